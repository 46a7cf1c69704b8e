"""Errors of every output of both orders in float32, bfloat16 and float16: the rule of helpers.check_errors.

The truth is float64 maths on the same rounded inputs, cotangents and tangents; the yardstick is plain PyTorch
in the same dtype. The thresholds were fixed before anything was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import (
    FLOAT_DTYPES,
    OPTIONS,
    Call,
    Shape,
    both_orders,
    check_errors,
    make_call,
    relative_error,
    with_offset,
)
from torch import Tensor

from metattn import host

SHAPE = Shape(
    batch=2,
    heads=4,
    n=33,
    m=35,
    d=16,
    dv=24,
    kv_heads=4,
    lengths=((33, 31), (1, 3), (7, 0), (0, 2), (17, 65)),
)
SHAPES = {
    "1x1": Shape(batch=3, heads=2, n=1, m=3, d=8, dv=8),
    "odd": Shape(batch=1, heads=2, n=31, m=129, d=40, dv=59),
    "wide": Shape(batch=1, heads=2, n=33, m=65, d=128, dv=128),
    "long": Shape(batch=1, heads=1, n=129, m=257, d=64, dv=64, kv_heads=1),
    "more queries": Shape(batch=1, heads=2, n=127, m=31, d=3, dv=1),
}
dtypes = pytest.mark.parametrize("dtype", list(FLOAT_DTYPES.values()), ids=list(FLOAT_DTYPES))


def check(call: Call, backend: str, dtype: torch.dtype) -> None:
    packed = call.lengths is not None
    truth = both_orders(call.to(torch.float64).math, call.to(torch.float64).inputs, rounding=dtype)
    baseline = both_orders(call.math, call.inputs, rounding=dtype)
    ours = both_orders(call.function(backend), call.inputs, rounding=dtype)
    check_errors(ours, baseline, truth, dtype, packed)


class TestEveryOption:
    @dtypes
    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_option(self, name: str, dtype: torch.dtype, backend: str) -> None:
        check(make_call((name,), SHAPE, dtype), backend, dtype)

    @dtypes
    @pytest.mark.parametrize(
        "names",
        [
            ("bias", "sinks", "softcap", "causal_bottom_right", "grouped"),
            ("mask", "bias_of_heads", "alibi", "dropout"),
            ("packed", "grouped", "window", "sinks", "dropout"),
        ],
        ids="+".join,
    )
    def test_together(self, names: tuple[str, ...], dtype: torch.dtype, backend: str) -> None:
        check(make_call(names, SHAPE, dtype), backend, dtype)


class TestEveryShape:
    @dtypes
    @pytest.mark.parametrize("shape", list(SHAPES))
    def test_shape(self, shape: str, dtype: torch.dtype, backend: str) -> None:
        check(make_call(("causal_bottom_right",), SHAPES[shape], dtype), backend, dtype)

    @dtypes
    def test_many_heads_of_one_group(self, dtype: torch.dtype, backend: str) -> None:
        """dk and dv are sums over 27 heads, in float32."""
        check(make_call(("grouped",), replace(SHAPE, heads=27), dtype), backend, dtype)


class TestPeakedSoftmax:
    """Where a few keys hold all the weight, what depends on differences of large terms is at stake."""

    @dtypes
    @pytest.mark.parametrize(
        ("option", "length", "scale"),
        [
            ("plain", 33, 2.0),
            ("plain", 33, 30.0),
            ("plain", 200, 2.0),
            ("plain", 200, 30.0),
            ("bias", 200, 2.0),
        ],
    )
    def test_scale(self, option: str, length: int, scale: float, dtype: torch.dtype, backend: str) -> None:
        """Of 35 keys a CPU's block holds all; of 202 not; Triton sweeps twice for a bias."""
        call = make_call((option,), replace(SHAPE, n=length, m=length + 2, d=8), dtype)
        call.constants["scale"] = scale
        check(call, backend, dtype)


# Options, and what has how many standard deviations in common.
SHARED: dict[str, tuple[tuple[str, ...], dict[str, float]]] = {
    "keys": (("plain",), {"k": 30.0}),
    "keys a little": (("plain",), {"k": 3.0}),
    "tangents": (("plain",), {"tq": 30.0, "tk": 30.0, "tv": 30.0}),
    "values": (("plain",), {"v": 30.0}),
    "queries": (("plain",), {"q": 10.0}),
    "cotangents": (("plain",), {"do": 30.0}),
    "all": (("plain",), {"q": 1.0, "k": 3.0, "v": 3.0, "do": 3.0, "tq": 1.0, "tk": 3.0, "tv": 3.0}),
    "keys causal": (("causal_bottom_right",), {"k": 30.0, "tk": 30.0, "v": 10.0}),
    "keys window": (("window",), {"k": 30.0, "tk": 30.0, "v": 10.0}),
    "keys masked": (("mask", "bias"), {"k": 30.0, "tk": 30.0, "v": 10.0}),
    "keys sinks": (("sinks", "grouped"), {"k": 30.0, "tk": 30.0, "v": 10.0}),
    "keys softcap": (("softcap",), {"k": 1.0, "tk": 30.0, "v": 10.0}),
    "keys dropout": (("dropout",), {"k": 30.0, "tk": 30.0}),
}


