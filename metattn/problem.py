"""Problem: everything about a call that is no tensor; validation happens here, once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Primals(NamedTuple):
    """The differentiable tensors of a call; also the type of their tangents and gradients (any may be None there)."""

    q: Tensor  # [B, Hq, N, d] any strides
    k: Tensor  # [B, Hkv, M, d]
    v: Tensor  # [B, Hkv, M, dv] same dtype and device as q
    bias: Tensor | None  # [1|B, 1|Hq, 1|N, 1|M], never expanded by us; its dtype may differ from q's
    sinks: Tensor | None  # [1|B, Hq] compute dtype (float64 for float64 inputs, else float32)


class Constants(NamedTuple):
    """The tensors of a call that are never differentiated."""

    mask: Tensor | None  # bool [1|B, 1|Hq, 1|N, 1|M], True = attends
    slopes: Tensor | None  # [1|B, Hq] ALiBi slopes, compute dtype
    rng: Tensor | None  # int64 [B, 2]: dropout seed and Philox batch index of each batch; None without dropout
    cu_q: Tensor | None  # int32 [S+1] for packed sequences, with cu_k
    cu_k: Tensor | None


@dataclass(frozen=True)
class Problem:
    """Everything about a call that is no tensor; hashable."""

    scale: float
    softcap: float | None  # c > 0
    causal: str | None  # None | "top-left" | "bottom-right"
    window: tuple[int, int]  # (left, right), -1 = unlimited
    dropout_p: float  # in [0, 1]
    max_q: int  # longest packed sequence, 0 when dense
    max_k: int
    backend: str  # "reference" | "cpu" | "cuda" | "triton"
