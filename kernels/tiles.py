"""Tiles of one (sequence, head): where they lie, loads, scores with every option, dropout, row statistics.

Each option is written here once; the kernels of the four maps only combine these helpers (docs/math.md has the
formulas and the names). A tile of scores lies as [queries, keys] in a row pass, whose program owns a block of
queries, and as [keys, queries] in a column pass, whose program owns a block of keys. The elementwise helpers do not
care: they take query and key indices i and j, and row statistics, already broadcast against each other.

A tensor's feature dimension is held as two tiles, main [*, MAIN] and rest [*, REST] or None, so that 80 features
cost 64 + 16 and not 128. `WIDTH` is (features, MAIN, REST).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


class View(NamedTuple):
    """A strided tensor; strides count elements and are 0 where it is broadcast."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Call(NamedTuple):
    """What every kernel is told of a call; what is None is compiled away."""

    q: Any  # View [B, Hq, N, d]; packed sequences: batch stride 0, rows of all sequences
    k: Any  # View [B, Hkv, M, d]
    v: Any  # View [B, Hkv, M, dv]
    bias: Any  # View [B, Hq, N, M]
    sinks: Any  # View [B, Hq]
    mask: Any  # View of bytes [B, Hq, N, M]
    slopes: Any  # View [B, Hq]
    rng: Any  # View int64 [B, 2] as batch and column
    cu_q: Any  # int32 [B + 1], with cu_k
    cu_k: Any
    heads: Any  # Hq
    group: Any  # query heads that share a key head
    n: Any  # queries, keys; the longest sequence's of a packed problem
    m: Any
    scale: Any
    softcap: Any
    left: Any  # keys up to so many before a query's own place; None: all
    right: Any  # and after it; 0: causal
    bottom_right: Any  # 1: the last query's own place is the last key; 0: the first's the first
    threshold: Any  # dropout keeps where a Philox word is at least this
    kept: Any  # 1 / (1 - p)


class Place(NamedTuple):
    """One (sequence, head): where its rows and keys start in memory, and how many there are."""

    seq: Any
    head: Any
    kv_head: Any
    q0: Any
    n: Any
    k0: Any
    m: Any
    offset: Any  # a query's own place is key i + offset


class Span(NamedTuple):
    """The partners of a block: visited from `first` to `end`, without a position mask from `full` to `tail`."""

    lowest: Any
    first: Any
    full: Any
    tail: Any
    end: Any


class Given(NamedTuple):
    """Views of what a map is given besides the call; None where there is none."""

    o: Any  # [B, Hq, N, dv]
    o_lo: Any  # what rounding o lost
    lse: Any  # float64 [B, Hq, N], as every row statistic between the maps
    do: Any  # cotangents of o and lse
    dlse: Any
    a: Any  # tangents of q, k, v, bias, sinks
    b: Any
    c: Any
    beta: Any
    sigma: Any
    o_t: Any  # tangents of o, o_lo, lse
    o_t_lo: Any
    lse_t: Any
    # float32 [B, Hq, N] and, as columns, Statistics' fields: a row pass tells a column pass. Without it a column pass
    # has all keys in its one block, and finds out itself.
    statistics: Any


class Wanted(NamedTuple):
    """Views of what a map gives; None where it is not wanted."""

    o: Any  # or their tangents
    o_lo: Any
    lse: Any
    dq: Any
    dk: Any
    dv: Any
    dbias: Any  # of a bias that is nowhere broadcast
    dsinks: Any  # float32 [B, Hq, N]: each row's share


class Block(NamedTuple):
    """What a program holds while it sweeps over the partners of its block of queries or keys."""

    call: Any
    given: Any
    wanted: Any
    place: Any
    span: Any
    first: Any  # the block's first query or key
    held: Any  # its tiles
    statistics: Any  # of a block of queries


class Statistics(NamedTuple):
    """What is known of each row of a block of queries, float32."""

    high: Any  # the log-sum-exp in two parts: P = exp(S − high)·2^(−low); +inf where nothing is attended
    low: Any
    d: Any  # D = rowsum(dO∘O) − dL
    tau: Any  # the tangent of L
    dt: Any  # Dt = rowsum(dO∘Ot)


