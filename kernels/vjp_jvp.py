"""vjp_jvp: the tangent of the first backward, dO and dL held fixed.

With Pt = P∘(T − τ) and E = Z∘(dO Cᵀ): dSt = Pt∘(dP − D) + P∘(E − Dt), dRt = s1∘dSt + s2∘TR∘dS. Row and column passes
as in vjp.
"""

from __future__ import annotations

import triton
import triton.language as tl

from metattn.kernels import tiles
from metattn.kernels.vjp import d_of_all_keys, row_statistics, sink_probability


@triton.jit
def second_order(call, s, p, bend, pt, dpz, ez, tr, d, dt, MASKED: tl.constexpr):
    """(dSt, dRt, dR) of a tile; dpz is dP, ez is E."""
    ds = tiles.shown(call, s, p * (dpz - d), MASKED)
    dst = tiles.shown(call, s, pt * (dpz - d) + p * (ez - dt), MASKED)
    dr, drt = ds, dst
    if bend is not None:
        slope = tiles.slope_of(bend)
        dr = slope * ds
        drt = tiles.shown(call, s, slope * dst + tiles.curve_of(call, bend) * tr * ds, MASKED)
    return dst, drt, dr


@triton.jit
def sink_share(call, given, place, statistics):
    """dSts = −Pts∘D − Ps∘Dt of each row [*], with Pts = Ps∘(σ − τ)."""
    moved = -statistics.tau
    if given.sigma is not None:
        moved += tiles.load_per_head(given.sigma, place)
    return -sink_probability(call, place, statistics) * (moved * statistics.d + statistics.dt)


