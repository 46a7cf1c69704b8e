"""The compiled CPU operators: every option on every ISA against the reference, and what only they have."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from four_maps import MAP_OPTIONS, OF_QKV, SHORT_LENGTHS, MapCall, Outputs, assert_close, four_maps
from torch import Tensor

import metattn
from metattn import host
from metattn.backends import cpu, reference
from metattn.problem import NO_CONSTANTS, Primals, Results

if cpu.unavailable_reason() is not None:
    pytest.skip(f"backend cpu: {cpu.unavailable_reason()}", allow_module_level=True)

BROADCASTS = list(itertools.product((0, 1), repeat=4))
EVERYTHING = MapCall(
    (2, 4, 2, 100, 130, 8, 12),
    **dict(softcap=1.5, causal="bottom-right", window=(60, -1), dropout_p=0.2, sinks=True, slopes=True),
    bias=(1, 0, 1, 1),
    mask=(1, 1, 1, 1),
)
LENGTHS = ((0, 70), (100, 130), (1, 3), (50, 0), (33, 64))
CALLS = {
    "plain": MapCall(),
    "one": MapCall((1, 1, 1, 1, 1, 1, 1)),
    "wide-d": MapCall((1, 1, 1, 97, 65, 203, 256)),
    "wide-dv": MapCall((1, 2, 2, 129, 257, 40, 59)),
    "many-chunks": MapCall((1, 1, 1, 200, 1100, 16, 3)),
    "top-left-long": MapCall((1, 2, 1, 70, 130, 8, 8), causal="top-left"),
    "top-left-tall": MapCall((1, 2, 1, 130, 70, 8, 8), causal="top-left"),
    "bottom-right-long": MapCall((1, 2, 1, 70, 130, 8, 8), causal="bottom-right"),
    "bottom-right-tall": MapCall((1, 2, 1, 130, 70, 8, 8), causal="bottom-right"),
    "window": MapCall((1, 1, 1, 150, 200, 8, 8), window=(20, 5)),
    "window-causal": MapCall((1, 1, 1, 300, 300, 8, 8), window=(70, -1), causal="bottom-right"),
    # chunks of keys that begin within what is a block elsewhere, and rows that attend to their ends alone
    "window-chunks": MapCall((1, 8, 8, 384, 384, 8, 8), window=(16, 0)),
    "window-chunks-few-heads": MapCall((1, 4, 4, 1200, 1200, 8, 8), window=(16, -1), causal="bottom-right"),
    "softcap": MapCall(softcap=2.0),
    "dropout": MapCall(dropout_p=0.3),
    **{f"bias-{''.join(map(str, has))}": MapCall((2, 4, 2, 35, 300, 8, 8), bias=has) for has in BROADCASTS},
    **{
        f"mask-{''.join(map(str, has))}": MapCall(mask=has)
        for has in ((0, 0, 0, 1), (1, 0, 1, 0), (1, 1, 1, 1))
    },
    "sinks": MapCall(sinks=True),
    "sinks-masked": MapCall(sinks=True, mask=(1, 0, 1, 1)),
    "slopes": MapCall(slopes=True),
    "everything": EVERYTHING,
    "packed": MapCall(lengths=LENGTHS),
    "packed-everything": MapCall(**{**vars(EVERYTHING), "lengths": LENGTHS}),
    "rows-past-the-last-window": MapCall((1, 1, 1, 97, 65, 8, 8), causal="top-left", window=(0, -1)),
    "unlimited-window": MapCall((1, 1, 1, 100, 70, 8, 8), window=(2**63 - 1, 2**63 - 1)),
    "no-heads": MapCall((1, 0, 0, 4, 5, 4, 4), bias=(0, 0, 1, 1)),
    "no-heads-half": MapCall((1, 0, 0, 4, 5, 4, 4), dtype=torch.float16, bias=(0, 0, 1, 0)),
    "no-batch": MapCall((0, 2, 2, 3, 4, 4, 4), bias=(0, 1, 1, 1)),
    "no-rows": MapCall((2, 2, 2, 0, 4, 4, 4), bias=(0, 0, 0, 0)),
    "no-keys": MapCall((2, 2, 2, 3, 0, 4, 4)),
    "no-features": MapCall((1, 1, 1, 3, 4, 0, 2)),
    # more keys than a thread packs at a time (geometry.h), and sums over more rows than a float takes at once
    "spans": MapCall((1, 2, 1, 130, 2300, 16, 20)),
    "spans-everything": MapCall(
        **{**vars(EVERYTHING), "sizes": (1, 2, 1, 100, 1300, 8, 12), "window": (600, -1)}
    ),
    "spans-window": MapCall((1, 1, 1, 1800, 1800, 8, 8), window=(1300, 30)),
    "spans-peaked": MapCall((1, 8, 8, 30, 2100, 64, 8), seed=1),
    "packed-spans": MapCall(
        (1, 4, 2, 0, 0, 8, 12), lengths=((5, 1500), (0, 7), (60, 1030)), causal="bottom-right"
    ),
    "many-rows": MapCall((1, 1, 1, 2200, 30, 16, 12)),
    # keys of few rows that are split in a forward
    "splits": MapCall((1, 1, 1, 2, 9000, 8, 9)),
    "splits-everything": MapCall(
        **{**vars(EVERYTHING), "sizes": (1, 4, 2, 2, 9000, 8, 8), "window": (6000, -1)}
    ),
    "packed-splits": MapCall((1, 1, 1, 0, 0, 8, 8), lengths=((1, 4000), (0, 3), (2, 8200)), sinks=True),
    # few keys, whose rows are cut: of heads with one key head, of one long head, and pairs that share a bias
    "parts-of-heads": MapCall((1, 16, 1, 128, 96, 32, 32), causal="top-left"),
    "parts-of-rows": MapCall((1, 1, 1, 2000, 60, 40, 20), bias=(1, 1, 0, 1)),
    "parts-of-pairs": MapCall((8, 4, 4, 96, 96, 32, 32), bias=(0, 0, 1, 1)),
    "parts-of-pairs-and-keys": MapCall((8, 4, 4, 96, 96, 32, 32), bias=(0, 0, 0, 0)),
}
# Kinds of calls that are cut into units in ways of their own.
CUT = [name for name in CALLS if name.startswith(("spans", "splits", "parts", "packed-s", "many-rows"))]


@functools.cache  # of all ISAs: the reference takes longer than they do
def by_reference(call: MapCall, wide: bool = False) -> Outputs:
    return four_maps(reference, call, wide)


@pytest.fixture(params=host.usable_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = host.isa()
    host.set_isa(request.param)
    yield request.param
    host.set_isa(before)


@pytest.mark.parametrize("name", CALLS)
def test_four_maps_in_float64(isa: str, name: str) -> None:
    assert_close(four_maps(cpu, CALLS[name]), by_reference(CALLS[name]), 1e-12)


# Rounding of the inputs is common to both, so what is left is rounding inside: a few units in the last place.
@pytest.mark.parametrize(
    ("dtype", "relative"), [(torch.float32, 3e-6), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize(
    "name",
    [
        *("wide-dv", "everything", "packed-everything", "window-chunks", "window-chunks-few-heads"),
        *("spans", "spans-everything", "splits-everything", "parts-of-heads", "many-rows"),
    ],
)
def test_four_maps_in_low_precision(isa: str, name: str, dtype: torch.dtype, relative: float) -> None:
    call = MapCall(**{**vars(CALLS[name]), "dtype": dtype})
    assert_close(four_maps(cpu, call), by_reference(call, wide=True), relative, relative * 1e-2)


# With more than 256 keys (64 of few heads, 128 in bfloat16) the operator runs the two maps.
# All kinds of calls, few of each.
DOUBLE = {
    **{name: MapCall((2, 4, 2, 100, 64, 8, 12), **options) for name, options in MAP_OPTIONS.items()},
    **{
        f"{name}-tiles": MapCall((2, 4, 2, 70, 150, 8, 12), **options)
        for name, options in MAP_OPTIONS.items()
    },
    **{
        f"{keys}-keys-of-many-heads": MapCall((1, 4, 4, 50, keys, 16, 5)) for keys in (65, 128, 193, 256, 257)
    },
    **{f"{keys}-keys": MapCall((1, 2, 1, 130, keys, 40, 33)) for keys in (0, 2, 63, 65, 128, 129)},
    "packed": MapCall(lengths=SHORT_LENGTHS, bias=(1, 1, 1, 1), causal="bottom-right", dropout_p=0.2),
    "no-rows": CALLS["no-rows"],
    "no-features": CALLS["no-features"],
    "shared-bias": MapCall((2, 4, 2, 35, 40, 8, 8), bias=(0, 1, 0, 1)),
}


@pytest.mark.parametrize(
    ("name", "given"),
    [*((name, "both") for name in DOUBLE), *itertools.product(("plain", "everything"), ("do", "dlse"))],
)
def test_double_backward_is_jvp_and_vjp_jvp(isa: str, name: str, given: str) -> None:
    for dtype, relative in ((torch.float64, 1e-12), (torch.float32, 5e-6), (torch.bfloat16, 1e-2)):
        call = replace(DOUBLE[name], dtype=dtype)
        problem, primals, tangents, constants, do, dlse = call.make()
        cotangents = do if given != "dlse" else None, dlse if given != "do" else None
        needs = tuple(primal is not None for primal in primals)
        results = cpu.forward(problem, primals, constants)
        moved, found = cpu.double_backward(problem, primals, constants, results, *cotangents, tangents, needs)
        right_moved = cpu.jvp(problem, primals, constants, results, tangents)
        right = cpu.vjp_jvp(problem, primals, constants, results, *cotangents, tangents, right_moved, needs)
        names = ("ot", "lt", *(f"d{name}t" for name in Primals._fields))
        assert_close(
            dict(zip(names, (*moved[:2], *found), strict=True)),
            dict(zip(names, (*right_moved[:2], *right), strict=True)),
            relative,
            relative * 0.1,  # a single key's gradients are sums of terms that cancel
        )


def test_double_backward_leaves_out_what_is_not_asked_for() -> None:
    problem, primals, tangents, constants, do, _ = MapCall((1, 2, 2, 20, 30, 8, 8)).make()
    results = cpu.forward(problem, primals, constants)
    given = problem, primals, constants, results, do, None
    _, whole = cpu.double_backward(*given, tangents, OF_QKV)
    for index in range(3):
        needs = tuple(i == index for i in range(6))
        _, found = cpu.double_backward(*given, tangents, needs)
        assert [g is not None for g in found] == list(needs)
        assert torch.equal(found[index], whole[index])
    # an absent tangent counts as zeros
    for index, name in enumerate(("q", "k", "v")):
        alone = Primals(*(t if i == index else None for i, t in enumerate(tangents)))
        zeros = Primals(
            *(t if i == index or t is None else torch.zeros_like(t) for i, t in enumerate(tangents))
        )
        needs = OF_QKV
        moved, found = cpu.double_backward(*given, alone, needs)
        right_moved, right = cpu.double_backward(*given, zeros, needs)
        for mine, other in zip((*moved[:2], *found[:3]), (*right_moved[:2], *right[:3]), strict=True):
            assert (mine - other).norm() <= 1e-12 * (1 + other.norm()), name


@pytest.mark.parametrize("tangents", ["v", "qkv"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("n", [100, 200])
def test_rows_of_nearly_one_key(isa: str, n: int, dropout_p: float, tangents: str) -> None:
    """What is left of dP − D and E − Dt there must not drown in the rounding of weights to bfloat16."""
    torch.manual_seed(0)
    q = torch.eye(n)[None, None].bfloat16()
    v, do, *moved = (torch.randn(1, 1, n, size).bfloat16() for size in (64, 64, n, n, 64))
    given = [moved[index] if name in tangents else None for index, name in enumerate("qkv")]
    options = dict(scale=float(torch.tensor(n / 0.0015).log()), dropout_p=dropout_p, dropout_seed=1)

    def both_orders(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, q, v)]
        o = metattn.attention(*leaves, backend=backend, **options)
        first = torch.autograd.grad(o, leaves, do.to(dtype), create_graph=True)
        wanted = [(f, t.to(dtype)) for f, t in zip(first, given, strict=True) if t is not None]
        second = torch.autograd.grad([f for f, _ in wanted], leaves[:2], [t for _, t in wanted])
        return [*first[:2], *second]

    found, right = both_orders("cpu", torch.bfloat16), both_orders("reference", torch.float64)
    for index, (x, y) in enumerate(zip(found, right, strict=True)):
        assert (x.double() - y).norm() <= 0.02 * y.norm(), index


@pytest.mark.parametrize("name", ["many-chunks", "everything", "packed-everything", "bias-0010", *CUT])
def test_results_do_not_depend_on_the_number_of_threads(name: str) -> None:
    call = MapCall(**{**vars(CALLS[name]), "dtype": torch.float32})
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = four_maps(cpu, call)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            for key, value in four_maps(cpu, call).items():
                right = alone[key]
                assert (value is None and right is None) or torch.equal(value, right), key
    finally:
        torch.set_num_threads(before)


def test_a_row_that_is_swept_again_leaves_its_neighbours_alone() -> None:
    """A peaked row's tangent loses digits in a first sweep; threads decide who is swept with it."""
    problem, primals, tangents, constants, _, _ = MapCall(
        (1, 1, 1, 96, 512, 64, 64), dtype=torch.float32
    ).make()
    results = cpu.forward(problem, primals, constants)
    alone = cpu.jvp(problem, primals, constants, results, tangents).o
    primals.q[:, :, 5] = 8 * primals.k[:, :, 7]
    tangents.q[:, :, 5] = 100 * primals.k[:, :, 7]
    results = cpu.forward(problem, primals, constants)
    beside = cpu.jvp(problem, primals, constants, results, tangents).o
    others = torch.arange(96) != 5
    assert torch.equal(alone[:, :, others], beside[:, :, others])
    assert not torch.equal(alone, beside)


