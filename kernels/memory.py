"""Loads and stores of blocks, through strides.

A block starts at `place`, which its caller moved to the block's first row and key, in 64 bits; rows and
keys count from there.

A tensor's feature dimension is held as two tiles, main [*, MAIN] and rest [*, REST] or (), so that 80
features cost 64 + 16 and not 128. `WIDTH` is (features, MAIN, REST).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import products
from .call import absent


@triton.jit
def start_of(view, seq, head, row):
    """The pointer to a row of one (sequence, head)."""
    return view.ptr + seq * view.batch + head * view.head + tl.cast(row, tl.int64) * view.row


@triton.jit
def steps(indices, stride, view):
    """Offsets within a block: 32-bit, unless the view is so wide that they would overflow."""
    if absent(view.wide):
        return indices * stride
    else:
        return tl.cast(indices, tl.int64) * stride


@triton.jit
def pointers(view, base, rows, FIRST: tl.constexpr, SIZE: tl.constexpr):
    columns = FIRST + tl.arange(0, SIZE)
    return base + (steps(rows, view.row, view)[:, None] + steps(columns, view.column, view)[None, :])


@triton.jit
def inside_of(inside, FEATURES: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """The rows `inside` ((): all) and the columns that exist, broadcast together; (): everything."""
    columns = FIRST + tl.arange(0, SIZE)
    if absent(inside):
        if FIRST + SIZE > FEATURES:
            return (columns < FEATURES)[None, :]
        else:
            return ()
    elif FIRST + SIZE > FEATURES:
        return inside[:, None] & (columns < FEATURES)[None, :]
    else:
        return inside[:, None]


@triton.jit
def load_part(view, base, rows, inside, FEATURES: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    at = pointers(view, base, rows, FIRST, SIZE)
    keep = inside_of(inside, FEATURES, FIRST, SIZE)
    if absent(keep):
        return tl.load(at)
    else:
        return tl.load(at, mask=keep, other=0.0)


@triton.jit
def load_block(view, base, rows, inside, WIDTH: tl.constexpr):
    """Rows of a tensor [*, MAIN], [*, REST] or (); zeros where not inside ((): all rows are)."""
    FEATURES: tl.constexpr = WIDTH[0]
    MAIN: tl.constexpr = WIDTH[1]
    REST: tl.constexpr = WIDTH[2]
    main = load_part(view, base, rows, inside, FEATURES, 0, MAIN)
    if REST > 0:
        return (main, load_part(view, base, rows, inside, FEATURES, MAIN, REST))
    else:
        return (main, ())


@triton.jit
def store_part(view, base, rows, inside, x, FEATURES: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
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
    """What rounding x ((): nothing) to dtype loses; where that overflows, x itself."""
    if absent(x):
        return ()
    else:
        rounded = x.to(dtype).to(tl.float32)
        return x - tl.where(products.finite(rounded), rounded, 0.0)


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
    """The sum of what was rounded and what that lost, float32; () where there is nothing."""
    if absent(high):
        return ()
    elif absent(low):
        return high.to(tl.float32)
    else:
        high = high.to(tl.float32)
        return tl.where(products.finite(high), high, 0.0) + low.to(tl.float32)


@triton.jit
def load_in_two(view, low, place, rows, inside, WIDTH: tl.constexpr):
    """A block of results that store_in_two stored, float32."""
    x = load_block(view, start_of(view, place.seq, place.head, place.q0), rows, inside, WIDTH)
    if low is None:
        return (two_parts(x[0], ()), two_parts(x[1], ()))
    else:
        y = load_block(low, start_of(low, place.seq, place.head, place.q0), rows, inside, WIDTH)
        return (two_parts(x[0], y[0]), two_parts(x[1], y[1]))


@triton.jit
def load_rows(view, place, rows, inside, idle, WIDTH: tl.constexpr):
    """A block of queries, or of what is shaped like them; `idle` rows lose what is not finite ((): none
    do).
    """
    x = load_block(view, start_of(view, place.seq, place.head, place.q0), rows, inside, WIDTH)
    return products.without(x, idle)


@triton.jit
def load_rows_if(view, place, rows, inside, idle, WIDTH: tl.constexpr):
    """load_rows, or () where there is no view."""
    if view is not None:
        return load_rows(view, place, rows, inside, idle, WIDTH)
    else:
        return ()


@triton.jit
def load_keys(view, place, keys, inside, WIDTH: tl.constexpr):
    """A block of keys, or of values."""
    return load_block(view, start_of(view, place.seq, place.kv_head, place.k0), keys, inside, WIDTH)


@triton.jit
def load_statistic(view, place, rows, inside):
    """A row statistic [*] as stored; 0 outside ((): all are inside)."""
    at = start_of(view, place.seq, place.head, place.q0) + steps(rows, view.row, view)
    if absent(inside):
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_statistic(view, place, rows, inside, x):
    base = start_of(view, place.seq, place.head, place.q0)
    tl.store(base + steps(rows, view.row, view), x.to(view.ptr.dtype.element_ty), mask=inside)


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
    """load_keys, or () where there is no view or it is not wanted."""
    if wanted and view is not None:
        return load_keys(view, place, keys, inside, WIDTH)
    else:
        return ()


@triton.jit
def store_rows(view, place, rows, inside, x, factor, WIDTH: tl.constexpr):
    """Stores factor·x, shaped like queries, where it is wanted."""
    if view is not None:
        base = start_of(view, place.seq, place.head, place.q0)
        store_block(view, base, rows, inside, products.scaled(x, factor), WIDTH)


@triton.jit
def store_keys(view, place, keys, inside, x, factor, WIDTH: tl.constexpr):
    """Stores factor·x, shaped like keys, where it is wanted."""
    if view is not None:
        base = start_of(view, place.seq, place.kv_head, place.k0)
        store_block(view, base, keys, inside, products.scaled(x, factor), WIDTH)


@triton.jit
def store_entries(view, place, i, j, x):
    """Stores a tile of an N×M view, where it is wanted."""
    if view is not None:
        base = view.ptr + place.seq * view.batch + place.head * view.head
        at = base + tl.cast(i, tl.int64) * view.row + tl.cast(j, tl.int64) * view.column
        tl.store(at, x.to(view.ptr.dtype.element_ty), mask=(i < place.n) & (j < place.m))
