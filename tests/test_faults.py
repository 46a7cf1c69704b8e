"""Known ways in which attention kernels fail (docs/faults.md), one test each at least.

Refusals are in test_problem.py, torch's own signature is in test_functional.py, torch.compile in
test_compile.py. `check` compares with the reference's formula in float64,
differentiated by torch itself.
"""

from __future__ import annotations

import inspect
import math
import mmap
import os
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import emulation
import pytest
import torch
from helpers import FLOORS
from torch import Tensor

import metattn
from metattn import backends, functional
from metattn.backends import reference
from metattn.backends.triton import devices
from metattn.cli import doctor
from metattn.problem import Options, Primals, dense

INF = math.inf
Leaves = dict[str, Tensor]
Layout = Callable[[str, Tensor], Tensor]


DEVICES = {
    "reference": "cpu",
    "cpu": "cpu",
    "cuda": "cpu" if emulation.installed() else "cuda",
    "triton": "cpu" if devices.interpreted() else "cuda",
}


def in_interpreter(backend: str) -> bool:
    """Whether the backend's kernels run in Triton's interpreter."""
    return backend == "triton" and devices.interpreted()


# ------------------------------------------------------------------------------------ comparing with float64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64)


def qkv(
    *,
    batch: int = 2,
    heads: int = 2,
    n: int = 5,
    m: int = 7,
    d: int = 8,
    dv: int | None = None,
    kv_heads: int | None = None,
) -> Leaves:
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = {"q": (heads, n, d), "k": (kv_heads, m, d), "v": (kv_heads, m, dv or d)}
    return {name: randn(batch, *shape, seed=ord(name)) for name, shape in shapes.items()}


def both_orders(call: Callable[..., tuple[Tensor, Tensor]], leaves: Leaves, seeds: Leaves) -> Leaves:
    """o, lse, the gradients of both along `seeds`' cotangents, and the gradients of those along its tangents.

    Unlike helpers.both_orders, leaves and cotangents keep the layouts they come in.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    results = dict(zip(("o", "lse"), call(**leaves), strict=True))
    outputs = {name: t for name, t in results.items() if t.requires_grad}  # lse does not depend on v
    cotangents = {
        f"d{name}": seeds[name].detach().to(t.dtype).requires_grad_() for name, t in outputs.items()
    }
    first = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(cotangents.values()), create_graph=True
    )
    tangents = [seeds[name].to(t.dtype) for name, t in zip(leaves, first, strict=True)]
    inputs = {f"d{name}": t for name, t in leaves.items()} | cotangents
    second = torch.autograd.grad(first, list(inputs.values()), tangents, materialize_grads=True)
    results |= {f"d{name}": t for name, t in zip(leaves, first, strict=True)}
    results |= {f"second {name}": t for name, t in zip(inputs, second, strict=True)}
    return {name: t.detach() for name, t in results.items()}


def plain(call: Callable[..., Any], **arguments: Any) -> Any:
    """The call through the reference's formula, differentiated by torch: none of our Functions, no kernel."""
    with mock.patch.object(functional, "attend", lambda *problem: reference.forward(*problem)[:2]):
        return call(**arguments, backend="reference")


def seeds_for(leaves: Leaves, o: Tensor, lse: Tensor) -> Leaves:
    """A cotangent of o and of lse, a tangent for the gradient of each leaf."""
    like = {"o": o, "lse": lse, **leaves}
    return {
        name: randn(*t.shape, seed=100 + index).to(t.device) for index, (name, t) in enumerate(like.items())
    }


def relative_error(found: Tensor, exact: Tensor, packed: bool = False, *, vanishes: bool = False) -> float:
    """‖x − x64‖/‖x64‖ of the whole or of the worst (batch, head), `vanishes`: of ones at least."""
    dead = exact == -INF
    assert torch.equal(found == -INF, dead), "-inf in other places than the float64 reference's"
    difference, exact = (t.masked_fill(dead, 0.0) for t in (found.double() - exact, exact))
    if packed and exact.ndim == 3:  # [total, H, d]
        difference, exact = (t.transpose(0, 1)[None] for t in (difference, exact))
    worst = 0.0
    for by_head in (False, True):
        split = by_head and exact.ndim > 2
        rows = [t.flatten(2).flatten(0, 1) if split else t.flatten()[None] for t in (difference, exact)]
        if exact.numel():
            error, size = (row.norm(dim=-1) for row in rows)
            size = size.clamp_min(math.sqrt(rows[1].shape[-1])) if vanishes else size
            ratio = torch.where(error == 0, 0.0, error / size).max().item()
            worst = ratio if not ratio <= worst else worst
    return worst


def check(
    backend: str,
    leaves: Leaves,
    dtype: torch.dtype = torch.float32,
    *,
    layout: Layout = lambda name, t: t,
    function: Callable[..., Any] = metattn.attention,
    unchecked: tuple[str, ...] = (),
    vanishing: tuple[str, ...] = (),
    **options: Any,
) -> Leaves:
    """Both orders on a backend against float64, within the rule beside eager torch in the same dtype; ours.

    `layout` lays out what our call gets: the leaves and options by their names, the cotangent of o as "do".
    """
    device = DEVICES[backend]

    def constants(dtype: torch.dtype, layout: Layout) -> dict[str, Any]:
        return {
            name: layout(name, t.to(device, dtype if t.is_floating_point() else None))
            if isinstance(t, Tensor)
            else t
            for name, t in options.items()
        }

    def call(dtype: torch.dtype, layout: Layout = lambda name, t: t) -> Callable[..., tuple[Tensor, Tensor]]:
        return partial(function, **constants(dtype, layout), return_lse=True)

    rounded = {name: t.to(device, dtype) for name, t in leaves.items()}
    seeds = seeds_for(rounded, *plain(call(dtype), **rounded))
    seeds = {name: t.to(dtype).double() for name, t in seeds.items()}
    ours = both_orders(
        partial(call(dtype, layout), backend=backend),
        {name: layout(name, t) for name, t in rounded.items()},
        seeds | {"o": layout("do", seeds["o"].to(dtype))},
    )
    eager = both_orders(partial(plain, call(dtype)), rounded, seeds)
    exact = both_orders(
        partial(plain, call(torch.float64)), {name: t.double() for name, t in rounded.items()}, seeds
    )
    factor, floor = {torch.float64: (4.0, 1e-12), **FLOORS}[dtype]
    packed = function is metattn.varlen_attention
    for name in exact.keys() - set(unchecked):
        error, eagers = (
            relative_error(x[name], exact[name], packed, vanishes=name in vanishing) for x in (ours, eager)
        )
        limit = max(factor * eagers, floor)
        assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.2e}"
    for name, t in leaves.items():
        assert ours[f"d{name}"].shape == ours[f"second d{name}"].shape == t.shape
        assert ours[f"d{name}"].dtype == ours[f"second d{name}"].dtype == dtype
    return ours