# Places and spans.


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
def has_work(given, first, total):
    """Whether a column pass' block has keys; the one that holds all has rows to write even without."""
    if given.statistics is None:
        return True
    else:
        return first < total


@triton.jit
def at_head(place, head):
    """The same place for another query head of the group."""
    return Place(
        place.seq, head, place.kv_head, place.q0, place.n, place.k0, place.m, place.offset
    )


@triton.jit
def span(first, size, total, shift, back, ahead, partners, STEP: tl.constexpr):
    """The partners of the block [first, first + size) of `total`, in blocks of STEP.

    Index x has the partners from x + shift − back to x + shift + ahead, of 0 to partners; None: no limit. A block
    that goes past the total is masked throughout.
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
    """The queries that a column pass visits: those that attend to its keys; all where its block is all keys."""
    if given.statistics is None:
        return span(first, KEYS, place.m, 0, None, None, place.n, ROWS)
    else:
        return span(first, KEYS, place.m, -place.offset, call.right, call.left, place.n, ROWS)


@triton.jit
def sweep(body: tl.constexpr, state, context, span, FORM: tl.constexpr):
    """Applies `body` to the state for every partner block of a span: masked, unmasked, masked."""
    STEP: tl.constexpr = FORM[0]
    for start in range(span.first, span.full, STEP):
        state = body(state, context, start, True, FORM)
    for start in range(span.full, span.tail, STEP):
        state = body(state, context, start, False, FORM)
    for start in range(span.tail, span.end, STEP):
        state = body(state, context, start, True, FORM)
    return state


# Loads and stores.


@triton.jit
def start_of(view, seq, head, row):
    """The pointer to a row of one (sequence, head)."""
    return view.ptr + seq * view.batch + head * view.head + tl.cast(row, tl.int64) * view.row


@triton.jit
def pointers(view, base, rows, FIRST: tl.constexpr, SIZE: tl.constexpr):
    columns = FIRST + tl.arange(0, SIZE)
    return (
        base
        + tl.cast(rows, tl.int64)[:, None] * view.row
        + tl.cast(columns, tl.int64)[None, :] * view.column
    )


@triton.jit
def inside_of(inside, FEATURES: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """The rows `inside` (None: all) and the columns that exist, broadcast together; None: everything."""
    columns = FIRST + tl.arange(0, SIZE)
    if inside is None:
        if FIRST + SIZE > FEATURES:
            return (columns < FEATURES)[None, :]
        else:
            return None
    elif FIRST + SIZE > FEATURES:
        return inside[:, None] & (columns < FEATURES)[None, :]
    else:
        return inside[:, None]


@triton.jit
def load_part(view, base, rows, inside, FEATURES: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    at = pointers(view, base, rows, FIRST, SIZE)
    keep = inside_of(inside, FEATURES, FIRST, SIZE)
    if keep is None:
        return tl.load(at)
    else:
        return tl.load(at, mask=keep, other=0.0)


@triton.jit
def load_block(view, base, rows, inside, WIDTH: tl.constexpr):
    """Rows of a tensor [*, MAIN], [*, REST] or None; zeros where not inside (None: all rows are)."""
    FEATURES: tl.constexpr = WIDTH[0]
    MAIN: tl.constexpr = WIDTH[1]
    REST: tl.constexpr = WIDTH[2]
    main = load_part(view, base, rows, inside, FEATURES, 0, MAIN)
    if REST > 0:
        return (main, load_part(view, base, rows, inside, FEATURES, MAIN, REST))
    else:
        return (main, None)


@triton.jit
def store_part(
    view, base, rows, inside, x, FEATURES: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr
):
    keep = inside_of(inside, FEATURES, FIRST, SIZE)
    tl.store(pointers(view, base, rows, FIRST, SIZE), x.to(view.ptr.dtype.element_ty), mask=keep)


@triton.jit
def store_block(view, base, rows, inside, x, WIDTH: tl.constexpr):
    """Stores (main, rest) in the view's dtype."""
    FEATURES: tl.constexpr = WIDTH[0]
    MAIN: tl.constexpr = WIDTH[1]
    REST: tl.constexpr = WIDTH[2]
    store_part(view, base, rows, inside, x[0], FEATURES, 0, MAIN)
    if REST > 0:
        store_part(view, base, rows, inside, x[1], FEATURES, MAIN, REST)


