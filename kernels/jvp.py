"""jvp: the tangents of O and L in one pass over the keys: Ot = (P∘(T − t)∘Z)V + (P∘Z)C − (τ − t)·O for any t.

With t = 0 the terms cancel where a sharply peaked row has large T; a block with a row that lost more than
CANCELLATION so is swept once more, with t = τ of the first sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metattn.kernels import tiles
from metattn.kernels.vjp import sink_probability

CANCELLATION = tl.constexpr(16.0)


@triton.jit
def visit(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to (τ − t, Ot)."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    excess, acc = state
    call, given, place, statistics = block.call, block.given, block.place, block.statistics
    q, a = block.held
    rows, keys = block.first + tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    i, j = rows[:, None], keys[None, :]
    inside = tiles.partners_inside(block, keys, MASKED)
    zero = tl.zeros([ROWS, KEYS], tl.float32)
    k = tiles.load_keys(call.k, place, keys, inside, HEAD)
    s, bend = tiles.scores(call, place, tiles.dot_features(q, k, zero, PRECISION), i, j, MASKED)
    unseen = tiles.unseen_keys(call, s)
    p = tiles.probability(s, statistics.high[:, None], statistics.low[:, None])
    z = tiles.dropout(call, place, block.first, start, ROWS, KEYS, False)
    if (a is not None) | (given.b is not None) | (given.beta is not None):
        tr = tiles.dot_features(a, k, zero, PRECISION)
        if given.b is not None:
            tr = tiles.dot_features(q, tiles.load_keys(given.b, place, keys, inside, HEAD), tr, PRECISION)
        t = tiles.score_tangent(call, given, place, s, bend, tr * call.scale, i, j, MASKED)
        pt = tiles.shown(call, s, p * (t - statistics.tau[:, None]), MASKED)
        excess += tl.sum(pt, 1)
        v = tiles.without(tiles.load_keys(call.v, place, keys, inside, VALUE), unseen)
        acc = tiles.add_product(acc, tiles.times(pt, z), v, PRECISION)
    if given.c is not None:
        c = tiles.without(tiles.load_keys(given.c, place, keys, inside, VALUE), unseen)
        acc = tiles.add_product(acc, tiles.times(p, z), c, PRECISION)
    return excess, acc


@triton.jit
def largest(x):
    """The largest magnitude of each row [rows]."""
    result = tl.max(tl.abs(x[0]), 1)
    if x[1] is not None:
        result = tl.maximum(result, tl.max(tl.abs(x[1]), 1))
    return result


@triton.jit
def part_less(x, y):
    if x is None:
        return None
    else:
        return x - y


@triton.jit
def less(x, factor, y):
    """(x − factor·y, which rows [rows] lost more than CANCELLATION by it)."""
    term = tiles.scaled(y, factor[:, None])
    difference = (part_less(x[0], term[0]), part_less(x[1], term[1]))
    return difference, largest(term) > largest(difference) * CANCELLATION


@triton.jit
def jvp_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tangents of o, of what rounding it lost, and of lse, of a block of queries."""
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        rows = first + tl.arange(0, ROWS)
        inside = rows < place.n
        span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
        high, low = tiles.load_lse(given.lse, place, rows, inside)
        nothing = high == float("inf")
        base = tl.zeros_like(high)
        statistics = tiles.Statistics(high, low, base, base, base)
        idle = tiles.idle_rows(call, place, statistics)
        q = tiles.load_rows(call.q, place, rows, inside, idle, HEAD)
        a = tiles.load_rows_if(given.a, place, rows, inside, idle, HEAD)
        excess, acc = base, tiles.zeros(ROWS, VALUE)
        sweeps, wanted_sweeps = 0, 1
        while sweeps < wanted_sweeps:
            statistics = tiles.Statistics(high, low, base, base, base)
            block = tiles.Block(call, given, wanted, place, span, first, (q, a), statistics)
            state = (tl.zeros_like(high), tiles.zeros(ROWS, VALUE))
            excess, acc = tiles.sweep(visit, state, block, span, (KEYS, ROWS, HEAD, VALUE, PRECISION))
            if call.sinks is not None:
                sigma = 0.0
                if given.sigma is not None:
                    sigma = tiles.load_per_head(given.sigma, place)
                excess += sink_probability(call, place, statistics) * (sigma - base)
            acc, lost = less(acc, excess, tiles.load_in_two(given.o, given.o_lo, place, rows, inside, VALUE))
            sweeps += 1
            wanted_sweeps = 1 + tl.max((lost & (nothing == 0)).to(tl.int32), 0)
            if sweeps < wanted_sweeps:
                base = tl.where(nothing, 0.0, excess)
            wanted_sweeps = tl.where(sweeps < 2, wanted_sweeps, 2)
        acc = tiles.where_rows(nothing, 0.0, acc)
        tiles.store_in_two(wanted.o, wanted.o_lo, place, rows, inside, acc, VALUE)
        tau = tl.where(nothing, 0.0, base.to(tl.float64) + excess.to(tl.float64))
        tiles.store_statistic(wanted.lse, place, rows, inside, tau)
