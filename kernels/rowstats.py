"""Row statistics: float64 between the maps, float32 within a kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from metattn.kernels.call import LOG2E, Statistics, absent

from metattn.kernels import memory


@triton.jit
def is_large(x):
    """Where the log-sum-exp holds the largest score itself, and log Σ exp in its last 29 bits
    (docs/math.md).
    """
    magnitude = tl.abs(x)
    return (magnitude >= 1073741824.0) & (magnitude <= 3.5e38)


@triton.jit
def join_lse(top, total):
    """Float64 log-sum-exp of a row from its largest score and its sum of exponentials over that; −inf for
    0.
    """
    log_total = tl.log(total).to(tl.float64)
    joined = top.to(tl.float64)
    low = tl.where(is_large(joined), log_total, 0.0) * 4194304.0 + 0.5
    packed = (joined.to(tl.int64, bitcast=True) | low.to(tl.int64)).to(tl.float64, bitcast=True)
    lse = tl.where(is_large(joined) & (total < 1e38), packed, joined + log_total)
    return tl.where(total == 0.0, float("-inf"), lse)


@triton.jit
def split_lse(lse):
    """(high, low) of a stored log-sum-exp, low in units of log 2; (+inf, 0) where nothing is attended."""
    bits = lse.to(tl.int64, bitcast=True)
    rounded = lse.to(tl.float32)
    top = (bits & ~0x1FFFFFFF).to(tl.float64, bitcast=True).to(tl.float32)
    high = tl.where(is_large(lse), top, rounded)
    packed = (bits & 0x1FFFFFFF).to(tl.float32) * (1.0 / 4194304.0)
    low = tl.where(is_large(lse), packed, (lse - rounded.to(tl.float64)).to(tl.float32))
    dead = lse == float("-inf")
    return tl.where(dead, float("inf"), high), tl.where(dead, 0.0, low * LOG2E)


@triton.jit
def load_lse(view, place, rows, inside):
    """(high, low) of a block of rows; those outside are as if they attended to nothing."""
    high, low = split_lse(memory.load_statistic(view, place, rows, inside))
    return tl.where(inside, high, float("inf")), low


@triton.jit
def store_statistics(view, place, rows, inside, statistics):
    """Stores Statistics for a column pass; tau and dt may be ()."""
    at = memory.start_of(view, place.seq, place.head, place.q0) + memory.steps(rows, view.row, view)
    tl.store(at, statistics.high, mask=inside)
    tl.store(at + tl.cast(view.column, tl.int64), statistics.low, mask=inside)
    tl.store(at + 2 * tl.cast(view.column, tl.int64), statistics.d, mask=inside)
    if not absent(statistics.tau):
        tl.store(at + 3 * tl.cast(view.column, tl.int64), statistics.tau, mask=inside)
        tl.store(at + 4 * tl.cast(view.column, tl.int64), statistics.dt, mask=inside)


@triton.jit
def load_column(view, at, column, inside, other):
    """A statistic of each row [*]; `other` outside ((): all are inside)."""
    if absent(inside):
        return tl.load(at + column * tl.cast(view.column, tl.int64))
    else:
        return tl.load(at + column * tl.cast(view.column, tl.int64), mask=inside, other=other)


@triton.jit
def load_statistics(view, place, rows, inside, TANGENTS: tl.constexpr):
    """Statistics [*] that a row pass stored; rows outside ((): none) attend to nothing."""
    at = memory.start_of(view, place.seq, place.head, place.q0) + memory.steps(rows, view.row, view)
    high = load_column(view, at, 0, inside, float("inf"))
    low = load_column(view, at, 1, inside, 0.0)
    d = load_column(view, at, 2, inside, 0.0)
    if TANGENTS:
        tau = load_column(view, at, 3, inside, 0.0)
        return Statistics(high, low, d, tau, load_column(view, at, 4, inside, 0.0))
    else:
        return Statistics(high, low, d, (), ())


@triton.jit
def statistics_of(given, place, rows, exists, inside, TANGENTS: tl.constexpr):
    """Statistics of a block of queries that a column pass visits; high and low alone where no row pass
    told.
    """
    if given.statistics is None:
        high, low = load_lse(given.lse, place, rows, exists)
        return Statistics(high, low, (), (), ())
    else:
        return load_statistics(given.statistics, place, rows, inside, TANGENTS)


@triton.jit
def as_column(statistics):
    """For tiles [queries, keys]."""
    high, low, d = statistics.high[:, None], statistics.low[:, None], statistics.d[:, None]
    if absent(statistics.tau):
        return Statistics(high, low, d, (), ())
    else:
        return Statistics(high, low, d, statistics.tau[:, None], statistics.dt[:, None])


@triton.jit
def as_row(statistics):
    """For tiles [keys, queries]."""
    high, low, d = statistics.high[None, :], statistics.low[None, :], statistics.d[None, :]
    return Statistics(high, low, d, statistics.tau[None, :], statistics.dt[None, :])
