"""vjp, the first backward: dS = P∘(dP − D), with dP = Z∘(dO Vᵀ).

A row pass gives dQ, the bias' gradient where each entry has its own, the sinks' shares, and the row statistics that
the column pass needs, which gives dK and dV. Where one block holds all keys, the column pass gives everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metattn.kernels import tiles


@triton.jit
def first_order(call, s, p, bend, dpz, d, MASKED: tl.constexpr):
    """(dS, dR) of a tile; dpz is dP."""
    ds = tiles.shown(call, s, p * (dpz - d), MASKED)
    return ds, tiles.slope_of(bend) * ds


@triton.jit
def d_of_all_keys(call, given, place, rows, inside, s, p, dpz, MASKED: tl.constexpr):
    """D [queries] from a tile [all keys, queries]."""
    d = tl.sum(tiles.shown(call, s, p * dpz, MASKED), 0)
    if given.dlse is not None:
        d -= tiles.load_statistic(given.dlse, place, rows, inside).to(tl.float32)
    return d


@triton.jit
def row_statistics(call, given, place, rows, inside, VALUE: tl.constexpr):
    """(Statistics without tangents, dO) of a block of queries."""
    high, low = tiles.load_lse(given.lse, place, rows, inside)
    d = tl.zeros_like(high)
    idle = tiles.idle_rows(call, place, tiles.Statistics(high, low, d, None, None))
    do = tiles.load_rows_if(given.do, place, rows, inside, idle, VALUE)
    if given.do is not None:
        d += tiles.row_dots(do, tiles.load_in_two(given.o, given.o_lo, place, rows, inside, VALUE))
    if given.dlse is not None:
        d -= tiles.load_statistic(given.dlse, place, rows, inside).to(tl.float32)
    # of a row that attends to nothing no cotangent counts
    d = tl.where(high == float("inf"), 0.0, d)
    return tiles.Statistics(high, low, d, None, None), do


@triton.jit
def sink_probability(call, place, statistics):
    """Ps = exp(s − L) of each row [*], 0 where nothing is attended."""
    return tiles.probability(tiles.load_per_head(call.sinks, place), statistics.high, statistics.low)


@triton.jit
def visit_keys(dq, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to dQ / scale, and stores the bias' gradient."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    call, place = block.call, block.place
    q, do = block.held
    rows, keys = block.first + tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    i, j = rows[:, None], keys[None, :]
    inside = tiles.partners_inside(block, keys, MASKED)
    zero = tl.zeros([ROWS, KEYS], tl.float32)
    k = tiles.load_keys(call.k, place, keys, inside, HEAD)
    s, bend = tiles.scores(call, place, tiles.dot_features(q, k, zero, PRECISION), i, j, MASKED)
    v = tiles.load_keys_if(do is not None, call.v, place, keys, inside, VALUE)
    dp = tiles.dot_features(do, v, zero, PRECISION)
    dpz = tiles.times(dp, tiles.dropout(call, place, block.first, start, ROWS, KEYS, False))
    statistics = tiles.as_column(block.statistics)
    p = tiles.probability(s, statistics.high, statistics.low)
    ds, dr = first_order(call, s, p, bend, dpz, statistics.d, MASKED)
    tiles.store_entries(block.wanted.dbias, place, i, j, ds)
    return tiles.add_product(dq, dr, tiles.without(k, tiles.unseen_keys(call, s)), PRECISION)


@triton.jit
def vjp_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, statistics, dbias and the sinks' shares of a block of queries."""
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        rows = first + tl.arange(0, ROWS)
        inside = rows < place.n
        statistics, do = row_statistics(call, given, place, rows, inside, VALUE)
        if given.statistics is not None:
            tiles.store_statistics(given.statistics, place, rows, inside, statistics)
        if wanted.dsinks is not None:
            dsinks = -sink_probability(call, place, statistics) * statistics.d
            tiles.store_statistic(wanted.dsinks, place, rows, inside, dsinks)
        if (wanted.dq is not None) | (wanted.dbias is not None):
            span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
            idle = tiles.idle_rows(call, place, statistics)
            q = tiles.load_rows(call.q, place, rows, inside, idle, HEAD)
            block = tiles.Block(call, given, wanted, place, span, first, (q, do), statistics)
            dq = tiles.zeros_if(wanted.dq, ROWS, HEAD)
            dq = tiles.sweep(visit_keys, dq, block, span, (KEYS, ROWS, HEAD, VALUE, PRECISION))
            tiles.store_rows(wanted.dq, place, rows, inside, dq, call.scale, HEAD)


