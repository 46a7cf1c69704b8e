"""jvp and the row pass of vjp_jvp in one sweep over the keys: 10 products instead of 12 (docs/math.md).

τ and Dt, which are known at the end of a sweep only, enter Ot and dQt linearly. With any guesses t and u of
them,

    Pt = P∘(T − t)    W = Pt∘(dP − D) + P∘(E − u)
    Ot = (Pt∘Z)V + (P∘Z)C − (τ − t)·O
    dQt = scale·[(s1∘W + s2∘TR∘dS)K + dR·B − (Dt − u)·(s1∘P)K] − (τ − t)·dQ

where O and dQ are those of the first two maps. The guesses are means over one block of keys. Bad ones cost
digits. Weights are rounded to two bytes before they are multiplied: those of Ot are as large as if T
had spread by τ − t too, those of dQt as if (dP − D)∘(T − t) + E had by Dt − u. And dQ was rounded, and
the weights of O. A block of queries whose guesses are off by more than the spreads themselves, or whose
last term exceeds dQt or Ot, is swept once more, with the τ and Dt that the first sweep found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import common, memory, products, row_tiles, rowstats, scores, tiles
from .call import Block, Statistics, absent
from .jvp import block_of_means, finite_or_0, inverse_or_0, mean_tangent
from .vjp import row_statistics
from .vjp_jvp import second_order, sink_share


@triton.jit
def visit(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to (τ − t, Ot, dQt / scale, (s1∘P)K, what the weights of K, of (s1∘P)K, B and C
    lack).
    """
    PRECISION: tl.constexpr = FORM[4]
    excess, ot, dq, pk, lack, lack_p, lack_b, lack_c = state
    call, guessed = block.call, rowstats.as_column(block.statistics)
    tile, k, b, v, c = row_tiles.all_of(block, start, MASKED, FORM)
    seen = tile.seen
    pt = scores.shown(call, seen.s, seen.p * (tile.t - guessed.tau), MASKED)
    _, drt, dr = second_order(call, tile, pt, guessed, MASKED)
    unseen = scores.unseen_keys(call, seen.s)
    k, v = products.without(k, unseen), products.without(v, unseen)
    dq = products.add_product(dq, drt, k, PRECISION)
    dq = products.add_product(dq, dr, products.without(b, unseen), PRECISION)
    slope = scores.shown(call, seen.s, scores.slope_of(seen.bend) * seen.p, MASKED)
    pk = products.add_product(pk, slope, k, PRECISION)
    # in two parts: Dt = rowsum(dO∘Ot) is to cancel with what is not rounded
    ot = products.add_product(ot, scores.times(pt, seen.z), v, PRECISION, True)
    pz = scores.times(seen.p, seen.z)
    ot = products.add_product(ot, pz, products.without(c, unseen), PRECISION)
    lack, lack_p = common.counted(lack, drt, k, call.softcap), common.counted(lack_p, slope, k, call.softcap)
    lack_b = common.counted(lack_b, dr, b, call.softcap)
    if not as_of_keys(call.softcap, call.rng):
        lack_c = common.counted(lack_c, pz, c, call.rng)
    return excess + tl.sum(pt, 1), ot, dq, pk, lack, lack_p, lack_b, lack_c


@triton.jit
def add_mean_by_weights(call, dq, lack, known, lack_p, pk, block, HEAD: tl.constexpr, FORM: tl.constexpr):
    """common.add_mean_key of dQt, with the mean by the row's own weights, (s1∘P)K over their sum.

    So it takes off what an error of Dt has added, too. With a softcap the sum of s1∘P is not known.
    """
    if (call.softcap is None) & (call.k.ptr.dtype.element_ty != tl.float32):
        lack += known
        share = tl.where(products.finite(lack) & (lack_p < 0.0), -lack / tl.minimum(lack_p, -1e-30), 0.0)
        return products.plus_finite(dq, (share * call.scale)[:, None], pk)
    else:
        return common.add_mean_key(dq, lack, known, call.softcap, block, call.k, call.scale, HEAD, FORM, True)


@triton.constexpr_function
def as_of_keys(softcap, rng):
    """Whether C has the weights of (s1∘P)K."""
    return softcap is None and rng is None


@triton.jit
def guesses(block, FORM: tl.constexpr):
    """(t, u [rows], Σ of T's squared distances from t, Σ of those of (dP − D)∘(T − t) + E from u).

    They are means over a block of keys, one that all queries of the block attend to where there is such; the
    squares' weights are P², as those of rounding errors.
    """
    call, span, known = block.call, block.span, rowstats.as_column(block.statistics)
    tile, _, _, _, _ = row_tiles.all_of(block, block_of_means(span), True, FORM)
    s, p = tile.seen.s, scores.shown(call, tile.seen.s, tile.seen.p, True)
    share = inverse_or_0(tl.sum(p, 1))
    t = mean_tangent(block, tile.seen, tile.t, True)
    shifted = tile.t - t[:, None]
    x = scores.shown(call, s, (tile.dp - known.d) * shifted + tile.e, True)
    u = finite_or_0(tl.sum(p * x, 1) * share)
    square = p * p
    share = inverse_or_0(tl.sum(square, 1))
    off = x - u[:, None]
    spread_t = finite_or_0(tl.sum(square * shifted * shifted, 1) * share)
    spread_u = finite_or_0(tl.sum(square * off * off, 1) * share)
    return t, u, tl.sum(spread_t, 0), tl.sum(spread_u, 0)


