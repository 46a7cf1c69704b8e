"""Known ways in which attention kernels fail (docs/faults.md): dead rows, NaN, masks, windows, dropout."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
from faults import DEVICES, INF, both_orders, check, mask_of, nothing_in_row, qkv, randn, seeds_for
from torch import Tensor

import metattn
from metattn import backends
from metattn.problem import Options, Primals, dense


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