@triton.jit
def visit_queries(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of queries to (dK / scale, dV)."""
    ROWS: tl.constexpr = FORM[0]
    KEYS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    dk, dv = state
    call, given, wanted, place = block.call, block.given, block.wanted, block.place
    k, v = block.held
    rows, keys = start + tl.arange(0, ROWS), block.first + tl.arange(0, KEYS)
    i, j = rows[None, :], keys[:, None]
    inside = tiles.partners_inside(block, rows, MASKED)
    zero = tl.zeros([KEYS, ROWS], tl.float32)
    statistics = tiles.statistics_of(given, place, rows, inside, False)
    idle = tiles.idle_rows(call, place, statistics)
    q = tiles.load_rows(call.q, place, rows, inside, idle, HEAD)
    s, bend = tiles.scores(call, place, tiles.dot_features(k, q, zero, PRECISION), i, j, MASKED)
    do = tiles.load_rows_if(given.do, place, rows, inside, idle, VALUE)
    dp = tiles.dot_features(v, do, zero, PRECISION)
    z = tiles.dropout(call, place, start, block.first, ROWS, KEYS, True)
    p = tiles.probability(s, statistics.high[None, :], statistics.low[None, :])
    dpz = tiles.times(dp, z)
    d = statistics.d
    if given.statistics is None:
        d = d_of_all_keys(call, given, place, rows, inside, s, p, dpz, MASKED)
        d = tl.where(statistics.high == float("inf"), 0.0, d)
    ds, dr = first_order(call, s, p, bend, dpz, d[None, :], MASKED)
    if given.statistics is None:
        tiles.store_entries(wanted.dbias, place, i, j, ds)
        if wanted.dq is not None:
            seen = tiles.without(k, tiles.unseen_of_all(call, s))
            dq = tiles.add_product(tiles.zeros(ROWS, HEAD), dr.T, seen, PRECISION, True)
            tiles.store_rows(wanted.dq, place, rows, rows < place.n, dq, call.scale, HEAD)
        if wanted.dsinks is not None:
            dsinks = -sink_probability(call, place, statistics) * d
            tiles.store_statistic(wanted.dsinks, place, rows, rows < place.n, dsinks)
    alone: tl.constexpr = given.statistics is None
    dk = tiles.add_product(dk, dr, q, PRECISION, alone)
    return dk, tiles.add_product(dv, tiles.times(p, z), do, PRECISION, alone)


@triton.jit
def vjp_keys(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, summed over the query heads that share it."""
    place, first = tiles.block_of_keys(call, blocks, KEYS)
    if tiles.has_work(given, first, place.m):
        keys = first + tl.arange(0, KEYS)
        inside = keys < place.m
        span = tiles.span_of_keys(call, given, place, first, KEYS, ROWS)
        k = tiles.load_keys(call.k, place, keys, inside, HEAD)
        v = tiles.load_keys(call.v, place, keys, inside, VALUE)
        dk, dv = tiles.zeros_if(wanted.dk, KEYS, HEAD), tiles.zeros_if(wanted.dv, KEYS, VALUE)
        for member in range(call.group):
            one = tiles.at_head(place, place.kv_head * call.group + member)
            block = tiles.Block(call, given, wanted, one, span, first, (k, v), None)
            dk, dv = tiles.sweep(visit_queries, (dk, dv), block, span, (ROWS, KEYS, HEAD, VALUE, PRECISION))
        tiles.store_keys(wanted.dk, place, keys, inside, dk, call.scale, HEAD)
        tiles.store_keys(wanted.dv, place, keys, inside, dv, 1.0, VALUE)
