"""Which tiles a program visits: places of (sequence, head) pairs, spans of blocks, the one loop over them.

A program of a row pass owns a block of queries, of a column pass a block of keys; it sweeps over its
partners.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import spans
from .call import Place, Span
from .spans import SPAN


@triton.jit
def place_of(call, seq, head, kv_head):
    seq, head, kv_head = tl.cast(seq, tl.int64), tl.cast(head, tl.int64), tl.cast(kv_head, tl.int64)
    if call.cu_q is None:
        q0, k0, n, m = 0, 0, call.n, call.m
    else:
        q0, k0 = tl.load(call.cu_q + seq), tl.load(call.cu_k + seq)
        n, m = tl.load(call.cu_q + seq + 1) - q0, tl.load(call.cu_k + seq + 1) - k0
    return Place(seq, head, kv_head, q0, n, k0, m, call.bottom_right * (m - n))


@triton.jit
def block_of_queries(call, blocks, ROWS: tl.constexpr):
    """(Place, first query) of this program of a row pass, `blocks` a (sequence, query head).

    The last queries have the most keys under a causal mask: their blocks start first.
    """
    index = tl.program_id(0)
    head = (index // blocks) % call.heads
    place = place_of(call, index // blocks // call.heads, head, head // call.group)
    return place, (blocks - 1 - index % blocks) * ROWS


@triton.jit
def block_of_keys(call, blocks, KEYS: tl.constexpr):
    """(Place, first key) of this program of a column pass, `blocks` a (sequence, key head)."""
    index = tl.program_id(0)
    kv_heads = call.heads // call.group
    kv_head = (index // blocks) % kv_heads
    place = place_of(call, index // blocks // kv_heads, kv_head * call.group, kv_head)
    return place, (index % blocks) * KEYS


@triton.jit
def moved(place, row, key):
    """The place of a block that starts at this row and key."""
    q0, k0 = tl.cast(place.q0, tl.int64) + row, tl.cast(place.k0, tl.int64) + key
    return Place(place.seq, place.head, place.kv_head, q0, place.n, k0, place.m, place.offset)


@triton.jit
def has_work(given, first, total):
    """Whether a column pass' block has keys; the one that holds all has rows to write even without."""
    if given.statistics is None:
        return True
    else:
        return first < total


@triton.jit
def at_head(place, head):
    """The same place for another query head of the group."""
    return Place(place.seq, head, place.kv_head, place.q0, place.n, place.k0, place.m, place.offset)


@triton.jit
def span(first, size, total, shift, back, ahead, partners, STEP: tl.constexpr):
    """The partners of the block [first, first + size) of `total`, in blocks of STEP.

    Index x has the partners from x + shift − back to x + shift + ahead, of 0 to partners; None: no limit. A
    block that goes past the total is masked throughout.
    """
    last = tl.minimum(first + size, total) - 1
    low, high, full_low, full_high = 0, partners, 0, partners
    if ahead is not None:
        high = tl.minimum(high, tl.cast(last, tl.int64) + shift + ahead + 1)
        full_high = tl.minimum(full_high, tl.cast(first, tl.int64) + shift + ahead + 1)
    if back is not None:
        low = tl.maximum(0, tl.cast(first, tl.int64) + shift - back)
        full_low = tl.maximum(0, tl.cast(last, tl.int64) + shift - back)
    low, full_low = tl.cast(low, tl.int32), tl.cast(full_low, tl.int32)
    high, full_high = tl.maximum(tl.cast(high, tl.int32), 0), tl.maximum(tl.cast(full_high, tl.int32), 0)
    start = low // STEP * STEP
    end = tl.maximum(high, start)
    full = tl.minimum((full_low + STEP - 1) // STEP * STEP, end)
    full = tl.where(first + size <= total, full, end)
    tail = tl.maximum(full, full_high // STEP * STEP)
    return Span(low, start, full, tl.minimum(tail, end), end)


@triton.jit
def span_of_keys(call, given, place, first, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """The queries that a column pass visits: those that attend to its keys; all where its block is all
    keys.
    """
    if given.statistics is None:
        if (call.left is None) & (call.right is None):
            return span(first, KEYS, place.m, 0, None, None, place.n, ROWS)
        else:
            return Span(0, 0, place.n, place.n, place.n)
    else:
        return span(first, KEYS, place.m, -place.offset, call.right, call.left, place.n, ROWS)


@triton.jit
def sweep_full(body: tl.constexpr, state, context, first, end, FORM: tl.constexpr):
    """Applies `body` to the state for every partner block from `first` to `end`, unmasked."""
    for start in range(first, end, FORM[0]):
        state = body(state, context, start, False, FORM)
    return state


@triton.jit
def sweep_masked(body: tl.constexpr, state, context, span, before, first, end, FORM: tl.constexpr):
    """The same of the blocks beside the unmasked ones, `before` of them in front; counted from 0."""
    STEP: tl.constexpr = FORM[0]
    for index in range(first, end):
        start = tl.where(index < before, span.first + index * STEP, span.tail + (index - before) * STEP)
        state = body(state, context, start, True, FORM)
    return state


@triton.jit
def sweep(
    body: tl.constexpr, state, context, span, FORM: tl.constexpr,
    FRESH: tl.constexpr = spans.zeros_of, JOINED: tl.constexpr = spans.added,
):  # fmt: skip
    """Applies `body` to the state for every partner block of a span: the unmasked ones, then the others.

    Where there is room to put sums aside, by spans of blocks: FRESH begins one, JOINED takes two as one.
    """
    STEP: tl.constexpr = FORM[0]
    # one loop for those before and those behind: each copy of a body costs time to compile
    before = (span.full - span.first + STEP - 1) // STEP
    masked = before + (span.end - span.tail + STEP - 1) // STEP
    room = context.wanted.room
    if room is None:
        state = sweep_full(body, state, context, span.full, span.tail, FORM)
        return sweep_masked(body, state, context, span, before, 0, masked, FORM)
    else:
        own = room.ptr + tl.cast(tl.program_id(0), tl.int64) * room.size
        spans.put(own, state)
        for first in range(span.full, span.tail, STEP * SPAN):
            end = tl.minimum(first + STEP * SPAN, span.tail)
            part = sweep_full(body, FRESH(state), context, first, end, FORM)
            spans.put(own, JOINED(context.call, spans.got(own, part), part))
        for first in range(0, masked, SPAN):
            end = tl.minimum(first + SPAN, masked)
            part = sweep_masked(body, FRESH(state), context, span, before, first, end, FORM)
            spans.put(own, JOINED(context.call, spans.got(own, part), part))
        return spans.got(own, state)


@triton.jit
def partners_inside(block, partners, MASKED: tl.constexpr):
    """Those of a visited block that position leaves to some index of the program's own block; (): all."""
    if MASKED:
        return (partners >= block.span.lowest) & (partners < block.span.end)
    else:
        return ()
