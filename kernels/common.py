"""What all keys share: weights whose sum is known cancel it, but not once they are rounded.

Derivatives of scores sum to 0 over the keys, or to what dL and a sink leave; probabilities to 1, or
to what a sink leaves. The products' weights miss that: they are rounded, and D comes of an O whose
weights were. What they lack is the weight of a mean of some keys that the row attends to; another
key would bring in what is masked. Nothing is done for float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import memory, products, row_tiles, scores, tiles
from .call import absent


@triton.jit
def sink_probability(call, place, statistics):
    """Ps = exp(s − L) of each row [*], 0 where nothing is attended."""
    return scores.probability(call, scores.sink(call, place), statistics.reference, statistics.log_total)


@triton.jit
def beside_sink(call, given, place, statistics):
    """1 − Ps of each row [*]; 1 where no sink makes what dS and dSt sum to differences of large numbers."""
    if (call.sinks is None) | (given.dlse is None):
        return tl.zeros_like(statistics.reference) + 1.0
    else:
        left = 1.0 - sink_probability(call, place, statistics)
        return tl.where(statistics.reference == float("inf"), 1.0, left)


@triton.jit
def where_known(call, given, place, statistics, total):
    """A row's sum, NaN where few digits are left of it: nothing is taken for lacking then."""
    return tl.where(beside_sink(call, given, place, statistics) > 1.0 / 4096, total, float("nan"))


@triton.jit
def nearest(call, given, place, i, statistics):
    """What distances of each row [*] are counted from: scores.nearest, or 0 where Σ dS is not known well."""
    left = beside_sink(call, given, place, statistics)
    return tl.where(left < 0.5, 0.0, scores.nearest(call, place, i))


@triton.jit
def known_sum(call, given, at, row_ids, inside, statistics):
    """Σ dS of each row [*] over the keys: dL, and D·Ps with a sink."""
    total = tl.zeros_like(statistics.reference)
    if given.dlse is not None:
        total += memory.load_statistic(given.dlse, at, row_ids, inside).to(tl.float32)
    if call.sinks is not None:
        total += sink_probability(call, at, statistics) * statistics.d
    total = tl.where(statistics.reference == float("inf"), 0.0, total)
    return where_known(call, given, at, statistics, total)


@triton.jit
def known_sum_of_tangent(call, given, place, statistics):
    """Σ dSt of each row [*]: with a sink Dt·Ps + D·Pst, where Pst = Ps·(σ − τ)."""
    total = tl.zeros_like(statistics.reference)
    if call.sinks is not None:
        moved = -statistics.tau
        if given.sigma is not None:
            moved += memory.load_per_head(given.sigma, place)
        total += sink_probability(call, place, statistics) * (statistics.dt + statistics.d * moved)
    total = tl.where(statistics.reference == float("inf"), 0.0, total)
    return where_known(call, given, place, statistics, total)


@triton.jit
def known_mass(call, at, statistics):
    """Σ P of each row [*] over the keys: 1 − Ps with a sink."""
    total = tl.where(statistics.reference == float("inf"), 0.0, 1.0)
    if call.sinks is not None:
        total -= tl.where(total == 0.0, 0.0, sink_probability(call, at, statistics))
    return total


@triton.constexpr_function
def has_two_bytes(x):
    """Of a block (main, rest), or ()."""
    return len(x) > 0 and x[0].dtype != tl.float32


@triton.jit
def counted(lack, weights, x, hidden):
    """`lack` [rows] less the weights that x is multiplied by.

    Plus what they lost, where an option (`hidden`, None without) leaves their sum unknown. lack itself where
    there is no x, or x is float32.
    """
    if not has_two_bytes(x):
        return lack
    else:
        multiplied = tl.sum(weights.to(x[0].dtype).to(tl.float32), 1)
        if hidden is None:
            return lack - multiplied
        else:
            return lack + (tl.sum(weights, 1) - multiplied)


