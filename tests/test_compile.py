"""torch.compile, FakeTensorMode, the meta device, opcheck and FLOP counts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Call, Shape, finite, largest_difference, make_call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import metattn
from metattn import autodiff
from metattn.backends import available_backends, operators
from metattn.problem import Options, Primals, Problem, dense, packed
from metattn.problem import Packing as Lengths

native = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"cpu: {available_backends()['cpu']}"
)

# The reference is traced operation by operation, which takes seconds a call: some tests of it stand for all.
MAIN = "cpu" if available_backends()["cpu"] is None else "reference"
TRACED = [(MAIN, name) for name in OPTIONS] + [("reference", name) for name in ("plain", "dropout", "packed")]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def gradients(function: Any, call: Call) -> tuple[Tensor, ...]:
    x = [t.detach().clone().requires_grad_() for t in call.tensors]
    o, lse = function(*x)
    return (o, finite(lse), *torch.autograd.grad((o.sin().sum(), finite(lse).square().sum()), x))


class TestCompile:
    @pytest.mark.parametrize(("backend", "name"), list(dict.fromkeys(TRACED)))
    def test_no_graph_break(self, backend: str, name: str) -> None:
        """fullgraph=True refuses any break, in the forward and in its backward."""
        call = make_call((name,), dtype=torch.float32)
        compiled = torch.compile(call.function(backend), fullgraph=True, backend="aot_eager")
        assert largest_difference(gradients(compiled, call), gradients(call.function(backend), call)) < 1e-5

    def test_inductor(self, backend: str) -> None:
        call = make_call(
            ("bias", "sinks", "softcap", "dropout"), Shape(n=33, m=31, d=16, dv=8), torch.float32
        )
        compiled = torch.compile(call.function(backend), fullgraph=True)
        assert largest_difference(gradients(compiled, call), gradients(call.function(backend), call)) < 1e-4

    def test_without_gradients(self, backend: str) -> None:
        call = make_call(("causal",), dtype=torch.float32)
        compiled = torch.compile(call.function(backend), fullgraph=True, backend="aot_eager")
        assert largest_difference(compiled(*call.tensors), call.function(backend)(*call.tensors)) < 1e-6

    def test_dynamic_shapes(self) -> None:
        compiled = torch.compile(
            lambda q, k, v: metattn.attention(q, k, v, causal=True, backend=MAIN),
            fullgraph=True,
            dynamic=True,
            backend="aot_eager",
        )
        for n in (5, 8, 13):
            q = torch.randn(2, 2, n, 4)
            assert (
                largest_difference(
                    [compiled(q, q, q)], [metattn.attention(q, q, q, causal=True, backend=MAIN)]
                )
                < 1e-6
            )
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    def test_a_drawn_seed_is_drawn_at_every_call(self, backend: str) -> None:
        q = torch.randn(1, 1, 16, 4)
        compiled = torch.compile(
            lambda x: metattn.attention(x, x, x, dropout_p=0.5, backend=backend),
            fullgraph=True,
            backend="aot_eager",
        )
        assert not torch.equal(compiled(q), compiled(q))

    @pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
    def test_double_backward_raises(self, compiler: str, backend: str) -> None:
        """PyTorch's compiled backward has no derivative: it says so, and nothing is detached in silence."""
        call = make_call(dtype=torch.float32)
        x = [t.requires_grad_() for t in call.tensors]
        o, _ = torch.compile(call.function(backend), fullgraph=True, backend=compiler)(*x)

        def double_backward() -> None:
            first = torch.autograd.grad(o.sum(), x, create_graph=True)
            sum(g.square().sum() for g in first).backward()

        with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
            double_backward()

    @pytest.mark.parametrize("transform", ["grad", "vmap", "grad of grad", "jvp of grad"])
    def test_transforms_inside_are_left_to_eager(self, transform: str) -> None:
        q, k, v = torch.randn(3, 2, 2, 5, 4)

        def loss(*x: Tensor) -> Tensor:
            return metattn.attention(*x, causal=True, backend=MAIN).sin().sum()

        grad = torch.func.grad(loss, (0, 1, 2))
        function = {
            "grad": grad,
            "vmap": lambda *x: (
                torch.func.vmap(lambda *y: metattn.attention(*(t[None] for t in y), backend=MAIN))(*x),
            ),
            "grad of grad": torch.func.grad(lambda *x: sum(g.sum() for g in grad(*x)), (0, 1, 2)),
            "jvp of grad": lambda *x: torch.func.jvp(grad, x, x)[1],
        }[transform]
        compiled = torch.compile(function, backend="aot_eager")
        assert largest_difference(compiled(q, k, v), function(q, k, v)) < 1e-6

    def test_after_eager_use(self) -> None:
        """The eager Functions, used first, do not stand in the compiled call's way, nor it in theirs."""
        call = make_call(dtype=torch.float32)
        function = call.function(MAIN)
        before = gradients(function, call)
        compiled = gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), call)
        x = [t.requires_grad_() for t in call.tensors]
        first = torch.autograd.grad(function(*x)[0].sum(), x, create_graph=True)
        assert all(g.requires_grad for g in first)
        assert largest_difference(compiled, before) < 1e-5