def mask_of(*shape: int, empty_row: int | None = None) -> Tensor:
    mask = randn(*shape) > -0.5
    mask[..., 0] = True
    if empty_row is not None:
        mask[..., empty_row, :] = False
    return mask


def nothing_in_row(result: Leaves, row: int) -> None:
    """The row's output is 0, its lse −inf, its gradients 0, all else is finite."""
    assert not result["o"][..., row, :].any()
    assert (result["lse"][..., row] == -INF).all()
    for name in ("dq", "second dq"):
        assert not result[name][..., row, :].any()
    assert all(t.isfinite().all() for name, t in result.items() if name != "lse")


# --------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize("causal", [False, "bottom-right"])
def test_mask_row_all_false(backend: str, causal: bool | str) -> None:
    result = check(backend, qkv(), mask=mask_of(2, 1, 5, 7, empty_row=3), causal=causal)
    nothing_in_row(result, 3)


@pytest.mark.parametrize("differentiated", [False, True])
def test_bias_row_all_minus_infinity(backend: str, differentiated: bool) -> None:
    bias = randn(2, 1, 5, 7)
    bias[..., 2, :] = -INF
    leaves, options = (qkv() | {"bias": bias}, {}) if differentiated else (qkv(), {"bias": bias})
    result = check(backend, leaves, **options)
    nothing_in_row(result, 2)
    if differentiated:
        assert not result["dbias"][..., 2, :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_row_of_finfo_min(backend: str, dtype: torch.dtype) -> None:
    leaves = {name: t.to(DEVICES[backend], dtype) for name, t in qkv().items()}
    bias = torch.zeros(2, 1, 5, 7, device=DEVICES[backend], dtype=dtype)
    bias[0, 0, 2:] = torch.finfo(dtype).min
    bias[1, 0, :, 4:] = torch.finfo(dtype).min
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        theirs = torch.nn.functional.scaled_dot_product_attention(*leaves.values(), attn_mask=bias)
    # tensor cores take the weights rounded to bfloat16
    close = {"rtol": 2**-6, "atol": 2**-9} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(metattn.attention(**leaves, bias=bias, backend=backend), theirs, **close)
    # what lse is there only shows how low a backend's scores go
    result = check(
        backend,
        qkv(n=33, m=35),
        dtype,
        unchecked=("lse",),
        bias=torch.nn.functional.pad(bias, (0, 28, 0, 28)),
    )
    assert all(t.isfinite().all() for t in result.values())


@pytest.mark.parametrize("poison", [math.nan, INF, -INF], ids=str)
@pytest.mark.parametrize("how", ["mask", "causal", "window"])
def test_masked_keys_do_not_leak(backend: str, poison: float, how: str) -> None:
    leaves = qkv(n=5, m=9)
    options: dict[str, Any] = {"causal": True}
    dead = slice(5, None)
    if how == "mask":
        options = {"mask": mask_of(1, 1, 1, 9)}
        options["mask"][..., 4:6] = False
        dead = slice(4, 6)
    elif how == "window":
        options = {"window": (2, 0)}
        dead = slice(0, 2)
    clean = check(backend, leaves, **options)
    poisoned = {name: t.to(DEVICES[backend], torch.float32) for name, t in leaves.items()}
    for name in ("k", "v"):
        poisoned[name][:, :, dead] = poison
    options = {name: t.to(DEVICES[backend]) if isinstance(t, Tensor) else t for name, t in options.items()}
    call = partial(metattn.attention, **options, return_lse=True, backend=backend)
    seeds = seeds_for(poisoned, clean["o"], clean["lse"])
    again = both_orders(call, {n: t.to(DEVICES[backend], torch.float32) for n, t in leaves.items()}, seeds)
    for name, t in both_orders(call, poisoned, seeds).items():
        assert torch.equal(t, again[name]), name
        if name.endswith(("dk", "dv")):
            assert not t[:, :, dead].any()


def test_other_sequences_do_not_leak(backend: str) -> None:
    cu = torch.tensor([0, 3, 8], device=DEVICES[backend])
    q, k, v = (randn(8, 2, 4, seed=i).to(DEVICES[backend], torch.float32) for i in range(3))
    call = partial(
        metattn.varlen_attention,
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        max_seqlen_q=5,
        max_seqlen_k=5,
        backend=backend,
    )
    alone = call(q, k, v)
    for t in (q, k, v):
        t[3:] = math.nan
    o = call(q, k, v)
    assert torch.equal(o[:3], alone[:3])
    assert o[3:].isnan().all()


@pytest.mark.parametrize(("n", "m"), [(40, 7), (40, 1100), (3, 9000)])
def test_nan_in_a_live_query_stays_in_its_row(n: int, m: int, backend: str) -> None:
    """Keys that come by spans and by splits too."""
    leaves = {name: t.to(DEVICES[backend], torch.float32) for name, t in qkv(n=n, m=m).items()}
    clean = metattn.attention(**leaves, backend=backend)
    leaves["q"][0, 1, n - 2, 2] = math.nan
    o, lse = metattn.attention(**leaves, backend=backend, return_lse=True)
    assert o[0, 1, n - 2].isnan().all()
    assert lse[0, 1, n - 2].isnan()
    o[0, 1, n - 2] = clean[0, 1, n - 2]
    assert torch.equal(o, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_in_the_first_keys_reaches_all_rows(dtype: torch.dtype, backend: str) -> None:
    """A thousand of them have no largest score."""
    leaves = {name: t.to(DEVICES[backend], dtype) for name, t in qkv(m=2100).items()}
    leaves["k"][:, :, :1024] = math.nan
    o, lse = metattn.attention(**leaves, backend=backend, return_lse=True)
    assert o.isnan().all()
    assert lse.isnan().all()


def test_float16_scores_beyond_65504(backend: str) -> None:
    leaves = {name: torch.full_like(t, 256.0) for name, t in qkv(n=33, m=65, d=64).items()}
    # the gradients of equal keys cancel: beside their terms of up to 2**40 nothing is left to compare
    gradients = ("dq", "dk", "dv", "second dq", "second dk", "second dv", "second do", "second dlse")
    result = check(backend, leaves, torch.float16, unchecked=gradients)
    assert all(t.isfinite().all() for name, t in result.items() if not name.startswith("second"))
    assert not any(t.isnan().any() for t in result.values())
    assert (result["o"] == 256.0).all()
    leaves = qkv(n=33, m=65, d=64)
    leaves |= {name: 256 * leaves[name] for name in ("q", "k")}
    check(backend, leaves, torch.float16)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"heads": 0}, {"n": 0}], ids=["B=0", "H=0", "N=0"])
