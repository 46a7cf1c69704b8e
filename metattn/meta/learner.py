"""AttentionMetaLearner: encoder → attention → decoder over a set."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metattn.nn import AttentionPooling, MultiheadAttention
from metattn.nn.pooling import require_set


class AttentionMetaLearner(nn.Module):
    """A small network over sets, made to be meta-learned: every part of it is twice differentiable.

    h = encoder(x);  h = h + attention(h, h, h);  out = decoder(h), or decoder(pooling(h))

    Arguments:
        input_size: features of a point.
        hidden_size: features inside, a multiple of num_heads.
        output_size: features of an output.
        num_heads: heads of the attention.
        pooling: None for one output a point, "attention" for one output a set by weights
            softmax(Linear(hidden_size, 1)) over the points (:class:`metattn.nn.AttentionPooling`).
        device, dtype: those of the parameters.

    The encoder and the decoder work on each point alone, so without positions among the features the outputs
    do not depend on the order of the points.
    Errors: ValueError for a pooling that is neither, and as :class:`metattn.nn.MultiheadAttention`.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int,
        num_heads: int = 4,
        *,
        pooling: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pooling not in (None, "attention"):
            raise ValueError(f'pooling: expected None or "attention", got {pooling!r}')
        self.encoder = nn.Sequential(
            nn.Linear(input_size, hidden_size, device=device, dtype=dtype),
            nn.ReLU(),
            nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype),
            nn.ReLU(),
        )
        self.attention = MultiheadAttention(
            hidden_size, num_heads, batch_first=True, device=device, dtype=dtype
        )
        self.pooling = AttentionPooling(hidden_size, device=device, dtype=dtype) if pooling else None
        self.decoder = nn.Sequential(
            nn.LayerNorm(
                hidden_size, elementwise_affine=False
            ),  # what follows has weight and bias of its own
            nn.Linear(hidden_size, output_size, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, points, input_size] → [batch, points, output_size], or [batch, output_size] with pooling.

        mask: bool [batch, points], True where there is a point (sets of several sizes, padded to one).
        Errors: ValueError for an x that is not 3-D; the message for a 2-D one says why it cannot work.
        """
        require_set(x, "x")
        hidden = self.encoder(x)
        padding = None if mask is None else ~mask
        mixed, _ = self.attention(hidden, hidden, hidden, key_padding_mask=padding, need_weights=False)
        hidden = hidden + mixed
        if self.pooling is not None:
            hidden = self.pooling(hidden, mask)
        decoded: Tensor = self.decoder(hidden)
        return decoded
