"""What gpu.py measures: cases, their inputs, and the float64 answer that each output is compared with."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from metattn.cli._cases import OUTPUTS, PRODUCTS, TOLERANCES, WHOLE, Inputs
from metattn.cli._measure import chunks

STEPS = tuple(PRODUCTS)  # forward, vjp, jvp, vjp_jvp, double backward, second-order step
FLEX, JAX = "FlexAttention", "JAX"
WINDOW = (4096, -1)  # of the longest case
SCORES_AT_ONCE = 2**25  # elements of an N×M matrix that the float64 answer holds at a time
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
    lengths: tuple[int, ...] = ()  # packed: the sequences' lengths, `batch` of them, the longest `n`
    steps: tuple[str, ...] = STEPS
    compiled: tuple[str, ...] = ()  # peers that cost seconds of compiling and take part all the same
    memory: bool = False  # the peak of its second-order step instead of times
    published: float | None = None  # ms of the whole step by Flash Hog on an H200 (its README)

    @property
    def keys(self) -> int:
        return self.m or self.n

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def masked(self) -> bool:
        """Whether torch's function needs a mask for what causal and window say."""
        return self.window is not None or (self.causal == "bottom-right" and self.keys != self.n)

    def pairs(self) -> int:
        """Attended (query, key) pairs of a head in all of the batch."""
        if self.lengths:
            return sum(attended_pairs(self, length, length) for length in self.lengths)
        return self.batch * attended_pairs(self, self.n, self.keys)

    def operations(self, step: str) -> float:
        return PRODUCTS[step] * 2.0 * self.heads * self.pairs() * self.d


def hog(batch: int, n: int, published: float) -> Case:
    return Case(f"hvp {batch}×{n}", batch, 12, n, 64, causal="top-left", steps=(WHOLE,), published=published)


def packed(name: str, count: int, shortest: int, longest: int, heads: int, d: int, dtype: str) -> Case:
    """Causal sequences of random lengths end to end; the same lengths every time."""
    draw = random.Random(0)
    lengths = tuple(draw.randint(shortest, longest) for _ in range(count))
    return Case(name, count, heads, max(lengths), d, dtype=dtype, causal="top-left", lengths=lengths)


def long_memory(n: int) -> Case:
    """The longest case, or a shorter one to see how its memory grows."""
    return Case(f"memory {n}", 1, 8, n, 64, causal="top-left", window=WINDOW, steps=(WHOLE,), memory=True)


# In the order of their weight: what there is no time for is at the end.
CASES = (
    Case("few-shot", 512, 8, 64, 32, compiled=(FLEX, JAX)),
    Case("few-shot float32", 512, 8, 64, 32, dtype="float32"),
    hog(1, 512, 0.22),
    hog(512, 512, 18.3),
    hog(256, 1024, 27.2),
    hog(128, 2048, 44.8),
    hog(64, 4096, 80.2),
    hog(32, 8192, 150.8),
    Case("long causal", 2, 16, 4096, 64, causal="top-left", compiled=(FLEX, JAX)),
    Case("long", 2, 16, 4096, 64),
    Case("long causal d128", 2, 16, 4096, 128, causal="top-left"),
    Case("long d128", 2, 16, 4096, 128),
    Case("memory 4096", 2, 16, 4096, 64, causal="top-left", steps=(WHOLE,), memory=True),
    long_memory(16384),
    long_memory(32768),
    long_memory(65536),
    Case("longest", 1, 8, 65536, 64, causal="top-left", window=WINDOW),
    Case("grouped", 2, 32, 4096, 128, kv_heads=8, causal="top-left"),
    packed("packed", 64, 32, 2048, 16, 64, "bfloat16"),
    Case(
        "test-time training", 1, 32, 1024, 80, m=9216, causal="bottom-right", window=(8192, -1),
        compiled=(FLEX,),
    ),
    Case("molecule", 64, 8, 200, 64, bias=True),
    Case("mid causal", 8, 16, 1024, 64, causal="top-left", compiled=(FLEX, JAX)),
    Case("mid", 8, 16, 1024, 64),
    Case("small causal", 64, 8, 256, 64, causal="top-left"),
    Case("small", 64, 8, 256, 64),
    Case("small float32", 64, 8, 256, 64, dtype="float32"),
    Case("longer", 1, 16, 16384, 128, causal="top-left"),
)  # fmt: skip
# A tiny one of each kind: whether everything runs at all.
SMOKE_CASES = (
    Case("tiny", 2, 4, 128, 64, kv_heads=2, causal="top-left"),
    packed("tiny packed", 3, 16, 64, 4, 64, "bfloat16"),
    Case("tiny memory", 2, 4, 128, 64, causal="top-left", steps=(WHOLE,), memory=True),
)


