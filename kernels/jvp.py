"""jvp: the tangents of O and L in one pass over the keys: Ot = (P∘(T − t)∘Z)V + (P∘Z)C − (τ − t)·O for any t.

t is the mean of T over one block of keys. Where a sharply peaked row has large T, the terms cancel still; a
block with a row that lost more than CANCELLATION so is swept once more, with t = τ of the first sweep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import common, memory, products, row_tiles, rowstats, scores, tiles
from .call import Block, Statistics, absent

CANCELLATION = tl.constexpr(16.0)


@triton.jit
def visit(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to (τ − t, Ot, what the weights of C lack)."""
    KEYS: tl.constexpr = FORM[0]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    excess, acc, lack = state
    call, given = block.call, block.given
    q, a = block.held
    seen, k = row_tiles.scores_of(block, q, start, MASKED, FORM)
    unseen = scores.unseen_keys(call, seen.s)
    if scores.have_tangent(a, given.b, given.beta, given.omega):
        _, t, _ = row_tiles.tangent_of(block, seen, q, k, a, start, MASKED, FORM)
        pt = scores.shown(call, seen.s, seen.p * (t - block.statistics.tau[:, None]), MASKED)
        excess += tl.sum(pt, 1)
        v = products.without(row_tiles.keys_of(block, call.v, start, MASKED, KEYS, VALUE), unseen)
        # in two parts: Dt = rowsum(dO∘Ot) is to cancel with what is not rounded
        acc = products.add_product(acc, scores.times(pt, seen.z), v, PRECISION, True)
    if given.c is not None:
        c = products.without(row_tiles.keys_of(block, given.c, start, MASKED, KEYS, VALUE), unseen)
        pz = scores.times(seen.p, seen.z)
        acc, lack = products.add_product(acc, pz, c, PRECISION), common.counted(lack, pz, c, call.rng)
    return excess, acc, lack


@triton.jit
def mean_tangent(block, seen, t, MASKED: tl.constexpr):
    """The mean of T [rows] over a block of keys, by their weights; 0 where they have none."""
    p = scores.shown(block.call, seen.s, seen.p, MASKED)
    return finite_or_0(tl.sum(p * t, 1) * inverse_or_0(tl.sum(p, 1)))


@triton.jit
def block_of_means(span):
    """Where a block of keys starts that all queries attend to; of the first, where there is none."""
    return tl.where(span.full < span.tail, span.full, span.first)


@triton.jit
def finite_or_0(x):
    return tl.where(products.finite(x), x, 0.0)


@triton.jit
def inverse_or_0(x):
    return tl.where(x > 0.0, 1.0 / x, 0.0)


@triton.jit
def held_rows(call, given, place, first, statistics, ROWS: tl.constexpr, HEAD: tl.constexpr):
    """(q, a) of the queries from `first` on: what a block of them holds."""
    row_ids = tl.arange(0, ROWS)
    at, inside = tiles.moved(place, first, 0), first + row_ids < place.n
    idle = scores.idle_rows(call, place, statistics)
    q = memory.load_rows(call.q, at, row_ids, inside, idle, HEAD)
    return q, memory.load_rows_if(given.a, at, row_ids, inside, idle, HEAD)


@triton.jit
def first_base(
    call, given, wanted, place, first, reference, log_total, ROWS: tl.constexpr, FORM: tl.constexpr
):
    """t of the first sweep [rows]: O's weights were rounded, and (τ − t)·O brings that in."""
    base = tl.zeros_like(reference)
    if (call.q.ptr.dtype.element_ty == tl.float32) | (
        not scores.have_tangent(given.a, given.b, given.beta, given.omega)
    ):
        return base
    else:
        statistics = Statistics(reference, log_total, base, base, base)
        q, a = held_rows(call, given, place, first, statistics, ROWS, FORM[2])
        span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, FORM[0])
        block = Block(call, given, wanted, place, span, first, (q, a), statistics)
        start = block_of_means(span)
        seen, k = row_tiles.scores_of(block, q, start, True, FORM)
        _, t, _ = row_tiles.tangent_of(block, seen, q, k, a, start, True, FORM)
        return tl.where(reference == float("inf"), 0.0, mean_tangent(block, seen, t, True))


@triton.jit
def largest(x):
    """The largest magnitude of each row [rows]."""
    result = tl.max(tl.abs(x[0]), 1)
    if not absent(x[1]):
        result = tl.maximum(result, tl.max(tl.abs(x[1]), 1))
    return result


@triton.jit
def less(x, factor, y):
    """(x − factor·y, which rows [rows] lost more than CANCELLATION by it)."""
    term = tl.abs(factor) * largest(y)
    difference = products.minus(x, factor[:, None], y)
    return difference, term > largest(difference) * CANCELLATION


@triton.jit
def attempt(
    call, given, wanted, place, first, reference, log_total, base, ROWS: tl.constexpr, FORM: tl.constexpr
):
    """(τ − t, Ot, which rows [rows] lost too much) of a block of queries, by one sweep with t = base."""
    VALUE: tl.constexpr = FORM[3]
    row_ids = tl.arange(0, ROWS)
    at, inside = tiles.moved(place, first, 0), first + row_ids < place.n
    statistics = Statistics(reference, log_total, base, base, base)
    held = held_rows(call, given, place, first, statistics, ROWS, FORM[2])
    span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, FORM[0])
    block = Block(call, given, wanted, place, span, first, held, statistics)
    zero = tl.zeros_like(reference)
    excess, acc, lack = tiles.sweep(visit, (zero, products.zeros(ROWS, VALUE), zero), block, span, FORM)
    known = common.known_mass(call, at, statistics)
    acc = common.add_mean_key(acc, lack, known, call.rng, block, given.c, 1.0, VALUE, FORM)
    if call.sinks is not None:
        sigma = 0.0
        if given.sigma is not None:
            sigma = memory.load_per_head(given.sigma, place)
        excess += common.sink_probability(call, place, statistics) * (sigma - base)
    o = memory.load_in_two(given.o, given.o_lo, at, row_ids, inside, VALUE)
    acc, lost = less(acc, excess, o)
    return excess, acc, lost & (reference != float("inf"))


@triton.jit
def jvp_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The tangents of o, of what rounding it lost, and of lse, of a block of queries."""
    FORM: tl.constexpr = (KEYS, ROWS, HEAD, VALUE, PRECISION)
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        row_ids = tl.arange(0, ROWS)
        at, inside = tiles.moved(place, first, 0), first + row_ids < place.n
        reference, log_total = rowstats.load_lse(call, given.lse, at, row_ids, inside)
        nothing = reference == float("inf")
        base = first_base(call, given, wanted, place, first, reference, log_total, ROWS, FORM)
        sweeps = 1
        sweep = 0
        while sweep < sweeps:
            excess, acc, lost = attempt(
                call, given, wanted, place, first, reference, log_total, base, ROWS, FORM
            )
            acc = products.where_rows(nothing, 0.0, acc)
            memory.store_in_two(wanted.o, wanted.o_lo, at, row_ids, inside, acc, VALUE)
            tau = tl.where(nothing, 0.0, base.to(tl.float64) + excess.to(tl.float64))
            memory.store_statistic(wanted.lse, at, row_ids, inside, tau)
            base = tl.where(nothing, 0.0, base + excess)
            sweep += 1
            if (sweep == 1) & (tl.max(lost.to(tl.int32), 0) > 0):
                sweeps = 2