@triton.jit
def visit_keys(dq, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to dQt / scale, and stores the tangent of the bias' gradient."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    call, given, place = block.call, block.given, block.place
    q, a, do = block.held
    rows, keys = block.first + tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    i, j = rows[:, None], keys[None, :]
    inside = tiles.partners_inside(block, keys, MASKED)
    zero = tl.zeros([ROWS, KEYS], tl.float32)
    k = tiles.load_keys(call.k, place, keys, inside, HEAD)
    s, bend = tiles.scores(call, place, tiles.dot_features(q, k, zero, PRECISION), i, j, MASKED)
    v = tiles.load_keys_if(do is not None, call.v, place, keys, inside, VALUE)
    dp = tiles.dot_features(do, v, zero, PRECISION)
    c = tiles.load_keys_if(do is not None, given.c, place, keys, inside, VALUE)
    e = tiles.dot_features(do, c, zero, PRECISION)
    b = tiles.load_keys_if(True, given.b, place, keys, inside, HEAD)
    tr = tiles.dot_features(q, b, tiles.dot_features(a, k, zero, PRECISION), PRECISION) * call.scale
    z = tiles.dropout(call, place, block.first, start, ROWS, KEYS, False)
    statistics = tiles.as_column(block.statistics)
    p = tiles.probability(s, statistics.high, statistics.low)
    t = tiles.score_tangent(call, given, place, s, bend, tr, i, j, MASKED)
    pt, dpz, ez = p * (t - statistics.tau), tiles.times(dp, z), tiles.times(e, z)
    dst, drt, dr = second_order(call, s, p, bend, pt, dpz, ez, tr, statistics.d, statistics.dt, MASKED)
    tiles.store_entries(block.wanted.dbias, place, i, j, dst)
    unseen = tiles.unseen_keys(call, s)
    dq = tiles.add_product(dq, drt, tiles.without(k, unseen), PRECISION)
    if b is not None:
        dq = tiles.add_product(dq, dr, tiles.without(b, unseen), PRECISION)
    return dq


@triton.jit
def vjp_jvp_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQt, statistics, the bias' and the sinks' shares of a block of queries."""
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        rows = first + tl.arange(0, ROWS)
        inside = rows < place.n
        known, do = row_statistics(call, given, place, rows, inside, VALUE)
        nothing = known.high == float("inf")
        tau = tiles.load_statistic(given.lse_t, place, rows, inside).to(tl.float32)
        dt = tl.zeros_like(tau)
        if do is not None:
            dt += tiles.row_dots(do, tiles.load_in_two(given.o_t, given.o_t_lo, place, rows, inside, VALUE))
        tau, dt = tl.where(nothing, 0.0, tau), tl.where(nothing, 0.0, dt)
        statistics = tiles.Statistics(known.high, known.low, known.d, tau, dt)
        if given.statistics is not None:
            tiles.store_statistics(given.statistics, place, rows, inside, statistics)
        if wanted.dsinks is not None:
            dsinks = sink_share(call, given, place, statistics)
            tiles.store_statistic(wanted.dsinks, place, rows, inside, dsinks)
        if (wanted.dq is not None) | (wanted.dbias is not None):
            span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
            idle = tiles.idle_rows(call, place, statistics)
            q = tiles.load_rows(call.q, place, rows, inside, idle, HEAD)
            a = tiles.load_rows_if(given.a, place, rows, inside, idle, HEAD)
            block = tiles.Block(call, given, wanted, place, span, first, (q, a, do), statistics)
            dq = tiles.zeros_if(wanted.dq, ROWS, HEAD)
            dq = tiles.sweep(visit_keys, dq, block, span, (KEYS, ROWS, HEAD, VALUE, PRECISION))
            tiles.store_rows(wanted.dq, place, rows, inside, dq, call.scale, HEAD)


@triton.jit
def visit_queries(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of queries to (dKt / scale, dVt)."""
    ROWS: tl.constexpr = FORM[0]
    KEYS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    dk, dv = state
    call, given, wanted, place = block.call, block.given, block.wanted, block.place
    k, b, v, c = block.held
    rows, keys = start + tl.arange(0, ROWS), block.first + tl.arange(0, KEYS)
    i, j = rows[None, :], keys[:, None]
    inside = tiles.partners_inside(block, rows, MASKED)
    zero = tl.zeros([KEYS, ROWS], tl.float32)
    statistics = tiles.statistics_of(given, place, rows, inside, True)
    idle = tiles.idle_rows(call, place, statistics)
    q = tiles.load_rows(call.q, place, rows, inside, idle, HEAD)
    s, bend = tiles.scores(call, place, tiles.dot_features(k, q, zero, PRECISION), i, j, MASKED)
    a = tiles.load_rows_if(given.a, place, rows, inside, idle, HEAD)
    do = tiles.load_rows_if(given.do, place, rows, inside, idle, VALUE)
    dp = tiles.dot_features(v, do, zero, PRECISION)
    e = tiles.dot_features(c, do, zero, PRECISION)
    tr = tiles.dot_features(b, q, tiles.dot_features(k, a, zero, PRECISION), PRECISION) * call.scale
    z = tiles.dropout(call, place, start, block.first, ROWS, KEYS, True)
    p = tiles.probability(s, statistics.high[None, :], statistics.low[None, :])
    t = tiles.score_tangent(call, given, place, s, bend, tr, i, j, MASKED)
    dpz, ez = tiles.times(dp, z), tiles.times(e, z)
    d, dt, tau = statistics.d, statistics.dt, statistics.tau
    if given.statistics is None:
        nothing = statistics.high == float("inf")
        d = d_of_all_keys(call, given, place, rows, inside, s, p, dpz, MASKED)
        tau = tl.sum(tiles.shown(call, s, p * t, MASKED), 0)
        if given.sigma is not None:
            tau += sink_probability(call, place, statistics) * tiles.load_per_head(given.sigma, place)
        d, tau = tl.where(nothing, 0.0, d), tl.where(nothing, 0.0, tau)
    pt = p * (t - tau[None, :])
    if given.statistics is None:
        dt = tl.sum(tiles.shown(call, s, pt * dpz + p * ez, MASKED), 0)
    dst, drt, dr = second_order(call, s, p, bend, pt, dpz, ez, tr, d[None, :], dt[None, :], MASKED)
    ptz = tiles.times(tiles.shown(call, s, pt, MASKED), z)
    if given.statistics is None:
        there, unseen = rows < place.n, tiles.unseen_of_all(call, s)
        tiles.store_entries(wanted.dbias, place, i, j, dst)
        if wanted.dq is not None:
            dq = tiles.add_product(tiles.zeros(ROWS, HEAD), drt.T, tiles.without(k, unseen), PRECISION, True)
            if b is not None:
                dq = tiles.add_product(dq, dr.T, tiles.without(b, unseen), PRECISION, True)
            tiles.store_rows(wanted.dq, place, rows, there, dq, call.scale, HEAD)
        if wanted.dsinks is not None:
            dsinks = sink_share(call, given, place, tiles.Statistics(statistics.high, statistics.low, d, tau, dt))
            tiles.store_statistic(wanted.dsinks, place, rows, there, dsinks)
        if wanted.o is not None:
            ot = tiles.add_product(tiles.zeros(ROWS, VALUE), ptz.T, tiles.without(v, unseen), PRECISION, True)
            if c is not None:
                pz = tiles.times(p, z).T
                ot = tiles.add_product(ot, pz, tiles.without(c, unseen), PRECISION, True)
            tiles.store_in_two(wanted.o, wanted.o_lo, place, rows, there, ot, VALUE)
            tiles.store_statistic(wanted.lse, place, rows, there, tau)
    alone: tl.constexpr = given.statistics is None
    dk = tiles.add_product(tiles.add_product(dk, drt, q, PRECISION, alone), dr, a, PRECISION, alone)
    return dk, tiles.add_product(dv, ptz, do, PRECISION, alone)


@triton.jit
def vjp_jvp_keys(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dKt and dVt of a block of keys, summed over the query heads that share it."""
    place, first = tiles.block_of_keys(call, blocks, KEYS)
    if tiles.has_work(given, first, place.m):
        keys = first + tl.arange(0, KEYS)
        inside = keys < place.m
        span = tiles.span_of_keys(call, given, place, first, KEYS, ROWS)
        k = tiles.load_keys(call.k, place, keys, inside, HEAD)
        b = tiles.load_keys_if(True, given.b, place, keys, inside, HEAD)
        # dO or Ot asks for the values
        of_values: tl.constexpr = (given.do is not None) or (wanted.o is not None)
        v = tiles.load_keys_if(of_values, call.v, place, keys, inside, VALUE)
        c = tiles.load_keys_if(of_values, given.c, place, keys, inside, VALUE)
        dk, dv = tiles.zeros_if(wanted.dk, KEYS, HEAD), tiles.zeros_if(wanted.dv, KEYS, VALUE)
        for member in range(call.group):
            one = tiles.at_head(place, place.kv_head * call.group + member)
            block = tiles.Block(call, given, wanted, one, span, first, (k, b, v, c), None)
            dk, dv = tiles.sweep(visit_queries, (dk, dv), block, span, (ROWS, KEYS, HEAD, VALUE, PRECISION))
        tiles.store_keys(wanted.dk, place, keys, inside, dk, call.scale, HEAD)
        tiles.store_keys(wanted.dv, place, keys, inside, dv, 1.0, VALUE)
