"""What a row pass, or a sum over tiles, computes of a block of keys under the queries that it holds.

FORM is (KEYS, ROWS, HEAD, VALUE, PRECISION); `block` is call.Block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import memory, products, rowstats, scores, tiles
from .call import Scores, Tile, absent


@triton.jit
def scores_of(block, q, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """(Scores, k) of the keys from `start` on."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    PRECISION: tl.constexpr = FORM[4]
    call, place, statistics = block.call, block.place, rowstats.as_column(block.statistics)
    keys = start + tl.arange(0, KEYS)
    i, j = (block.first + tl.arange(0, ROWS))[:, None], keys[None, :]
    k = keys_of(block, call.k, start, MASKED, KEYS, HEAD)
    product = products.dot_features(q, k, tl.zeros([ROWS, KEYS], tl.float32), PRECISION)
    s, bend = scores.scores(call, place, product, i, j, MASKED)
    p = scores.probability(call, s, statistics.reference, statistics.log_total)
    z = scores.dropout(call, place, block.first, start, ROWS, KEYS, False)
    return Scores(i, j, s, bend, p, z), k


@triton.jit
def keys_of(block, view, start, MASKED: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr):
    """The block of keys, values or their tangents from `start` on; () where there is no view."""
    if view is None:
        return ()
    else:
        keys = tl.arange(0, KEYS)
        inside = tiles.partners_inside(block, start + keys, MASKED)
        return memory.load_keys(view, tiles.moved(block.place, 0, start), keys, inside, WIDTH)


@triton.jit
def tangent_of(block, seen, q, k, a, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """(TR, T, b): the tangents of the scores."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    PRECISION: tl.constexpr = FORM[4]
    call, given = block.call, block.given
    b = keys_of(block, given.b, start, MASKED, KEYS, HEAD)
    tr = products.dot_features(a, k, tl.zeros([ROWS, KEYS], tl.float32), PRECISION)
    tr = products.dot_features(q, b, tr, PRECISION) * call.scale
    t = scores.score_tangent(call, given, block.place, seen.s, seen.bend, tr, seen.i, seen.j, MASKED)
    return tr, t, b


@triton.jit
def cotangent_of(block, seen, do, view, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """(Z∘(dO Xᵀ), x) of a block x of values or of their tangents; (0, ()) where there is no dO or no X."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    zero = tl.zeros([ROWS, KEYS], tl.float32)
    if absent(do):
        return zero, ()
    else:
        x = keys_of(block, view, start, MASKED, KEYS, VALUE)
        return scores.times(products.dot_features(do, x, zero, PRECISION), seen.z), x


@triton.jit
def all_of(block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """(Tile, k, b, v, c): everything that second derivatives need; the block holds (q, a, dO)."""
    q, a, do = block.held
    seen, k = scores_of(block, q, start, MASKED, FORM)
    dp, v = cotangent_of(block, seen, do, block.call.v, start, MASKED, FORM)
    e, c = cotangent_of(block, seen, do, block.given.c, start, MASKED, FORM)
    tr, t, b = tangent_of(block, seen, q, k, a, start, MASKED, FORM)
    return Tile(seen, tr, t, dp, e), k, b, v, c