class TestWithoutData:
    @pytest.mark.parametrize("name", list(OPTIONS))
    @pytest.mark.parametrize("mode", ["fake", "meta"])
    def test_shapes_of_both_orders(self, name: str, mode: str, backend: str) -> None:
        """As on real tensors: shapes and dtypes, through autograd. Meta tensors run on the reference."""
        call = make_call((name,), dtype=torch.bfloat16)
        run = call.function(None if mode == "meta" else backend)

        def described(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
            x = [t.detach().requires_grad_() for t in tensors]
            o, lse = run(*x)
            first = torch.autograd.grad(
                (o, lse), x, (torch.ones_like(o), torch.ones_like(lse)), create_graph=True
            )
            second = torch.autograd.grad(first, x, [torch.ones_like(g) for g in first])
            return [(t.shape, t.dtype) for t in (o, lse, *first, *second)]

        expected = described(list(call.tensors))
        if mode == "meta":
            call.constants = {
                key: x.to("meta") if isinstance(x, Tensor) else x for key, x in call.constants.items()
            }
            assert described([t.to("meta") for t in call.tensors]) == expected
            return
        fake = FakeTensorMode()
        call.constants = {
            key: fake.from_tensor(x) if isinstance(x, Tensor) else x for key, x in call.constants.items()
        }
        tensors = [fake.from_tensor(t) for t in call.tensors]
        with fake:
            assert described(tensors) == expected


def operator_arguments(call: Call) -> dict[str, tuple[Any, ...]]:
    """What each of torch.ops.metattn receives for a call, its forward and both orders."""
    from metattn.backends import native as module

    x = call.inputs
    options = Options(**call.constants, **{name: x[name] for name in ("bias", "sinks") if name in x})
    problem: Problem
    if call.lengths is None:
        problem, primals, constants = dense(x["q"], x["k"], x["v"], options)
    else:
        lengths_q, lengths_k = zip(*call.lengths, strict=True)
        cu = [torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k)]
        lengths = Lengths(*cu, max(lengths_q), max(lengths_k))
        problem, primals, constants = packed(x["q"], x["k"], x["v"], lengths, options)
    shared = operators.flatten(problem, primals, constants)
    moves = [None if primal is None else primal.nan_to_num(neginf=0.0) for primal in primals]
    results = module.forward(problem, primals, constants)
    results_t = module.jvp(problem, primals, constants, results, Primals(*moves))
    cotangents, needs = results[:2], sum(1 << i for i, primal in enumerate(primals) if primal is not None)
    return {
        "forward": shared,
        "vjp": (*shared, *results, *cotangents, needs),
        "jvp": (*shared, *results, *moves),
        "vjp_jvp": (*shared, *results, *cotangents, *moves, *results_t, needs),
    }