@triton.jit
def total_of_squares(x, factor):
    """Σ (factor·x)² of a block (main, rest), the factor of each row [rows]."""
    total = tl.sum(factor * factor * tl.sum(x[0] * x[0], 1), 0)
    if not absent(x[1]):
        total += tl.sum(factor * factor * tl.sum(x[1] * x[1], 1), 0)
    return total


@triton.jit
def double_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Ot, what rounding it lost, τ, dQt, statistics and the sinks' shares of a block of queries."""
    FORM: tl.constexpr = (KEYS, ROWS, HEAD, VALUE, PRECISION)
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        row_ids, at = tl.arange(0, ROWS), tiles.moved(place, first, 0)
        inside = first + row_ids < place.n
        known, do = row_statistics(call, given, at, row_ids, inside, VALUE)
        seen = known.reference != float("inf")
        idle = scores.idle_rows(call, place, known)
        q = memory.load_rows(call.q, at, row_ids, inside, idle, HEAD)
        a = memory.load_rows_if(given.a, at, row_ids, inside, idle, HEAD)
        span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
        zero = tl.zeros_like(known.d)
        start = Statistics(known.reference, known.log_total, known.d, zero, zero)
        held = (q, a, do)
        t, u, spread_t, spread_u = guesses(Block(call, given, wanted, place, span, first, held, start), FORM)
        sweep, sweeps = 0, 1
        while sweep < sweeps:
            statistics = Statistics(known.reference, known.log_total, known.d, t, u)
            block = Block(call, given, wanted, place, span, first, held, statistics)
            of_keys = products.zeros(ROWS, HEAD)
            state = (zero, products.zeros(ROWS, VALUE), of_keys, of_keys, zero, zero, zero, zero)
            excess, ot, dq, pk, lack, lack_p, lack_b, lack_c = tiles.sweep(visit, state, block, span, FORM)
            if as_of_keys(call.softcap, call.rng):
                lack_c = lack_p
            mass = common.known_mass(call, at, known)
            ot = common.add_mean_key(ot, lack_c, mass, call.rng, block, given.c, 1.0, VALUE, FORM, True)
            if call.sinks is not None:
                sigma = 0.0
                if given.sigma is not None:
                    sigma = memory.load_per_head(given.sigma, place)
                excess += common.sink_probability(call, place, statistics) * (sigma - t)
            excess = tl.where(seen, excess, 0.0)
            o = memory.load_in_two(given.o, given.o_lo, at, row_ids, inside, VALUE)
            ot = products.where_rows(seen == 0, 0.0, products.minus(ot, excess[:, None], o))
            # O's weights were rounded: an error that its multiple carries into Ot
            much_o = total_of_squares(o, excess) > total_of_squares(ot, seen.to(tl.float32))
            memory.store_in_two(wanted.o, wanted.o_lo, at, row_ids, inside, ot, VALUE)
            tau = tl.where(seen, t.to(tl.float64) + excess.to(tl.float64), 0.0)
            memory.store_statistic(wanted.lse, at, row_ids, inside, tau)
            # loaded again: what is held over the sweep for use behind it takes registers from it
            again = memory.load_rows(given.do, at, row_ids, inside, idle, VALUE)
            dt = tl.where(seen, products.row_dots(again, ot), 0.0)
            further = tl.where(seen, dt - u, 0.0)
            dq = products.minus(products.scaled(dq, call.scale), (further * call.scale)[:, None], pk)
            first_dq = memory.load_in_two(given.dq, None, at, row_ids, inside, HEAD)
            dq = products.minus(dq, excess[:, None], first_dq)
            found = Statistics(known.reference, known.log_total, known.d, tau.to(tl.float32), dt)
            # the weights of K are those of dQt, and as many of dQ as were taken off
            sum_ds = common.known_sum(call, given, at, row_ids, inside, known)
            sum_dst = common.known_sum_of_tangent(call, given, place, found) + excess * sum_ds
            lack -= further * lack_p
            bent = call.softcap
            dq = add_mean_by_weights(call, dq, lack, sum_dst, lack_p, pk, block, HEAD, FORM)
            dq = common.add_mean_key(dq, lack_b, sum_ds, bent, block, given.b, call.scale, HEAD, FORM, True)
            dq = products.where_rows(seen == 0, 0.0, dq)
            memory.store_rows(wanted.dq, at, row_ids, inside, dq, 1.0, HEAD)
            rowstats.store_statistics(given.statistics, at, row_ids, inside, found)
            if wanted.dsinks is not None:
                dsinks = sink_share(call, given, place, found)
                memory.store_statistic(wanted.dsinks, at, row_ids, inside, dsinks)
            sweep += 1
            far_t = tl.sum(excess * excess, 0) > spread_t
            far_u = tl.sum(further * further, 0) > spread_u
            left = total_of_squares(dq, seen.to(tl.float32))
            much = total_of_squares(first_dq, excess) > left
            if (sweep == 1) & (far_t | far_u | much | much_o):
                sweeps, t, u = 2, found.tau, dt