THREADS = """
import os, torch, metattn

def threads():
    return len(os.listdir("/proc/self/task"))

def both_orders():
    q, k, v = (torch.randn(4, 4, 64, 16, requires_grad=True) for _ in range(3))
    found = torch.autograd.grad(metattn.attention(q, k, v, backend="cpu").sum(), (q, k, v), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in found), (q, k, v))

class Each(torch.utils.data.Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        before = threads()
        both_orders()
        return torch.tensor([torch.get_num_threads(), threads() - before])

if __name__ == "__main__":
    (torch.randn(512, 512) @ torch.randn(512, 512)).exp()  # torch has its threads then
    torch.ones(1, requires_grad=True).sum().backward()
    both_orders()
    before = threads()
    for _ in range(3):
        both_orders()
    print(torch.get_num_threads(), threads() - before)
    (worker,) = torch.utils.data.DataLoader(Each(), num_workers=1)
    print(*worker[0].tolist())
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads where Linux lists them")
@pytest.mark.parametrize("threads", [1, 2])
def test_no_threads_but_torchs(threads: int) -> None:
    """As many as OMP_NUM_THREADS says, none besides, and one in a DataLoader's worker."""
    found = subprocess.run(
        [sys.executable, "-c", THREADS],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=True,
    )
    expected = min(threads, os.cpu_count() or 1)
    assert found.stdout.split() == [str(expected), "0", "1", "0"]