@triton.jit
def lost_part(x, dtype: tl.constexpr):
    """What rounding x (None: nothing) to dtype loses; where that overflows, x itself."""
    if x is None:
        return None
    else:
        rounded = x.to(dtype).to(tl.float32)
        return x - tl.where(finite(rounded), rounded, 0.0)


@triton.jit
def store_in_two(view, low, place, rows, inside, x, WIDTH: tl.constexpr):
    """Stores a block of results, and in `low`, where that is kept, what rounding it lost."""
    store_block(view, start_of(view, place.seq, place.head, place.q0), rows, inside, x, WIDTH)
    if low is not None:
        dtype: tl.constexpr = view.ptr.dtype.element_ty
        base = start_of(low, place.seq, place.head, place.q0)
        store_block(low, base, rows, inside, (lost_part(x[0], dtype), lost_part(x[1], dtype)), WIDTH)


@triton.jit
def two_parts(high, low):
    """The sum of what was rounded and what that lost, float32; None where there is nothing."""
    if high is None:
        return None
    elif low is None:
        return high.to(tl.float32)
    else:
        high = high.to(tl.float32)
        return tl.where(finite(high), high, 0.0) + low.to(tl.float32)


@triton.jit
def load_in_two(view, low, place, rows, inside, WIDTH: tl.constexpr):
    """A block of results that store_in_two stored, float32."""
    x = load_block(view, start_of(view, place.seq, place.head, place.q0), rows, inside, WIDTH)
    if low is None:
        return (two_parts(x[0], None), two_parts(x[1], None))
    else:
        y = load_block(low, start_of(low, place.seq, place.head, place.q0), rows, inside, WIDTH)
        return (two_parts(x[0], y[0]), two_parts(x[1], y[1]))


@triton.jit
def load_rows(view, place, rows, inside, idle, WIDTH: tl.constexpr):
    """A block of queries, or of what is shaped like them; `idle` rows lose what is not finite (None: none do)."""
    x = load_block(view, start_of(view, place.seq, place.head, place.q0), rows, inside, WIDTH)
    return without(x, idle)


@triton.jit
def load_rows_if(view, place, rows, inside, idle, WIDTH: tl.constexpr):
    """load_rows, or None where there is no view."""
    if view is not None:
        return load_rows(view, place, rows, inside, idle, WIDTH)
    else:
        return None


@triton.jit
def load_keys(view, place, keys, inside, WIDTH: tl.constexpr):
    """A block of keys, or of values."""
    return load_block(view, start_of(view, place.seq, place.kv_head, place.k0), keys, inside, WIDTH)


@triton.jit
def load_statistic(view, place, rows, inside):
    """A row statistic [*] as stored; 0 outside."""
    base = start_of(view, place.seq, place.head, place.q0)
    return tl.load(base + tl.cast(rows, tl.int64) * view.row, mask=inside, other=0.0)


@triton.jit
def store_statistic(view, place, rows, inside, x):
    base = start_of(view, place.seq, place.head, place.q0)
    tl.store(base + tl.cast(rows, tl.int64) * view.row, x.to(view.ptr.dtype.element_ty), mask=inside)


@triton.jit
def load_entries(view, place, i, j, inside):
    """Entries (i, j) of a [B, Hq, N, M] view, read through its strides; 0 outside."""
    base = view.ptr + place.seq * view.batch + place.head * view.head
    at = base + tl.cast(i, tl.int64) * view.row + tl.cast(j, tl.int64) * view.column
    return tl.load(at, mask=inside, other=0)


@triton.jit
def load_per_head(view, place):
    return tl.load(view.ptr + place.seq * view.batch + place.head * view.head)


@triton.jit
def load_keys_if(wanted: tl.constexpr, view, place, keys, inside, WIDTH: tl.constexpr):
    """load_keys, or None where there is no view or it is not wanted."""
    if wanted and view is not None:
        return load_keys(view, place, keys, inside, WIDTH)
    else:
        return None


@triton.jit
def store_rows(view, place, rows, inside, x, factor, WIDTH: tl.constexpr):
    """Stores factor·x, shaped like queries, where it is wanted."""
    if view is not None:
        base = start_of(view, place.seq, place.head, place.q0)
        store_block(view, base, rows, inside, scaled(x, factor), WIDTH)