def test_nothing_asked(backend: str, empty: dict[str, int]) -> None:
    result = check(backend, qkv(**empty))
    assert not result["o"].numel()
    assert not any(t.any() for name, t in result.items() if name.startswith("d"))


def test_no_keys(backend: str) -> None:
    result = check(backend, qkv(m=0))
    assert not result["o"].any()
    assert (result["lse"] == -INF).all()
    assert not result["dq"].any()
    bias = check(backend, qkv(m=0) | {"sinks": randn(2)}, causal=True)
    assert not bias["o"].any()
    assert bias["lse"].isfinite().all()


LENGTHS = [1, 31, 33, 127, 129, 257]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("m", LENGTHS)
def test_lengths(backend: str, n: int, m: int) -> None:
    # of one key the weight is 1: what q and k get through o cancels, beside terms of size 1
    vanishing = ("dq", "dk", "second dq", "second dk") if m == 1 else ()
    if n == 1:  # one number a head, a sum of terms of size 1 that is 0.006 in one
        vanishing += ("second dlse",)
    check(backend, qkv(batch=1, n=n, m=m), vanishing=vanishing)


DIMENSIONS = [1, 3, 16, 40, 59, 80, 96, 111, 128, 203, 256]


@pytest.mark.parametrize(
    ("d", "dv"), [*zip(DIMENSIONS, reversed(DIMENSIONS), strict=True), (64, 64), (16, 1)]
)
def test_head_dimensions(backend: str, d: int, dv: int) -> None:
    check(backend, qkv(batch=1, n=9, m=35, d=d, dv=dv))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [16, 59, 128])
def test_head_dimensions_in_low_precision(backend: str, d: int, dtype: torch.dtype) -> None:
    check(backend, qkv(n=33, m=65, d=d), dtype, causal=True)


@pytest.mark.parametrize("d", [257, 300, 512])
def test_wide_heads(backend: str, d: int) -> None:
    """Right, or refused by name and left to the next backend: never wrong."""
    leaves = {name: t.to(DEVICES[backend], torch.float32) for name, t in qkv(d=d).items()}
    call = dense(*leaves.values(), Options())
    if backends.objection(backend, *call) is None:
        check(backend, qkv(d=d))
    else:
        with pytest.raises(NotImplementedError, match="cannot serve this call"):
            metattn.attention(**leaves, backend=backend)
        assert metattn.explain(**leaves).backend != backend


def last_stride_2(name: str, t: Tensor) -> Tensor:
    return torch.stack((t, torch.full_like(t, -7)), -1)[..., 0] if t.dtype != torch.bool else t


def negated_view(name: str, t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype == torch.float32 else t


LAYOUTS: dict[str, Layout] = {
    "heads-after-rows": lambda name, t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t,
    "features-before-rows": lambda name, t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "batch-last": lambda name, t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "last-stride-2": last_stride_2,
    "inside-a-larger-one": lambda name, t: torch.nn.functional.pad(t, (3, 2) * t.ndim)[
        (slice(3, -2),) * t.ndim
    ],
    "negative-bit": negated_view,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: str, layout: Layout, dtype: torch.dtype) -> None:
    leaves = qkv(n=33, m=35) | {"bias": randn(2, 2, 33, 35)}
    check(backend, leaves, dtype, layout=layout, mask=mask_of(2, 2, 33, 35), alibi_slopes=torch.rand(2, 2))


def test_expanded_keys_and_values(backend: str) -> None:
    leaves = qkv(kv_heads=2)
    leaves["k"] = leaves["k"][:1, :1].expand(2, 2, -1, -1)
    leaves["v"] = leaves["v"][:, :, :1].expand(-1, -1, 7, -1)

    def expanded(name: str, t: Tensor) -> Tensor:
        if name == "k":
            return t[:1, :1].expand_as(t)
        return t[:, :, :1].expand_as(t) if name == "v" else t

    check(backend, leaves, layout=expanded)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 7), (1, 2, 5, 1), (5, 7), (7,), ()], ids=str)
@pytest.mark.parametrize("expanded", [False, True], ids=["of-size-1", "expanded"])
def test_broadcast_masks_and_biases(backend: str, shape: tuple[int, ...], expanded: bool) -> None:
    bias, mask = randn(*shape), torch.ones(shape, dtype=torch.bool)
    if shape and shape[-1] == 7:
        mask[..., 2] = False
    # alike for all keys, a bias moves lse alone: its second derivatives are sums that cancel
    unchecked = () if shape and shape[-1] == 7 else ("second dbias",)
    full = (2, 2, 5, 7)
    narrow = tuple(slice(size) for size in (1,) * (4 - len(shape)) + shape)

    def broadcast(name: str, t: Tensor) -> Tensor:
        return t[narrow].expand(full) if name in ("bias", "mask") else t

    if expanded:
        leaves = qkv() | {"bias": bias.expand(full)}
        check(backend, leaves, layout=broadcast, mask=mask.expand(full))
    else:
        result = check(backend, qkv() | {"bias": bias}, unchecked=unchecked, mask=mask)
        assert not unchecked or result["second dbias"].abs().max() < 1e-5


