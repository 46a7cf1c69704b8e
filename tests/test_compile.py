"""torch.compile, torch.export, FakeTensorMode, the meta device, opcheck and FLOP counts."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    OPTIONS,
    Call,
    Shape,
    both_orders,
    finite,
    largest_difference,
    make_call,
    operator_arguments,
    relative_error,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import metattn
from metattn.backends import available_backends, operators
from metattn.layout import MAPS, Layout
from metattn.nn import AttentionPooling, MultiheadAttention, replace_attention

ROOT = Path(__file__).resolve().parents[1]
native = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"cpu: {available_backends()['cpu']}"
)

# The reference is traced operation by operation, which takes seconds a call: some tests of it stand for all.
MAIN = "cpu" if available_backends()["cpu"] is None else "reference"
TRACED = [(MAIN, name) for name in OPTIONS] + [("reference", name) for name in ("plain", "dropout", "packed")]

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


class SelfAttention(nn.Module):
    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.attention = MultiheadAttention(16, 4, batch_first=True, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def encoder_layer(dtype: torch.dtype | None = None) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, dtype=dtype)
    assert replace_attention(layer) == 1
    return layer


MODULES: dict[str, Callable[..., nn.Module]] = {
    "multihead": SelfAttention,
    "pooling": lambda dtype=None: AttentionPooling(16, dtype=dtype),
    "encoder layer": encoder_layer,
}


def first_order(function: Any, x: Tensor, params: Any) -> list[Tensor]:
    x = x.clone().requires_grad_()
    o = function(x)
    return [o, *torch.autograd.grad(o.float().sin().sum(), [x, *params])]


class TestModules:
    @pytest.mark.parametrize("name", MODULES)
    def test_compiled(self, name: str) -> None:
        module = MODULES[name]()
        params = list(module.parameters())
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = torch.randn(2, 7, 16)
        found, expected = (first_order(f, x, params) for f in (compiled, module))
        assert largest_difference(found, expected) < 1e-5

    def test_dynamic_shapes(self) -> None:
        module = SelfAttention()
        params = list(module.parameters())
        compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
        for batch, points in ((2, 7), (3, 12)):
            x = torch.randn(batch, points, 16)
            found, expected = (first_order(f, x, params) for f in (compiled, module))
            assert largest_difference(found, expected) < 1e-5
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1

    def test_autocast(self) -> None:
        module = SelfAttention()
        params, x = list(module.parameters()), torch.randn(2, 7, 16)

        def cast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return module(x)

        compiled = torch.compile(cast, fullgraph=True, backend="aot_eager")
        found, expected = (first_order(f, x, params) for f in (compiled, cast))
        assert found[0].dtype == torch.bfloat16
        assert largest_difference(found, expected) == 0

    def test_functional_call(self) -> None:
        module, x = encoder_layer(), torch.randn(2, 7, 16)
        params = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}

        def function(params: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(module, params, (x,))

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found = first_order(lambda x: compiled(params, x), x, params.values())
        assert largest_difference(found, first_order(module, x, module.parameters())) < 1e-5

    def test_checkpointed(self) -> None:
        module, x = SelfAttention(), torch.randn(2, 7, 16)
        params = list(module.parameters())

        def checkpointed(x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)

        compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
        found, expected = (first_order(f, x, params) for f in (compiled, module))
        assert largest_difference(found, expected) < 1e-5


def saved_and_loaded(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


PROGRAMS: dict[str, Callable[[torch.export.ExportedProgram], torch.export.ExportedProgram]] = {
    "exported": lambda program: program,
    "decomposed": lambda program: program.run_decompositions(),
    "loaded": saved_and_loaded,
}


class TestExport:
    """An exported program computes what the module does, and has the module's derivatives."""

    class Attention(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            self.function = function

        def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            return self.function(*tensors)

    @pytest.mark.parametrize(
        ("backend", "name", "strict"),
        [
            *((backend, name, False) for backend, name in dict.fromkeys(TRACED)),
            *((MAIN, name, True) for name in ("plain", "bias", "dropout", "packed")),
        ],
    )
    def test_both_orders(self, backend: str, name: str, strict: bool) -> None:
        call = make_call((name,))
        function = call.function(backend)
        program = torch.export.export(self.Attention(function), call.tensors, strict=strict)
        found, expected = (both_orders(f, call.inputs) for f in (program.module(), function))
        for key, truth in expected.items():
            assert relative_error(found[key], truth)[0] < 1e-9, key

    @pytest.mark.parametrize(
        ("name", "stage"),
        [
            ("multihead", "exported"),
            ("pooling", "loaded"),
            ("encoder layer", "decomposed"),
            ("encoder layer", "loaded"),
        ],
    )
    def test_module(self, name: str, stage: str) -> None:
        module = MODULES[name](torch.float64)
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        program = PROGRAMS[stage](torch.export.export(module, (x,), strict=stage == "loaded"))

        def derivatives(function: nn.Module) -> list[Tensor]:
            named = dict(function.named_parameters())
            leaves = [x.clone().requires_grad_(), *(named[n] for n, _ in module.named_parameters())]
            o = function(leaves[0])
            first = torch.autograd.grad(o.sin().sum(), leaves, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
            return [o, *first, *second]

        for found, expected in zip(derivatives(program.module()), derivatives(module), strict=True):
            assert relative_error(found.detach(), expected.detach())[0] < 1e-9

    @pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
    def test_dynamic_shapes(self, strict: bool) -> None:
        module = encoder_layer().eval()
        shapes = {"src": {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("n", max=64)}}
        program = torch.export.export(
            module, (torch.randn(2, 7, 16),), dynamic_shapes=shapes, strict=strict
        ).module()
        for batch, points in ((2, 7), (3, 11)):
            x = torch.randn(batch, points, 16)
            assert largest_difference([program(x)], [module(x)]) < 1e-6

    def test_dropout_is_drawn_where_the_program_runs(self) -> None:
        module = self.Attention(lambda q: metattn.attention(q, q, q, dropout_p=0.5))
        q = torch.randn(1, 2, 9, 4)
        program = torch.export.export(module, (q,)).module()
        torch.manual_seed(1)
        found, other = program(q), program(q)
        torch.manual_seed(1)
        assert torch.equal(found, module(q))
        assert not torch.equal(found, other)

    @native
    @pytest.mark.parametrize("transform", ["grad", "vmap", "grad of grad", "jvp of grad", "dual numbers"])
    def test_transforms(self, transform: str) -> None:
        module = SelfAttention(torch.float64)
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        program = torch.export.export(module, (x,)).module()

        def run(module: nn.Module) -> Tensor:
            def loss(x: Tensor) -> Tensor:
                return module(x).sin().sum()

            if transform == "vmap":
                return torch.func.vmap(module)(torch.stack([x, x.sin()]))
            if transform == "dual numbers":
                with torch.autograd.forward_ad.dual_level():
                    o = module(torch.autograd.forward_ad.make_dual(x, x.cos()))
                    return torch.autograd.forward_ad.unpack_dual(o).tangent
            grad = torch.func.grad(loss)
            if transform == "grad":
                return grad(x)
            if transform == "jvp of grad":
                return torch.func.jvp(grad, (x,), (x.cos(),))[1]
            return torch.func.grad(lambda x: grad(x).square().sum())(x)

        found, expected = run(program), run(module)
        assert expected.norm() > 0
        assert relative_error(found.detach(), expected.detach())[0] < 1e-9

    @native
    def test_compiled_program(self) -> None:
        module, x = SelfAttention(), torch.randn(2, 7, 16)
        program = torch.export.export(module, (x,)).module()
        named = dict(program.named_parameters())
        compiled = torch.compile(program, fullgraph=True, backend="aot_eager")
        found = first_order(compiled, x, [named[name] for name, _ in module.named_parameters()])
        assert largest_difference(found, first_order(module, x, module.parameters())) < 1e-5

    @native
    def test_another_process_loads_the_operators_first(self, tmp_path: Path) -> None:
        module, x = SelfAttention(), torch.randn(2, 7, 16)
        torch.export.save(torch.export.export(module, (x,)), tmp_path / "program.pt2")
        torch.save((x, module(x).detach()), tmp_path / "samples.pt")
        script = """
import torch
import metattn
assert metattn.available_backends()["cpu"] is None
x, expected = torch.load("samples.pt")
torch.testing.assert_close(torch.export.load("program.pt2").module()(x), expected)
"""
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


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


OPERATORS = tuple(MAPS)


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

    @pytest.mark.parametrize("layout", MAPS.values(), ids=lambda layout: layout.name)
    def test_the_compiled_schema_is_pythons(self, layout: Layout) -> None:
        compiled = getattr(torch.ops.metattn, layout.name).default._schema
        python = torch._C.parse_schema(f"{layout.name}{operators.schema(layout)}")
        arguments = [(each.name, str(each.type)) for each in compiled.arguments if each.name != "tf32"]
        assert arguments == [(each.name, str(each.type)) for each in python.arguments]
        assert len(compiled.returns) == len(python.returns) == layout.size_given

    def test_flops(self) -> None:
        """Products with the N×M matrix, 2·N·M·d each: 2 forward, 5 vjp, 5 jvp, 10 vjp_jvp, 15 both."""
        shape = Shape(batch=2, heads=3, n=8, m=16, d=4, dv=4, kv_heads=3)
        arguments = operator_arguments(make_call(shape=shape))
        product = 2 * 2 * 3 * 8 * 16 * 4
        for operator, products in (
            ("forward", 2),
            ("vjp", 5),
            ("jvp", 5),
            ("vjp_jvp", 10),
            ("double_backward", 15),
        ):
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
        warnings.simplefilter("error", metattn.HigherOrderWarning)
        gradients(torch.compile(call.function(backend), fullgraph=True, backend="aot_eager"), call)