@triton.jit
def store_keys(view, place, keys, inside, x, factor, WIDTH: tl.constexpr):
    """Stores factor·x, shaped like keys, where it is wanted."""
    if view is not None:
        base = start_of(view, place.seq, place.kv_head, place.k0)
        store_block(view, base, keys, inside, scaled(x, factor), WIDTH)


@triton.jit
def store_entries(view, place, i, j, x):
    """Stores a tile of an N×M view, where it is wanted."""
    if view is not None:
        base = view.ptr + place.seq * view.batch + place.head * view.head
        at = base + tl.cast(i, tl.int64) * view.row + tl.cast(j, tl.int64) * view.column
        tl.store(at, x.to(view.ptr.dtype.element_ty), mask=(i < place.n) & (j < place.m))


@triton.jit
def partners_inside(block, partners, MASKED: tl.constexpr):
    """Those of a visited block that position leaves to some index of the program's own block; None: all."""
    if MASKED:
        return (partners >= block.span.lowest) & (partners < block.span.end)
    else:
        return None


# What keeps NaN away from what is masked.


@triton.jit
def finite(x):
    return x - x == 0.0


@triton.jit
def part_without(x, idle):
    if x is None:
        return None
    else:
        return tl.where(idle[:, None] & (finite(x) == 0), 0.0, x).to(x.dtype)


@triton.jit
def without(x, idle):
    """x with zeros for what is not finite in idle rows (None: no row is)."""
    if idle is None:
        return x
    else:
        return (part_without(x[0], idle), part_without(x[1], idle))


@triton.jit
def idle_rows(call, place, statistics):
    """The rows that attend to nothing; with a sink, those whose weight it has to the last digit. None: none."""
    if (call.mask is None) & (call.bias is None) & (call.left is None) & (call.right is None):
        return None
    elif call.sinks is None:
        return statistics.high == float("inf")
    else:
        all_at_sink = (statistics.high == load_per_head(call.sinks, place)) & (statistics.low == 0.0)
        return (statistics.high == float("inf")) | all_at_sink


@triton.jit
def unseen_keys(call, s):
    """[keys] of a row pass' tile: those that no query of it attends to. None: mask and bias hide none."""
    if (call.mask is None) & (call.bias is None):
        return None
    else:
        return tl.max((s != float("-inf")).to(tl.int32), 0) == 0


@triton.jit
def unseen_of_all(call, s):
    """The same of a tile [all keys, queries], whose keys were loaded whatever their position."""
    if (call.mask is None) & (call.bias is None) & (call.left is None) & (call.right is None):
        return None
    else:
        return tl.max((s != float("-inf")).to(tl.int32), 1) == 0


# Products.


@triton.jit
def dot_features(x, y, acc, PRECISION: tl.constexpr):
    """x yᵀ over the features [rows of x, rows of y], added to acc (None: 0); None where x or y is."""
    if (x is None) | (y is None):
        return acc
    else:
        acc = tl.dot(x[0], y[0].T, acc, input_precision=PRECISION)
        if x[1] is not None:
            acc = tl.dot(x[1], y[1].T, acc, input_precision=PRECISION)
        return acc


@triton.jit
def part_product(weights, x, acc, PRECISION: tl.constexpr, TWICE: tl.constexpr):
    if x is None:
        return None
    else:
        high = weights.to(x.dtype)
        acc = tl.dot(high, x, acc, input_precision=PRECISION)
        if TWICE and x.dtype != tl.float32:
            wide = high.to(tl.float32)
            low = tl.where(finite(wide), weights - wide, 0.0).to(x.dtype)
            acc = tl.dot(low, x, acc, input_precision=PRECISION)
        return acc


@triton.jit
def add_product(acc, weights, x, PRECISION: tl.constexpr, TWICE: tl.constexpr = False):
    """acc + weights·x, both parts; acc itself where there is no acc or no x.

    Weights are rounded to x's dtype; TWICE multiplies what a two-byte float loses of them as well. A sum over few keys
    has nothing to average the loss out.
    """
    if (acc is None) | (x is None):
        return acc
    else:
        main = part_product(weights, x[0], acc[0], PRECISION, TWICE)
        return (main, part_product(weights, x[1], acc[1], PRECISION, TWICE))