OPERATORS = ("forward", "vjp", "jvp", "vjp_jvp")


def check_operator(name: str, arguments: tuple[Any, ...], tests: tuple[str, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.metattn, name).default, arguments, test_utils=tests)


@native
class TestOperators:
    @pytest.mark.parametrize("name", list(OPTIONS))
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_schema_and_fake(self, operator: str, name: str) -> None:
        arguments = operator_arguments(make_call((name,), dtype=torch.float32))[operator]
        check_operator(operator, arguments, ("test_schema", "test_faketensor"))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "names",
        [
            ("plain",),
            ("mask", "bias", "sinks", "grouped", "dropout", "alibi"),
            ("packed", "softcap", "window"),
        ],
        ids="+".join,
    )
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_opcheck(self, operator: str, names: tuple[str, ...], dtype: torch.dtype) -> None:
        """All that torch.library checks: AOT dispatch with dynamic shapes too."""
        arguments = operator_arguments(make_call(names, dtype=dtype))[operator]
        check_operator(operator, arguments, ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))

    @pytest.mark.parametrize("name", ["plain", "bias", "sinks", "grouped", "packed"])
    @pytest.mark.parametrize("operator", OPERATORS)
    def test_fakes_have_the_real_strides(self, operator: str, name: str) -> None:
        arguments = operator_arguments(make_call((name,)))[operator]
        function = getattr(torch.ops.metattn, operator)
        real = function(*arguments)
        mode = FakeTensorMode()
        with mode:
            fake = function(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)

    @pytest.mark.parametrize("operator", OPERATORS)
    def test_tf32_is_for_gpus(self, operator: str) -> None:
        """The CPU's operators take the argument, and compute what they compute."""
        arguments = operator_arguments(make_call(dtype=torch.float32))[operator]
        function = getattr(torch.ops.metattn, operator)
        torch.library.opcheck(
            function.default, arguments, {"tf32": True}, test_utils=("test_schema", "test_faketensor")
        )
        for a, b in zip(function(*arguments), function(*arguments, tf32=True), strict=True):
            assert torch.equal(a, b)

    def test_flops(self) -> None:
        """Products with the N×M matrix, 2·N·M·d each: 2 forward, 5 vjp, 5 jvp, 10 vjp_jvp."""
        shape = Shape(batch=2, heads=3, n=8, m=16, d=4, dv=4, kv_heads=3)
        arguments = operator_arguments(make_call(shape=shape))
        product = 2 * 2 * 3 * 8 * 16 * 4
        for operator, products in (("forward", 2), ("vjp", 5), ("jvp", 5), ("vjp_jvp", 10)):
            with FlopCounterMode(display=False) as counter:
                getattr(torch.ops.metattn, operator)(*arguments[operator])
            assert counter.get_total_flops() == products * product, operator

    def test_flops_of_a_second_order_step(self) -> None:
        """Through the public function and autograd: forward 2, vjp 5, jvp 5, vjp_jvp 10."""
        shape = Shape(batch=2, heads=3, n=8, m=16, d=4, dv=4, kv_heads=3)
        call = make_call(shape=shape)
        with FlopCounterMode(display=False) as counter:
            x = [t.requires_grad_() for t in call.tensors]
            o, _ = call.function("cpu")(*x)
            first = torch.autograd.grad(o.sum(), x, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in first), x)
        assert counter.get_total_flops() == 22 * 2 * 2 * 3 * 8 * 16 * 4


def test_compiling_warns_of_nothing(backend: str) -> None:
    call = make_call(dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", autodiff.HigherOrderWarning)
        gradients(torch.compile(call.function(backend), fullgraph=True, backend="aot_eager"), call)
