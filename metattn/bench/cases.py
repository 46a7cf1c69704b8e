"""What the benchmarks measure: shapes with their options, and which scores they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

WHOLE = "second-order step"
# Products of 2·N·M·d FLOP in each step (docs/math.md). jvp is what torch.func.jvp gives: the forward too.
PRODUCTS = {
    "forward": 2,
    "vjp": 5,
    "jvp": 7,
    "vjp_jvp": 10,
    "double backward": 15,
    WHOLE: 22,
}


@dataclass(frozen=True)
class Case:
    """A shape, a dtype and options to measure."""

    name: str
    batch: int
    heads: int
    n: int  # queries
    d: int  # features
    m: int | None = None  # keys, where they are not as many as the queries
    kv_heads: int | None = None  # fewer than heads: grouped queries
    dtype: str = "float32"
    causal: Literal["top-left", "bottom-right"] | None = None
    window: tuple[int, int] | None = None  # keys attended before and after a query's own, -1: all of them
    bias: Literal["shared", "own"] | None = None  # float, with a gradient: [1, heads, N, M] or [batch, …]
    lengths: tuple[int, ...] = ()  # packed: the sequences' lengths, `batch` of them, the longest `n`
    steps: tuple[str, ...] = tuple(PRODUCTS)
    quick: bool = False  # measured by `bench --quick` too
    memory: bool = False  # the peak of its second-order step instead of times
    compiled: tuple[str, ...] = ()  # peers that cost seconds of compiling and take part all the same
    published: float | None = None  # ms of the whole step by Flash Hog on an H200 (its README)

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Case:
        """A case from its `asdict`, which may have been JSON."""
        values: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in said.items()}
        return cls(**values)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def keys(self) -> int:
        return self.m or self.n

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def shape(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else str(self.heads)
        keys = "" if self.m is None else f" M{self.m}"
        return f"B{self.batch} H{heads} N{self.n}{keys} d{self.d}"

    @property
    def options(self) -> str:
        said = [self.dtype]
        if self.causal is not None:
            said.append("causal" if self.causal == "top-left" else f"causal {self.causal}")
        if self.window is not None:
            said.append("window ({}, {})".format(*self.window))
        if self.bias is not None:
            said.append("bias gradient")
        return ", ".join(said)

    @property
    def scores(self) -> int:
        """Elements of all its N×M matrices."""
        return self.batch * self.heads * self.n * self.keys

    @property
    def masked(self) -> bool:
        return self.causal is not None or self.window is not None

    @property
    def needs_mask(self) -> bool:
        """Whether torch's function needs a matrix for what causal and window say."""
        return self.window is not None or (self.causal == "bottom-right" and self.keys != self.n)

    @property
    def offset(self) -> int:
        """The key beside the first query."""
        return 0 if self.causal == "top-left" else self.keys - self.n

    def full(self) -> Case:
        """The same without a mask."""
        return replace(self, causal=None, window=None)

    def sequence(self, n: int, m: int | None = None) -> Case:
        """One sequence of so many queries and keys with the same options."""
        return replace(self, batch=1, n=n, m=m, lengths=())

    @property
    def reach(self) -> tuple[int, int]:
        """How many keys before and after its own a query attends to at most."""
        everything = self.n + self.keys
        left, right = (everything if side < 0 else side for side in self.window or (-1, -1))
        return left, right if self.causal is None else 0

    def attended(self, rows: slice) -> slice:
        """The keys that some of these queries attend to."""
        left, right = self.reach
        first, last = rows.start + self.offset - left, rows.stop + self.offset + right
        return slice(min(max(0, first), self.keys), max(0, min(self.keys, last)))

    def mask(self, rows: slice, columns: slice, device: torch.device | str = "cpu") -> Tensor | None:
        """True where a query attends to a key, [rows, columns]; None where every one of them does."""
        if not self.masked:
            return None
        left, right = self.reach
        places = torch.arange(rows.start, rows.stop, device=device, dtype=torch.int32) + self.offset
        distance = torch.arange(columns.start, columns.stop, device=device, dtype=torch.int32)
        distance = distance - places[:, None]
        return (distance >= -left) & (distance <= right)

    def pairs(self) -> int:
        """Attended (query, key) pairs of a head in all of the batch."""
        if self.lengths:
            return sum(self.sequence(length).pairs() for length in self.lengths)
        left, right = self.reach
        place = torch.arange(self.n) + self.offset
        first, last = (place - left).clamp_min(0), (place + right).clamp_max(self.keys - 1)
        return self.batch * int((last - first + 1).clamp_min(0).sum())

    def operations(self, step: str) -> float:
        """FLOP of the step by the count of products and of attended pairs."""
        return PRODUCTS[step] * 2.0 * self.heads * self.pairs() * self.d


# What the goals are about: no map that only forward mode needs.
REVERSE = ("forward", "vjp", "double backward", WHOLE)
WINDOW = (256, 0)
CASES = (
    Case("few-shot", 32, 8, 64, 32, quick=True),
    Case("few-shot bf16", 32, 8, 64, 32, dtype="bfloat16", steps=REVERSE),
    Case("small", 8, 8, 256, 64),
    Case("long", 1, 8, 2048, 64, steps=REVERSE),
    Case("long d128", 1, 8, 2048, 128, steps=REVERSE),
    Case("long bf16", 1, 8, 2048, 64, dtype="bfloat16", steps=REVERSE),
    Case("long d128 bf16", 1, 8, 2048, 128, dtype="bfloat16", steps=REVERSE),
    Case("long causal", 1, 8, 2048, 64, causal="top-left", steps=REVERSE),
    Case("window", 1, 1, 8192, 64, window=WINDOW, steps=REVERSE),
    Case("grouped causal", 1, 16, 1024, 64, kv_heads=4, causal="top-left", steps=REVERSE),
    Case("one head", 1, 1, 2048, 64, steps=REVERSE, quick=True),
    Case("molecule", 8, 8, 200, 64, bias="shared", steps=REVERSE),
)
# Peak memory of the second-order step, each contestant in a process of its own.
MEMORY_CASES = tuple(
    Case("memory", 1, 2, n, 64, steps=(WHOLE,), memory=True) for n in (4096, 8192, 16384, 32768)
)
# Small twins of the above for `--quick`.
QUICK_MEMORY_CASES = tuple(
    Case("memory", 1, 2, n, 64, steps=(WHOLE,), memory=True, quick=True) for n in (1024, 2048)
)
