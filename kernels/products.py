"""Products on tensor cores, accumulators, and what keeps NaN of masked places out of them.

Blocks and accumulators are pairs (main, rest), see memory.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .call import absent


@triton.jit
def finite(x):
    x = x.to(tl.float32)  # the interpreter's bfloat16 holds bits, whose differences are 0
    return x - x == 0.0


@triton.jit
def part_without(x, idle):
    if absent(x):
        return ()
    else:
        return tl.where(idle[:, None] & (finite(x) == 0), 0.0, x).to(x.dtype)


@triton.jit
def without(x, idle):
    """x with zeros for what is not finite in idle rows ((): no row is); () of nothing."""
    if absent(idle) | absent(x):
        return x
    else:
        return (part_without(x[0], idle), part_without(x[1], idle))


@triton.jit
def dot_features(x, y, acc, PRECISION: tl.constexpr):
    """x yᵀ over the features [rows of x, rows of y], added to acc; acc itself where there is no x or no y."""
    if absent(x) | absent(y):
        return acc
    else:
        acc = tl.dot(x[0], y[0].T, acc, input_precision=PRECISION)
        if not absent(x[1]):
            acc = tl.dot(x[1], y[1].T, acc, input_precision=PRECISION)
        return acc


@triton.jit
def part_product(weights, x, acc, PRECISION: tl.constexpr, TWICE: tl.constexpr):
    if absent(x):
        return ()
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

    Weights are rounded to x's dtype; TWICE multiplies what a two-byte float loses of them as well. A sum
    over few keys has nothing to average the loss out.
    """
    if absent(acc) | absent(x):
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
        return (tl.zeros([ROWS, MAIN], tl.float32), ())


@triton.jit
def zeros_if(view, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """An accumulator for what is wanted, or ()."""
    if view is None:
        return ()
    else:
        return zeros(ROWS, WIDTH)


@triton.jit
def part_scaled(x, factor):
    if absent(x):
        return ()
    else:
        return x * factor


@triton.jit
def scaled(acc, factor):
    """acc times a number, or times a factor for each row as [rows, 1]."""
    return (part_scaled(acc[0], factor), part_scaled(acc[1], factor))


@triton.jit
def part_minus(x, factor, y):
    if absent(x):
        return ()
    else:
        return x - factor * y


@triton.jit
def minus(x, factor, y):
    """x − factor·y, factor for each row as [rows, 1]."""
    return (part_minus(x[0], factor, y[0]), part_minus(x[1], factor, y[1]))


@triton.jit
def part_plus_finite(x, factor, y):
    if absent(x):
        return ()
    else:
        return x + factor * tl.where(finite(y), y, 0.0)


@triton.jit
def plus_finite(x, factor, y):
    """x + factor·y, factor for each row as [rows, 1], without what of y is infinite or NaN."""
    return (part_plus_finite(x[0], factor, y[0]), part_plus_finite(x[1], factor, y[1]))


@triton.jit
def part_where(x, condition, value):
    if absent(x):
        return ()
    else:
        return tl.where(condition[:, None], value, x)


@triton.jit
def where_rows(condition, value, acc):
    """An accumulator with a number in the rows [rows] where a condition holds."""
    return (part_where(acc[0], condition, value), part_where(acc[1], condition, value))


@triton.jit
def row_dots(x, y):
    """Σ x∘y over the features [rows], float32; 0 where there is no x or no y."""
    if absent(x) | absent(y):
        return 0.0
    else:
        total = tl.sum(x[0].to(tl.float32) * y[0].to(tl.float32), 1)
        if not absent(x[1]):
            total += tl.sum(x[1].to(tl.float32) * y[1].to(tl.float32), 1)
        return total
