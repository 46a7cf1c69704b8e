"""What gpu.py measures: cases, contestants, and the float64 answer they must give."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from metattn.cli._cases import OUTPUTS, PRODUCTS, TOLERANCES, Inputs

STEPS = ("forward", "vjp", "double backward", "second-order step")
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A shape with its option."""

    name: str
    batch: int
    heads: int
    n: int
    d: int
    m: int | None = None
    kv_heads: int | None = None
    dtype: str = "bfloat16"
    causal: str | None = None
    window: tuple[int, int] | None = None
    bias: bool = False
    steps: tuple[str, ...] = STEPS
    published: float | None = None  # ms of the whole step by Flash Hog on an H200 (its README)

    @property
    def keys(self) -> int:
        return self.m or self.n

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def pairs(self) -> int:
        """Attended (query, key) pairs of a head."""
        if self.causal is None and self.window is None:
            return self.n * self.keys
        offset = 0 if self.causal == "top-left" else self.keys - self.n
        first = torch.zeros(self.n, dtype=torch.int64)
        last = torch.full((self.n,), self.keys - 1)
        place = torch.arange(self.n) + offset
        if self.causal is not None:
            last = torch.minimum(last, place)
        if self.window is not None:
            left, right = self.window
            first = torch.maximum(first, place - left) if left >= 0 else first
            last = torch.minimum(last, place + right) if right >= 0 else last
        return int((last - first + 1).clamp_min(0).sum())

    def operations(self, step: str) -> float:
        return PRODUCTS[step] * 2.0 * self.batch * self.heads * self.pairs() * self.d


def hog(batch: int, n: int, published: float) -> Case:
    return Case(
        f"hvp {batch}×{n}",
        batch,
        12,
        n,
        64,
        causal="top-left",
        steps=("second-order step",),
        published=published,
    )


CASES = (
    Case("few-shot", 512, 8, 64, 32),
    Case("few-shot float32", 512, 8, 64, 32, dtype="float32"),
    hog(1, 512, 0.22),
    hog(512, 512, 18.3),
    hog(256, 1024, 27.2),
    hog(128, 2048, 44.8),
    hog(64, 4096, 80.2),
    hog(32, 8192, 150.8),
    Case("small", 64, 8, 256, 64),
    Case("small causal", 64, 8, 256, 64, causal="top-left"),
    Case("small float32", 64, 8, 256, 64, dtype="float32"),
    Case("mid", 8, 16, 1024, 64),
    Case("mid causal", 8, 16, 1024, 64, causal="top-left"),
    Case("long", 2, 16, 4096, 64),
    Case("long causal", 2, 16, 4096, 64, causal="top-left"),
    Case("long d128", 2, 16, 4096, 128),
    Case("long causal d128", 2, 16, 4096, 128, causal="top-left"),
    Case("grouped", 2, 32, 4096, 128, kv_heads=8, causal="top-left"),
    Case("test-time training", 1, 32, 1024, 80, m=9216, causal="bottom-right", window=(8192, -1)),
    Case("molecule", 64, 8, 200, 64, bias=True),
    Case("longer", 1, 16, 16384, 128, causal="top-left"),
)
# Memory alone: one second-order step, its peak over the inputs.
MEMORY_CASES = (
    Case("longest", 1, 8, 65536, 64, causal="top-left", window=(4096, -1)),
    Case("half of it", 1, 8, 32768, 64, causal="top-left", window=(4096, -1)),
)


# Contestants: a name, what they can do, and attention as a function of (q, k, v[, bias]).


@dataclass(frozen=True)
class Contestant:
    name: str
    steps: tuple[str, ...]
    attend: Callable[..., Tensor]


