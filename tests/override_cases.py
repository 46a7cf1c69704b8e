"""What tests of sdpa_override share: both orders of a call, torch's layers and a model of one's own."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo.testing
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def math(*args: Any, **kwargs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        result: Tensor = F.scaled_dot_product_attention(*args, **kwargs)
        return result


def two_orders(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)  # type: ignore[arg-type]
    return [output, *first, *second]


class Attends(nn.Module):
    """A model's own attention, with heads split as most split them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Multihead(nn.Module):
    """torch's module, without weights or in its plain formula with them."""

    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
        self.need_weights = need_weights

    def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.attention(*(tensors * 3)[:3], need_weights=self.need_weights, **options)[0]


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **options)


PADDING = torch.tensor([[False] * 4 + [True], [False] * 2 + [True] * 3])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
