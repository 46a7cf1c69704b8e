"""Plain calls have operators of fewer arguments: with equal bits, for no other call."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from four_maps import OF_QKV
from helpers import OPTIONS, RecordedMaps, Shape, make_call, operator_arguments
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.func import grad, jvp, vmap

import metattn
from metattn.backends import available_backends, operators, plain
from metattn.layout import MAPS, Arguments, Cotangents, Layout, Needs
from metattn.problem import Options, Primals, Problem, Results, dense

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(available_backends()["cpu"] is not None, reason=f"cpu: {available_backends()['cpu']}"),
]

SHAPES = {
    "square": Shape(batch=1, heads=2, n=5, m=5, d=4, dv=4, kv_heads=2),
    "grouped": Shape(batch=2, heads=4, n=7, m=3, d=8, dv=5, kv_heads=2),
    "blocks": Shape(batch=1, heads=1, n=33, m=600, d=16, dv=16, kv_heads=1),
    "no rows": Shape(batch=1, heads=2, n=0, m=3, d=4, dv=4, kv_heads=2),
}


def draw(shape: Shape, dtype: torch.dtype, transposed: bool = False) -> list[Tensor]:
    """q, k, v."""
    generator = torch.Generator().manual_seed(0)

    def tensor(heads: int, rows: int, width: int) -> Tensor:
        x = torch.randn(shape.batch, rows, heads, width, generator=generator, dtype=torch.float64).to(dtype)
        return x.transpose(1, 2) if transposed else x.transpose(1, 2).contiguous()

    kv_heads = shape.kv_heads or shape.heads
    return [
        tensor(shape.heads, shape.n, shape.d),
        tensor(kv_heads, shape.m, shape.d),
        tensor(kv_heads, shape.m, shape.dv),
    ]


def given_of(tensors: list[Tensor], causal: bool | str) -> tuple[Problem, Arguments]:
    """A call's problem, and what any map of it may be given."""
    problem, primals, constants = dense(*tensors, Options(causal=causal))
    backend = metattn.backends.load("cpu")
    o, lse, o_lo = backend.forward(problem, primals, constants)
    tangents = Primals(*[x.cos() for x in primals[:3]], None, None, None)
    results_t = backend.jvp(problem, primals, constants, Results(o, lse, o_lo), tangents)
    return problem, Arguments(
        primals, constants, Results(o, lse, o_lo), Cotangents(o.sin(), None), tangents, results_t
    )


def twins(layout: Layout) -> tuple[Any, Any]:
    names = (layout.name, plain.PREFIX + layout.name)
    return tuple(getattr(torch.ops.metattn_bare, name).default for name in names)  # type: ignore[return-value]


