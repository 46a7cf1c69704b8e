"""What every kernel is told: views of tensors, sizes, options; and what a program knows of its place.

Tuples that hold tuples end with a None. Triton 3.6 derives a tuple's type again whenever it sets one of its
own fields, last the constants in their order; after a field that is a tuple only such a constant does it. To
a constexpr_function it hands neither the names of a tuple's fields nor a None among them, so these are given
single fields.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.constexpr_function
def absent(x: Any) -> bool:
    """Whether x is None, as a kernel is told that there is none, or (), as a function returns it.

    Triton 3.6 makes a tensor of each constant that a function returns, and cannot of None.
    """
    return x is None or (isinstance(x, (tuple, tl.tuple)) and len(x) == 0)


class View(NamedTuple):
    """A strided tensor; strides count elements and are 0 where it is broadcast."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    column: Any
    wide: Any  # 1 where offsets within a block need 64 bits, or ()


class Call(NamedTuple):
    """What every kernel is told of a call; what is None is compiled away."""

    q: Any  # View [B, Hq, N, d]; packed sequences: batch stride 0, rows of all sequences
    k: Any  # View [B, Hkv, M, d]
    v: Any  # View [B, Hkv, M, dv]
    bias: Any  # View [B, Hq, N, M]
    sinks: Any  # View [B, Hq]
    slopes: Any  # View [B, Hq]
    mask: Any  # View of bytes [B, Hq, N, M]
    rng: Any  # View int64 [B, 2] as batch and column
    cu_q: Any  # int32 [B + 1], with cu_k
    cu_k: Any
    heads: Any  # Hq
    group: Any  # query heads that share a key head
    n: Any  # queries, keys; the longest sequence's of a packed problem
    m: Any
    scale: Any
    unit: Any  # tiles hold elements, S / unit: it is the last factor on the way to S, or None (1)
    softcap: Any
    left: Any  # keys up to so many before a query's own place; None: all
    right: Any  # and after it; 0: causal
    bottom_right: Any  # 1: the last query's own place is the last key; 0: the first's the first
    threshold: Any  # dropout keeps where a Philox word is at least this
    kept: Any  # 1 / (1 - p)
    last: None = None


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
    """The partners of a block: visited from `first` to `end`, without a position mask from `full` to
    `tail`.
    """

    lowest: Any
    first: Any
    full: Any
    tail: Any
    end: Any


class Given(NamedTuple):
    """Views of what a map is given besides the call; None where there is none."""

    o: Any  # [B, Hq, N, dv]
    o_lo: Any  # what rounding o lost
    lse: Any  # float64 [B, Hq, N] and, as columns, its two parts (problem.Results)
    do: Any  # cotangents of o and lse: every other row statistic between the maps is float64 [B, Hq, N]
    dlse: Any
    a: Any  # tangents of q, k, v, bias, sinks, slopes
    b: Any
    c: Any
    beta: Any
    sigma: Any
    omega: Any
    o_t: Any  # tangents of o, o_lo, lse
    o_t_lo: Any
    lse_t: Any
    dq: Any  # what vjp gave for q
    # float32 [B, Hq, N] and, as columns, Statistics' fields: a row pass tells a column pass. Without it a
    # column pass has all keys in its one block, and finds out itself.
    statistics: Any
    last: None = None


class Room(NamedTuple):
    """Float32 memory that a program has for itself, `size` elements each."""

    ptr: Any
    size: Any


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
    dslopes: Any  # likewise
    room: Any  # Room, where a sweep is so long that its sums are put aside (spans.py)
    last: None = None


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
    last: None = None


class Statistics(NamedTuple):
    """What is known of each row of a block of queries, float32."""

    reference: (
        Any  # an element: P = 2^(exponents(element, reference) − log_total); +inf where nothing is attended
    )
    log_total: Any
    d: Any  # D = rowsum(dO∘O) − dL
    tau: Any  # the tangent of L
    dt: Any  # Dt = rowsum(dO∘Ot)


class Scores(NamedTuple):
    """Scores under a block of queries and one of keys."""

    i: Any  # indices of queries and keys, broadcast against each other
    j: Any
    s: Any  # S, or S / unit
    bend: Any  # tanh(R / c), or ()
    p: Any  # P
    z: Any  # Z, or ()


class Tile(NamedTuple):
    """What second derivatives are made of, under a block of queries and one of keys."""

    seen: Any  # Scores
    tr: Any  # TR
    t: Any  # T
    dp: Any  # dP = Z∘(dO Vᵀ)
    e: Any  # E = Z∘(dO Cᵀ)
