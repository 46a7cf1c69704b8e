"""Gradients of what many rows share: a bias that is broadcast somewhere, sinks, slopes. No atomics: one
program owns an entry, or one of `parts` of its sum, and adds in an order that shapes alone decide.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import memory, row_tiles, rowstats, scores, tiles
from .call import Block
from .vjp import first_order
from .vjp_jvp import second_order


class Parts(NamedTuple):
    """A float32 tensor [parts, 1|B, 1|Hq, 1|N, 1|M] and its strides."""

    ptr: Any
    part: Any
    batch: Any
    head: Any
    row: Any
    column: Any


@triton.jit
def score_gradient(call, given, place, span, row, key, TANGENT: tl.constexpr, FORM: tl.constexpr):
    """dS, or its tangent, of the tile at (row, key), zeros where there is nothing."""
    ROWS: tl.constexpr = FORM[1]
    HEAD: tl.constexpr = FORM[2]
    VALUE: tl.constexpr = FORM[3]
    row_ids, at = tl.arange(0, ROWS), tiles.moved(place, row, 0)
    inside = row + row_ids < place.n
    statistics = rowstats.load_statistics(given.statistics, at, row_ids, inside, TANGENT)
    idle = scores.idle_rows(call, place, statistics)
    q = memory.load_rows(call.q, at, row_ids, inside, idle, HEAD)
    do = memory.load_rows_if(given.do, at, row_ids, inside, idle, VALUE)
    known = rowstats.as_column(statistics)
    if TANGENT:
        a = memory.load_rows_if(given.a, at, row_ids, inside, idle, HEAD)
        block = Block(call, given, None, place, span, row, (q, a, do), statistics)
        tile, _, _, _, _ = row_tiles.all_of(block, key, True, FORM)
        ds, _, _ = second_order(call, tile, tile.seen.p * (tile.t - known.tau), known, True)
    else:
        block = Block(call, given, None, place, span, row, (q, do), statistics)
        seen, _ = row_tiles.scores_of(block, q, key, True, FORM)
        dp, _ = row_tiles.cotangent_of(block, seen, do, call.v, key, True, FORM)
        ds, _ = first_order(call, seen, dp, known.d, True)
    return ds


@triton.jit
def bias_sums(
    call, given, out, batches, row_blocks, key_blocks, parts, SUMMED: tl.constexpr, TANGENT: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, HEAD: tl.constexpr, VALUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of a tile of the bias' gradient, summed over those of (batch, head, row, column) that SUMMED
    says.
    """
    FORM: tl.constexpr = (KEYS, ROWS, HEAD, VALUE, PRECISION)
    ALL_BATCHES: tl.constexpr = SUMMED[0]
    ALL_HEADS: tl.constexpr = SUMMED[1]
    ALL_ROWS: tl.constexpr = SUMMED[2]
    ALL_KEYS: tl.constexpr = SUMMED[3]
    # how many of each this tile sums over, and how many there are to place it in
    sum_b, sum_h, sum_n, sum_m = 1, 1, 1, 1
    own_h, own_n, own_m = call.heads, row_blocks, key_blocks
    if ALL_BATCHES:
        sum_b = batches
    if ALL_HEADS:
        sum_h, own_h = call.heads, 1
    if ALL_ROWS:
        sum_n, own_n = row_blocks, 1
    if ALL_KEYS:
        sum_m, own_m = key_blocks, 1
    index = tl.program_id(0)
    part, index = index % parts, index // parts
    own_key, index = index % own_m, index // own_m
    own_row, index = index % own_n, index // own_n
    own_head, own_batch = index % own_h, index // own_h
    terms = tl.cast(sum_b, tl.int64) * sum_h * sum_n * sum_m
    share = (terms + parts - 1) // parts
    total = tl.zeros([ROWS, KEYS], tl.float32)
    lost = tl.zeros([ROWS, KEYS], tl.float32)  # by rounding the total: terms may be thousands
    for term in range(part * share, tl.minimum(terms, (part + 1) * share)):
        key, rest = term % sum_m + own_key, term // sum_m
        row, rest = rest % sum_n + own_row, rest // sum_n
        head, batch = rest % sum_h + own_head, rest // sum_h + own_batch
        place = tiles.place_of(call, batch, head, head // call.group)
        first_row, first_key = tl.cast(row * ROWS, tl.int32), tl.cast(key * KEYS, tl.int32)
        reach = tiles.span(first_row, ROWS, place.n, place.offset, call.left, call.right, place.m, KEYS)
        if (first_row < place.n) & (first_key >= reach.first) & (first_key < reach.end):
            more = score_gradient(call, given, place, reach, first_row, first_key, TANGENT, FORM) - lost
            before = total
            total += more
            lost = (total - before) - more
    base = out.ptr + tl.cast(own_batch, tl.int64) * out.batch + tl.cast(own_head, tl.int64) * out.head
    base += tl.cast(part, tl.int64) * out.part
    rows, keys = own_row * ROWS + tl.arange(0, ROWS), own_key * KEYS + tl.arange(0, KEYS)
    row_at, key_at = tl.cast(rows, tl.int64) * out.row, tl.cast(keys, tl.int64) * out.column
    if ALL_ROWS and ALL_KEYS:
        tl.store(base, tl.sum(tl.sum(total, 1), 0))
    elif ALL_ROWS:
        tl.store(base + key_at, tl.sum(total, 0), mask=keys < call.m)
    elif ALL_KEYS:
        tl.store(base + row_at, tl.sum(total, 1), mask=rows < call.n)
    else:
        inside = (rows < call.n)[:, None] & (keys < call.m)[None, :]
        tl.store(base + row_at[:, None] + key_at[None, :], total, mask=inside)


@triton.jit
def share_sums(call, shares, out, batches, STEP: tl.constexpr):
    """The sum of the rows' shares of one (batch, head), or of all batches: out float32 [1|B, Hq]."""
    index = tl.program_id(0)
    head = index % call.heads
    first = index // call.heads
    total = tl.zeros([STEP], tl.float64)
    for batch in range(first, first + batches):
        place = tiles.place_of(call, batch, head, head // call.group)
        for start in range(0, place.n, STEP):
            at, row_ids = tiles.moved(place, start, 0), tl.arange(0, STEP)
            total += memory.load_statistic(shares, at, row_ids, start + row_ids < place.n).to(tl.float64)
    tl.store(out + index, tl.sum(total, 0).to(tl.float32))
