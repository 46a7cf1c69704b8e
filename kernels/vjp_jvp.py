"""vjp_jvp: the tangent of the first backward, dO and dL held fixed.

With Pt = P∘(T − τ) and E = Z∘(dO Cᵀ): dSt = Pt∘(dP − D) + P∘(E − Dt), dRt = s1∘dSt + s2∘TR∘dS. Row and
column passes as in vjp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import common, memory, products, row_tiles, rowstats, scores, tiles
from .call import Block, Scores, Statistics, Tile, absent
from .vjp import (
    add_distances,
    d_of_all_keys,
    row_statistics,
    store_slope_shares,
    store_slope_shares_of_all,
)


@triton.jit
def second_order(call, tile, pt, statistics, MASKED: tl.constexpr):
    """(dSt, dRt, dR) of a Tile; pt is Pt, statistics broadcast to it."""
    seen, lifted = tile.seen, tile.dp - statistics.d
    ds = scores.shown(call, seen.s, seen.p * lifted, MASKED)
    dst = scores.shown(call, seen.s, pt * lifted + seen.p * (tile.e - statistics.dt), MASKED)
    dr, drt = ds, dst
    if not absent(seen.bend):
        slope = scores.slope_of(seen.bend)
        dr = slope * ds
        drt = scores.shown(
            call, seen.s, slope * dst + scores.curve_of(call, seen.bend) * tile.tr * ds, MASKED
        )
    return dst, drt, dr


@triton.jit
def sink_share(call, given, place, statistics):
    """dSts = −Pts∘D − Ps∘Dt of each row [*], with Pts = Ps∘(σ − τ)."""
    moved = -statistics.tau
    if given.sigma is not None:
        moved += memory.load_per_head(given.sigma, place)
    return -common.sink_probability(call, place, statistics) * (moved * statistics.d + statistics.dt)


@triton.jit
def visit_keys(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to (dQt / scale, what the weights of k and b lack, Σ dSt·distance).

    And stores the tangent of the bias' gradient.
    """
    PRECISION: tl.constexpr = FORM[4]
    call = block.call
    dq, lack, lack_b, far = state
    tile, k, b, _, _ = row_tiles.all_of(block, start, MASKED, FORM)
    seen, statistics = tile.seen, rowstats.as_column(block.statistics)
    dst, drt, dr = second_order(call, tile, seen.p * (tile.t - statistics.tau), statistics, MASKED)
    memory.store_entries(block.wanted.dbias, block.place, seen.i, seen.j, dst)
    far = add_distances(far, block, seen, dst)
    unseen = scores.unseen_keys(call, seen.s)
    dq = products.add_product(dq, drt, products.without(k, unseen), PRECISION)
    # a product with no B leaves what it is added to
    dq = products.add_product(dq, dr, products.without(b, unseen), PRECISION)
    return dq, common.counted(lack, drt, k, call.softcap), common.counted(lack_b, dr, b, call.softcap), far


