"""Scores with every option, their derivatives, dropout: each option is written here once.

The formulas and names are in docs/math.md. A tile of scores lies as [queries, keys] in a row pass and as
[keys, queries] in a column pass. These helpers do not care: they take query and key indices i and j, and row
statistics, already broadcast against each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import memory
from .call import LOG2E, absent


@triton.jit
def idle_rows(call, place, statistics):
    """The rows that attend to nothing; with a sink, those whose weight it has to the last digit. ():
    none.
    """
    if (call.mask is None) & (call.bias is None) & (call.left is None) & (call.right is None):
        return ()
    elif call.sinks is None:
        return statistics.reference == float("inf")
    else:
        all_at_sink = (statistics.reference == sink(call, place)) & (statistics.log_total == 0.0)
        return (statistics.reference == float("inf")) | all_at_sink


@triton.jit
def unseen_keys(call, s):
    """[keys] of a row pass' tile: those that no query of it attends to. (): mask and bias hide none."""
    if (call.mask is None) & (call.bias is None):
        return ()
    else:
        return tl.max((s != float("-inf")).to(tl.int32), 0) == 0


@triton.jit
def unseen_of_all(call, s):
    """The same of a tile [all keys, queries], whose keys were loaded whatever their position."""
    if (call.mask is None) & (call.bias is None) & (call.left is None) & (call.right is None):
        return ()
    else:
        return tl.max((s != float("-inf")).to(tl.int32), 1) == 0


@triton.jit
def tanh(x):
    """By a polynomial near 0, where 1 − 2/(e^{2|x|} + 1) would cancel (coefficients: Moshier's Cephes)."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = near * z - 5.37397155531e-2
    near = near * z + 1.33314422036e-1
    near = near * z - 3.33332819422e-1
    near = near * z * x + x
    magnitude = tl.abs(x)
    far = 1.0 - 2.0 / (tl.exp2(magnitude * (2.0 * LOG2E)) + 1.0)
    return tl.where(magnitude < 0.625, near, tl.where(x < 0.0, -far, far))


@triton.jit
def in_units(call, score):
    """A score as an element of a tile."""
    if call.unit is None:
        return score
    else:
        return score / call.unit


@triton.jit
def sink(call, place):
    """The sink's score, as an element."""
    return in_units(call, memory.load_per_head(call.sinks, place))


@triton.jit
def capped(call, product):
    """(c·tanh(R / c), tanh(R / c)), or (R, ()) without softcap; the first as elements."""
    if call.softcap is None:
        if call.unit is None:
            return product * call.scale, ()
        else:
            return product, ()
    else:
        bend = tanh(product * call.scale / call.softcap)
        if call.unit is None:
            return bend * call.softcap, bend
        else:
            return bend, bend


@triton.jit
def scores(call, place, product, i, j, MASKED: tl.constexpr):
    """(S as elements, tanh(R / c) or ()): softcap, bias and ALiBi on scale·QKᵀ, −inf where masked.

    A masked entry is selected away, never added to: it must hide NaN.
    """
    s, bend = capped(call, product)
    exists = (i < place.n) & (j < place.m)
    if call.bias is not None:
        bias = memory.load_entries(call.bias, place, i, j, exists).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if call.slopes is not None:
        s -= in_units(call, memory.load_per_head(call.slopes, place)) * distance(place, i, j)
    if call.mask is not None:
        s = tl.where(memory.load_entries(call.mask, place, i, j, exists) != 0, s, float("-inf"))
    if MASKED:
        keep = exists
        if call.right is not None:
            keep &= j - i <= place.offset + call.right
        if call.left is not None:
            keep &= j - i >= place.offset - call.left
        s = tl.where(keep, s, float("-inf"))
    return s, bend


@triton.jit
def distance(place, i, j):
    """ALiBi's |i + M − N − j|."""
    return tl.abs(i + (place.m - place.n) - j).to(tl.float32)