class TestWhatRowsShare:
    """Σⱼ dSᵢⱼ = 0 cancels what all keys have in common, and D what all values have.

    More rows and keys than one block or one program of a backend holds, and than are summed in two parts.
    """

    @pytest.mark.parametrize(
        ("name", "dtype"),
        [
            *(pytest.param(name, torch.bfloat16, id=f"{name}-bfloat16") for name in SHARED),
            *(pytest.param(name, torch.float16, id=f"{name}-float16") for name in ("all", "keys", "values")),
        ],
    )
    def test_offset(self, name: str, dtype: torch.dtype, backend: str) -> None:
        options, offsets = SHARED[name]
        call = make_call(options, Shape(batch=1, heads=1, n=131, m=147, d=16, dv=16, kv_heads=1), dtype)
        check_offsets(call, offsets, backend, dtype)

    @pytest.mark.parametrize("isa", [isa for isa in host.usable_isas() if isa in ("amx", "avx512_bf16")])
    @pytest.mark.parametrize("name", list(SHARED))
    def test_every_instruction_set(self, name: str, isa: str) -> None:
        """Those with products of bfloat16. Several chunks of keys besides, whose parts of dq are summed."""
        before = host.isa()
        host.set_isa(isa)
        try:
            options, offsets = SHARED[name]
            shape = Shape(batch=1, heads=1, n=200, m=300, d=24, dv=40, kv_heads=1)
            check_offsets(make_call(options, shape, torch.bfloat16), offsets, "cpu", torch.bfloat16)
        finally:
            host.set_isa(before)

    def test_masked_keys_stay_out_of_it(self, backend: str) -> None:
        """Keys that nobody attends to, 1e30 large, are in no mean; later keys are in no earlier row's."""
        call = make_call(
            ("causal",), Shape(batch=1, heads=1, n=140, m=140, d=8, dv=8, kv_heads=1), torch.bfloat16
        )
        changed = {name: x.clone() for name, x in call.inputs.items()}
        for name in ("k", "v"):
            changed[name][:, :, 100:] = 1e30
        found = []
        for inputs in (call.inputs, changed):
            q, k, v = (x.clone().requires_grad_() for x in inputs.values())
            o, _ = call.function(backend)(q, k, v)
            do = torch.ones_like(o).cumsum(-1)
            (dq,) = torch.autograd.grad(o, q, do, create_graph=True)
            (ddo,) = torch.autograd.grad(dq[:, :, :100].square().sum(), q)
            found.append((o[:, :, :100], dq[:, :, :100], ddo[:, :, :100]))
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def check_offsets(call: Call, offsets: dict[str, float], backend: str, dtype: torch.dtype) -> None:
    inputs = {name: with_offset(x, offsets.get(name, 0.0)) for name, x in call.inputs.items()}
    call = replace(call, inputs=inputs)
    wide = call.to(torch.float64)
    truth = both_orders(wide.math, wide.inputs, dtype, offsets)
    baseline = both_orders(call.math, call.inputs, dtype, offsets)
    ours = both_orders(call.function(backend), call.inputs, dtype, offsets)
    check_errors(ours, baseline, truth, dtype)


