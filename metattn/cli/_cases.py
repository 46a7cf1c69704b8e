"""What bench measures: cases, their inputs, and the float64 answer that every output is compared with."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metattn.cli._measure import chunks

WHOLE = "second-order step"
# Products of 2·N·M·d FLOP in each step (docs/math.md). jvp is what torch.func.jvp gives: the forward too.
PRODUCTS = {
    "forward": 2,
    "vjp": 5,
    "jvp": 7,
    "vjp_jvp": 10,
    "double backward": 15,
    "second-order step": 22,
}
OUTPUTS = {
    "forward": ("o",),
    "vjp": ("dq", "dk", "dv", "dbias"),
    "jvp": ("o", "ot"),
    "vjp_jvp": ("dqt", "dkt", "dvt", "dbiast"),
    "double backward": ("dqt", "dkt", "dvt", "dbiast", "ot"),
    "second-order step": ("o", "dq", "dk", "dv", "dbias", "dqt", "dkt", "dvt", "dbiast", "ot"),
}
# Relative error allowed beside the float64 answer: (factor on the math path's own error, floor).
TOLERANCES = {
    torch.float64: (4.0, 1e-12),
    torch.float32: (4.0, 5e-6),
    torch.bfloat16: (1.5, 4e-3),
    torch.float16: (1.5, 1e-3),
}
SCORES_AT_ONCE = 2**22  # elements of an N×M matrix that checkpointing and the float64 answer hold at a time


@dataclass(frozen=True)
class Case:
    """A shape, dtype and option to measure."""

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: str = "float32"
    kv_heads: int | None = None  # fewer than heads: grouped queries
    causal: bool = False
    window: tuple[int, int] | None = None  # keys attended before and after a query's own
    bias: bool = False  # a dense float bias [1, heads, N, M] that gets a gradient
    steps: tuple[str, ...] = tuple(PRODUCTS)
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def shape(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else str(self.heads)
        return f"B{self.batch} H{heads} N{self.length} d{self.head_dim}"

    @property
    def options(self) -> str:
        said = [self.dtype]
        if self.causal:
            said.append("causal")
        if self.window is not None:
            said.append("window ({}, {})".format(*self.window))
        if self.bias:
            said.append("bias gradient")
        return ", ".join(said)

    @property
    def scores(self) -> int:
        """Elements of all its N×N matrices."""
        return self.batch * self.heads * self.length**2

    @property
    def masked(self) -> bool:
        return self.causal or self.window is not None

    def full(self) -> Case:
        """The same without a mask."""
        return replace(self, causal=False, window=None)

    def attended(self, rows: slice) -> slice:
        """The keys that some of these queries attend to."""
        first, last = 0, self.length
        if self.causal:
            last = rows.stop
        if self.window is not None:
            first = max(first, rows.start - self.window[0])
            last = min(last, rows.stop + self.window[1])
        return slice(first, last)

    def mask(self, rows: slice, columns: slice) -> Tensor | None:
        """True where a query attends to a key; None where every one of them does."""
        if not self.masked:
            return None
        distance = torch.arange(columns.start, columns.stop) - torch.arange(rows.start, rows.stop)[:, None]
        attends = distance <= (0 if self.causal else self.length)
        if self.window is not None:
            attends &= (distance >= -self.window[0]) & (distance <= self.window[1])
        return attends

    def operations(self, step: str) -> float:
        """FLOP of the step by the count of products; a causal mask halves it, a window counts its pairs."""
        pairs = float(self.length**2)
        if self.window is not None:
            one = (self.attended(slice(row, row + 1)) for row in range(self.length))
            pairs = float(sum(keys.stop - keys.start for keys in one))
        elif self.causal:
            pairs /= 2
        return PRODUCTS[step] * 2.0 * self.batch * self.heads * pairs * self.head_dim

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


# What the goals are about: no map that only forward mode needs.
REVERSE = ("forward", "vjp", "double backward", "second-order step")
WINDOW = (256, 0)
CASES = (
    Case("few-shot", 32, 8, 64, 32, quick=True),
    Case("few-shot bf16", 32, 8, 64, 32, dtype="bfloat16", steps=REVERSE),
    Case("small", 8, 8, 256, 64),
    Case("long", 1, 8, 2048, 64, steps=REVERSE),
    Case("long d128", 1, 8, 2048, 128, steps=REVERSE),
    Case("long bf16", 1, 8, 2048, 64, dtype="bfloat16", steps=REVERSE),
    Case("long d128 bf16", 1, 8, 2048, 128, dtype="bfloat16", steps=REVERSE),
    Case("long causal", 1, 8, 2048, 64, causal=True, steps=REVERSE),
    Case("window", 1, 1, 8192, 64, window=WINDOW, steps=REVERSE),
    Case("grouped causal", 1, 16, 1024, 64, kv_heads=4, causal=True, steps=REVERSE),
    Case("one head", 1, 1, 2048, 64, steps=REVERSE, quick=True),
    Case("molecule", 8, 8, 200, 64, bias=True, steps=REVERSE),
)
# Peak memory of the second-order step, each contestant in a process of its own.
MEMORY_CASES = tuple(
    Case("memory", 1, 2, length, 64, steps=("second-order step",)) for length in (4096, 8192, 16384, 32768)
)
# Small twins of the above for `--quick`.
QUICK_MEMORY_CASES = tuple(
    Case("memory", 1, 2, length, 64, steps=("second-order step",), quick=True) for length in (1024, 2048)
)


@dataclass(frozen=True)
class Inputs:
    """Leaves, cotangent and tangents of a case."""

    primals: tuple[Tensor, ...]  # q, k, v and, with a bias, the bias
    do: Tensor
    tangents: tuple[Tensor, ...]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.primals, self.do, *self.tangents))

    def output_nbytes(self) -> int:
        """Bytes of what a second-order step gives: o, the gradients, their gradients and that in do."""
        return 2 * sum(t.nbytes for t in (*self.primals, self.do))

    def first_head(self) -> Inputs:
        """The first head alone, of a case whose keys have as many heads as its queries."""
        one = [tuple(t.detach()[:, :1] for t in ts) for ts in (self.primals, (self.do,), self.tangents)]
        return Inputs(one[0], one[1][0], one[2])


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # drawn in float32 and rounded once, so that every dtype and the float64 answer see the same numbers
        return torch.randn(shape, generator=generator).to(case.torch_dtype)

    rows = (case.batch, case.heads, case.length, case.head_dim)
    keys = (case.batch, case.kv_heads or case.heads, case.length, case.head_dim)
    shapes = [rows, keys, keys]
    if case.bias:
        shapes.append((1, case.heads, case.length, case.length))
    primals = tuple(normal(*shape).requires_grad_() for shape in shapes)
    return Inputs(primals, normal(*rows).requires_grad_(), tuple(normal(*shape) for shape in shapes))


def exact(case: Case, inputs: Inputs, last: int | None = None) -> dict[str, Tensor]:
    """Every output of every step in float64, from softmax written out; a few rows of queries at a time.

    All sums over queries are additive, so the gradients of keys, values and bias are summed over the pieces.
    With `last`, the outputs of so many last queries alone: a fraction of the work.
    """
    wide = [t.detach().double() for t in inputs.primals]
    tangents = [t.double() for t in inputs.tangents]
    do = inputs.do.detach().double()
    group = case.heads // (case.kv_heads or case.heads)
    found: dict[str, Tensor] = {
        name: torch.zeros_like(like)
        for name, like in zip(outputs_of(case), itertools.chain([do], wide, wide, [do]), strict=True)
    }
    per_row = case.batch * case.heads * case.length
    start = 0 if last is None else max(0, case.length - last)
    for piece in chunks(case.length - start, max(1, SCORES_AT_ONCE // per_row)):
        rows = slice(start + piece.start, start + piece.stop)
        columns = case.attended(rows)
        places = (rows, columns, columns)  # of q, k, v and their like
        leaves = [t[:, :, place] for t, place in zip(wide[:3], places, strict=True)]
        leaves += [b[:, :, rows, columns] for b in wide[3:]]
        seeds = [t[:, :, place] for t, place in zip(tangents[:3], places, strict=True)]
        seeds += [t[:, :, rows, columns] for t in tangents[3:]]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        cotangent = do[:, :, rows].clone().requires_grad_()
        keys, values = (t.repeat_interleave(group, dim=1) for t in leaves[1:3])
        scores = leaves[0] @ keys.mT * case.head_dim**-0.5
        if case.bias:
            scores = scores + leaves[3]
        attends = case.mask(rows, columns)
        if attends is not None:
            scores = scores.masked_fill(~attends, -torch.inf)
        o = scores.softmax(dim=-1) @ values
        first = torch.autograd.grad(o, leaves, cotangent, create_graph=True)
        second = torch.autograd.grad(first, (*leaves, cotangent), seeds)
        for name, part in zip(found, itertools.chain([o], first, second), strict=True):
            if name.startswith(("dk", "dv")):
                found[name][:, :, columns] += part.detach()
            elif name.startswith("dbias"):
                found[name][:, :, rows, columns] = part.detach()
            else:
                found[name][:, :, rows] = part.detach()
    if last is None:
        return found
    return {name: found[name][:, :, start:] for name in ("o", "dq", "dqt", "ot")}


def outputs_of(case: Case, step: str = "second-order step") -> tuple[str, ...]:
    """The names of a step's outputs, in their order."""
    return tuple(name for name in OUTPUTS[step] if case.bias or not name.startswith("dbias"))


def relative_error(found: Tensor, exact_value: Tensor) -> float:
    """‖x − x64‖ / ‖x64‖, whole or for the worst (batch, head), whichever is larger."""
    difference = found.detach().double() - exact_value
    whole = difference.norm() / exact_value.norm()
    each = difference.flatten(2).norm(dim=2) / exact_value.flatten(2).norm(dim=2)
    return float(torch.maximum(whole, each.max()))


def errors(case: Case, step: str, outputs: tuple[Tensor, ...], answer: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each output; the answer may be of the first head or of the last queries alone."""
    found = {}
    for name, output in zip(outputs_of(case, step), outputs, strict=True):
        if name in answer:
            heads, rows = answer[name].shape[1:3]
            found[name] = relative_error(output[:, :heads, -rows:], answer[name])
    return found