@triton.jit
def zeros(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """An accumulator (main, rest)."""
    MAIN: tl.constexpr = WIDTH[1]
    REST: tl.constexpr = WIDTH[2]
    if REST > 0:
        return (tl.zeros([ROWS, MAIN], tl.float32), tl.zeros([ROWS, REST], tl.float32))
    else:
        return (tl.zeros([ROWS, MAIN], tl.float32), None)


@triton.jit
def zeros_if(view, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """An accumulator for what is wanted, or None."""
    if view is None:
        return None
    else:
        return zeros(ROWS, WIDTH)


@triton.jit
def part_scaled(x, factor):
    if x is None:
        return None
    else:
        return x * factor


@triton.jit
def scaled(acc, factor):
    """acc times a number, or times a factor for each row as [rows, 1]."""
    return (part_scaled(acc[0], factor), part_scaled(acc[1], factor))


@triton.jit
def part_where(x, condition, value):
    if x is None:
        return None
    else:
        return tl.where(condition[:, None], value, x)


@triton.jit
def where_rows(condition, value, acc):
    """An accumulator with a number in the rows [rows] where a condition holds."""
    return (part_where(acc[0], condition, value), part_where(acc[1], condition, value))


@triton.jit
def row_dots(x, y):
    """Σ x∘y over the features [rows], float32; 0 where either is None."""
    if (x is None) | (y is None):
        return 0.0
    else:
        total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
        if x[1] is not None:
            total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
        return total


# Scores.


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
def capped(call, r):
    """(c·tanh(R / c), tanh(R / c)), or (R, None) without softcap."""
    if call.softcap is None:
        return r, None
    else:
        bend = tanh(r / call.softcap)
        return bend * call.softcap, bend


@triton.jit
def scores(call, place, product, i, j, MASKED: tl.constexpr):
    """(S, tanh(R / c) or None): softcap, bias and ALiBi on scale·QKᵀ, −inf where masked.

    A masked entry is selected away, never added to: it must hide NaN.
    """
    s, bend = capped(call, product * call.scale)
    exists = (i < place.n) & (j < place.m)
    if call.bias is not None:
        bias = load_entries(call.bias, place, i, j, exists).to(tl.float32)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    if call.slopes is not None:
        distance = tl.abs(i + (place.m - place.n) - j).to(tl.float32)
        s -= load_per_head(call.slopes, place) * distance
    if call.mask is not None:
        s = tl.where(load_entries(call.mask, place, i, j, exists) != 0, s, float("-inf"))
    if MASKED:
        keep = exists
        if call.right is not None:
            keep &= j - i <= place.offset + call.right
        if call.left is not None:
            keep &= j - i >= place.offset - call.left
        s = tl.where(keep, s, float("-inf"))
    return s, bend


@triton.jit
def probability(s, high, low):
    """P = exp(S − L), L in two parts as Statistics holds it."""
    return tl.exp2((s - high) * LOG2E - low)


@triton.jit
def score_tangent(call, given, place, s, bend, tr, i, j, MASKED: tl.constexpr):
    """T = s1∘TR + β, 0 where nothing is attended."""
    t = slope_of(bend) * tr
    if given.beta is not None:
        t += tangent_entries(given.beta, place, i, j)
    return shown(call, s, t, MASKED)


@triton.jit
def tangent_entries(bias_tangent, place, i, j):
    """β under a tile, float32."""
    return load_entries(bias_tangent, place, i, j, (i < place.n) & (j < place.m)).to(tl.float32)


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
    if bend is None:
        return 1.0
    else:
        return 1.0 - bend * bend


@triton.jit
def curve_of(call, bend):
    """s2 = −2·tanh(R / c)·s1 / c."""
    if bend is None:
        return 0.0
    else:
        return bend * (1.0 - bend * bend) * (-2.0 / call.softcap)


@triton.jit
def dropout(call, place, row, key, ROWS: tl.constexpr, KEYS: tl.constexpr, TURNED: tl.constexpr):
    """Z of a tile [ROWS, KEYS], or turned [KEYS, ROWS]; None without dropout. `key` is a multiple of 4."""
    if call.rng is None:
        return None
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
    if factor is None:
        return x
    else:
        return x * factor


# Row statistics: float64 between the maps, float32 within a kernel.


@triton.jit
def is_large(x):
    """Where the log-sum-exp holds the largest score itself, and log Σ exp in its last 29 bits (docs/math.md)."""
    magnitude = tl.abs(x)
    return (magnitude >= 1073741824.0) & (magnitude <= 3.5e38)


@triton.jit
def join_lse(top, total):
    """Float64 log-sum-exp of a row from its largest score and its sum of exponentials over that; −inf for 0."""
    log_total = tl.log(total).to(tl.float64)
    joined = top.to(tl.float64)
    low = tl.where(is_large(joined), log_total, 0.0) * 4194304.0 + 0.5
    packed = (joined.to(tl.int64, bitcast=True) | low.to(tl.int64)).to(tl.float64, bitcast=True)
    lse = tl.where(is_large(joined) & (total < 1e38), packed, joined + log_total)
    return tl.where(total == 0.0, float("-inf"), lse)


@triton.jit
def split_lse(lse):
    """(high, low) of a stored log-sum-exp, low in units of log 2; (+inf, 0) where nothing is attended."""
    bits = lse.to(tl.int64, bitcast=True)
    rounded = lse.to(tl.float32)
    top = (bits & ~0x1FFFFFFF).to(tl.float64, bitcast=True).to(tl.float32)
    high = tl.where(is_large(lse), top, rounded)
    packed = (bits & 0x1FFFFFFF).to(tl.float32) * (1.0 / 4194304.0)
    low = tl.where(is_large(lse), packed, (lse - rounded.to(tl.float64)).to(tl.float32))
    dead = lse == float("-inf")
    return tl.where(dead, float("inf"), high), tl.where(dead, 0.0, low * LOG2E)


@triton.jit
def load_lse(view, place, rows, inside):
    """(high, low) of a block of rows; those outside are as if they attended to nothing."""
    high, low = split_lse(load_statistic(view, place, rows, inside))
    return tl.where(inside, high, float("inf")), low


@triton.jit
def store_statistics(view, place, rows, inside, statistics):
    """Stores Statistics for a column pass; tau and dt may be None."""
    at = start_of(view, place.seq, place.head, place.q0) + tl.cast(rows, tl.int64) * view.row
    tl.store(at, statistics.high, mask=inside)
    tl.store(at + view.column, statistics.low, mask=inside)
    tl.store(at + 2 * view.column, statistics.d, mask=inside)
    if statistics.tau is not None:
        tl.store(at + 3 * view.column, statistics.tau, mask=inside)
        tl.store(at + 4 * view.column, statistics.dt, mask=inside)


@triton.jit
def load_column(view, at, column, inside, other):
    """A statistic of each row [*]; `other` outside (None: all are inside)."""
    if inside is None:
        return tl.load(at + column * view.column)
    else:
        return tl.load(at + column * view.column, mask=inside, other=other)


@triton.jit
def load_statistics(view, place, rows, inside, TANGENTS: tl.constexpr):
    """Statistics [*] that a row pass stored; rows outside (None: none) attend to nothing."""
    at = start_of(view, place.seq, place.head, place.q0) + tl.cast(rows, tl.int64) * view.row
    high = load_column(view, at, 0, inside, float("inf"))
    low = load_column(view, at, 1, inside, 0.0)
    d = load_column(view, at, 2, inside, 0.0)
    if TANGENTS:
        tau = load_column(view, at, 3, inside, 0.0)
        return Statistics(high, low, d, tau, load_column(view, at, 4, inside, 0.0))
    else:
        return Statistics(high, low, d, None, None)


@triton.jit
def statistics_of(given, place, rows, inside, TANGENTS: tl.constexpr):
    """Statistics of a block of queries that a column pass visits; high and low alone where no row pass told."""
    if given.statistics is None:
        exists = rows < place.n
        high, low = load_lse(given.lse, place, rows, exists)
        return Statistics(high, low, None, None, None)
    else:
        return load_statistics(given.statistics, place, rows, inside, TANGENTS)


@triton.jit
def as_column(statistics):
    """For tiles [queries, keys]."""
    high, low, d = statistics.high[:, None], statistics.low[:, None], statistics.d[:, None]
    if statistics.tau is None:
        return Statistics(high, low, d, None, None)
    else:
        return Statistics(high, low, d, statistics.tau[:, None], statistics.dt[:, None])
