"""Layer normalization by operations whose derivatives are right to any order."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm with exact derivatives of any order, in reverse and forward mode and under vmap.

    torch's own is wrong, and says nothing, in its third derivative, and in its second where autograd goes
    back through a gradient that vmap took (pytorch/functorch#534). This one computes the same numbers from
    elementary operations, in float32 or wider. Arguments, parameters and state dict are torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[…, *normalized_shape] → the same. Errors: torch's, for another shape or dtype."""
        shape = self.normalized_shape
        nothing = input.new_empty((0, *input.shape[-len(shape) :]))
        # torch's refusals, and its dtype
        dtype = nn.functional.layer_norm(nothing, shape, self.weight, self.bias).dtype
        output = standardized(input, tuple(range(-len(shape), 0)), self.eps)
        return affine(output, self.weight, self.bias).to(dtype)


def standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(x − mean) / √(variance + eps) over some dimensions, in float32 or float64."""
    x = x if x.dtype == torch.float64 else x.float()
    centred = x - x.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    return centred * torch.rsqrt(variance + eps)


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight·x + bias, where there are any."""
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