@triton.jit
def nearest(call, place, i):
    """The least that position leaves to each query i: sums of dS·distance are taken around it.

    For a row's dS sum to little.
    """
    own, low, high = i + (place.m - place.n), 0, place.m
    if call.left is not None:
        low = tl.maximum(low, i + place.offset - call.left)
    if call.right is not None:
        high = tl.minimum(high, i + place.offset + call.right + 1)
    gap = tl.maximum(tl.maximum(low - own, own - (high - 1)), 0)
    return tl.where(low < high, gap, 0).to(tl.float32)


@triton.jit
def exponents(call, s, reference):
    """log2 of exp(S − reference) from elements and the reference's: exact for equal ones, however large."""
    if call.unit is None:
        return (s - reference) * LOG2E
    else:
        return (s - reference) * (call.unit * LOG2E)


@triton.jit
def probability(call, s, reference, log_total):
    """P = exp(S − L), L in two parts as Statistics holds it."""
    return tl.exp2(exponents(call, s, reference) - log_total)


@triton.jit
def score_tangent(call, given, place, s, bend, tr, i, j, MASKED: tl.constexpr):
    """T = s1∘TR + β − ω·distance, 0 where nothing is attended."""
    t = slope_of(bend) * tr
    if given.beta is not None:
        t += tangent_entries(given.beta, place, i, j)
    if given.omega is not None:
        t -= memory.load_per_head(given.omega, place) * distance(place, i, j)
    return shown(call, s, t, MASKED)


@triton.constexpr_function
def have_tangent(a, b, beta, omega):
    """Whether something moves the scores; a: the tangent of q, a view or a block, None or ()."""
    return not absent(a) or b is not None or beta is not None or omega is not None


@triton.jit
def tangent_entries(bias_tangent, place, i, j):
    """β under a tile, float32."""
    return memory.load_entries(bias_tangent, place, i, j, (i < place.n) & (j < place.m)).to(tl.float32)


@triton.jit
def shown(call, s, x, MASKED: tl.constexpr):
    """x, and 0 where S is −inf: what was computed there may be NaN."""
    if MASKED | (call.mask is not None) | (call.bias is not None):
        return tl.where(s == float("-inf"), 0.0, x)
    else:
        return x


@triton.jit
def slope_of(bend):
    """s1 = 1 − tanh²(R / c)."""
    if absent(bend):
        return 1.0
    else:
        return 1.0 - bend * bend


@triton.jit
def curve_of(call, bend):
    """s2 = −2·tanh(R / c)·s1 / c."""
    if absent(bend):
        return 0.0
    else:
        return bend * (1.0 - bend * bend) * (-2.0 / call.softcap)


@triton.jit
def dropout(call, place, row, key, ROWS: tl.constexpr, KEYS: tl.constexpr, TURNED: tl.constexpr):
    """Z of a tile [ROWS, KEYS], or turned [KEYS, ROWS]; () without dropout. `key` is a multiple of 4."""
    if call.rng is None:
        return ()
    else:
        FOURS: tl.constexpr = KEYS // 4
        at = call.rng.ptr + place.seq * call.rng.batch
        seed, batch = tl.load(at), tl.load(at + call.rng.column).to(tl.int32)
        head = tl.cast(place.head, tl.int32)
        fours = key // 4 + tl.arange(0, FOURS)
        rows = row + tl.arange(0, ROWS)
        if TURNED:
            c0 = tl.broadcast_to(fours[:, None], [FOURS, ROWS])
            c1 = tl.broadcast_to(rows[None, :], [FOURS, ROWS])
        else:
            c0 = tl.broadcast_to(fours[None, :], [ROWS, FOURS])
            c1 = tl.broadcast_to(rows[:, None], [ROWS, FOURS])
        w0, w1, w2, w3 = tl.philox(seed, c0, c1, head + 0 * c0, batch + 0 * c0)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        if TURNED:
            words = tl.reshape(tl.permute(words, (0, 2, 3, 1)), [KEYS, ROWS])
        else:
            words = tl.reshape(words, [ROWS, KEYS])
        return tl.where(words >= tl.cast(call.threshold, tl.uint32), call.kept, 0.0)


@triton.jit
def times(x, factor):
    """x∘factor; x itself where there is no factor."""
    if absent(factor):
        return x
    else:
        return x * factor