def test_exponentials_are_as_exact_as_stated(isa: str) -> None:
    """2^z to 1.7e-7 (docs/backends.md), beside the rounding of z and of the two products that show it."""
    score = -torch.linspace(0, 20, 64)
    shape = (1, 1, 64, 1)
    primals = Primals(torch.ones(1, 1, 1, 1), score.view(shape), torch.eye(64)[None, None], None, None, None)
    problem = replace(MapCall().make()[0], scale=1.0)
    o = cpu.forward(problem, primals, NO_CONSTANTS).o.flatten().double()
    error = (o / o[0] / score.double().exp() - 1).abs()
    ulp = torch.finfo(torch.float32).eps / 2
    assert (error <= 2 * 1.7e-7 + ulp * (4 - 3 * score.double())).all()
    assert error[0] == 0


@pytest.mark.parametrize("size", [3e12, 1e30])
def test_maps_round_large_products_alike(size: float, isa: str) -> None:
    """Else P, which is exp(S − L), would not sum to 1: a score of that size is known to millions."""
    for dtype, d, m in itertools.product((torch.float32, torch.float64), (8, 40), (30, 70, 300)):
        call = MapCall((1, 2, 1, 50, m, d, 1), dtype=dtype, causal="top-left")
        problem, primals, _, constants, do, _ = call.make()
        q, k = (x * size**0.5 for x in primals[:2])
        primals = Primals(q, k, torch.ones_like(primals.v), None, None, None)
        of_v = Primals(None, None, torch.ones_like(primals.v), None, None, None)
        results = cpu.forward(problem, primals, constants)
        moved = cpu.jvp(problem, primals, constants, results, of_v)
        first = cpu.vjp(
            problem, primals, constants, results, do, None, (False, False, True, False, False, False)
        )
        both = cpu.double_backward(problem, primals, constants, results, do, None, of_v, OF_QKV)[0]
        for sums in (results.o, moved.o, both.o):
            torch.testing.assert_close(sums, torch.ones_like(sums))
        torch.testing.assert_close(first.v.sum(), do.sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_infinite_query_under_a_softcap(isa: str, dtype: torch.dtype) -> None:
    """Its scores are finite; what stands behind the last key, 0 times infinity, is in no sum."""
    call = MapCall((1, 1, 1, 2, 3, 4, 4), softcap=1.5, dtype=dtype)
    problem, primals, tangents, constants, do, _ = call.make()
    primals.k.abs_().clamp_(min=0.5)  # no product is NaN
    primals.q[0, 0, 0] = torch.inf
    needs = OF_QKV
    tangents = tangents._replace(k=None)
    results = cpu.forward(problem, primals, constants)
    first = cpu.vjp(problem, primals, constants, results, do, None, needs)
    _, second = cpu.double_backward(problem, primals, constants, results, do, None, tangents, needs)
    assert not first.q[0, 0, 0].any()
    assert not second.q[0, 0, 0].any()


def test_absent_cotangents_and_tangents_are_zeros() -> None:
    problem, primals, tangents, constants, do, dlse = CALLS["everything"].make()
    needs = (True,) * 6
    o, lse = cpu.forward(problem, primals, constants)[:2]
    zero = Primals(*(torch.zeros_like(t) for t in tangents))
    for chosen in itertools.product((False, True), repeat=6):
        some = Primals(*(t if one else None for t, one in zip(tangents, chosen, strict=True)))
        full = Primals(*(t if one else z for t, z, one in zip(tangents, zero, chosen, strict=True)))
        results = []
        for t in (some, full):
            ot, lt = cpu.jvp(problem, primals, constants, Results(o, lse), t)[:2]
            second = cpu.vjp_jvp(
                problem, primals, constants, Results(o, lse), do, None, t, Results(ot, lt), needs
            )
            results.append({"ot": ot, "lt": lt, **second._asdict()})
        assert_close(results[0], results[1], 1e-12)
    for cotangents in ((do, None), (None, dlse)):
        d_o, d_l = cotangents
        found = cpu.vjp(problem, primals, constants, Results(o, lse), d_o, d_l, needs)
        full_o, full_l = (
            (torch.zeros_like(do) if d_o is None else do),
            (torch.zeros_like(dlse) if d_l is None else dlse),
        )
        right = cpu.vjp(problem, primals, constants, Results(o, lse), full_o, full_l, needs)
        assert_close(found._asdict(), right._asdict(), 1e-12)


def test_only_needed_gradients_come_back() -> None:
    problem, primals, tangents, constants, do, dlse = CALLS["everything"].make()
    o, lse = cpu.forward(problem, primals, constants)[:2]
    ot, lt = cpu.jvp(problem, primals, constants, Results(o, lse), tangents)[:2]
    every = (True,) * 6
    first = cpu.vjp(problem, primals, constants, Results(o, lse), do, dlse, every)
    second = cpu.vjp_jvp(
        problem, primals, constants, Results(o, lse), do, dlse, tangents, Results(ot, lt), every
    )
    for needs in itertools.product((False, True), repeat=6):
        some_first = cpu.vjp(problem, primals, constants, Results(o, lse), do, dlse, needs)
        some_second = cpu.vjp_jvp(
            problem, primals, constants, Results(o, lse), do, dlse, tangents, Results(ot, lt), needs
        )
        for some, whole in ((some_first, first), (some_second, second)):
            for need, mine, right in zip(needs, some, whole, strict=True):
                if need:
                    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
                else:
                    assert mine is None
