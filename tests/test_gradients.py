"""Slow-mode gradcheck and gradgradcheck in float64: every option, every pair, every Function on its own."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    OPTIONS,
    Call,
    RecordedMaps,
    Shape,
    both_orders,
    finite,
    largest_difference,
    make_call,
    pairs,
)
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import metattn
from metattn import autodiff
from metattn.higher_order import HigherOrderWarning
from metattn.layout import DOUBLE_BACKWARD, FORWARD, JVP, VJP, VJP_JVP, Arguments, Cotangents
from metattn.problem import Primals, Results

SMALL = Shape(batch=1, heads=2, n=3, m=3, d=2, dv=1, lengths=((2, 2), (1, 0)))
TINY = Shape(batch=1, heads=1, n=2, m=2, d=2, dv=1, kv_heads=1, lengths=((1, 2), (1, 0)))
TINY_GROUPED = Shape(batch=1, heads=2, n=2, m=2, d=1, dv=1, kv_heads=1, lengths=((1, 2), (1, 0)))

FLOAT64 = True  # finite differences need it: backends that lack it are tested in test_triton.py


def live_function(call: Call, backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = call.function(backend)(*x)
        return o, finite(lse)

    return run


def check_both_orders(call: Call, backend: str) -> None:
    """Reverse, forward, forward over reverse, reverse over reverse; each batched by vmap too."""
    function = live_function(call, backend)
    x = tuple(t.requires_grad_() for t in call.tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error", HigherOrderWarning)  # both orders are fused: none may be needed
        assert gradcheck(
            function,
            x,
            fast_mode=False,
            check_forward_ad=True,
            check_backward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert gradgradcheck(
            function,
            x,
            fast_mode=False,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            check_batched_grad=True,
        )


@pytest.mark.parametrize("name", list(OPTIONS))
def test_option(name: str, backend: str) -> None:
    check_both_orders(make_call((name,), SMALL), backend)


@pytest.mark.parametrize("names", list(pairs()), ids="+".join)
def test_pair(names: tuple[str, str], backend: str) -> None:
    shape = TINY_GROUPED if "grouped" in names else TINY
    check_both_orders(make_call(names, shape), backend)


class TestEachFunction:
    """The maps as functions of all their tensors; what the reference must do says so."""

    def functions(
        self, backend: str, names: tuple[str, ...]
    ) -> dict[str, tuple[Callable[..., object], Primals]]:
        call = make_call(names, Shape(batch=1, heads=1, n=2, m=3, d=2, dv=2, kv_heads=1))
        problem, primals, constants = call.canonical()
        problem = problem.on(backend)
        needs = tuple(t is not None for t in primals)

        count = len(primals)

        def given(*p: Tensor) -> Arguments:
            start = Arguments(Primals(*p[:count]), constants)
            return start._replace(results=Results(*autodiff.call_map(FORWARD, problem, start)))

        def vjp(*p: Tensor) -> tuple[Tensor, ...]:
            return autodiff.call_map(
                VJP, problem, given(*p)._replace(cotangents=Cotangents(*p[count:])), needs
            )

        def jvp(*p: Tensor) -> tuple[Any, ...]:
            return autodiff.call_map(JVP, problem, given(*p)._replace(tangents=Primals(*p[count:])))

        def second(*p: Tensor) -> Arguments:
            return given(*p)._replace(
                cotangents=Cotangents(*p[count : count + 2]), tangents=Primals(*p[count + 2 :])
            )

        def vjp_jvp(*p: Tensor) -> tuple[Tensor, ...]:
            results_t = Results(*jvp(*p[:count], *p[count + 2 :]))
            return autodiff.call_map(VJP_JVP, problem, second(*p)._replace(results_t=results_t), needs)

        def double_backward(*p: Tensor) -> tuple[Tensor, ...]:
            ot, lt, _, *gradients = autodiff.call_map(DOUBLE_BACKWARD, problem, second(*p), needs)
            return ot, lt, *gradients

        o, lse, _ = given(*primals).results
        cotangents = torch.randn_like(o), torch.randn_like(lse[..., 1])
        tangents = tuple(torch.randn_like(t) for t in primals)
        return {
            "Vjp": (vjp, (*primals, *cotangents)),
            "Jvp": (lambda *p: jvp(*p)[:2], (*primals, *tangents)),
            "VjpJvp": (vjp_jvp, (*primals, *cotangents, *tangents)),
            "DoubleBackward": (double_backward, (*primals, *cotangents, *tangents)),
        }

    @pytest.mark.parametrize("name", ["Vjp", "Jvp", "VjpJvp", "DoubleBackward"])
    @pytest.mark.parametrize(
        "names", [("bias", "sinks", "alibi", "softcap", "dropout", "causal")], ids="+".join
    )
    def test_derivatives(self, name: str, names: tuple[str, ...], backend: str) -> None:
        function, x = self.functions(backend, names)[name]
        x = tuple(t.detach().requires_grad_() for t in x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore" if name != "Vjp" else "error", HigherOrderWarning)
            assert gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)

    @pytest.mark.parametrize("name", ["Jvp", "VjpJvp", "DoubleBackward"])
    def test_derivatives_in_the_tangents_are_fused(self, name: str, backend: str) -> None:
        """All are linear in the tangents: no warning, and no N×M matrices, in reverse and in forward mode."""
        function, x = self.functions(backend, ("bias", "sinks", "alibi"))[name]
        fixed, tangents = x[:-6], x[-6:]
        with warnings.catch_warnings():
            warnings.simplefilter("error", HigherOrderWarning)
            assert gradcheck(
                lambda *t: function(*fixed, *t),
                tuple(t.detach().requires_grad_() for t in tangents),
                check_forward_ad=True,
            )

    @pytest.mark.parametrize("name", ["Vjp", "VjpJvp"])
    def test_forward_mode_in_the_cotangents_is_fused(self, name: str, backend: str) -> None:
        function, x = self.functions(backend, ("bias", "sinks", "alibi"))[name]
        cotangents = tuple(t.detach().requires_grad_() for t in x[6:8])
        with warnings.catch_warnings():
            warnings.simplefilter("error", HigherOrderWarning)
            assert gradcheck(
                lambda *c: function(*x[:6], *c, *x[8:]),
                cotangents,
                check_forward_ad=True,
                check_backward_ad=False,
            )


class TestHigherOrders:
    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_third_and_fourth(self, name: str, backend: str) -> None:
        """Through the reference, with one warning for each derivative of a fused map."""
        call = make_call((name,), Shape(batch=1, n=3, m=2, d=2, dv=1, lengths=((2, 2), (1, 0))))

        def orders(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
            x = [t.clone().requires_grad_() for t in call.tensors]
            o, lse = function(*x)
            value, found = o.sin().sum() + finite(lse).square().sum(), []
            for order in range(1, 5):
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    first = torch.autograd.grad(value, x, create_graph=True)
                warned.append((order, [w for w in caught if w.category is HigherOrderWarning]))
                found += first
                value = sum(g.sin().sum() for g in first)
            return found

        warned: list[tuple[int, list[warnings.WarningMessage]]] = []
        expected = orders(call.math)
        assert not any(caught for _, caught in warned)
        warned.clear()
        ours = orders(call.function(backend))
        scale = max(float(x.detach().abs().max()) for x in expected)
        assert largest_difference(ours, expected) < 1e-12 * scale
        assert [len(caught) for order, caught in warned if order < 4] == [0, 0, 1]
        assert "third derivative" in str(warned[2][1][0].message)


class TestWhereItWarns:
    """At the caller's line, whatever of ours and torch's lies between."""

    @staticmethod
    def grads(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
        total = f(x.requires_grad_())
        for _ in range(2):
            (total,) = torch.autograd.grad(total.sin().sum(), x, create_graph=True)
        torch.autograd.grad(total.sin().sum(), x)  # here

    @staticmethod
    def backward(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
        total = f(x.requires_grad_())
        for _ in range(2):
            (total,) = torch.autograd.grad(total.sin().sum(), x, create_graph=True)
        total.sin().sum().backward()  # here

    @staticmethod
    def func(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
        g = torch.func.hessian(lambda x: f(x).sin().sum())
        torch.func.jvp(g, (x,), (x,))

    @staticmethod
    def forward(f: Callable[[Tensor], Tensor], x: Tensor) -> None:
        def moved(x: Tensor) -> Tensor:
            return torch.func.jvp(f, (x,), (x,))[1]

        torch.func.jvp(moved, (x,), (x,))

    @pytest.mark.parametrize("door", ["grads", "backward", "func", "forward"])
    def test_line(self, door: str, backend: str) -> None:
        torch.manual_seed(0)
        function = getattr(self, door)
        module = metattn.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)

        def attend(x: Tensor) -> Tensor:
            return module(x, x, x, need_weights=False)[0]  # here: forward mode's derivatives are taken here

        with metattn.use_backend(backend), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", HigherOrderWarning)
            function(attend, torch.randn(1, 3, 4, dtype=torch.float64))
        lines = Path(__file__).read_text().splitlines()
        found = [w for w in caught if w.category is HigherOrderWarning]
        assert found
        for w in found:
            assert w.filename == __file__
        assert "# here" in lines[found[0].lineno - 1]


class Recorder:
    """A backend's module whose calls are written down."""

    def __init__(self, module: object) -> None:
        self.module, self.calls = module, []

    def __getattr__(self, name: str) -> Callable[..., object]:
        if name == "run_plain":  # the short way, which serves no call now: all take the maps' functions
            return lambda *_: None
        function = getattr(self.module, name)  # it has no more than the backend has
        if name == "reuses_dq":  # a question, no product
            return function  # type: ignore[no-any-return]

        def run(problem: object, *arguments: object) -> object:
            self.calls.append((name, arguments))
            return function(problem, *arguments)  # type: ignore[no-any-return]

        return run

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@pytest.fixture
def recorder(backend: str, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recording = Recorder(autodiff.load(backend))
    monkeypatch.setattr(autodiff, "load", lambda name: recording)
    return recording


class TestNoWastedProducts:
    @pytest.mark.parametrize("wanted", ["q", "k", "v", "bias", "sinks", "alibi_slopes"])
    def test_only_one_input_requires_grad(self, wanted: str, backend: str, recorder: Recorder) -> None:
        call = make_call(("bias", "sinks", "alibi"))
        x = dict(call.inputs)
        x[wanted] = x[wanted].requires_grad_()
        o, lse = call.function(backend)(*x.values())
        (first,) = torch.autograd.grad((o, lse), x[wanted], (o.detach(), lse.detach()), create_graph=True)
        needs = tuple(name == wanted for name in x)
        assert recorder.names == ["forward", "vjp"]
        assert recorder.calls[1][1][-1] == needs
        (second,) = torch.autograd.grad(first, x[wanted], first.detach(), materialize_grads=True)
        assert recorder.names == ["forward", "vjp", "double_backward"]
        tangents, second_needs = recorder.calls[2][1][5:7]
        assert second_needs == needs
        assert tuple(t is not None for t in tangents) == needs
        leaf = x[wanted].detach().clone().requires_grad_()
        expected_o, expected_lse = call.math(*{**call.inputs, wanted: leaf}.values())
        (expected,) = torch.autograd.grad(
            (expected_o, expected_lse + 0 * leaf.sum()), leaf, (o.detach(), lse.detach()), create_graph=True
        )
        (expected2,) = torch.autograd.grad(expected + 0 * leaf, leaf, first.detach())
        assert largest_difference((first, second), (expected, expected2)) < 1e-12

    @pytest.mark.parametrize("used", ["o", "lse"])
    def test_an_unused_output_gives_no_cotangent(self, used: str, backend: str, recorder: Recorder) -> None:
        call = make_call()
        x = [t.requires_grad_() for t in call.tensors]
        o, lse = call.function(backend)(*x)
        torch.autograd.grad((o if used == "o" else lse).sum(), x, allow_unused=True)
        do, dlse = recorder.calls[1][1][3:5]
        assert (do is None, dlse is None) == (used == "lse", used == "o")

    def test_only_the_cotangent_requires_grad(self, backend: str, recorder: Recorder) -> None:
        """The gradient of a gradient in do alone is a jvp; no vjp_jvp runs."""
        call = make_call()
        x = [t.requires_grad_() for t in call.tensors]
        o, _ = call.function(backend)(*x)
        do = torch.ones_like(o, requires_grad=True)
        first = torch.autograd.grad(o, x, do, create_graph=True)
        node = first[0].grad_fn
        fixed = [t if t is None or t is do else t.detach() for t in node.saved_tensors]
        gradients = autodiff.call_map(VJP, node.problem, VJP.split(fixed), node.needs)
        recorder.calls.clear()
        torch.autograd.grad(sum(g.sum() for g in gradients[:3]), do)
        assert recorder.names == ["jvp"]

    def test_a_hessian_vector_product_forward_over_reverse(self, backend: str) -> None:
        """Four maps, none twice: the tangents of o and lse serve vjp_jvp too."""
        call = make_call()
        with RecordedMaps() as recorded:
            torch.func.jvp(
                torch.func.grad(lambda *x: call.function(backend)(*x)[0].sum(), argnums=(0, 1, 2)),
                call.tensors,
                call.tensors,
            )
        assert sorted(recorded.names) == ["forward", "jvp", "vjp", "vjp_jvp"]

    def test_a_gradient_of_a_gradient(self, backend: str) -> None:
        """Three maps, the last of them for all of the second order."""
        call = make_call()

        def penalty(*x: Tensor) -> Tensor:
            first = torch.func.grad(lambda *x: call.function(backend)(*x)[0].sum(), (0, 1, 2))(*x)
            return sum(g.square().sum() for g in first)

        with RecordedMaps() as recorded:
            torch.func.grad(penalty, (0, 1, 2))(*call.tensors)
        assert recorded.names == ["forward", "vjp", "double_backward"]

    @pytest.mark.parametrize("product", ["hvp", "vhp"])
    def test_a_hessian_vector_product_of_torch_autograd_functional(self, product: str, backend: str) -> None:
        """hvp differentiates a gradient in its cotangent: of a third derivative nothing is asked for."""
        call = make_call(("bias", "causal"))
        v = tuple(t.cos() for t in call.tensors)

        def products(function: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
            def loss(*x: Tensor) -> Tensor:
                return function(*x)[0].sin().sum()

            return getattr(torch.autograd.functional, product)(loss, call.tensors, v)[1]

        with warnings.catch_warnings():
            warnings.simplefilter("error", HigherOrderWarning)
            found = products(call.function(backend))
        assert largest_difference(found, products(call.math)) < 1e-12


class TestAutogradContract:
    @pytest.mark.parametrize("changed", ["q", "k", "v", "bias", "sinks", "mask", "o"])
    def test_in_place_changes_are_refused(self, changed: str, backend: str) -> None:
        call = make_call(("bias", "sinks", "mask"))
        x = {name: t.requires_grad_() * 1 for name, t in call.inputs.items()}
        o, _ = call.function(backend)(*x.values())
        with torch.no_grad():
            {**x, "o": o, "mask": call.constants["mask"]}[changed].logical_not_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            o.sum().backward()

    def test_in_place_changes_between_the_orders_are_refused(self, backend: str) -> None:
        call = make_call()
        x = [t.requires_grad_() * 1 for t in call.tensors]
        o, _ = call.function(backend)(*x)
        first = torch.autograd.grad(o.sum(), x, create_graph=True)
        with torch.no_grad():
            x[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(sum(g.sum() for g in first), x)

    @pytest.mark.filterwarnings("ignore::metattn.higher_order.HigherOrderWarning")
    @pytest.mark.parametrize("names", [("plain",), ("bias", "sinks", "dropout")], ids="+".join)
    def test_gradients_are_their_owners(self, names: tuple[str, ...], backend: str) -> None:
        """Written to behind autograd's counter, as numpy and collectives do: no later order sees it."""
        call = make_call(names)

        def third(function: Callable[..., tuple[Tensor, Tensor]], spoil: bool) -> list[Tensor]:
            x = [t.detach().clone().requires_grad_() for t in call.tensors]
            results = function(*x)
            cotangents = [t.detach().cos().requires_grad_() for t in results]
            x += cotangents
            of: tuple[Any, ...] = (results, x[: len(call.tensors)], cotangents)
            for _ in range(3):
                gradients = torch.autograd.grad(*of, create_graph=True)
                of = (sum((g * g.detach().sin()).sum() for g in gradients), x)
                kept = [g.detach().clone() for g in gradients]
                if spoil:
                    for g in gradients:
                        g.data.fill_(torch.nan)
            return kept

        found = third(live_function(call, backend), True)
        expected = third(lambda *x: (lambda o, lse: (o, finite(lse)))(*call.math(*x)), False)
        assert largest_difference(found, expected) < 1e-11 * max(float(t.abs().max()) for t in expected)

    def test_two_backward_passes(self, backend: str) -> None:
        call = make_call(("bias", "sinks", "dropout"), Shape(n=33, m=65, d=16, dv=16), torch.float32)
        x = [t.requires_grad_() for t in call.tensors]
        o, lse = call.function(backend)(*x)
        once = torch.autograd.grad(o.sum() + lse.sum(), x, retain_graph=True)
        again = torch.autograd.grad(o.sum() + lse.sum(), x)
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))

    def test_nothing_outlives_a_call(self, backend: str) -> None:
        """No reference cycle holds the saved tensors: they go with the outputs, without the collector."""
        call = make_call()
        gc.disable()
        try:
            x = [t.requires_grad_() for t in call.tensors]
            o, lse = call.function(backend)(*x)
            first = torch.autograd.grad(o.sum() + lse.sum(), x, create_graph=True)
            second = torch.autograd.grad(sum(g.sum() for g in first), x, create_graph=True)
            held = [weakref.ref(t) for t in (o, lse, *first, *second)]
            del o, lse, first, second
            assert [ref() for ref in held] == [None] * len(held)
        finally:
            gc.enable()

    def test_saved_tensor_hooks(self, backend: str) -> None:
        """Checkpointing recomputes the forward in each order's backward: the same results."""
        call = make_call(("bias", "dropout"))
        run = call.function(backend)

        def checkpointed(*x: Tensor) -> tuple[Tensor, Tensor]:
            return checkpoint(run, *x, use_reentrant=False)

        plain, again = both_orders(run, call.inputs), both_orders(checkpointed, call.inputs)
        assert all(torch.equal(plain[name], again[name]) for name in plain)

    def test_no_graph_without_need(self, backend: str) -> None:
        """Without an input that requires a gradient there is no graph at all."""
        call = make_call()
        o, lse = call.function(backend)(*call.tensors)
        assert o.grad_fn is None
        assert lse.grad_fn is None
