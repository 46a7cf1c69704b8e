"""Every door through which torch reaches a second derivative: right, or an error; never another number.

What is expected is the plain formula's through the same door, or torch.autograd.grad's where torch itself is
wrong there.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Shape, finite, largest_difference, make_call
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functionalize, grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import metattn
from metattn.autodiff import HigherOrderWarning
from metattn.backends import available_backends

FLOAT64 = True  # backends that lack it: TestSinglePrecision

FEATURES = 3

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * FEATURES**-0.5
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def ours(backend: str | None) -> Attention:
    return lambda q, k, v: metattn.attention(q, k, v, causal=True, backend=backend)


DRAWN = torch.randn(4, 1, 2, 4, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tensors(count: int) -> list[Tensor]:
    return [x.clone() for x in DRAWN[:count]]


def residual(attend: Attention) -> Callable[[Tensor], Tensor]:
    """Beside attention there is another way to the output: a lost share of a gradient is then no error."""
    _, k, v = tensors(3)
    return lambda x: x.sin() + attend(x, (k + x).cos(), v * x)


def penalty(gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a gradient's square, and the gradient."""
    return gradient.detach(), *torch.autograd.grad(gradient.square().sum(), inputs)


def leaf() -> Tensor:
    return tensors(1)[0].requires_grad_()


# Doors: each gives tensors that hold a second derivative.


def batched_gradients(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    y = residual(attend)(x)
    cotangents = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)[::3]
    (rows,) = torch.autograd.grad(y, x, cotangents, create_graph=True, is_grads_batched=True)
    return penalty(rows, x)


def batched_gradients_of_batched_gradients(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    y = residual(attend)(x)
    cotangents = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)[:2]
    (rows,) = torch.autograd.grad(y, x, cotangents, create_graph=True, is_grads_batched=True)
    more = torch.stack([rows.detach().cos(), rows.detach(), rows.detach().sin()])
    return torch.autograd.grad(rows, x, more, is_grads_batched=True)