# Positions.


def attended_pairs(case: Case, n: int, m: int) -> int:
    """Attended (query, key) pairs of one head of one sequence."""
    offset = alignment(case, n, m)
    place = torch.arange(n) + offset
    first, last = torch.zeros_like(place), torch.full_like(place, m - 1)
    if case.causal is not None:
        last = torch.minimum(last, place)
    if case.window is not None:
        left, right = case.window
        first = torch.maximum(first, place - left) if left >= 0 else first
        last = torch.minimum(last, place + right) if right >= 0 else last
    return int((last - first + 1).clamp_min(0).sum())


def alignment(case: Case, n: int, m: int) -> int:
    return 0 if case.causal == "top-left" else m - n


@lru_cache(maxsize=1)  # torch's paths read it in every call of a case
def position_mask(case: Case, device: torch.device) -> Tensor | None:
    """Causal and window as a mask [N, M]; None where all is attended."""
    return mask_of(case, case.n, case.keys, slice(0, case.n), slice(0, case.keys), device)


def mask_of(
    case: Case, n: int, m: int, rows: slice, keys: slice, device: torch.device | None
) -> Tensor | None:
    """The part [rows, keys] of the mask [n, m]; None where all is attended."""
    if case.causal is None and case.window is None:
        return None
    places = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int32) + alignment(case, n, m)
    distance = torch.arange(keys.start, keys.stop, device=device, dtype=torch.int32) - places[:, None]
    mask = distance <= 0 if case.causal is not None else torch.ones_like(distance, dtype=torch.bool)
    if case.window is not None:
        left, right = case.window
        mask = mask & (distance >= -left) if left >= 0 else mask
        mask = mask & (distance <= right) if right >= 0 else mask
    return mask


def keys_of(case: Case, n: int, m: int, rows: slice) -> slice:
    """The keys that a few rows attend to at most: all of them without a window."""
    if case.window is None:
        return slice(0, m)
    offset = alignment(case, n, m)
    left, right = case.window
    right = 0 if case.causal is not None else right
    start = max(0, rows.start + offset - left) if left >= 0 else 0
    stop = min(m, rows.stop + offset + right) if right >= 0 else m
    return slice(start, stop)


# Inputs.


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Leaves, cotangent, tangents; [B, H, N, d], packed [total, H, d]."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

    rows: tuple[int, ...] = (case.batch, case.heads, case.n, case.d)
    keys: tuple[int, ...] = (case.batch, case.kv_heads or case.heads, case.keys, case.d)
    if case.lengths:
        rows = keys = (sum(case.lengths), case.heads, case.d)
    shapes = [rows, keys, keys]
    if case.bias:
        shapes.append((case.batch, case.heads, case.n, case.keys))
    primals = tuple(normal(*shape).requires_grad_() for shape in shapes)
    return Inputs(primals, normal(*rows).requires_grad_(), tuple(normal(*shape) for shape in shapes))


@lru_cache(maxsize=1)
def ends(case: Case, device: torch.device) -> Tensor:
    """Where packed sequences end, 0 first: int32 [sequences + 1]."""
    return torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)


def sequences(case: Case, inputs: Inputs) -> list[Inputs]:
    """The inputs of each packed sequence as [1, H, length, d]: q, k, v, do are views of the whole."""

    def part(t: Tensor, start: int, end: int) -> Tensor:
        return t[start:end].transpose(0, 1)[None]

    found = []
    for start, end in pairwise([0, *itertools.accumulate(case.lengths)]):
        leaves = [part(t.detach(), start, end).requires_grad_() for t in (*inputs.primals, inputs.do)]
        tangents = tuple(part(t, start, end) for t in inputs.tangents)
        found.append(Inputs(tuple(leaves[:-1]), leaves[-1], tangents))
    return found