@triton.constexpr_function
def wants_exact_d(softcap, slopes):
    """Whether the forward multiplies P in two parts, where it is rounded, so that O's D is exact.

    A softcap hides what D lacks, and the gradient of slopes weighs it by distances.
    """
    return softcap is not None or slopes is not None


@triton.jit
def part_mean(x, count):
    if absent(x):
        return ()
    else:
        mean = tl.sum(x.to(tl.float32), 0) / count
        return tl.where(products.finite(mean), mean, 0.0)[None, :]


@triton.jit
def add_shared_key(acc, weight, block, view, WIDTH: tl.constexpr, KEYS: tl.constexpr):
    """acc + weight·(the mean of the last keys that all rows of the block attend to)."""
    call, place = block.call, block.place
    high = place.m
    if call.right is not None:
        reach = tl.cast(place.offset, tl.int64) + call.right
        # the rows before attend to nothing
        high = tl.minimum(high, tl.maximum(block.first, -reach) + reach + 1)
    start = tl.cast(tl.maximum(0, high - KEYS), tl.int32)
    keys, count = tl.arange(0, KEYS), tl.maximum(high - start, 1).to(tl.float32)
    x = memory.load_keys(view, tiles.moved(place, 0, start), keys, start + keys < high, WIDTH)
    return products.minus(acc, -weight[:, None], (part_mean(x[0], count), part_mean(x[1], count)))


@triton.jit
def add_mean_key(
    acc, lack, known, hidden, block, view, factor, WIDTH: tl.constexpr, FORM: tl.constexpr,
    FEW: tl.constexpr = False,
):  # fmt: skip
    """acc + factor·(lack + known)·(a mean key, or value, of each row); acc itself where there is no view.

    known is what the weights that `lack` counted should sum to, if that is not `hidden`. The mean is over
    one block of keys; rows that attend to none of it have theirs in the first block that they do attend to.
    FEW: under a causal mask the first queries share the mean of few keys, which takes fewer registers.
    """
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    PRECISION: tl.constexpr = FORM[4]
    if absent(acc) | (view is None):  # noqa: SIM114 - Triton reads both sides of an `or`
        return acc
    elif view.ptr.dtype.element_ty == tl.float32:
        return acc
    else:
        call, span = block.call, block.span
        # whether position tells which keys all rows of a block attend to, and each block has such
        free: tl.constexpr = (call.mask is None) & (call.bias is None) & (call.left is None)
        if hidden is None:
            lack += known
        lack = tl.where(products.finite(lack), lack, 0.0)
        if free & (FEW | (call.right is None)):
            return add_shared_key(acc, lack * factor, block, view, WIDTH, KEYS)
        else:
            rows = block.first + tl.arange(0, ROWS)
            found, mean = tl.zeros([ROWS], tl.float32), products.zeros(ROWS, WIDTH)
            # the nearest before a query's own place: the first key of all is often unlike the others
            start = tl.where(span.full < span.tail, span.tail - KEYS, span.first)
            following, missing = span.first, 1
            while missing > 0:
                keys = start + tl.arange(0, KEYS)
                s, _ = scores.scores(
                    call, block.place, tl.zeros([ROWS, KEYS], tl.float32), rows[:, None], keys[None, :], True
                )
                s = tl.where(found[:, None] == 0.0, s, float("-inf"))
                chosen = tl.where(s != float("-inf"), 1.0, 0.0)
                x = row_tiles.keys_of(block, view, start, True, KEYS, WIDTH)
                mean = products.add_product(
                    mean, chosen, products.without(x, scores.unseen_keys(call, s)), PRECISION
                )
                found += tl.sum(chosen, 1)
                missing = tl.sum(((found == 0.0) & (lack != 0.0)).to(tl.int32), 0)
                missing = tl.where(following < span.end, missing, 0)
                start, following = following, following + KEYS
            share = factor * lack / tl.maximum(found, 1.0)
            return products.plus_finite(acc, share[:, None], mean)
