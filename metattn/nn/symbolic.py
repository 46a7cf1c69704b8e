"""linear and chunk for graphs whose sizes are symbols, under vmap.

torch's vmap rules for linear and for chunk's derivative, a concatenation, ask for sizes as numbers: they
raise, or make a graph for every size. Replaced by: rules that take symbols.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own abbreviation)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch.nn.functional.linear."""
    if bias is None:
        return input @ weight.t()
    if input.dim() < 2 or weight.dim() != 2 or weight.shape[1] == 0:
        return F.linear(input, weight, bias)
    rows = torch.addmm(bias, input.reshape(-1, input.shape[-1]), weight.t())
    return rows.reshape(*input.shape[:-1], weight.shape[0])


def chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """torch.chunk."""
    if chunks < 1 or input.shape[dim] % chunks:
        return torch.chunk(input, chunks, dim)
    return torch.unflatten(input, dim, (chunks, input.shape[dim] // chunks)).unbind(
        dim if dim >= 0 else dim - 1
    )
