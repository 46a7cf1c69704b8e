"""Which keys each query sees, found in the rows of a mask; the mask is never held as a whole.

A row of most masks is one run of keys. The runs of all rows are 2·N numbers, and a band, or a band within
each of several sequences, says the same with a few. A pattern is given only if it reproduces every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from metattn.problem import readable

ENTRIES = 2**20  # of a mask that are looked at together


@dataclass(frozen=True)
class Pattern:
    """Query i sees, of its sequence, the keys j with low ≤ j − i ≤ high."""

    low: int | None  # None: no limit
    high: int | None
    sequences: Tensor | None = None  # int64 [1 or B, N] ids, never decreasing, where a row holds several


def find(rows: Callable[[int, int], Tensor], batch: int, queries: int, keys: int) -> Pattern | None:
    """The pattern of a mask [B, N, M]; None if it has none, or cannot be read.

    rows: gives bool [1 or B, count, M] of `count` queries from the first one on, True = attends.
    """
    runs = _runs(rows, batch, queries, keys)
    if runs is None:
        return None
    first, end = runs
    zero = torch.zeros_like(first)
    plain = _band(first, end, zero, zero + keys)
    if plain is not None or queries != keys:
        return plain
    begins = _begins(first, end)
    i = torch.arange(queries, device=first.device)
    lower = torch.where(begins, i, 0).cummax(1).values
    after = torch.where(begins, i, queries)[:, 1:]
    upper = pad(after, (0, 1), value=queries).flip(1).cummin(1).values.flip(1)
    return _band(first, end, lower, upper, begins.cumsum(1))


def _runs(
    rows: Callable[[int, int], Tensor], batch: int, queries: int, keys: int
) -> tuple[Tensor, Tensor] | None:
    """int64 [1 or B, N]: each query's first key, and the one behind its last; 0 and 0 if it sees none."""
    parts = []
    step = max(1, ENTRIES // max(1, batch * keys))
    for start in range(0, queries, step):
        seen = rows(start, min(step, queries - start))
        if not readable(seen):
            return None
        framed = pad(seen, (1, 1))
        edges = (framed[..., 1:] != framed[..., :-1]).nonzero().cpu()  # (batch, row, column), in this order
        left, right = edges[0::2], edges[1::2]  # a row has as many of one as of the other
        row = left[:, 0] * seen.shape[1] + left[:, 1]
        if (row.diff() == 0).any():
            return None
        part = edges.new_zeros(2, *seen.shape[:2])
        part[:, left[:, 0], left[:, 1]] = torch.stack([left[:, 2], right[:, 2]])
        parts.append(part)
    if not parts:
        return None
    first, end = torch.cat(parts, 2)
    return first, end


def _begins(first: Tensor, end: Tensor) -> Tensor:
    """bool [1 or B, N]: where no query looks back over, and none before it looks ahead to."""
    n = first.shape[1]
    i = torch.arange(n, device=first.device)
    looks_back = torch.where(first == end, n, first).flip(1).cummin(1).values.flip(1)
    looks_ahead = pad(end.cummax(1).values[:, :-1], (1, 0))
    return (looks_back >= i) & (looks_ahead <= i)


def _band(
    first: Tensor, end: Tensor, lower: Tensor, upper: Tensor, sequences: Tensor | None = None
) -> Pattern | None:
    """The band that gives these runs if keys are those from lower up to upper; None if none does."""
    i = torch.arange(first.shape[1], device=first.device)
    empty = first == end

    def limit(distance: Tensor, limited: Tensor) -> int | None:
        found = distance[limited & ~empty]
        return int(found[0]) if len(found) else None

    low, high = limit(first - i, first > lower), limit(end - 1 - i, end < upper)
    from_ = lower if low is None else torch.maximum(lower, i + low)
    to = upper if high is None else torch.minimum(upper, i + high + 1)
    same = torch.where(empty, from_ >= to, (from_ == first) & (to == end))
    return Pattern(low, high, sequences) if same.all() else None
