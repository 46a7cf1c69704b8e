"""Sums of very many terms: a running float32 sum of some hundred blocks loses digits.

A sweep over more takes them by spans, each from zero, and adds what one came to onto what it has put aside in
float32 memory of its own. So registers hold one state at a time.

A state is a tuple of numbers of each row, accumulators (main, rest) and ().
"""

from __future__ import annotations

import triton
import triton.language as tl

from .call import absent

SPAN = tl.constexpr(128)  # blocks


@triton.constexpr_function
def is_pair(x):
    return isinstance(x, (tuple, tl.tuple))


@triton.jit
def zeros_of_part(x):
    if absent(x):
        return ()
    else:
        return tl.zeros_like(x)


@triton.jit
def zeros_of(state):
    """An empty sum."""
    zeros = ()
    for index in tl.static_range(len(state)):
        x = state[index]
        if is_pair(x) and not absent(x):
            zeros = zeros + ((zeros_of_part(x[0]), zeros_of_part(x[1])),)
        else:
            zeros = zeros + (zeros_of_part(x),)
    return zeros


@triton.jit
def added_part(x, y):
    if absent(x):
        return ()
    else:
        return x + y


@triton.jit
def added(call, x, y):
    """Two sums as one."""
    both = ()
    for index in tl.static_range(len(x)):
        if is_pair(x[index]) and not absent(x[index]):
            main, rest = x[index]
            other_main, other_rest = y[index]
            both = both + ((added_part(main, other_main), added_part(rest, other_rest)),)
        else:
            both = both + (added_part(x[index], y[index]),)
    return both


@triton.jit
def pointers(base, x):
    """Where a tensor [rows] or [rows, columns] lies."""
    if len(x.shape) == 1:
        return base + tl.arange(0, x.shape[0])
    else:
        return base + tl.arange(0, x.shape[0])[:, None] * x.shape[1] + tl.arange(0, x.shape[1])[None, :]


@triton.constexpr_function
def size_of(x):
    """Elements of a tensor, an accumulator or ()."""
    return sum(map(size_of, x)) if isinstance(x, (tuple, tl.tuple)) else int(x.numel)


@triton.jit
def put_part(base, x):
    if not absent(x):
        tl.store(pointers(base, x), x)


@triton.jit
def put(base, state):
    """Stores a state, its members one after the other."""
    for index in tl.static_range(len(state)):
        x = state[index]
        if is_pair(x) and not absent(x):
            put_part(base, x[0])
            put_part(base + size_of(x[0]), x[1])
        else:
            put_part(base, x)
        base += size_of(x)
    tl.debug_barrier()  # who loads an element need not be who stored it


@triton.jit
def got_part(base, like):
    if absent(like):
        return ()
    else:
        return tl.load(pointers(base, like))


@triton.jit
def got(base, like):
    """What was stored, of the same members as `like`."""
    state = ()
    for index in tl.static_range(len(like)):
        x = like[index]
        if is_pair(x) and not absent(x):
            state = state + ((got_part(base, x[0]), got_part(base + size_of(x[0]), x[1])),)
        else:
            state = state + (got_part(base, x),)
        base += size_of(x)
    tl.debug_barrier()
    return state
