"""AttentionMetaLearner: encoder → attention → decoder over a set, or from a context to targets."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metattn.nn import AttentionPooling, CrossAttentionBlock, LayerNorm, MultiheadAttention
from metattn.nn.sets import masked_set


class AttentionMetaLearner(nn.Module):
    """A small network over sets, made to be meta-learned: every part of it is twice differentiable.

    Over one set:    h = encoder(x);  h = h + attention(h, h, h);  out = decoder(h), or decoder(pooling(h))
    From a context:  c = context_encoder(context);  h = encoder(x);  h = h + attention(h, c, c);  out likewise

    Arguments:
        input_size: features of a point.
        hidden_size: features inside, a multiple of num_heads.
        output_size: features of an output, or classes.
        num_heads: heads of every attention.
        context_size: None for one set whose points attend to each other; or the features of a context point
            (an input and what is known of it: its value, its label as a unit vector), and points attend to
            the context alone, each by itself, as in a neural process.
        layers: attention layers one after the other. The last is the one above; those before it
            (:class:`metattn.nn.CrossAttentionBlock`) mix the set; with a context there are `layers` of them,
            which mix that.
        pooling: None for one output a point, "attention" for one output a set by weights
            softmax(Linear(hidden_size, 1)) over the points (:class:`metattn.nn.AttentionPooling`).
        head: "regression", or "classification": outputs are logits, and all are 0 to begin with, so that no
            class is preferred before a task is seen.
        device, dtype: those of the parameters.

    The encoders and the decoder work on each point alone, so without positions among the features the outputs
    do not depend on the order of the points.
    Errors: ValueError for a pooling or a head that is neither, for layers below 1, and as
    :class:`metattn.nn.MultiheadAttention`.
    Source of the form with a context: Kim et al. 2019 (arXiv 1901.05761), figure 2, its deterministic path.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_heads: int = 4,
        *,
        context_size: int | None = None,
        layers: int = 1,
        pooling: str | None = None,
        head: str = "regression",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pooling not in (None, "attention"):
            raise ValueError(f'pooling: expected None or "attention", got {pooling!r}')
        if head not in ("regression", "classification"):
            raise ValueError(f'head: expected "regression" or "classification", got {head!r}')
        if not isinstance(layers, int) or layers < 1:
            raise ValueError(f"layers: expected an integer of 1 or more, got {layers!r}")

        def encoder(size: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Linear(size, hidden_size, device=device, dtype=dtype),
                nn.ReLU(),
                nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype),
                nn.ReLU(),
            )

        self.input_size, self.context_size = input_size, context_size
        self.encoder = encoder(input_size)
        self.context_encoder = None if context_size is None else encoder(context_size)
        self.mixing = nn.ModuleList(
            CrossAttentionBlock(
                hidden_size, num_heads, hidden_dim=2 * hidden_size, device=device, dtype=dtype
            )
            for _ in range(layers - 1 if context_size is None else layers)
        )
        self.attention = MultiheadAttention(
            hidden_size, num_heads, batch_first=True, device=device, dtype=dtype
        )
        self.pooling = AttentionPooling(hidden_size, device=device, dtype=dtype) if pooling else None
        last = nn.Linear(hidden_size, output_size, device=device, dtype=dtype)
        if head == "classification":
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        # what follows the norm has weight and bias of its own
        self.decoder = nn.Sequential(LayerNorm(hidden_size, elementwise_affine=False), last)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """x [batch, points, input_size] → [batch, points, output_size], or [batch, output_size] with pooling.

        mask: bool [batch, points], True where there is a point (sets of several sizes, padded to one).
        context: [batch, context points, context_size], where the learner has a context_size; without any
            point the outputs are those of no knowledge. context_mask: bool [batch, context points].
        Where a mask is False x or the context is taken for 0.
        Errors: ValueError for an x or a context that is not 3-D (the message for a 2-D one says why it cannot
        work) or has other features, for masks that do not fit, and for a context that is missing or not
        expected; TypeError for one that is no Tensor, and for a mask that is not bool.
        """
        hidden = self.encoder(masked_set(x, mask, "x", self.input_size))
        if self.context_encoder is None:
            if context is not None or context_mask is not None:
                raise ValueError("context: expected none, for the learner was made without a context_size")
            seen = hidden = self._mixed(hidden, mask)
            seen_mask = mask
        else:
            if context is None:
                raise ValueError(
                    "context: expected [batch, context points, context_size], for the learner has a "
                    "context_size; got None"
                )
            assert self.context_size is not None
            context = masked_set(context, context_mask, "context", self.context_size, "context_mask")
            seen, seen_mask = self._mixed(self.context_encoder(context), context_mask), context_mask
        padding = None if seen_mask is None else ~seen_mask
        hidden = hidden + self.attention(hidden, seen, seen, key_padding_mask=padding, need_weights=False)[0]
        if self.pooling is not None:
            hidden = self.pooling(hidden, mask)
        decoded: Tensor = self.decoder(hidden)
        return decoded

    def _mixed(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        for layer in self.mixing:
            hidden = layer(hidden, hidden, mask)
        return hidden
