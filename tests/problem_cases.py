"""Small inputs of a call, for what is refused and what is accepted."""

from __future__ import annotations

import torch
from torch import Tensor

B, HQ, HKV, N, M, D, DV = 2, 4, 2, 3, 5, 8, 6


def qkv(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, HQ, N, D), (B, HKV, M, D), (B, HKV, M, DV))
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    return q, k, v


def of_shape(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape, dtype=dtype)


Q, K, V = qkv()
ON_META = torch.ones(N, M, device="meta")
