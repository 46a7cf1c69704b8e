"""vjp, the first backward: dS = P∘(dP − D), with dP = Z∘(dO Vᵀ).

A row pass gives dQ, the bias' gradient where each entry has its own, the shares of sinks and slopes, and the
row statistics that the column pass needs, which gives dK and dV. Where one block holds all keys, the column
pass gives everything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import common, memory, products, row_tiles, rowstats, scores, tiles
from .call import Block, Scores, Statistics


@triton.jit
def first_order(call, seen, dp, d, MASKED: tl.constexpr):
    """(dS, dR) of a tile of Scores."""
    ds = scores.shown(call, seen.s, seen.p * (dp - d), MASKED)
    return ds, scores.slope_of(seen.bend) * ds


@triton.jit
def d_of_all_keys(call, given, at, row_ids, inside, s, p, dpz, MASKED: tl.constexpr):
    """D [queries] from a tile [all keys, queries]."""
    d = tl.sum(scores.shown(call, s, p * dpz, MASKED), 0)
    if given.dlse is not None:
        d -= memory.load_statistic(given.dlse, at, row_ids, inside).to(tl.float32)
    return d


@triton.jit
def row_statistics(call, given, at, row_ids, inside, VALUE: tl.constexpr):
    """(Statistics without tangents, dO) of a block of queries."""
    reference, log_total = rowstats.load_lse(call, given.lse, at, row_ids, inside)
    d = tl.zeros_like(reference)
    idle = scores.idle_rows(call, at, Statistics(reference, log_total, d, (), ()))
    do = memory.load_rows_if(given.do, at, row_ids, inside, idle, VALUE)
    if given.do is not None:
        d += products.row_dots(do, memory.load_in_two(given.o, given.o_lo, at, row_ids, inside, VALUE))
    if given.dlse is not None:
        d -= memory.load_statistic(given.dlse, at, row_ids, inside).to(tl.float32)
    # of a row that attends to nothing no cotangent counts
    d = tl.where(reference == float("inf"), 0.0, d)
    return Statistics(reference, log_total, d, (), ()), do


@triton.jit
def visit_keys(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to (dQ / scale, what its weights lack, Σ dS·distance), and stores the bias'
    gradient.
    """
    PRECISION: tl.constexpr = FORM[4]
    dq, lack, far = state
    q, do = block.held
    seen, k = row_tiles.scores_of(block, q, start, MASKED, FORM)
    dp, _ = row_tiles.cotangent_of(block, seen, do, block.call.v, start, MASKED, FORM)
    ds, dr = first_order(block.call, seen, dp, block.statistics.d[:, None], MASKED)
    memory.store_entries(block.wanted.dbias, block.place, seen.i, seen.j, ds)
    far = add_distances(far, block, seen, ds)
    k = products.without(k, scores.unseen_keys(block.call, seen.s))
    return products.add_product(dq, dr, k, PRECISION), common.counted(lack, dr, k, block.call.softcap), far


@triton.jit
def add_distances(far, block, seen, ds):
    """far [rows] + Σ ds·(distance − the nearest); far itself where no gradient of slopes is wanted."""
    if block.wanted.dslopes is None:
        return far
    else:
        call, place = block.call, block.place
        near = common.nearest(call, block.given, place, seen.i, rowstats.as_column(block.statistics))
        beyond = scores.distance(place, seen.i, seen.j) - near
        return far + tl.sum(ds * beyond, 1)


@triton.jit
def store_slope_shares(call, given, wanted, place, first, far, known, statistics, ROWS: tl.constexpr):
    """−Σ dS·distance of each row, where it is wanted; known: what dS sums to."""
    if wanted.dslopes is not None:
        row_ids = tl.arange(0, ROWS)
        near = common.nearest(call, given, place, first + row_ids, statistics)
        share = -(far + tl.where(near == 0.0, 0.0, known * near))
        at = tiles.moved(place, first, 0)
        memory.store_statistic(wanted.dslopes, at, row_ids, first + row_ids < place.n, share)


