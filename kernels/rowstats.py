"""Row statistics: float64 between the maps, float32 within a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from . import memory, scores
from .call import LOG2E, Statistics, absent


@triton.jit
def store_lse(call, view, place, rows, inside, top, total):
    """Stores a row's log-sum-exp in two parts, from its largest element and the sum of exponentials over it.

    Counted from the element nearest to it, the log has few digits to lose in float32.
    """
    dead = total == 0.0
    log_total = tl.log(tl.where(dead, 1.0, total))
    top = tl.where(top == float("-inf"), 0.0, top)
    nearest = top + scores.in_units(call, log_total)
    further = nearest.to(tl.float64) - top.to(tl.float64)
    reference = nearest.to(tl.float64)
    if call.unit is not None:
        further *= tl.cast(call.unit, tl.float64)
        reference *= tl.cast(call.unit, tl.float64)  # exact
    at = memory.start_of(view, place.seq, place.head, place.q0) + memory.steps(rows, view.row, view)
    tl.store(at, reference, mask=inside)
    log_total = tl.where(dead, float("-inf"), log_total.to(tl.float64) - further)
    tl.store(at + tl.cast(view.column, tl.int64), log_total, mask=inside)


@triton.jit
def load_lse(call, view, place, rows, inside):
    """(reference as an element, log_total in units of log 2) of a block of rows; (+inf, 0) where nothing is
    attended, and outside.
    """
    at = memory.start_of(view, place.seq, place.head, place.q0) + memory.steps(rows, view.row, view)
    reference = tl.load(at, mask=inside, other=0.0)
    if call.unit is not None:
        reference /= tl.cast(call.unit, tl.float64)
    reference = reference.to(tl.float32)
    log_total = tl.load(at + tl.cast(view.column, tl.int64), mask=inside, other=float("-inf"))
    dead = log_total == float("-inf")
    return tl.where(dead, float("inf"), reference), tl.where(dead, 0.0, (log_total * LOG2E).to(tl.float32))


@triton.jit
def store_statistics(view, place, rows, inside, statistics):
    """Stores Statistics for a column pass; tau and dt may be ()."""
    at = memory.start_of(view, place.seq, place.head, place.q0) + memory.steps(rows, view.row, view)
    tl.store(at, statistics.reference, mask=inside)
    tl.store(at + tl.cast(view.column, tl.int64), statistics.log_total, mask=inside)
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
    reference = load_column(view, at, 0, inside, float("inf"))
    log_total = load_column(view, at, 1, inside, 0.0)
    d = load_column(view, at, 2, inside, 0.0)
    if TANGENTS:
        tau = load_column(view, at, 3, inside, 0.0)
        return Statistics(reference, log_total, d, tau, load_column(view, at, 4, inside, 0.0))
    else:
        return Statistics(reference, log_total, d, (), ())


@triton.jit
def statistics_of(call, given, place, rows, exists, inside, TANGENTS: tl.constexpr):
    """Statistics of a block of queries that a column pass visits; the log-sum-exp alone where no row pass
    told.
    """
    if given.statistics is None:
        reference, log_total = load_lse(call, given.lse, place, rows, exists)
        return Statistics(reference, log_total, (), (), ())
    else:
        return load_statistics(given.statistics, place, rows, inside, TANGENTS)


@triton.jit
def as_column(statistics):
    """For tiles [queries, keys]."""
    reference, log_total = statistics.reference[:, None], statistics.log_total[:, None]
    d = statistics.d[:, None]
    if absent(statistics.tau):
        return Statistics(reference, log_total, d, (), ())
    else:
        return Statistics(reference, log_total, d, statistics.tau[:, None], statistics.dt[:, None])


@triton.jit
def as_row(statistics):
    """For tiles [keys, queries]."""
    reference, log_total = statistics.reference[None, :], statistics.log_total[None, :]
    d = statistics.d[None, :]
    return Statistics(reference, log_total, d, statistics.tau[None, :], statistics.dt[None, :])
