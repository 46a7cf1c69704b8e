"""What `make gpu` measures. Outputs are checked for the first and the last (batch, key head)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from metattn.bench.answers import OUTPUTS, TOLERANCES, Inputs, Outputs, answer, torch_math
from metattn.bench.cases import PRODUCTS, WHOLE, Case

STEPS = tuple(PRODUCTS)  # forward, vjp, jvp, vjp_jvp, double backward, second-order step
FLEX, JAX = "FlexAttention", "JAX"
WINDOW = (4096, -1)  # of the longest case
bf16 = partial(Case, dtype="bfloat16")


def hog(batch: int, n: int, published: float) -> Case:
    return bf16(f"hvp {batch}×{n}", batch, 12, n, 64, causal="top-left", steps=(WHOLE,), published=published)


def packed(name: str, count: int, shortest: int, longest: int, heads: int, d: int, dtype: str) -> Case:
    """Causal sequences of random lengths end to end; the same lengths every time."""
    draw = random.Random(0)
    lengths = tuple(draw.randint(shortest, longest) for _ in range(count))
    return Case(name, count, heads, max(lengths), d, dtype=dtype, causal="top-left", lengths=lengths)


def long_memory(n: int) -> Case:
    """The longest case, or a shorter one to see how its memory grows."""
    return bf16(f"memory {n}", 1, 8, n, 64, causal="top-left", window=WINDOW, steps=(WHOLE,), memory=True)


# In the order of their weight: what there is no time for is at the end.
CASES = (
    bf16("few-shot", 512, 8, 64, 32, compiled=(FLEX, JAX)),
    Case("few-shot float32", 512, 8, 64, 32),
    hog(1, 512, 0.22),
    hog(512, 512, 18.3),
    hog(256, 1024, 27.2),
    hog(128, 2048, 44.8),
    hog(64, 4096, 80.2),
    hog(32, 8192, 150.8),
    bf16("long causal", 2, 16, 4096, 64, causal="top-left", compiled=(FLEX, JAX)),
    bf16("long", 2, 16, 4096, 64),
    bf16("long causal d128", 2, 16, 4096, 128, causal="top-left"),
    bf16("long d128", 2, 16, 4096, 128),
    bf16("memory 4096", 2, 16, 4096, 64, causal="top-left", steps=(WHOLE,), memory=True),
    long_memory(16384),
    long_memory(32768),
    long_memory(65536),
    bf16("longest", 1, 8, 65536, 64, causal="top-left", window=WINDOW),
    bf16("grouped", 2, 32, 4096, 128, kv_heads=8, causal="top-left"),
    packed("packed", 64, 32, 2048, 16, 64, "bfloat16"),
    bf16(
        "test-time training", 1, 32, 1024, 80, m=9216, causal="bottom-right", window=(8192, -1),
        compiled=(FLEX,),
    ),
    bf16("molecule", 64, 8, 200, 64, bias="own"),
    bf16("mid causal", 8, 16, 1024, 64, causal="top-left", compiled=(FLEX, JAX)),
    bf16("mid", 8, 16, 1024, 64),
    bf16("small causal", 64, 8, 256, 64, causal="top-left"),
    bf16("small", 64, 8, 256, 64),
    Case("small float32", 64, 8, 256, 64),
    bf16("longer", 1, 16, 16384, 128, causal="top-left"),
)  # fmt: skip
# A tiny one of each kind: whether everything runs at all.
SMOKE_CASES = (
    bf16("tiny", 2, 4, 128, 64, kv_heads=2, causal="top-left"),
    packed("tiny packed", 3, 16, 64, 4, 64, "bfloat16"),
    bf16("tiny memory", 2, 4, 128, 64, causal="top-left", steps=(WHOLE,), memory=True),
)


def slices(case: Case, t: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to the first and the last (batch or sequence, key head): [1, heads, rows, columns]."""
    if case.lengths:
        first, last = t[: case.lengths[0], :1], t[-case.lengths[-1] :, -1:]
        return first.transpose(0, 1)[None], last.transpose(0, 1)[None]
    group = case.heads // (case.kv_heads or case.heads)
    heads = group if t.shape[1] == case.heads else 1
    return t[:1, :heads], t[-1:, -heads:]


def answers(
    case: Case, inputs: Inputs, attend: Callable[..., Tensor], dtype: torch.dtype
) -> tuple[Outputs, Outputs]:
    """Every output for the first and the last (batch, key head), by `attend` on their inputs in `dtype`."""
    tensors = (*inputs.primals, inputs.do, *inputs.tangents)
    first, last = zip(*(slices(case, t.detach()) for t in tensors), strict=True)
    return (
        answer(case, [t.to(dtype) for t in first], attend),
        answer(case, [t.to(dtype) for t in last], attend),
    )


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def allowed(case: Case, inputs: Inputs, truth: tuple[Outputs, Outputs]) -> dict[str, float]:
    """What each output may be off by: a factor times torch's math path's own error, or a floor."""
    factor, floor = TOLERANCES[case.torch_dtype]
    rounded = answers(case, inputs, torch_math, case.torch_dtype)
    by_slice = [
        {name: relative(x[name], exact[name]) for name in exact}
        for x, exact in zip(rounded, truth, strict=True)
    ]
    return {name: max(floor, *(factor * e[name] for e in by_slice)) for name in truth[0]}


def errors(
    case: Case, step: str, outputs: Sequence[Tensor], truth: tuple[Outputs, Outputs]
) -> dict[str, float]:
    """Relative error of each output, for the worse of the first and the last (batch, key head)."""
    names = [name for name in OUTPUTS[step] if name in truth[0]]
    found = {}
    for name, output in zip(names, outputs, strict=True):
        both = zip(slices(case, output.detach()), truth, strict=True)
        each = [relative(mine, exact[name]) for mine, exact in both]
        found[name] = max(each) if not any(map(math.isnan, each)) else math.nan
    return found