def test_expanded_cotangents(backend: str) -> None:
    leaves = [t.to(DEVICES[backend], torch.float32).requires_grad_() for t in qkv().values()]
    o = metattn.attention(*leaves, backend=backend)
    ours = torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    dense_cotangent = torch.autograd.grad(o, leaves, torch.ones_like(o))
    for expanded, contiguous in zip(ours, dense_cotangent, strict=True):
        assert torch.equal(expanded, contiguous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_unaligned_pointers(backend: str, dtype: torch.dtype) -> None:
    def shifted(name: str, t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    if dtype == torch.float64 and backend == "triton":
        pytest.skip("it computes in float32")
    leaves = qkv(n=17, m=19, d=16) | {"bias": randn(17, 19)}
    check(backend, leaves, dtype, layout=shifted, mask=mask_of(17, 19))


@pytest.mark.parametrize(("batch", "heads"), [(65_536, 1), (1, 65_537), (4_097, 16)])
def test_many_heads(backend: str, batch: int, heads: int) -> None:
    if in_interpreter(backend):
        pytest.skip("the interpreter would take hours for so many programs")
    check(backend, qkv(batch=batch, heads=heads, n=2, m=2, d=2))


def sparse(backend: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view that spans far more than it holds; only the pages it touches take memory."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if DEVICES[backend] == "cpu":
        pages = mmap.mmap(-1, elements * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype).as_strided(shape, strides)
    return torch.zeros(elements, dtype=dtype, device=DEVICES[backend]).as_strided(shape, strides)


FAR = 2**31 + 64


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("q", (FAR, 40, 8, 1)),
        ("q", (20, 10, FAR // 4, 1)),
        ("k", (8, FAR, 16, 1)),
        ("v", (16, 8, FAR // 6, 1)),
        ("do", (16, 8, FAR // 4, 1)),
        ("bias", (FAR, 35, 7, 1)),
        ("mask", (10, 5, 1, FAR // 6)),
    ],
    ids=["q-batch", "q-row", "k-head", "v-row", "do-row", "bias-batch", "mask-key"],
)
def test_offsets_past_2_31(backend: str, name: str, strides: tuple[int, ...]) -> None:
    leaves, options = qkv() | {"bias": randn(2, 2, 5, 7)}, {"mask": mask_of(2, 2, 5, 7)}

    def far(which: str, t: Tensor) -> Tensor:
        if which != name:
            return t
        return sparse(backend, tuple(t.shape), strides, t.dtype).copy_(t)

    check(backend, leaves, torch.float16, layout=far, **options)


@pytest.mark.parametrize("causal", ["top-left", "bottom-right"])
@pytest.mark.parametrize(("n", "m"), [(5, 9), (9, 5), (33, 129), (129, 33), (1, 33), (65, 1)])
def test_causal_rectangles(backend: str, n: int, m: int, causal: str) -> None:
    result = check(backend, qkv(n=n, m=m), causal=causal)
    if causal == "bottom-right" and n > m:
        for row in (0, n - m - 1):
            nothing_in_row(result, row)


@pytest.mark.parametrize("window", [(0, 0), (3, -1), (-1, 2), (40, 1), (0, 5)], ids=str)
@pytest.mark.parametrize("causal", [False, "top-left", "bottom-right"])
@pytest.mark.parametrize(("n", "m"), [(9, 9), (70, 35), (35, 70)])
def test_windows(backend: str, n: int, m: int, causal: bool | str, window: tuple[int, int]) -> None:
    check(backend, qkv(batch=1, n=n, m=m), causal=causal, window=window)


@pytest.mark.parametrize("causal", [False, True, "bottom-right"])
@pytest.mark.parametrize(
    ("window", "same"),
    [((2**63 - 1, -1), (-1, -1)), ((0, 2**63), (0, -1)), ((2**31, 2**31 - 1), None)],
    ids=str,
)
def test_windows_wider_than_any_sequence(
    backend: str, causal: bool | str, window: tuple[int, int], same: tuple[int, int] | None
) -> None:
    leaves = qkv(n=35, m=33)
    ours = check(backend, leaves, causal=causal, window=window)
    expected = check(backend, leaves, causal=causal, window=same)
    assert all(torch.equal(t, expected[name]) for name, t in ours.items())


@pytest.mark.parametrize(("heads", "kv_heads"), [(65, 5), (27, 1), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_heads(backend: str, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(backend, qkv(batch=1, heads=heads, kv_heads=kv_heads, n=33, m=17), dtype, causal=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current(backend: str) -> None:
    leaves = [t.float().to("cuda:1") for t in qkv().values()]
    if DEVICES[backend] == "cuda":
        expected = plain(metattn.attention, q=leaves[0], k=leaves[1], v=leaves[2])
        torch.testing.assert_close(metattn.attention(*leaves, backend=backend), expected)


def test_dropout_of_none_and_of_all(backend: str) -> None:
    leaves = {name: t.to(DEVICES[backend], torch.float32) for name, t in qkv().items()}
    call = partial(metattn.attention, **leaves, backend=backend)
    assert torch.equal(call(dropout_p=0.0, dropout_seed=3), call())
    result = check(backend, qkv(), dropout_p=1.0, dropout_seed=3)
    assert not result["o"].any()
    assert result["lse"].isfinite().all()


def dropout_masks(backend: str, seed: int, p: float = 0.3) -> list[Tensor]:
    """The keep-mask [B, H, N, M] as each of the four maps used it: equal scores, unit vectors as values."""
    batch, heads, n, m = 2, 3, 37, 70
    options = Options(dropout_p=p, dropout_seed=seed)
    q, do = torch.zeros(batch, heads, n, 4), torch.eye(n).expand(batch, heads, n, n)
    k, values = torch.zeros(batch, heads, m, 4), torch.eye(m).expand(batch, heads, m, m)
    narrow = torch.ones(batch, heads, m, n)
    tangent_q, tangent_k = torch.ones_like(q), randn(batch, heads, m, 4).float()
    q, do, k, values, narrow, tangent_q, tangent_k = (
        t.to(DEVICES[backend]) for t in (q, do, k, values, narrow, tangent_q, tangent_k)
    )
    module, wanted = backends.load(backend), (False, False, True, False, False, False)
    problem, primals, constants = dense(q, k, values, options)
    of_values = module.forward(problem.on(backend), primals, constants)
    ot = module.jvp(problem, primals, constants, of_values, Primals(None, None, values, None, None, None)).o
    # the tangent of equal scores has to come from k, with queries of ones
    problem, primals, constants = dense(tangent_q, k, narrow, options)
    tangents = Primals(None, tangent_k, None, None, None, None)
    results = module.forward(problem, primals, constants)
    dv = module.vjp(problem, primals, constants, results, do, None, wanted).v
    results_t = module.jvp(problem, primals, constants, results, tangents)
    dvt = module.vjp_jvp(problem, primals, constants, results, do, None, tangents, results_t, wanted).v
    o = of_values.o
    return [(t != 0).cpu() for t in (o, ot, dv.mT, dvt.mT)]


def test_one_mask_in_all_maps_and_backends(backend: str) -> None:
    p = 0.3
    masks = dropout_masks(backend, 7, p)
    for mask in (*masks, *dropout_masks(backend, 7, p), *dropout_masks("reference", 7, p)):
        assert torch.equal(mask, masks[0])
    other = dropout_masks(backend, 8, p)[0]
    differing = (other != masks[0]).float().mean().item()
    count = masks[0].numel()
    for fraction, expected in ((masks[0].float().mean().item(), 1 - p), (differing, 2 * p * (1 - p))):
        assert abs(fraction - expected) <= 4 * math.sqrt(expected * (1 - expected) / count)


def test_dropout_in_both_orders(backend: str) -> None:
    check(backend, qkv(n=33, m=65), dropout_p=0.4, dropout_seed=11, causal=True)


def test_drawn_seeds_come_from_torchs_generator(backend: str) -> None:
    leaves = [t.to(DEVICES[backend], torch.float32) for t in qkv().values()]

    def drawn(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [metattn.attention(*leaves, dropout_p=0.5, backend=backend) for _ in range(2)]

    first, again, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e4])
def test_scales(backend: str, scale: float) -> None:
    check(backend, qkv(n=65, m=67, d=16), scale=scale)


def test_gradients_carry_a_graph_to_the_third_order(backend: str) -> None:
    dtype, close = torch.float64, {"rtol": 1e-9, "atol": 1e-11}
    if backend == "triton":
        dtype, close = torch.float32, {"rtol": 1e-3, "atol": 1e-4}
    leaves = {name: t.to(DEVICES[backend], dtype) for name, t in qkv(batch=1, n=3, m=4, d=3).items()}

    def orders(call: Callable[..., Tensor]) -> list[tuple[Tensor, ...]]:
        inputs = [t.clone().requires_grad_() for t in leaves.values()]
        value = call(q=inputs[0], k=inputs[1], v=inputs[2]).square().sum()
        result = []
        for order in range(3):
            gradients = torch.autograd.grad(value, inputs, create_graph=order < 2)
            assert all((t.grad_fn is not None) == (order < 2) for t in gradients)
            result.append(gradients)
            value = sum((t.sin().sum() for t in gradients), torch.zeros((), device=DEVICES[backend]))
        return result

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ours = orders(partial(metattn.attention, backend=backend))
    caught = [w for w in caught if w.category is not RuntimeWarning]  # numpy's, in the interpreter
    assert [w.category for w in caught] == [metattn.HigherOrderWarning]
    assert "reference" in str(caught[0].message)
    for order, exact in zip(ours, orders(partial(plain, metattn.attention)), strict=True):
        for found, expected in zip(order, exact, strict=True):
            torch.testing.assert_close(found, expected, **close)


class Calls:
    """Records what a backend's maps are asked for, by argument."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        module = backends.load(backend)
        for name in ("forward", "vjp", "jvp", "vjp_jvp"):
            monkeypatch.setattr(module, name, partial(self._record, name, getattr(module, name)))
        # the short way serves no call now: all take the maps' functions
        monkeypatch.setattr(module, "run_plain", lambda *_: None, raising=False)

    def _record(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append((name, inspect.signature(function).bind(*arguments).arguments))
        return function(*arguments)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.mark.parametrize(
    "wanted", [("q",), ("k",), ("v",), ("bias",), ("q", "v"), ("k", "bias")], ids="-".join
)
def test_only_some_inputs_are_differentiated(
    backend: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = qkv() | {"bias": randn(1, 2, 5, 7)}
    held = {name: t for name, t in everything.items() if name not in wanted}
    check(backend, {name: everything[name] for name in wanted}, **held)

    calls = Calls(monkeypatch, backend)
    tensors = {name: t.to(DEVICES[backend], torch.float32) for name, t in everything.items()}
    for name in wanted:
        tensors[name].requires_grad_()
    o = metattn.attention(**tensors, backend=backend)
    inputs = [tensors[name] for name in wanted]
    loss = sum(t.square().sum() for t in torch.autograd.grad(o.sum(), inputs, create_graph=True))
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    needs = tuple(name in wanted for name in Primals._fields)
    assert [call["needs"] for call in calls.named("vjp")] == [needs]
    for call in (*calls.named("jvp"), *calls.named("vjp_jvp")):
        assert tuple(t is not None for t in call["tangents"]) == needs
        assert call.get("needs", needs) == needs
    if wanted == ("v",):  # linear in v: the second order is of the cotangent alone
        assert all(t is None or not t.any() for t in gradients)


def test_undefined_cotangents(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, backend)
    leaves = [t.to(DEVICES[backend], torch.float32).requires_grad_() for t in qkv().values()]
    o, lse = metattn.attention(*leaves, return_lse=True, backend=backend)
    torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    q, k, v = torch.autograd.grad(lse.sum(), leaves, allow_unused=True, materialize_grads=True)
    of_o, of_lse = calls.named("vjp")
    assert [of_o[name] is None for name in ("do", "dlse")] == [False, True]
    assert [of_lse[name] is None for name in ("do", "dlse")] == [True, False]
    expected = torch.autograd.grad(
        plain(metattn.attention, q=leaves[0], k=leaves[1], v=leaves[2], return_lse=True)[1].sum(), leaves[:2]
    )
    torch.testing.assert_close((q, k), expected)
    assert not v.any()


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask"])
def test_changed_in_place_between_forward_and_backward(backend: str, name: str) -> None:
    leaves = {n: t.to(DEVICES[backend], torch.float32).requires_grad_() for n, t in qkv().items()}
    others = {"bias": randn(5, 7).to(DEVICES[backend]).float(), "mask": mask_of(5, 7).to(DEVICES[backend])}
    tensors: Leaves = leaves | others
    o = metattn.attention(**tensors, backend=backend)
    with torch.no_grad():
        tensors[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_forward_alone(backend: str, dtype: torch.dtype) -> None:
    def autocast(**arguments: Any) -> Any:
        with torch.autocast(DEVICES[backend], dtype=dtype):
            return metattn.attention(**arguments)

    leaves = {name: t.to(DEVICES[backend], dtype).float() for name, t in qkv(n=17, m=33).items()}
    o, lse = (t.detach() for t in autocast(**leaves, return_lse=True))
    assert o.dtype == dtype
    seeds = {name: t.to(dtype) for name, t in seeds_for(leaves, o, lse).items()}
    ours = both_orders(partial(autocast, return_lse=True, backend=backend), leaves, seeds)
    exact = both_orders(
        partial(plain, metattn.attention, return_lse=True),
        {name: t.double() for name, t in leaves.items()},
        {name: t.double() for name, t in seeds.items()},
    )
    for name, t in ours.items():
        assert t.dtype == (dtype if name in ("o", "second do") else torch.float32)
        # three roundings to the dtype at most on the way to a second-order output
        assert relative_error(t, exact[name]) <= 3 * torch.finfo(dtype).eps, name


def test_autocast_around_both_orders(backend: str) -> None:
    leaves = {name: t.to(DEVICES[backend]).float() for name, t in qkv(n=17, m=33).items()}
    o, lse = (t.detach() for t in metattn.attention(**leaves, return_lse=True))
    seeds = seeds_for(leaves, o, lse)
    call = partial(metattn.attention, return_lse=True, backend=backend)
    outside = both_orders(lambda **t: call(**{n: x.bfloat16() for n, x in t.items()}), leaves, seeds)
    with torch.autocast(DEVICES[backend], dtype=torch.bfloat16):
        inside = both_orders(call, leaves, seeds)
    for name, t in inside.items():
        assert torch.equal(t, outside[name]), name


def test_a_thousand_repeats_are_bit_equal(backend: str, request: pytest.FixtureRequest) -> None:
    """Each map by itself, on two threads, with sums over heads, rows and blocks."""
    shapes = ((1, 2, 70, 8), (1, 1, 67, 8), (1, 1, 67, 8), (70, 67), (2,), (2,))
    q, k, v, bias, sinks, slopes = (
        randn(*shape, seed=i).to(DEVICES[backend], torch.float32) for i, shape in enumerate(shapes)
    )
    options = Options(
        bias=bias, sinks=sinks, alibi_slopes=slopes, causal="bottom-right", dropout_p=0.1, dropout_seed=1
    )
    problem, primals, constants = dense(q, k, v, options)
    problem, module = problem.on(backend), backends.load(backend)
    needs, tangents = (True,) * 6, Primals(*(t.cos() for t in primals if t is not None))
    torch.set_num_threads(2 if backend == "cpu" else 1)
    first: tuple[Tensor, ...] = ()
    repeats = 3 if in_interpreter(backend) else 1000
    if backend == "cuda" and emulation.installed() and not request.config.getoption("--exhaustive"):
        repeats = 50
    for repeat in range(repeats):
        out = module.forward(problem, primals, constants)
        given = (problem, primals, constants, out)
        cotangents = out.o, out.lse[..., 1]
        gradients = module.vjp(*given, *cotangents, needs)
        out_t = module.jvp(*given, tangents)
        second = module.vjp_jvp(*given, *cotangents, tangents, out_t, needs)
        results = (*out[:2], *gradients, *out_t[:2], *second)
        first = first or results
        for index, (found, expected) in enumerate(zip(results, first, strict=True)):
            assert torch.equal(found, expected), f"result {index} of repeat {repeat}"


def test_two_backward_passes(backend: str) -> None:
    leaves = [t.to(DEVICES[backend], torch.float32).requires_grad_() for t in qkv().values()]
    o = metattn.attention(*leaves, backend=backend)
    once = torch.autograd.grad(o.sum(), leaves, retain_graph=True, create_graph=True)
    again = torch.autograd.grad(o.sum(), leaves, retain_graph=True, create_graph=True)
    second = [
        torch.autograd.grad(sum(t.square().sum() for t in first), leaves, retain_graph=True)
        for first in (once, once, again)
    ]
    for first, *others in zip(once, again, strict=True):
        assert torch.equal(first, others[0])
    for first, *others in zip(*second, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_inputs_between_bands_of_nan(backend: str) -> None:
    """What lies around an input is neither read nor written."""
    bands: list[tuple[Tensor, Tensor]] = []

    def banded(name: str, t: Tensor) -> Tensor:
        fill = math.nan if t.is_floating_point() else True
        whole = torch.full((t.numel() + 512,), fill, dtype=t.dtype, device=t.device)
        inner = whole[256:-256].view(t.shape).copy_(t)
        bands.append((whole, whole.clone()))
        return inner

    leaves = qkv(n=33, m=35, d=17, dv=13) | {"bias": randn(2, 1, 33, 35), "sinks": randn(2)}
    check(backend, leaves, layout=banded, mask=mask_of(2, 1, 33, 35), alibi_slopes=torch.rand(2))
    assert len(bands) == 8  # q, k, v, bias, sinks, mask, slopes and the cotangent of o
    for now, before in bands:
        assert torch.equal(now.nan_to_num(7.0), before.nan_to_num(7.0))


def run_python(code: str, timeout: int = 300, **environment: str) -> str:
    """What the code prints in a process of its own, where "cuda" is emulated if it is here."""
    emulate = "import emulation\nif emulation.installed():\n    emulation.install()\n"
    path = f"{Path(metattn.__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"
    result = subprocess.run(
        [sys.executable, "-c", emulate + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()


SECOND_ORDER = """
    import torch, metattn
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 33, 17) for _ in range(3)]
    def second_order(**options):
        q, k, v = (t.clone().requires_grad_() for t in leaves)
        o = metattn.attention(q, k, v, causal=True, **options)
        first = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), (q, k, v))
        return [t.detach() for t in (o, *first, *second)]
    def same(found, expected):
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
"""


def test_heap_checked_by_the_c_library(backend: str) -> None:
    """Every block that a kernel allocates has guard bytes behind it, looked at when it is freed."""
    library = next(Path("/").glob("lib/*/libc_malloc_debug.so.0"), None)
    if backend == "triton" or DEVICES[backend] != "cpu" or library is None:
        pytest.skip("needs CPU tensors and glibc's libc_malloc_debug")
    code = (
        SECOND_ORDER
        + f"""
    for shape in ((1, 1, 1, 1), (1, 3, 31, 5), (2, 1, 33, 17), (1, 2, 129, 59)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            leaves = [torch.randn(shape, dtype=dtype) for _ in range(3)]
            second_order(backend="{backend}", bias=torch.randn(shape[2], shape[2]))
    print("intact")
    """
    )
    tunables = {"LD_PRELOAD": str(library), "GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.perturb=165"}
    assert run_python(code, **tunables) == "intact"


def test_after_fork(backend: str) -> None:
    if DEVICES[backend] != "cpu":
        pytest.skip("CUDA cannot be used after a fork")
    code = (
        SECOND_ORDER
        + f"""
    import os
    # torch's own products hang in a child of a process that ran them on several threads
    torch.set_num_threads({1 if backend == "reference" else 2})
    expected = second_order(backend="{backend}")
    child = os.fork()
    if not child:
        os._exit(0 if same(second_order(backend="{backend}"), expected) else 1)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), same(second_order(backend="{backend}"), expected))
    """
    )
    assert run_python(code) == "0 True"


def test_eight_threads_on_a_cold_cache(backend: str) -> None:
    if backend == "triton":
        pytest.skip("it computes in float32, this test's process in float64")
    code = (
        SECOND_ORDER
        + f"""
    import threading
    leaves = [t.to("{DEVICES[backend]}") for t in leaves]
    start, results = threading.Barrier(8), [None] * 8
    def work(index):
        start.wait()
        results[index] = second_order(backend="{backend}")
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    expected = second_order(backend="{backend}")
    print(all(result is not None and same(result, expected) for result in results))
    """
    )
    assert run_python(code) == "True"


def test_in_a_dataloader_worker(backend: str) -> None:
    if DEVICES[backend] != "cpu":
        pytest.skip("CUDA cannot be used after a fork")
    code = (
        SECOND_ORDER
        + f"""
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return second_order(backend="{backend}")
    expected = second_order(backend="{backend}")
    loader = torch.utils.data.DataLoader(Data(), num_workers=2, batch_size=None)
    print(all(same(item, expected) for item in loader))
    """
    )
    assert run_python(code) == "True"


def test_one_thread_gives_the_same_bits(backend: str) -> None:
    leaves = {
        name: t.to(DEVICES[backend], torch.float32)
        for name, t in qkv(batch=1, heads=1, n=300, m=290, d=16).items()
    }
    call = partial(metattn.attention, return_lse=True, backend=backend)
    o, lse = (t.detach() for t in call(**leaves))
    seeds, before, results = seeds_for(leaves, o, lse), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both_orders(call, leaves, seeds))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in other.items():
            if backend == "reference":  # torch's own products are not bit-equal for every number of threads
                torch.testing.assert_close(t, results[0][name])
            else:
                assert torch.equal(t, results[0][name]), name


def test_threads_in_one_process(backend: str) -> None:
    leaves = {name: t.to(DEVICES[backend], torch.float32) for name, t in qkv(n=65, m=67).items()}
    call = partial(metattn.attention, causal=True, return_lse=True, backend=backend)
    o, lse = (t.detach() for t in call(**leaves))
    seeds = seeds_for(leaves, o, lse)
    expected = both_orders(call, leaves, seeds)
    failures: list[str] = []

    def work() -> None:
        for _ in range(1 if in_interpreter(backend) else 5):
            try:
                found = both_orders(call, leaves, seeds)
            except Exception as error:  # a thread's is nobody's
                failures.append(repr(error))
                raise
            failures.extend(name for name, t in found.items() if not torch.equal(t, expected[name]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "vmap": torch.func.vmap,
    "vmap-of-q": lambda f: lambda q, k, v: torch.func.vmap(f, in_dims=(0, None, None))(q, k[0], v[0]),
    "vmap-of-k": lambda f: lambda q, k, v: torch.func.vmap(f, in_dims=(None, 0, None))(q[0], k, v[0]),
    "vmap-of-v": lambda f: lambda q, k, v: torch.func.vmap(f, in_dims=(None, None, 0))(q[0], k[0], v),
    "vmap-other-dimension": lambda f: (
        lambda q, k, v: torch.func.vmap(f, in_dims=(1, 2, 0), out_dims=1)(q.movedim(0, 1), k.movedim(0, 2), v)
    ),
    "vmap-twice": lambda f: (
        lambda q, k, v: torch.func.vmap(torch.func.vmap(f, (0, None, 0)), (0, 0, None))(
            torch.stack((q, q + 1)), k[:2], v
        )
    ),
    "vmap-of-grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2))
    ),
    "vmap-of-jvp": lambda f: torch.func.vmap(lambda q, k, v: torch.func.jvp(f, (q, k, v), (k, q, v))),
    "vmap-of-grad-of-grad": lambda f: torch.func.vmap(
        lambda q, k, v: torch.func.grad(
            lambda q: torch.func.grad(lambda k: f(q, k, v).square().sum())(k).square().sum()
        )(q)
    ),
    "jacrev": lambda f: lambda q, k, v: torch.func.jacrev(f, argnums=(0, 1, 2))(q[0], k[0], v[0]),
    "jacfwd": lambda f: lambda q, k, v: torch.func.jacfwd(f, argnums=(0, 1, 2))(q[0], k[0], v[0]),
    "hessian": lambda f: (
        lambda q, k, v: torch.func.hessian(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2))(
            q[0], k[0], v[0]
        )
    ),
    "jacrev-of-jacrev": lambda f: (
        lambda q, k, v: torch.func.jacrev(torch.func.jacrev(lambda q: f(q, k[0], v[0]).square().sum()))(q[0])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms(backend: str, transform: Callable[[Callable[..., Tensor]], Callable[..., Any]]) -> None:
    dtype, close = torch.float64, {"rtol": 1e-9, "atol": 1e-11}
    if backend == "triton":
        dtype, close = torch.float32, {"rtol": 1e-4, "atol": 1e-5}
    tensors = [randn(3, 1, 2, 3, 2, seed=seed).to(DEVICES[backend], dtype) for seed in range(3)]

    def call(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k, v: function(q=q, k=k, v=v, causal=True)

    ours = transform(call(partial(metattn.attention, backend=backend)))(*tensors)
    expected = transform(call(partial(plain, metattn.attention)))(*tensors)
    torch.testing.assert_close(ours, expected, **close)


SEQUENCES = {
    "with-empty-ones": ([0, 3, 3, 8, 8], [0, 0, 4, 9, 9]),
    "all-empty": ([0, 0, 0], [0, 0, 0]),
    "no-keys": ([0, 3, 5], [0, 0, 0]),
    "one": ([0, 9], [0, 11]),
    "4096": (list(range(0, 4096 * 2 + 1, 2)), list(range(4097))),
}


@pytest.mark.parametrize(("ends_q", "ends_k"), SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("causal", [False, "bottom-right"])
def test_packed_sequences(backend: str, ends_q: list[int], ends_k: list[int], causal: bool | str) -> None:
    if in_interpreter(backend) and len(ends_q) > 100:
        pytest.skip("the interpreter would take hours for so many programs")
    cu_q, cu_k = torch.tensor(ends_q, dtype=torch.int32), torch.tensor(ends_k, dtype=torch.int32)
    max_q, max_k = int(cu_q.diff().max()), int(cu_k.diff().max())
    leaves = {
        "q": randn(ends_q[-1], 4, 3),
        "k": randn(ends_k[-1], 2, 3, seed=1),
        "v": randn(ends_k[-1], 2, 5, seed=2),
    }
    if len(ends_q) < 100:
        leaves |= {"bias": randn(len(ends_q) - 1, 1, max_q, max_k), "sinks": randn(4)}
    check(
        backend,
        leaves,
        function=metattn.varlen_attention,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=causal,
        window=(3, 2),
        dropout_p=0.2,
        dropout_seed=5,
    )


class TestRow40BrokenExtension:
    """A library that is missing, corrupt or made for another torch is a reason to read, not a crash."""

    FAILURES = {
        "missing": "was not built",
        "corrupt": "cannot be loaded into torch",
        "other-torch": "undefined symbol: aoti_torch_of_tomorrow",
    }

    @pytest.fixture(params=FAILURES)
    def reason(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
        native = backends.load("cpu")
        library = tmp_path / "libmetattn_cpu.so"
        if request.param != "missing":
            library.write_bytes(b"\x7fELF" + bytes(64))
        if request.param == "other-torch":

            def load_library(path: Any) -> None:
                raise OSError(f"{path}: undefined symbol: aoti_torch_of_tomorrow")

            monkeypatch.setattr(torch.ops, "load_library", load_library)
        monkeypatch.setattr(native, "LIBRARY", library)
        monkeypatch.setattr(native, "unavailable_reason", native.unavailable_reason.__wrapped__)
        monkeypatch.delitem(backends._reasons, "cpu", raising=False)
        expected: str = self.FAILURES[request.param]
        return expected

    def test_automatic_choice_goes_on(self, reason: str) -> None:
        leaves = [t.float() for t in qkv().values()]
        explanation = metattn.explain(*leaves)
        assert explanation.backend == "reference"
        assert reason in explanation.reasons["cpu"]
        assert metattn.attention(*leaves).isfinite().all()

    def test_named_backend_says_why(self, reason: str) -> None:
        leaves = [t.float() for t in qkv().values()]
        with pytest.raises(NotImplementedError, match=f"'cpu' was asked for by name.*{reason}"):
            metattn.attention(*leaves, backend="cpu")

    def test_doctor_says_why(self, reason: str) -> None:
        report = doctor.text(doctor.examine())
        assert reason in report


def test_without_the_extension_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metattn.backends.cpu", None)
    monkeypatch.delitem(backends._loaded, "cpu", raising=False)
    monkeypatch.delitem(backends._reasons, "cpu", raising=False)
    reason = metattn.available_backends()["cpu"]
    assert reason is not None
    assert "metattn.backends.cpu" in reason


def test_memory_is_poisoned_during_the_suite(backend: str) -> None:
    assert torch.empty(1000, device=DEVICES[backend]).isnan().all()
    leaves = {
        name: t.to(DEVICES[backend], torch.float32).requires_grad_()
        for name, t in qkv(n=33, m=35, d=17).items()
    }
    o, lse = metattn.attention(**leaves, return_lse=True, backend=backend)
    first = torch.autograd.grad((o.sum(), lse.sum()), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), list(leaves.values()))
    assert all(t.isfinite().all() for t in (o, lse, *first, *second))