@triton.jit
def vjp_jvp_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQt, statistics, the bias' and the sinks' shares of a block of queries."""
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        row_ids = tl.arange(0, ROWS)
        rows, at = first + row_ids, tiles.moved(place, first, 0)
        inside = rows < place.n
        known, do = row_statistics(call, given, at, row_ids, inside, VALUE)
        nothing = known.reference == float("inf")
        tau = memory.load_statistic(given.lse_t, at, row_ids, inside).to(tl.float32)
        dt = tl.zeros_like(tau)
        if not absent(do):
            dt += products.row_dots(
                do, memory.load_in_two(given.o_t, given.o_t_lo, at, row_ids, inside, VALUE)
            )
        tau, dt = tl.where(nothing, 0.0, tau), tl.where(nothing, 0.0, dt)
        statistics = Statistics(known.reference, known.log_total, known.d, tau, dt)
        if given.statistics is not None:
            rowstats.store_statistics(given.statistics, at, row_ids, inside, statistics)
        if wanted.dsinks is not None:
            dsinks = sink_share(call, given, place, statistics)
            memory.store_statistic(wanted.dsinks, at, row_ids, inside, dsinks)
        if (wanted.dq is not None) | (wanted.dbias is not None) | (wanted.dslopes is not None):
            span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
            idle = scores.idle_rows(call, place, statistics)
            q = memory.load_rows(call.q, at, row_ids, inside, idle, HEAD)
            a = memory.load_rows_if(given.a, at, row_ids, inside, idle, HEAD)
            block = Block(call, given, wanted, place, span, first, (q, a, do), statistics)
            FORM: tl.constexpr = (KEYS, ROWS, HEAD, VALUE, PRECISION)
            zero = tl.zeros_like(statistics.d)
            state = (products.zeros_if(wanted.dq, ROWS, HEAD), zero, zero, zero)
            dq, lack, lack_b, far = tiles.sweep(visit_keys, state, block, span, FORM)
            known_b = common.known_sum(call, given, at, row_ids, inside, statistics)
            known = common.known_sum_of_tangent(call, given, place, statistics)
            store_slope_shares(call, given, wanted, place, first, far, known, statistics, ROWS)
            bent = call.softcap
            dq = common.add_mean_key(dq, lack, known, bent, block, call.k, 1.0, HEAD, FORM)
            dq = common.add_mean_key(dq, lack_b, known_b, bent, block, given.b, 1.0, HEAD, FORM)
            memory.store_rows(wanted.dq, at, row_ids, inside, dq, call.scale, HEAD)


@triton.jit
def visit_queries(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of queries to (dKt / scale, dVt)."""
    ROWS: tl.constexpr = FORM[0]
    KEYS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    TWICE: tl.constexpr = FORM[5]
    dk, dv = state
    call, given, wanted, place = block.call, block.given, block.wanted, block.place
    k, b, v, c = block.held
    row_ids, key_ids = tl.arange(0, ROWS), tl.arange(0, KEYS)
    rows, keys = start + row_ids, block.first + key_ids
    at = tiles.moved(place, start, block.first)
    i, j = rows[None, :], keys[:, None]
    inside = tiles.partners_inside(block, rows, MASKED)
    zero = tl.zeros([KEYS, ROWS], tl.float32)
    statistics = rowstats.statistics_of(call, given, at, row_ids, rows < place.n, inside, True)
    idle = scores.idle_rows(call, place, statistics)
    q = memory.load_rows(call.q, at, row_ids, inside, idle, HEAD)
    s, bend = scores.scores(call, place, products.dot_features(k, q, zero, PRECISION), i, j, MASKED)
    a = memory.load_rows_if(given.a, at, row_ids, inside, idle, HEAD)
    do = memory.load_rows_if(given.do, at, row_ids, inside, idle, VALUE)
    dp = products.dot_features(v, do, zero, PRECISION)
    e = products.dot_features(c, do, zero, PRECISION)
    tr = products.dot_features(b, q, products.dot_features(k, a, zero, PRECISION), PRECISION) * call.scale
    z = scores.dropout(call, place, start, block.first, ROWS, KEYS, True)
    p = scores.probability(call, s, statistics.reference[None, :], statistics.log_total[None, :])
    t = scores.score_tangent(call, given, place, s, bend, tr, i, j, MASKED)
    dpz, ez = scores.times(dp, z), scores.times(e, z)
    d, dt, tau = statistics.d, statistics.dt, statistics.tau
    if given.statistics is None:
        nothing = statistics.reference == float("inf")
        d = d_of_all_keys(call, given, at, row_ids, inside, s, p, dpz, MASKED)
        tau = tl.sum(scores.shown(call, s, p * t, MASKED), 0)
        if given.sigma is not None:
            tau += common.sink_probability(call, place, statistics) * memory.load_per_head(given.sigma, place)
        d, tau = tl.where(nothing, 0.0, d), tl.where(nothing, 0.0, tau)
    pt = p * (t - tau[None, :])
    if given.statistics is None:
        dt = tl.sum(scores.shown(call, s, pt * dpz + p * ez, MASKED), 0)
    tile = Tile(Scores(i, j, s, bend, p, z), tr, t, dpz, ez)
    known = Statistics(statistics.reference, statistics.log_total, d, tau, dt)
    dst, drt, dr = second_order(call, tile, pt, rowstats.as_row(known), MASKED)
    ptz = scores.times(scores.shown(call, s, pt, MASKED), z)
    if given.statistics is None:
        there, unseen = rows < place.n, scores.unseen_of_all(call, s)
        memory.store_entries(wanted.dbias, place, i, j, dst)
        if wanted.dq is not None:
            dq = products.add_product(
                products.zeros(ROWS, HEAD), drt.T, products.without(k, unseen), PRECISION, True
            )
            if not absent(b):
                dq = products.add_product(dq, dr.T, products.without(b, unseen), PRECISION, True)
            memory.store_rows(wanted.dq, at, row_ids, there, dq, call.scale, HEAD)
        if wanted.dsinks is not None:
            memory.store_statistic(wanted.dsinks, at, row_ids, there, sink_share(call, given, place, known))
        store_slope_shares_of_all(wanted, place, at, i, j, row_ids, there, dst)
        if wanted.o is not None:
            ot = products.add_product(
                products.zeros(ROWS, VALUE), ptz.T, products.without(v, unseen), PRECISION, True
            )
            if not absent(c):
                pz = scores.times(p, z).T
                ot = products.add_product(ot, pz, products.without(c, unseen), PRECISION, True)
            memory.store_in_two(wanted.o, wanted.o_lo, at, row_ids, there, ot, VALUE)
            memory.store_statistic(wanted.lse, at, row_ids, there, tau)
    alone: tl.constexpr = given.statistics is None
    return (
        # in two parts: rows' cotangents may cancel what their queries share
        products.add_product(products.add_product(dk, drt, q, PRECISION, TWICE), dr, a, PRECISION, TWICE),
        products.add_product(dv, ptz, do, PRECISION, alone),
    )