def slices(case: Case, t: Tensor) -> tuple[Tensor, Tensor]:
    """What belongs to the first and the last (batch or sequence, key head): [1, heads, rows, columns]."""
    if case.lengths:
        first, last = t[: case.lengths[0], :1], t[-case.lengths[-1] :, -1:]
        return first.transpose(0, 1)[None], last.transpose(0, 1)[None]
    group = case.heads // (case.kv_heads or case.heads)
    heads = group if t.shape[1] == case.heads else 1
    return t[:1, :heads], t[-1:, -heads:]


# The answer.


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """softmax(QKᵀ/√d)V as it is."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def torch_math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The same by torch's math path."""
    if bias is not None and mask is not None:
        mask = bias.masked_fill(~mask, -torch.inf)
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=bias if mask is None else mask, enable_gqa=q.shape[1] != k.shape[1]
        )


def answers(
    case: Case, inputs: Inputs, attend: Callable[..., Tensor], dtype: torch.dtype
) -> tuple[Outputs, Outputs]:
    """Every output for the first and the last (batch, key head), by `attend` on their inputs in `dtype`."""
    tensors = (*inputs.primals, inputs.do, *inputs.tangents)
    first, last = zip(*(slices(case, t.detach()) for t in tensors), strict=True)
    return answer(case, [t.to(dtype) for t in first], attend), answer(
        case, [t.to(dtype) for t in last], attend
    )


def answer(case: Case, tensors: list[Tensor], attend: Callable[..., Tensor]) -> Outputs:
    """Every output of one (batch, key head): a few rows of queries at a time, whose shares of the gradients
    of keys and values are summed in float32 or more."""
    count = len(tensors) // 2
    primals, do, tangents = tensors[:count], tensors[count], tensors[count + 1 :]
    n, m = do.shape[2], primals[1].shape[2]
    wide = torch.promote_types(do.dtype, torch.float32)
    names = ["dq", "dk", "dv", "dbias"][:count]
    likes = [do, *primals, *primals, do]
    found = {
        name: torch.zeros_like(like, dtype=wide)
        for name, like in zip(["o", *names, *(f"{name}t" for name in names), "ot"], likes, strict=True)
    }
    for rows in chunks(n, max(1, SCORES_AT_ONCE // (m * do.shape[1]))):
        keys = keys_of(case, n, m, rows)
        mask = mask_of(case, n, m, rows, keys, do.device)

        def of(those: list[Tensor], rows: slice = rows, keys: slice = keys) -> list[Tensor]:
            q, k, v, *bias = those
            return [q[:, :, rows], k[:, :, keys], v[:, :, keys], *(b[:, :, rows, keys] for b in bias)]

        leaves = [t.detach().requires_grad_() for t in of(primals)]
        cotangent = do[:, :, rows].detach().requires_grad_()
        o = attend(*leaves, *(None,) * (4 - count), mask)
        first = torch.autograd.grad(o, leaves, cotangent, create_graph=True)
        second = torch.autograd.grad(first, (*leaves, cotangent), of(tangents))
        for name, part in zip(found, (o, *first, *second), strict=True):
            if name.startswith(("dk", "dv")):
                found[name][:, :, keys] += part.detach()
            elif name.startswith("dbias"):
                found[name][:, :, rows, keys] = part.detach()
            else:
                found[name][:, :, rows] = part.detach()
    return {name: t.to(do.dtype) for name, t in found.items()}


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
    case: Case, step: str, outputs: tuple[Tensor, ...], truth: tuple[Outputs, Outputs]
) -> dict[str, float]:
    """Relative error of each output, for the worse of the first and the last (batch, key head)."""
    names = [name for name in OUTPUTS[step] if name in truth[0]]
    found = {}
    for name, output in zip(names, outputs, strict=True):
        both = zip(slices(case, output.detach()), truth, strict=True)
        each = [relative(mine, exact[name]) for mine, exact in both]
        found[name] = max(each) if not any(map(math.isnan, each)) else math.nan
    return found
