"""Blocks of the Set Transformer, and the cross-attention and causal blocks that meta-learners are made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metattn.functional import attention
from metattn.nn.multihead import MultiheadAttention
from metattn.nn.norm import LayerNorm
from metattn.nn.sets import masked_set, require_set

Device = torch.device | str | None


class MAB(nn.Module):
    """Multihead attention block: H = norm(X + Multihead(X, Y, Y)), out = norm(H + relu(Linear(H))).

    Arguments: dim, the features of X and Y, a multiple of num_heads; num_heads; layer_norm, whether norm is
    LayerNorm or nothing; device, dtype, those of the parameters.
    Errors: as :class:`metattn.nn.MultiheadAttention`.
    Source: Lee et al. 2019 (arXiv 1810.00825), equations 6 and 7. The authors' program adds the projected
    queries where the equation adds X, and divides scores by √dim where it says √(dim/num_heads); this is the
    equations.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layer_norm: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.attention = MultiheadAttention(dim, num_heads, batch_first=True, device=device, dtype=dtype)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim, device=device, dtype=dtype), nn.ReLU())
        norms = (LayerNorm(dim, device=device, dtype=dtype) if layer_norm else nn.Identity() for _ in "12")
        self.attention_norm, self.feed_forward_norm = norms

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, n, dim], y [batch, m, dim] → [batch, n, dim], twice differentiable.

        mask: bool [batch, m], True where y has a point; a set without any adds its projection's bias to x.
        Errors: ValueError for an x or y that is not 3-D, or a mask that does not fit; TypeError for a mask
        that is not bool.
        """
        require_set(x, "x", self.attention.embed_dim)
        return self._mixed(x, masked_set(y, mask, "y", self.attention.embed_dim), mask)

    def _mixed(self, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        mixed = self.attention(x, y, y, key_padding_mask=_padding(mask), need_weights=False)[0]
        hidden = self.attention_norm(x + mixed)
        output: Tensor = self.feed_forward_norm(hidden + self.feed_forward(hidden))
        return output


class SAB(MAB):
    """Set attention block: MAB(X, X). Equivariant to the order of the points; n² scores.

    Arguments and errors: as :class:`MAB`. Source: as there, equation 8.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x [batch, n, dim] → the same; mask: bool [batch, n], True where there is a point; else x is 0."""
        x = masked_set(x, mask, "x", self.attention.embed_dim)
        return self._mixed(x, x, mask)


class ISAB(nn.Module):
    """Induced set attention block: MAB(X, MAB(I, X)), I learned. Equivariant; n·num_inducing scores.

    Arguments: num_inducing, how many points I has; the others and errors as :class:`MAB`; ValueError for
    num_inducing below 1. Source: as there, equations 9 and 10.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_inducing: int,
        *,
        layer_norm: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.inducing = _learned_points("num_inducing", num_inducing, dim, device, dtype)
        self.inducing_block, self.point_block = (
            MAB(dim, num_heads, layer_norm=layer_norm, device=device, dtype=dtype) for _ in "12"
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, n, dim] → the same; mask: bool [batch, n], True where there is a point; else x is 0."""
        x = masked_set(x, mask, "x", self.inducing.shape[-1])
        summary = self.inducing_block(self.inducing.expand(x.shape[0], -1, -1), x, mask)
        output: Tensor = self.point_block(x, summary)
        return output


class PMA(nn.Module):
    """Pooling by multihead attention: MAB(S, relu(Linear(X))), S learned. The order does not matter.

    Arguments: num_seeds, how many outputs a set has; the others and errors as :class:`MAB`; ValueError for
    num_seeds below 1. Source: as there, equation 11.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_seeds: int = 1,
        *,
        layer_norm: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.seeds = _learned_points("num_seeds", num_seeds, dim, device, dtype)
        self.feed_forward = nn.Sequential(nn.Linear(dim, dim, device=device, dtype=dtype), nn.ReLU())
        self.block = MAB(dim, num_heads, layer_norm=layer_norm, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, n, dim] → [batch, num_seeds, dim]; mask: bool [batch, n], True where there is a point."""
        x = masked_set(x, mask, "x", self.seeds.shape[-1])
        output: Tensor = self.block(self.seeds.expand(x.shape[0], -1, -1), self.feed_forward(x), mask)
        return output


class CrossAttentionBlock(nn.Module):
    """Points that look at a context: H = X + Multihead(norm(X), norm(C), norm(C)), out = H + MLP(norm(H)).

    Each point by itself, as the targets of a neural process; with the points as their own context it is a
    layer of a Transformer encoder with the norms in front.

    Arguments: dim, the features of X, a multiple of num_heads; context_dim, those of C (dim unless given);
    hidden_dim, those inside the MLP (4·dim unless given), which has a GELU; device, dtype, those of the
    parameters. Errors: as :class:`metattn.nn.MultiheadAttention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        context_dim: int | None = None,
        hidden_dim: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        context_dim = dim if context_dim is None else context_dim
        self.norm = LayerNorm(dim, device=device, dtype=dtype)
        self.context_norm = LayerNorm(context_dim, device=device, dtype=dtype)
        self.attention = MultiheadAttention(
            dim, num_heads, kdim=context_dim, vdim=context_dim, batch_first=True, device=device, dtype=dtype
        )
        self.mlp = _mlp(dim, hidden_dim, device, dtype)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, n, dim], context [batch, m, context_dim] → [batch, n, dim], twice differentiable.

        mask: bool [batch, m], True where the context has a point; one without any adds a projection's bias.
        Errors: ValueError for an x or a context that is not 3-D, or a mask that does not fit; TypeError for a
        mask that is not bool.
        """
        require_set(x, "x", self.attention.embed_dim)
        seen = self.context_norm(masked_set(context, mask, "context", self.attention.kdim))
        padding = _padding(mask)
        mixed = self.attention(self.norm(x), seen, seen, key_padding_mask=padding, need_weights=False)[0]
        hidden = x + mixed
        output: Tensor = hidden + self.mlp(hidden)
        return output


class CausalBlock(nn.Module):
    """A layer of a causal Transformer: H = X + Multihead(norm(X)), each position on those up to it; + MLP.

    Arguments: dim, the features, a multiple of num_heads; hidden_dim, those inside the MLP (4·dim unless
    given), which has a GELU; window, how many positions back a position sees (None: all); device, dtype,
    those of the parameters.
    Errors: ValueError for a dim that is no multiple of num_heads and for a window that is no integer of 0 or
    more.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hidden_dim: int | None = None,
        window: int | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim: expected a multiple of num_heads={num_heads}, got dim={dim}")
        if window is not None and (not isinstance(window, int) or window < 0):
            raise ValueError(f"window: expected None or an integer of 0 or more, got {window!r}")
        self.num_heads, self.window = num_heads, window
        self.norm = LayerNorm(dim, device=device, dtype=dtype)
        self.qkv = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.project = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.mlp = _mlp(dim, hidden_dim, device, dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, positions, dim] → the same, twice differentiable.

        mask: bool [batch, positions], True where there is a position; elsewhere x is taken for 0. One that
        sees none, as in front of a sequence that is padded there, takes in a projection's bias alone.
        Errors: ValueError for an x that is not 3-D, or a mask that does not fit; TypeError for a mask that is
        not bool.
        """
        x = masked_set(x, mask, "x", self.qkv.in_features)
        # [batch, positions, 3·dim] → 3 × [batch, heads, positions, dim / heads], views
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        window = None if self.window is None else (self.window, 0)
        seen = None if mask is None else mask[:, None, None, :]
        mixed = attention(q, k, v, mask=seen, causal=True, window=window).transpose(1, 2).flatten(2)
        hidden = x + self.project(mixed)
        output: Tensor = hidden + self.mlp(hidden)
        return output


def _mlp(dim: int, hidden_dim: int | None, device: Device, dtype: torch.dtype | None) -> nn.Sequential:
    hidden_dim = 4 * dim if hidden_dim is None else hidden_dim
    return nn.Sequential(
        LayerNorm(dim, device=device, dtype=dtype),
        nn.Linear(dim, hidden_dim, device=device, dtype=dtype),
        nn.GELU(),
        nn.Linear(hidden_dim, dim, device=device, dtype=dtype),
    )


def _learned_points(
    name: str, count: int, dim: int, device: Device, dtype: torch.dtype | None
) -> nn.Parameter:
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}: expected an integer of 1 or more, got {count!r}")
    points = torch.empty(1, count, dim, device=device, dtype=dtype)
    return nn.Parameter(nn.init.xavier_uniform_(points))


def _padding(mask: Tensor | None) -> Tensor | None:
    """torch.nn's masks are True where there is nothing."""
    return None if mask is None else ~mask