def contestants(case: Case) -> list[Contestant]:
    """Ours by backend, and torch's paths that take the case."""
    found = [
        Contestant(f"metattn {name}", case.steps, partial(ours, case, name))
        for name, reason in metattn.available_backends().items()
        if reason is None and name != "reference"
    ]
    found.append(Contestant("torch math", case.steps, partial(torch_path, case, SDPBackend.MATH)))
    if case.window is None and (case.causal is None or case.keys == case.n):
        first = tuple(step for step in case.steps if step in ("forward", "vjp"))
        for name, kernel in (
            ("torch flash", SDPBackend.FLASH_ATTENTION),
            ("torch memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("torch cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            found.append(Contestant(name, first, partial(torch_path, case, kernel)))
    return found


def ours(case: Case, backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    options: dict[str, Any] = {"causal": case.causal or False, "window": case.window, "bias": bias}
    o = metattn.attention(q, k, v, backend=backend, **options)
    assert isinstance(o, Tensor)
    return o


def torch_path(
    case: Case, kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    mask, causal = bias, case.causal == "top-left" and case.window is None
    if (case.causal is not None and not causal) or case.window is not None:
        mask = position_mask(case, q.device)
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=case.kv_heads is not None
        )


def position_mask(case: Case, device: torch.device) -> Tensor:
    """Causal and window as a mask [N, M]."""
    offset = 0 if case.causal == "top-left" else case.keys - case.n
    distance = torch.arange(case.keys, device=device) - torch.arange(case.n, device=device)[:, None] - offset
    mask = torch.ones_like(distance, dtype=torch.bool)
    if case.causal is not None:
        mask &= distance <= 0
    if case.window is not None:
        left, right = case.window
        mask &= (distance >= -left) if left >= 0 else mask
        mask &= (distance <= right) if right >= 0 else mask
    return mask


# Inputs, steps, and the float64 answer of one head.


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

    kv = (case.batch, case.kv_heads or case.heads, case.keys, case.d)
    rows = (case.batch, case.heads, case.n, case.d)
    shapes = [rows, kv, kv]
    if case.bias:
        shapes.append((case.batch, case.heads, case.n, case.keys))
    primals = tuple(normal(*shape).requires_grad_() for shape in shapes)
    return Inputs(primals, normal(*rows).requires_grad_(), tuple(normal(*shape) for shape in shapes))


def slices(case: Case, t: Tensor) -> tuple[Tensor, ...]:
    """What belongs to the first, and to the last, (batch, key head)."""
    group = case.heads // (case.kv_heads or case.heads)
    heads = group if t.shape[1] == case.heads else 1
    return t[:1, :heads], t[-1:, -heads:]


def answers(case: Case, inputs: Inputs, attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Outputs]:
    """Every output for the first and the last (batch, key head), by `attend` on its slice of the inputs."""
    found: list[Outputs] = []
    for index in range(2):

        def of(t: Tensor, index: int = index) -> Tensor:
            return slices(case, t.detach())[index].to(dtype)

        leaves = [of(p).requires_grad_() for p in inputs.primals]
        do = of(inputs.do).requires_grad_()
        o = attend(*leaves)
        first = torch.autograd.grad(o, leaves, do, create_graph=True)
        second = torch.autograd.grad(first, (*leaves, do), [of(t) for t in inputs.tangents])
        names = ["dq", "dk", "dv", "dbias"][: len(leaves)]
        outputs = {"o": o, **dict(zip(names, first, strict=True))}
        outputs |= dict(zip([*(f"{name}t" for name in names), "ot"], second, strict=True))
        found.append({name: t.detach() for name, t in outputs.items()})
    return found


def plain_math(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V written out."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * case.d**-0.5
    if bias is not None:
        scores = scores + bias
    if case.causal is not None or case.window is not None:
        scores = scores.masked_fill(~position_mask(case, q.device), -torch.inf)
    return scores.softmax(-1) @ v


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def allowed(case: Case, inputs: Inputs, truth: list[Outputs]) -> dict[str, float]:
    """What each output may be off by: a factor times the formula's own error in its dtype, or a floor."""
    factor, floor = TOLERANCES[case.torch_dtype]
    rounded = answers(case, inputs, partial(plain_math, case), case.torch_dtype)
    pairs = zip(rounded, truth, strict=True)
    by_slice = [{name: relative(x[name], exact[name]) for name in exact} for x, exact in pairs]
    return {name: max(floor, *(factor * e[name] for e in by_slice)) for name in truth[0]}


def errors(case: Case, step: str, outputs: tuple[Tensor, ...], truth: list[Outputs]) -> dict[str, float]:
    """Relative error of each output, for the worse of the first and the last (batch, key head)."""
    names = [name for name in OUTPUTS[step] if name in truth[0]]
    found = {}
    for name, output in zip(names, outputs, strict=True):
        both = zip(slices(case, output.detach()), truth, strict=True)
        each = [relative(mine, exact[name]) for mine, exact in both]
        found[name] = max(each) if not any(map(math.isnan, each)) else math.nan
    return found