@triton.jit
def vjp_jvp_keys(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """dKt and dVt of a block of keys, summed over the query heads that share it."""
    place, first = tiles.block_of_keys(call, blocks, KEYS)
    if tiles.has_work(given, first, place.m):
        key_ids = tl.arange(0, KEYS)
        keys, at = first + key_ids, tiles.moved(place, 0, first)
        inside = keys < place.m
        span = tiles.span_of_keys(call, given, place, first, KEYS, ROWS)
        k = memory.load_keys(call.k, at, key_ids, inside, HEAD)
        # dO or Ot asks for the values
        of_values: tl.constexpr = (given.do is not None) or (wanted.o is not None)
        b, v, c = (
            memory.load_keys_if(True, given.b, at, key_ids, inside, HEAD),
            memory.load_keys_if(of_values, call.v, at, key_ids, inside, VALUE),
            memory.load_keys_if(of_values, given.c, at, key_ids, inside, VALUE),
        )
        dk, dv = products.zeros_if(wanted.dk, KEYS, HEAD), products.zeros_if(wanted.dv, KEYS, VALUE)
        for member in range(call.group):
            one = tiles.at_head(place, place.kv_head * call.group + member)
            block = Block(call, given, wanted, one, span, first, (k, b, v, c), None)
            FORM: tl.constexpr = (ROWS, KEYS, HEAD, VALUE, PRECISION, TWICE)
            dk, dv = tiles.sweep(visit_queries, (dk, dv), block, span, FORM)
        memory.store_keys(wanted.dk, at, key_ids, inside, dk, call.scale, HEAD)
        memory.store_keys(wanted.dv, at, key_ids, inside, dv, 1.0, VALUE)