class TestFarKeys:
    """Rows whose keys all are some hundred places away."""

    @dtypes
    @pytest.mark.parametrize(
        ("names", "factor"), [(("alibi",), 1.0), (("alibi", "sinks"), 0.01), (("alibi", "sinks"), 0.1)]
    )
    def test_slopes(self, names: tuple[str, ...], factor: float, dtype: torch.dtype, backend: str) -> None:
        shape = Shape(batch=2, heads=2, n=20, m=150, d=8, dv=8)
        call = make_call((*names, "causal"), shape, dtype)
        call.inputs["alibi_slopes"] *= factor
        check(call, backend, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("more", "offset"), [(5.0, 2.0), (15.0, 0.0)])
    def test_a_sink_that_has_nearly_all_weight(
        self, more: float, offset: float, dtype: torch.dtype, backend: str
    ) -> None:
        """What dS sums to is a small difference of large numbers; keys may have a part in common."""
        call = make_call(("sinks",), Shape(batch=1, heads=2, n=20, m=150, d=16, dv=16), dtype)
        call.inputs["sinks"] += more
        call.inputs["k"] = with_offset(call.inputs["k"], offset)
        check(call, backend, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("of_lse", "of_sinks", "offset"),
        [(False, False, 30.0), (True, False, 0.0), (False, True, 30.0)],
        ids=["neither", "dlse", "tsinks"],
    )
    def test_which_sums_such_a_sink_leaves_known(
        self, of_lse: bool, of_sinks: bool, offset: float, dtype: torch.dtype, backend: str
    ) -> None:
        """Those of dS and dSt, which cancel what keys share, unless lse has a cotangent."""
        shape = Shape(batch=1, heads=2, n=20, m=150, d=16, dv=16)
        call = make_call(("sinks", "alibi", "causal"), shape, dtype)
        call.inputs["sinks"] += 15.0
        call.inputs["k"] = with_offset(call.inputs["k"], offset)
        call.inputs["alibi_slopes"] *= 0.01

        def derivatives(call: Call, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            generator = torch.Generator().manual_seed(1)
            leaves = {
                name: x.clone().requires_grad_(name != "sinks" or of_sinks) for name, x in call.inputs.items()
            }
            names = [name for name, x in leaves.items() if x.requires_grad]
            results = function(*leaves.values())[: 2 if of_lse else 1]
            given = [torch.randn(x.shape, generator=generator).to(dtype).to(x.dtype) for x in results]
            wanted = [leaves[name] for name in names]
            first = torch.autograd.grad(results, wanted, given, create_graph=True)
            tangents = [torch.randn(x.shape, generator=generator).to(dtype).to(x.dtype) for x in first]
            second = torch.autograd.grad(first, wanted, tangents)
            found = {f"d{name}": x for name, x in zip(names, first, strict=True)}
            return found | {f"d2{name}": x for name, x in zip(names, second, strict=True)}

        wide = call.to(torch.float64)
        ours, baseline = derivatives(call, call.function(backend)), derivatives(call, call.math)
        check_errors(ours, baseline, derivatives(wide, wide.math), dtype)

    @pytest.mark.parametrize(("n", "m"), [(64, 512), (40, 1100)])
    def test_a_sum_left_unknown_is_unknown_to_every_block_of_keys(self, n: int, m: int, backend: str) -> None:
        """With nearly all weight on the sink and a cotangent of lse; keys come by chunks and spans."""
        call = make_call(("sinks",), Shape(batch=1, heads=2, n=n, m=m, d=16, dv=16), torch.bfloat16)
        call.inputs["sinks"] += 16.0

        def derivatives(call: Call, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            leaves = {name: x.clone().requires_grad_(name != "sinks") for name, x in call.inputs.items()}
            wanted = [leaves[name] for name in "qkv"]
            o, lse = function(*leaves.values())
            first = torch.autograd.grad((o.double().sum(), lse.double().sum()), wanted, create_graph=True)
            second = torch.autograd.grad(sum(x.double().square().sum() for x in first), wanted[:2])
            return dict(zip(("dq", "dk", "dv", "d2q", "d2k"), (*first, *second), strict=True))

        wide = call.to(torch.float64)
        ours, baseline = derivatives(call, call.function(backend)), derivatives(call, call.math)
        check_errors(ours, baseline, derivatives(wide, wide.math), torch.bfloat16)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_slopes_of_many_keys(self, dtype: torch.dtype, backend: str) -> None:
        """An error of D is weighed by distances. More rows and keys than all weights are in two parts for."""
        shape = Shape(batch=1, heads=2, n=130, m=260, d=16, dv=16)
        call = make_call(("alibi", "causal_bottom_right"), shape, dtype)
        call.inputs["alibi_slopes"] = call.inputs["alibi_slopes"].float() * 0.1
        check(call, backend, dtype)


class TestTheRuleItself:
    def test_whole_and_worst_head(self) -> None:
        truth = torch.ones(1, 2, 4, 4)
        x = truth.clone()
        x[0, 1] += 0.1
        whole, worst = relative_error(x, truth)
        assert abs(worst - 0.1) < 1e-6
        assert abs(whole - 0.1 / 2**0.5) < 1e-6

    def test_it_refuses(self) -> None:
        truth = {"o": torch.ones(1, 2, 4, 4, dtype=torch.float64)}
        ours = {"o": truth["o"] + 6e-6}
        with pytest.raises(AssertionError, match=r"o \(whole\)"):
            check_errors(ours, truth, truth, torch.float32)
        check_errors({"o": truth["o"] + 4e-6}, truth, truth, torch.float32)
        with pytest.raises(AssertionError, match="nan"):
            check_errors({"o": truth["o"] * torch.nan}, truth, truth, torch.float32)