@triton.jit
def vjp_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ, statistics, dbias and the shares of sinks and slopes of a block of queries."""
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        row_ids = tl.arange(0, ROWS)
        rows, at = first + row_ids, tiles.moved(place, first, 0)
        inside = rows < place.n
        statistics, do = row_statistics(call, given, at, row_ids, inside, VALUE)
        if given.statistics is not None:
            rowstats.store_statistics(given.statistics, at, row_ids, inside, statistics)
        if wanted.dsinks is not None:
            dsinks = -common.sink_probability(call, place, statistics) * statistics.d
            memory.store_statistic(wanted.dsinks, at, row_ids, inside, dsinks)
        if (wanted.dq is not None) | (wanted.dbias is not None) | (wanted.dslopes is not None):
            span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
            idle = scores.idle_rows(call, place, statistics)
            q = memory.load_rows(call.q, at, row_ids, inside, idle, HEAD)
            block = Block(call, given, wanted, place, span, first, (q, do), statistics)
            FORM: tl.constexpr = (KEYS, ROWS, HEAD, VALUE, PRECISION)
            zero = tl.zeros_like(statistics.d)
            state = (products.zeros_if(wanted.dq, ROWS, HEAD), zero, zero)
            dq, lack, far = tiles.sweep(visit_keys, state, block, span, FORM)
            known = common.known_sum(call, given, at, row_ids, inside, statistics)
            store_slope_shares(call, given, wanted, place, first, far, known, statistics, ROWS)
            dq = common.add_mean_key(dq, lack, known, call.softcap, block, call.k, 1.0, HEAD, FORM)
            memory.store_rows(wanted.dq, at, row_ids, inside, dq, call.scale, HEAD)


@triton.jit
def store_slope_shares_of_all(wanted, place, at, i, j, row_ids, inside, ds):
    """The same of a tile [all keys, queries]."""
    if wanted.dslopes is not None:
        share = -tl.sum(ds * scores.distance(place, i, j), 0)
        memory.store_statistic(wanted.dslopes, at, row_ids, inside, share)


@triton.jit
def visit_queries(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of queries to (dK / scale, dV)."""
    ROWS: tl.constexpr = FORM[0]
    KEYS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    TWICE: tl.constexpr = FORM[5]
    dk, dv = state
    call, given, wanted, place = block.call, block.given, block.wanted, block.place
    k, v = block.held
    row_ids, key_ids = tl.arange(0, ROWS), tl.arange(0, KEYS)
    rows, keys = start + row_ids, block.first + key_ids
    at = tiles.moved(place, start, block.first)
    i, j = rows[None, :], keys[:, None]
    inside = tiles.partners_inside(block, rows, MASKED)
    zero = tl.zeros([KEYS, ROWS], tl.float32)
    statistics = rowstats.statistics_of(call, given, at, row_ids, rows < place.n, inside, False)
    idle = scores.idle_rows(call, place, statistics)
    q = memory.load_rows(call.q, at, row_ids, inside, idle, HEAD)
    s, bend = scores.scores(call, place, products.dot_features(k, q, zero, PRECISION), i, j, MASKED)
    do = memory.load_rows_if(given.do, at, row_ids, inside, idle, VALUE)
    dp = products.dot_features(v, do, zero, PRECISION)
    z = scores.dropout(call, place, start, block.first, ROWS, KEYS, True)
    p = scores.probability(call, s, statistics.reference[None, :], statistics.log_total[None, :])
    dpz = scores.times(dp, z)
    d = statistics.d
    if given.statistics is None:
        d = d_of_all_keys(call, given, at, row_ids, inside, s, p, dpz, MASKED)
        d = tl.where(statistics.reference == float("inf"), 0.0, d)
    ds, dr = first_order(call, Scores(i, j, s, bend, p, z), dpz, d[None, :], MASKED)
    if given.statistics is None:
        memory.store_entries(wanted.dbias, place, i, j, ds)
        if wanted.dq is not None:
            seen = products.without(k, scores.unseen_of_all(call, s))
            dq = products.add_product(products.zeros(ROWS, HEAD), dr.T, seen, PRECISION, True)
            memory.store_rows(wanted.dq, at, row_ids, rows < place.n, dq, call.scale, HEAD)
        if wanted.dsinks is not None:
            dsinks = -common.sink_probability(call, place, statistics) * d
            memory.store_statistic(wanted.dsinks, at, row_ids, rows < place.n, dsinks)
        store_slope_shares_of_all(wanted, place, at, i, j, row_ids, rows < place.n, ds)
    alone: tl.constexpr = given.statistics is None
    return (
        # in two parts: rows' cotangents may cancel what their queries share
        products.add_product(dk, dr, q, PRECISION, TWICE),
        products.add_product(dv, scores.times(p, z), do, PRECISION, alone),
    )


@triton.jit
def vjp_keys(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys, summed over the query heads that share it."""
    place, first = tiles.block_of_keys(call, blocks, KEYS)
    if tiles.has_work(given, first, place.m):
        key_ids = tl.arange(0, KEYS)
        keys, at = first + key_ids, tiles.moved(place, 0, first)
        inside = keys < place.m
        span = tiles.span_of_keys(call, given, place, first, KEYS, ROWS)
        k = memory.load_keys(call.k, at, key_ids, inside, HEAD)
        v = memory.load_keys(call.v, at, key_ids, inside, VALUE)
        dk, dv = products.zeros_if(wanted.dk, KEYS, HEAD), products.zeros_if(wanted.dv, KEYS, VALUE)
        for member in range(call.group):
            one = tiles.at_head(place, place.kv_head * call.group + member)
            block = Block(call, given, wanted, one, span, first, (k, v), None)
            FORM: tl.constexpr = (ROWS, KEYS, HEAD, VALUE, PRECISION, TWICE)
            dk, dv = tiles.sweep(visit_queries, (dk, dv), block, span, FORM)
        memory.store_keys(wanted.dk, at, key_ids, inside, dk, call.scale, HEAD)
        memory.store_keys(wanted.dv, at, key_ids, inside, dv, 1.0, VALUE)