NEEDS: list[Needs] = [OF_QKV, (False, True, False, False, False, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("causal", [False, "top-left", "bottom-right"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MAPS)
def test_equal_bits(name: str, shape: str, causal: bool | str, dtype: torch.dtype) -> None:
    layout = MAPS[name]
    full, short = twins(layout)
    for transposed in (False, True):
        problem, given = given_of(draw(SHAPES[shape], dtype, transposed), causal)
        for needs in NEEDS if layout.gives_gradients else [None]:
            arguments = operators.arguments_of(layout, problem, given, needs)
            found, shortened = full(*arguments), operators.shortened(layout, arguments)
            assert shortened is not None
            for place, x in zip(plain.PLACES[layout.name], short(*shortened), strict=True):
                assert torch.equal(x, found[place])
                assert (x.stride(), x.dtype) == (found[place].stride(), found[place].dtype)


@pytest.mark.parametrize("name", MAPS)
def test_schema_and_fake(name: str) -> None:
    layout = MAPS[name]
    problem, given = given_of(draw(SHAPES["grouped"], torch.float32, transposed=True), False)
    arguments = operators.arguments_of(layout, problem, given, NEEDS[0] if layout.gives_gradients else None)
    shortened = operators.shortened(layout, arguments)
    assert shortened is not None
    torch.library.opcheck(twins(layout)[1], shortened, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("option", OPTIONS)
def test_no_option_is_lost(option: str) -> None:
    """Arguments with any option have no short form, nor a call with a cotangent of lse."""
    arguments = operator_arguments(make_call((option,), dtype=torch.float32))
    is_plain = option in ("plain", "causal", "causal_bottom_right", "scale", "grouped")
    for name, layout in MAPS.items():
        expected = is_plain and "cotangents" not in layout.groups
        assert (operators.shortened(layout, arguments[name]) is not None) == expected, name


def test_rounded_is_refused() -> None:
    q, k, v = draw(SHAPES["square"], torch.bfloat16)
    with pytest.raises(RuntimeError, match="a plain call rounds nothing"):
        torch.ops.metattn_bare.plain_forward(q, k, v, 1.0, 0)


def called(function: Any, *arguments: Any, dynamic: bool | None = None) -> tuple[set[str], Any]:
    """The operators that Inductor's code calls, and the results."""
    with torch._inductor.config.patch(force_disable_caches=True):  # code of other lowerings may lie there
        results, code = run_and_get_code(torch.compile(function, fullgraph=True, dynamic=dynamic), *arguments)
    return set(re.findall(r"torch\.ops\.(metattn\w*\.\w+)\.default\(", "".join(code))), results


def second_order(**options: Any) -> Any:
    """The gradient of a gradient's square."""

    def energy(*x: Tensor) -> Tensor:
        return metattn.attention(*x, **options).sin().sum()

    def penalty(*x: Tensor) -> Tensor:
        return sum(g.square().sum() for g in grad(energy, (0, 1, 2))(*x))  # type: ignore[return-value]

    return grad(penalty, (0, 1, 2))


SECOND_ORDER = ("forward", "vjp", "double_backward")


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("causal", [False, "bottom-right"])
def test_inductor_calls_plain_twins(causal: bool | str, dynamic: bool) -> None:
    tensors = draw(SHAPES["grouped"], torch.float64)
    function = second_order(causal=causal)
    names, found = called(function, *tensors, dynamic=dynamic)
    assert names == {f"metattn_bare.plain_{name}" for name in SECOND_ORDER}
    for a, b in zip(found, function(*tensors), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_inductor_calls_plain_twins_of_forward_mode() -> None:
    """jvp alone, and jvp of a gradient."""
    tensors = draw(SHAPES["square"], torch.float64)
    moves = [x.cos() for x in tensors]

    def first(*x: Tensor) -> Tensor:
        return metattn.attention(*x)

    def second(*x: Tensor) -> Any:
        return grad(lambda *x: metattn.attention(*x).sin().sum(), (0, 1, 2))(*x)

    for function, expected in ((first, {"plain_jvp"}), (second, {"plain_vjp_jvp", "plain_vjp"})):

        def moved(*x: Tensor, function: Any = function) -> Any:
            return jvp(function, tuple(x), tuple(moves))[1]

        names, found = called(moved, *tensors)
        assert expected <= {name.removeprefix("metattn_bare.") for name in names}
        pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, moved(*tensors))), strict=True)
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize(
    "options",
    [{"softcap": 3.0}, {"window": (2, 1)}, {"mask": torch.eye(5).bool()}, {"dropout_p": 0.5}],
    ids=str,
)
def test_options_take_full_twins(options: dict[str, Any]) -> None:
    names, _ = called(second_order(**options), *draw(SHAPES["square"], torch.float64))
    assert names - {"metattn.forward"} == {f"metattn_bare.{name}" for name in SECOND_ORDER}


def test_rounded_calls_take_full_twins() -> None:
    names, _ = called(second_order(), *draw(SHAPES["square"], torch.bfloat16))
    assert names == {f"metattn_bare.{name}" for name in SECOND_ORDER}


def test_a_result_that_a_plain_twin_lacks() -> None:
    """Code that takes an operator's empty o_lo, whatever for, gets it."""
    q, k, v = draw(SHAPES["square"], torch.float64)
    options = (*(None,) * 7, 0, 0, 1.0, 0.0, 0, -1, -1, 0.0)

    def raw(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return torch.ops.metattn.forward(q, k, v, *options)

    def first(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return raw(q, k, v)[0]

    names, found = called(raw, q, k, v)
    assert names == {"metattn_bare.forward"}
    assert [x.shape for x in found] == [x.shape for x in raw(q, k, v)]
    assert called(first, q, k, v)[0] == {"metattn_bare.plain_forward"}


def test_cpp_wrappers_call_public_schemas() -> None:
    """So does what AOTInductor packages."""
    with torch._inductor.config.patch(cpp_wrapper=True, force_disable_caches=True):
        q, k, v = draw(SHAPES["square"], torch.float32)
        compiled = torch.compile(metattn.attention, fullgraph=True)
        found, code = run_and_get_code(compiled, q, k, v)
    assert "metattn_bare::forward" in "".join(code)
    assert "plain_" not in "".join(code)
    assert torch.equal(found, metattn.attention(q, k, v))


# Eager calls.


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plain operators that eager code calls, as they are called."""
    names: list[str] = []
    found = operators._plain_operator

    def recorded(name: str) -> Any:
        names.append(name)
        return found(name)

    monkeypatch.setattr(operators, "_plain_operator", recorded)
    return names


def backward(*x: Tensor) -> Any:
    return torch.autograd.grad(metattn.attention(*x).sin().sum(), x)


def twice(*x: Tensor) -> Any:
    first = torch.autograd.grad(metattn.attention(*x).sin().sum(), x, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in first), x)


def energy(*x: Tensor) -> Tensor:
    return metattn.attention(*x).sin().sum()


EAGER: dict[str, tuple[Any, list[str]]] = {
    "forward": (metattn.attention, ["forward"]),
    "backward": (backward, ["forward", "vjp"]),
    "twice": (twice, ["forward", "vjp", "double_backward", "vjp"]),
    "grad": (grad(energy, (0, 1, 2)), ["forward", "vjp"]),
    "vmap": (vmap(lambda *x: metattn.attention(*(t[None] for t in x))), ["forward"]),
    "grad of grad": (second_order(), ["forward", "vjp", "double_backward", "vjp"]),
    # the level of the gradient, then the user's leaves
    "backward of grad": (
        lambda *x: torch.autograd.grad(sum(g.square().sum() for g in grad(energy, (0, 1, 2))(*x)), x),
        ["forward", "vjp", "double_backward", "vjp"],
    ),
}


@pytest.mark.parametrize("name", EAGER)
def test_eager_calls_take_them(name: str, short: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each map, with the full operators' bits."""
    function, names = EAGER[name]
    tensors = draw(SHAPES["square"], torch.float64)
    if name in ("backward", "twice", "backward of grad"):
        tensors = [x.requires_grad_() for x in tensors]
    found = function(*tensors)
    assert short == names
    monkeypatch.setattr(metattn.backends.load("cpu"), "run_plain", lambda *_: None)
    monkeypatch.setattr(operators, "run_plain", lambda *_: None)
    expected = function(*tensors)
    assert short == names
    pairs = zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("options", [{"softcap": 3.0}, {"window": (2, 1)}, {"dropout_p": 0.5}], ids=str)
def test_eager_options_take_full_operators(options: dict[str, Any], short: list[str]) -> None:
    q, k, v = draw(SHAPES["square"], torch.float64)
    metattn.attention(q, k, v, **options)
    metattn.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert short == []


def test_who_watches_sees_full_operators(short: list[str]) -> None:
    """Dispatch modes count and record what users know."""
    with RecordedMaps() as recorded:
        backward(*[x.requires_grad_() for x in draw(SHAPES["square"], torch.float64)])
    assert recorded.names == ["forward", "vjp"]
    assert short == []


def test_only_some_gradients_are_needed(short: list[str]) -> None:
    q, k, v = draw(SHAPES["square"], torch.float64)
    k.requires_grad_()
    (found,) = torch.autograd.grad(metattn.attention(q, k, v).sin().sum(), k)
    assert short == ["forward", "vjp"]
    scores = q @ k.mT * q.shape[-1] ** -0.5
    (expected,) = torch.autograd.grad((scores.softmax(-1) @ v).sin().sum(), k)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
