"""forward: O = (P∘Z)V and L = logsumexp(S), by the online softmax over key blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from metattn.kernels import tiles


@triton.jit
def visit(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to (top, total, acc)."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    top, total, acc = state
    call, place = block.call, block.place
    rows, keys = block.first + tl.arange(0, ROWS), start + tl.arange(0, KEYS)
    inside = tiles.partners_inside(block, keys, MASKED)
    k = tiles.load_keys(call.k, place, keys, inside, HEAD)
    product = tiles.dot_features(block.held, k, tl.zeros([ROWS, KEYS], tl.float32), PRECISION)
    s, _ = tiles.scores(call, place, product, rows[:, None], keys[None, :], MASKED)
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2((s - shift[:, None]) * tiles.LOG2E)
    decay = tl.exp2((top - shift) * tiles.LOG2E)
    total = total * decay + tl.sum(p, 1)
    p = tiles.times(p, tiles.dropout(call, place, block.first, start, ROWS, KEYS, False))
    v = tiles.load_keys(call.v, place, keys, inside, VALUE)
    v = tiles.without(v, tiles.unseen_keys(call, s))
    acc = tiles.add_product(tiles.scaled(acc, decay[:, None]), p, v, PRECISION)
    return new_top, total, acc


@triton.jit
def forward_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, what rounding it lost, and lse of a block of queries."""
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        rows = first + tl.arange(0, ROWS)
        inside = rows < place.n
        span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
        q = tiles.load_rows(call.q, place, rows, inside, None, HEAD)
        block = tiles.Block(call, given, wanted, place, span, first, q, None)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if call.sinks is not None:
            top = tl.zeros([ROWS], tl.float32) + tiles.load_per_head(call.sinks, place)
            total = tl.where(top == float("-inf"), 0.0, 1.0)
        state = (top, total, tiles.zeros(ROWS, VALUE))
        top, total, acc = tiles.sweep(visit, state, block, span, (KEYS, ROWS, HEAD, VALUE, PRECISION))
        # a row that attends to nothing gives zeros, whatever 0·NaN brought in from a key that others see
        dead = total == 0.0
        acc = tiles.scaled(tiles.where_rows(dead, 0.0, acc), (1.0 / tl.where(dead, 1.0, total))[:, None])
        tiles.store_in_two(wanted.o, wanted.o_lo, place, rows, inside, acc, VALUE)
        tiles.store_statistic(wanted.lse, place, rows, inside, tiles.join_lse(top, total))