def vectorized_jacobian(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    return penalty(jacobian(residual(attend), x, create_graph=True, vectorize=True), x)


def vectorized_hessian(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()

    def energy(x: Tensor) -> Tensor:
        return residual(attend)(x).sin().sum()

    return (hessian(energy, x, vectorize=True),)


def forward_vectorized_jacobian(attend: Attention) -> tuple[Tensor, ...]:
    return (jacobian(residual(attend), tensors(1)[0], vectorize=True, strategy="forward-mode"),)


def vectorized_hessian_forward_over_reverse(attend: Attention) -> tuple[Tensor, ...]:
    def energy(x: Tensor) -> Tensor:
        return residual(attend)(x).sin().sum()

    x = tensors(1)[0]
    return (hessian(energy, x, vectorize=True, outer_jacobian_strategy="forward-mode"),)


def recorded_gradient(attend: Attention) -> tuple[Tensor, ...]:
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(residual(attend)(x).square().sum(), x, create_graph=True)[0]

    x = leaf()
    return penalty(make_fx(gradient)(leaf())(x), x)


def recorded_transform(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    return penalty(make_fx(grad(lambda x: residual(attend)(x).square().sum()))(x.detach())(x), x)


def recorded_then_transformed(attend: Attention) -> tuple[Tensor, ...]:
    x, move = tensors(2)
    recorded = make_fx(grad(lambda x: residual(attend)(x).square().sum()))(x)
    return jvp(recorded, (x,), (move,))[1], vmap(recorded)(torch.stack([x, move]))


def linearized(attend: Attention) -> tuple[Tensor, ...]:
    """Along several directions at once, and transposed."""
    x, move = tensors(2)
    _, along = linearize(residual(attend), x)
    return vmap(along)(torch.stack([move, 2 * move, x])), vjp(along, move)[1](x)[0]


def linearized_gradient(attend: Attention) -> tuple[Tensor, ...]:
    x, move = tensors(2)
    _, along = linearize(grad(lambda x: residual(attend)(x).square().sum()), x)
    return vmap(along)(torch.stack([move, x])), vjp(along, move)[1](x)[0]


def functionalized(attend: Attention) -> tuple[Tensor, ...]:
    x = tensors(1)[0]
    gradient = grad(lambda x: residual(attend)(x).square().sum())
    inner = grad(lambda x: functionalize(residual(attend))(x).square().sum())
    return functionalize(residual(attend))(x), functionalize(gradient)(x), inner(x)


def traced_and_saved(attend: Attention) -> tuple[Tensor, ...]:
    traced = torch.jit.trace(residual(attend), (tensors(1)[0],), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded, x = torch.jit.load(file), leaf()
    (gradient,) = torch.autograd.grad(loaded(x).square().sum(), x, create_graph=True)
    return penalty(gradient, x)


def compiled_by_dynamo_alone(attend: Attention) -> tuple[Tensor, ...]:
    """The compilers that keep torch's own double backward."""
    compiled, x = torch.compile(residual(attend), backend="eager", fullgraph=True), leaf()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    return penalty(gradient, x)


def compiled_by_dynamo_alone_then_transformed(attend: Attention) -> tuple[Tensor, ...]:
    x, move = tensors(2)
    compiled = torch.compile(residual(attend), backend="eager")
    gradient = grad(lambda x: compiled(x).square().sum())
    return gradient(x), jvp(gradient, (x,), (move,))[1], vmap(gradient)(torch.stack([x, move]))


def compiled_autograd(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True, fullgraph=False):
        (gradient,) = torch.autograd.grad(residual(attend)(x).square().sum(), x, create_graph=True)
        return penalty(gradient, x)


def zero_cotangents(attend: Attention) -> tuple[Tensor, ...]:
    """A tensor without memory that stands for zeros, as forward mode hands on."""
    x = leaf()
    zero = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    (gradient,) = torch.autograd.grad(residual(attend)(x), x, zero, create_graph=True)
    return (gradient.detach() + 0,)


DOORS = {
    function.__name__: function
    for function in (
        batched_gradients,
        batched_gradients_of_batched_gradients,
        vectorized_jacobian,
        vectorized_hessian,
        forward_vectorized_jacobian,
        vectorized_hessian_forward_over_reverse,
        recorded_gradient,
        recorded_transform,
        recorded_then_transformed,
        linearized,
        linearized_gradient,
        functionalized,
        traced_and_saved,
        compiled_by_dynamo_alone,
        compiled_by_dynamo_alone_then_transformed,
        compiled_autograd,
        zero_cotangents,
    )
}


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def expected_of(door: str) -> tuple[Tensor, ...]:
    """The plain formula's; but a recorded gradient of it cuts its graph at what autograd has saved."""
    if door != "recorded_gradient":
        return DOORS[door](plain)
    x = leaf()
    (gradient,) = torch.autograd.grad(residual(plain)(x).square().sum(), x, create_graph=True)
    return penalty(gradient, x)


@pytest.mark.parametrize("door", DOORS)
def test_door(door: str, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", HigherOrderWarning)
        found = DOORS[door](ours(backend))
    expected = expected_of(door)
    assert largest_difference(found, expected) < 1e-12 * max(float(x.abs().max()) for x in expected) + 1e-14


@pytest.mark.parametrize("name", list(OPTIONS))
def test_batched_gradients_of_every_option(name: str, backend: str) -> None:
    """The older vmap's folding, and the graph that is left of it."""
    call = make_call((name,), Shape(batch=2, n=3, m=3, d=2, dv=2, lengths=((2, 1), (1, 2))))

    def second_order(batched: bool) -> list[Tensor]:
        x = [t.clone().requires_grad_() for t in call.tensors]
        o, lse = call.function(backend)(*x)
        y = torch.cat([o.flatten(), finite(lse).flatten()])
        cotangents = torch.stack([y.detach().cos(), y.detach().sin(), y.detach()])
        if batched:
            rows = torch.autograd.grad(y, x, cotangents, create_graph=True, is_grads_batched=True)
        else:
            found = [torch.autograd.grad(y, x, c, create_graph=True) for c in cotangents]
            rows = [torch.stack(each) for each in zip(*found, strict=True)]
        total = sum(row.square().sum() for row in rows) + sum(
            t.nan_to_num(neginf=0.0).square().sum() for t in x
        )
        return [*rows, *torch.autograd.grad(total, x)]

    expected = second_order(False)
    scale = max(float(x.detach().abs().max()) for x in expected)
    assert largest_difference(second_order(True), expected) < 1e-12 * scale


class TestDualNumbersIntoCompiledCode:
    """Inductor's code loses their tangents without a word: attention is left out of it, or refuses."""

    def test_compiled_before(self) -> None:
        q, k, v, move = tensors(4)
        compiled = torch.compile(lambda q: metattn.attention(q, k, v), backend="aot_eager")
        compiled(q)
        expected = jvp(lambda q: metattn.attention(q, k, v), (q,), (move,))[1]
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(q, move))).tangent
        assert largest_difference([found], [expected]) < 1e-12

    def test_full_graph(self) -> None:
        q, k, v, move = tensors(4)
        compiled = torch.compile(lambda q: metattn.attention(q, k, v), backend="aot_eager", fullgraph=True)
        with (
            forward_ad.dual_level(),
            pytest.raises(torch._dynamo.exc.Unsupported, match="disable"),
        ):
            compiled(forward_ad.make_dual(q, move))


class TestEmptyBatches:
    """vmap over a dimension of size 0, of every map."""

    def test_shapes(self, backend: str) -> None:
        x = torch.zeros(0, 3, 2, 5, 4, dtype=torch.float64)
        bias = torch.zeros(0, 1, 2, 5, 5, dtype=torch.float64)

        def attend(q: Tensor, bias: Tensor) -> Tensor:
            return metattn.attention(q, q.sin(), q.cos(), bias=bias, backend=backend)

        def formula(q: Tensor, bias: Tensor) -> Tensor:
            return (q @ q.sin().mT / 2 + bias).softmax(-1) @ q.cos()

        def loss(attend: Any) -> Any:
            return grad(lambda *x: attend(*x).square().sum(), (0, 1))

        def all_maps(attend: Any) -> tuple[Tensor, ...]:
            second = vmap(lambda *x: jvp(loss(attend), x, x)[1])(x, bias)
            of_second = vmap(grad(lambda *y: loss(attend)(*y)[0].sum() + loss(attend)(*y)[1].sum(), (0, 1)))(
                x, bias
            )
            of_empty = vmap(attend, (0, None))
            nested = vmap(of_empty, (None, 0))(x, torch.zeros(3, 1, 2, 5, 5, dtype=torch.float64))
            return vmap(attend)(x, bias), *vmap(loss(attend))(x, bias), *second, *of_second, nested

        with torch.no_grad():
            for found, expected in zip(all_maps(attend), all_maps(formula), strict=True):
                assert found.shape == expected.shape

    @pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
    def test_jacobian_in_an_empty_value(self, jacobian: Any, backend: str) -> None:
        q, empty = torch.randn(2, 2, 3, 4), torch.zeros(2, 2, 3, 0)
        found = jacobian(lambda v: metattn.attention(q, q, v, backend=backend))(empty)
        assert found.shape == (2, 2, 3, 0, 2, 2, 3, 0)


@pytest.mark.skipif(available_backends()["triton"] is not None, reason=f"{available_backends()['triton']}")
@pytest.mark.parametrize(
    "door",
    [
        "batched_gradients",
        "vectorized_hessian",
        "recorded_gradient",
        "linearized_gradient",
        "zero_cotangents",
    ],
)
def test_door_in_single_precision(door: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Triton backend's kernels are launched from Python, or by operators where torch looks from below."""
    monkeypatch.setitem(globals(), "DRAWN", DRAWN.float())
    found = DOORS[door](ours("triton"))
    expected = expected_of(door)
    assert largest_difference(found, expected) <= 1e-4 * max(float(x.abs().max()) for x in expected)
