"""forward: O = (P∘Z)V and L = logsumexp(S), by the online softmax over key blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from . import common, memory, products, rowstats, scores, spans, tiles
from .call import Block


@triton.jit
def visit(state, block, start, MASKED: tl.constexpr, FORM: tl.constexpr):
    """Adds a block of keys to (top, total, total of the weights kept, and of these as multiplied, acc)."""
    KEYS: tl.constexpr = FORM[0]
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    PRECISION: tl.constexpr = FORM[4]
    top, total, kept, multiplied, acc = state
    call, place = block.call, block.place
    row_ids, key_ids = tl.arange(0, ROWS), tl.arange(0, KEYS)
    rows, keys = block.first + row_ids, start + key_ids
    at = tiles.moved(place, block.first, start)
    inside = tiles.partners_inside(block, keys, MASKED)
    k = memory.load_keys(call.k, at, key_ids, inside, HEAD)
    product = products.dot_features(block.held, k, tl.zeros([ROWS, KEYS], tl.float32), PRECISION)
    s, _ = scores.scores(call, place, product, rows[:, None], keys[None, :], MASKED)
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores.exponents(call, s, shift[:, None]))
    decay = tl.exp2(scores.exponents(call, top, shift))
    total = total * decay + tl.sum(p, 1)
    p = scores.times(p, scores.dropout(call, place, block.first, start, ROWS, KEYS, False))
    v = memory.load_keys(call.v, at, key_ids, inside, VALUE)
    v = products.without(v, scores.unseen_keys(call, s))
    kept, multiplied = kept * decay + tl.sum(p, 1), multiplied * decay
    twice: tl.constexpr = common.wants_exact_d(call.softcap, call.slopes)
    multiplied += tl.sum(p if twice else p.to(v[0].dtype).to(tl.float32), 1)
    acc = products.add_product(products.scaled(acc, decay[:, None]), p, v, PRECISION, twice)
    return new_top, total, kept, multiplied, acc


@triton.jit
def fresh(state):
    """No keys."""
    zero, acc = tl.zeros_like(state[0]), state[4]
    return zero - float("inf"), zero, zero, zero, (spans.zeros_of_part(acc[0]), spans.zeros_of_part(acc[1]))


@triton.jit
def joined(call, x, y):
    """The states of two sets of keys as one."""
    top = tl.maximum(x[0], y[0])
    shift = tl.where(top == float("-inf"), 0.0, top)
    a, b = tl.exp2(scores.exponents(call, x[0], shift)), tl.exp2(scores.exponents(call, y[0], shift))
    acc = spans.added(call, (products.scaled(x[4], a[:, None]),), (products.scaled(y[4], b[:, None]),))
    return top, x[1] * a + y[1] * b, x[2] * a + y[2] * b, x[3] * a + y[3] * b, acc[0]


@triton.jit
def forward_rows(
    call, given, wanted, blocks, ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr,
    VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, what rounding it lost, and lse of a block of queries."""
    place, first = tiles.block_of_queries(call, blocks, ROWS)
    if first < place.n:
        row_ids = tl.arange(0, ROWS)
        rows, at = first + row_ids, tiles.moved(place, first, 0)
        inside = rows < place.n
        span = tiles.span(first, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
        q = memory.load_rows(call.q, at, row_ids, inside, None, HEAD)
        block = Block(call, given, wanted, place, span, first, q, None)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if call.sinks is not None:
            top = tl.zeros([ROWS], tl.float32) + scores.sink(call, place)
            total = tl.where(top == float("-inf"), 0.0, 1.0)
        zero = tl.zeros([ROWS], tl.float32)
        state = (top, total, zero, zero, products.zeros(ROWS, VALUE))
        FORM: tl.constexpr = (KEYS, ROWS, HEAD, VALUE, PRECISION)
        top, total, kept, multiplied, acc = tiles.sweep(visit, state, block, span, FORM, fresh, joined)
        # a row that attends to nothing gives zeros, whatever 0·NaN brought in from a key that others see
        dead = total == 0.0
        # O is a mean by the weights as they were multiplied: a row's errors then weigh V − O, not V
        mean = tl.where(multiplied == 0.0, 1.0, kept / multiplied)
        acc = products.scaled(
            products.where_rows(dead, 0.0, acc), (mean / tl.where(dead, 1.0, total))[:, None]
        )
        memory.store_in_two(wanted.o, wanted.o_lo, at, row_ids, inside, acc, VALUE)
        rowstats.store_lse(call, wanted.lse, at, row_ids, inside, top, total)
