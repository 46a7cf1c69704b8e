"""Every door through which torch reaches a second derivative: right, or an error; never another number.

What is expected is the plain formula's through the same door, or torch.autograd.grad's where torch itself is
wrong there.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from helpers import OPTIONS, Call, Shape, finite, largest_difference, make_call
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import metattn
from benchmarks import doors
from benchmarks.doors import DOORS, Attention, expected_of, tensors
from metattn.backends import available_backends
from metattn.higher_order import HigherOrderWarning

FLOAT64 = True  # backends that lack it: TestSinglePrecision

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def ours(backend: str | None) -> Attention:
    return lambda q, k, v: metattn.attention(q, k, v, causal=True, backend=backend)


def with_slopes(backend: str) -> Attention:
    return lambda q, k, v: metattn.attention(
        q, k, v, causal=True, alibi_slopes=doors.slopes_of(q), backend=backend
    )


@functools.cache  # of all backends: a compiler takes longer than they do
def exact(door: str, formula: Attention) -> tuple[Tensor, ...]:
    return tuple(x.detach() for x in expected_of(door, formula))


@pytest.mark.parametrize(("attend", "formula"), [(ours, doors.plain), (with_slopes, doors.sloped)])
@pytest.mark.parametrize("door", DOORS)
def test_door(door: str, attend: Callable[[str], Attention], formula: Attention, backend: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", HigherOrderWarning)
        found = DOORS[door](attend(backend))
    expected = exact(door, formula)
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
    """Inductor's code loses their tangents without a word, attention's and all others': refused."""

    FUNCTIONS: ClassVar[dict[str, Any]] = {
        "before": lambda q, k, v: metattn.attention(q * 2, k, v),
        "after": lambda q, k, v: metattn.attention(q, k, v) * 2,
        "vmap": lambda q, k, v: vmap(lambda x: metattn.attention(x[None], k[:1], v[:1]))(q),
        "grad": lambda q, k, v: grad(lambda x: metattn.attention(x, k, v).sin().sum())(q),
    }

    @pytest.mark.parametrize("fullgraph", [False, True])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_refused(self, name: str, fullgraph: bool) -> None:
        q, k, v, move = tensors(4)
        compiled = torch.compile(lambda q: self.FUNCTIONS[name](q, k, v), fullgraph=fullgraph)
        compiled(q)  # what was compiled before does not serve them
        with forward_ad.dual_level(), pytest.raises(Exception, match="dual numbers"):
            compiled(forward_ad.make_dual(q, move))

    def test_a_jvp_inside_is_none(self) -> None:
        q, k, v, move = tensors(4)

        def tangent(q: Tensor) -> Tensor:
            return jvp(lambda q: metattn.attention(q, k, v), (q,), (move,))[1]

        compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
        assert largest_difference([compiled(q)], [tangent(q)]) < 1e-12


class TestSlopesAreNeverLost:
    """Their derivative, on whatever level it is asked for."""

    CASES: ClassVar[dict[str, Any]] = {
        "grad of vmap": lambda a, s: grad(lambda s: vmap(a)(s).square().sum())(torch.stack([s, s])),
        "jacrev of vmap": lambda a, s: jacrev(vmap(lambda x: a(x).sum()))(torch.stack([s, s])),
        "vmap of a leaf": lambda a, s: torch.autograd.grad(
            vmap(a)(leaves := torch.stack([s, s]).requires_grad_()).sum(), leaves
        ),
        "jvp": lambda a, s: jvp(a, (s,), (s,)),
        "jvp of grad": lambda a, s: jvp(lambda s: grad(lambda x: a(s * 1, x).sum())(s), (s,), (s,)),
        "compiled grad": lambda a, s: torch.compile(grad(lambda s: a(s).square().sum()), backend="eager")(s),
        "compiled jvp": lambda a, s: torch.compile(lambda s: jvp(a, (s,), (s,))[1], backend="eager")(s),
    }

    @pytest.mark.parametrize("case", CASES)
    def test_as_the_formulas(self, case: str) -> None:
        q, k, v = tensors(3)
        position = torch.arange(q.shape[2])
        distance = (position[:, None] - position).abs()

        def formula(q: Tensor, slopes: Tensor) -> Tensor:
            return (q @ k.mT / q.shape[3] ** 0.5 - slopes[:, None, None] * distance).softmax(-1) @ v

        def ours(q: Tensor, slopes: Tensor) -> Tensor:
            return metattn.attention(q, k, v, alibi_slopes=slopes, backend="cpu")

        def found(attend: Any) -> Any:
            def function(slopes: Tensor, factor: Tensor | float = 1.0) -> Tensor:
                return attend(q * (factor.sum() if isinstance(factor, Tensor) else factor), slopes)

            return tree_leaves(self.CASES[case](function, torch.tensor([0.5, 0.25], dtype=torch.float64)))

        assert largest_difference(found(ours), found(formula)) < 1e-12

    def test_mapped_slopes_beside_forward_mode(self, backend: str) -> None:
        q, k, v, move = tensors(4)
        slopes = torch.rand(3, 2, dtype=torch.float64)

        def tangent(slopes: Tensor) -> Tensor:
            return jvp(
                lambda q: metattn.attention(q, k, v, alibi_slopes=slopes, backend=backend), (q,), (move,)
            )[1]

        assert largest_difference(vmap(tangent)(slopes), map(tangent, slopes)) < 1e-12


class AlongCotangents(torch.autograd.Function):
    """Of a function's gradient: its backward takes forward-mode derivatives along what it is given."""

    @staticmethod
    def forward(ctx: Any, gradient: Any, along: Any, x: Tensor) -> Tensor:
        ctx.along = along
        ctx.save_for_backward(x)
        return gradient(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Any:
        return None, None, ctx.along(ctx.saved_tensors[0], cotangent)


def duals(f: Any, x: Tensor, move: Tensor) -> Tensor:
    """The tangent that torch's own forward mode gives."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, move))).tangent  # type: ignore[no-any-return]


class TestWithinABatchedBackward:
    """Forward mode, and torch.func's transforms, along cotangents that is_grads_batched maps over."""

    WAYS: ClassVar[dict[str, Any]] = {
        "torch's duals": lambda f: lambda x, move: duals(grad(f), x, move),
        "duals of a map": lambda f: lambda x, move: duals(vmap(grad(lambda y: f(y[None]))), x, move),
        "vjp of a grad": lambda f: lambda x, move: vjp(grad(f), x)[1](move)[0],
        "vjp of a map": lambda f: lambda x, move: vjp(vmap(grad(lambda y: f(y[None]))), x)[1](move)[0],
    }

    @pytest.mark.parametrize("way", WAYS)
    def test_hessian_products(self, way: str, backend: str) -> None:
        q, k, v = tensors(3)
        cotangents = torch.randn(4, *q.shape, dtype=q.dtype)
        results = []
        for attend in (ours(backend), doors.plain):

            def energy(x: Tensor, attend: Attention = attend) -> Tensor:
                return attend(x, k[: x.shape[0]], v[: x.shape[0]]).sin().sum()

            gradient = self.WAYS[way](energy)
            x = q.clone().requires_grad_()
            y = AlongCotangents.apply(grad(energy), gradient, x)
            batched = torch.autograd.grad(y, x, cotangents, is_grads_batched=True, retain_graph=True)
            one_by_one = [torch.autograd.grad(y, x, c, retain_graph=True)[0] for c in cotangents]
            results += [batched[0], torch.stack(one_by_one)]
        assert largest_difference(results[:3], results[1:]) < 1e-12


class TestABatchedBackwardWithin:
    """Within a transform torch does not unwrap what is_grads_batched gives: nobody can read it."""

    @staticmethod
    def batched(attend: Attention) -> Any:
        _, k, v = tensors(3)

        def gradients(q: Tensor) -> Tensor:
            x = q if q.requires_grad else q.clone().requires_grad_()
            basis = torch.stack([v.cos(), v.sin()])
            return torch.autograd.grad(attend(x, k, v), x, basis, is_grads_batched=True, create_graph=True)[0]

        return gradients

    OUTER: ClassVar[dict[str, Any]] = {
        "vjp": lambda f, q: vjp(f, q)[1](torch.stack([q, q]))[0],
        "grad": lambda f, q: grad(lambda q: f(q).sin().sum())(q),
        "jacrev": lambda f, q: jacrev(f)(q),
        "vmap of grad": lambda f, q: vmap(grad(lambda q: f(q).sin().sum()))(torch.stack([q, q])),
    }

    @pytest.mark.parametrize("outer", OUTER)
    def test_refused(self, outer: str, backend: str) -> None:
        q = tensors(1)[0]
        with pytest.raises(NotImplementedError, match="is_grads_batched"):
            self.OUTER[outer](self.batched(ours(backend)), q)

    def test_torchs_own_cannot_be_read(self) -> None:
        """When this fails, torch can do it, and we should."""
        q = tensors(1)[0]
        with pytest.raises(RuntimeError, match="atching rule"):
            self.OUTER["vjp"](self.batched(doors.plain), q).sum().item()


class TestModesAndWrappers:
    def test_no_grad_inside_of_transforms(self, backend: str) -> None:
        """What was off where attention was called stays off on the levels further out."""
        q, k, v, move = tensors(4)

        def product(attend: Attention) -> Any:
            def function(x: Tensor) -> Tensor:
                with torch.no_grad():
                    y = attend(x, k, v)
                return (y * x).sum()

            return grad(lambda x: jvp(function, (x,), (move,))[1])(q)

        assert largest_difference([product(ours(backend))], [product(doors.plain)]) < 1e-12

    def test_a_tensor_kept_beyond_its_transform(self, backend: str) -> None:
        """As keys are in a cache that is filled within one: it has a graph all the same."""
        q, k, v = tensors(3)
        kept: list[Tensor] = []
        k.requires_grad_()
        grad(lambda x: (kept.append(k * x.detach()), x.sum())[1])(q)
        found = torch.autograd.grad(ours(backend)(q, kept[0], v).sum(), k)
        assert largest_difference(found, torch.autograd.grad(doors.plain(q, k * q, v).sum(), k)) < 1e-12

    def test_a_third_derivative_within_transforms(self, backend: str) -> None:
        """Of what does not depend on a primal the reference's gradient is zero, on every level."""
        q, k, v = tensors(3)

        def third(attend: Attention) -> Any:
            def second(q: Tensor, v: Tensor) -> Tensor:
                def energy(v: Tensor) -> Tensor:
                    o = attend(q, k, v)
                    return o.sum() + 0.5 * o.sin().sum()

                return vmap(lambda move: jvp(grad(energy), (v,), (move,))[1])(torch.stack([v, v.cos()]))

            return jacrev(lambda q: vjp(lambda v: second(q, v), v)[1](torch.stack([v, v.sin()]))[0].sum())(q)

        with pytest.warns(HigherOrderWarning):
            found = third(ours(backend))
        assert largest_difference([found], [third(doors.plain)]) < 1e-12


def joined(tensors: Any) -> Tensor:
    """One tensor: of sizes 0, torch's vmap cannot add two that are single numbers."""
    return torch.cat([x.flatten() for x in (tensors if isinstance(tensors, tuple) else (tensors,))])


def energy(function: Any) -> Any:
    """One number of what a function gives, for functions of tuples too."""
    return lambda *x: (lambda y: (y * y.cos()).sum())(joined(function(*x)))


# Each takes (o, lse) of some tensors and gives a function of them: all maps, and what lies beyond.
OF_AN_EXAMPLE: dict[str, Any] = {
    "forward": lambda f, every: f,
    "vjp": lambda f, every: grad(energy(f), every),
    "jvp": lambda f, every: lambda *x: jvp(f, x, x)[1],
    "double_backward": lambda f, every: grad(energy(grad(energy(f), every)), every),
    "vjp_jvp": lambda f, every: lambda *x: jvp(grad(energy(f), every), x, x)[1],
    "grad of jvp": lambda f, every: grad(lambda *x: jvp(energy(f), x, x)[1], every),
    "jvp of vjp": lambda f, every: lambda *x: jvp(lambda *y: vjp(f, *y)[1](f(*y)), x, x)[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f, every: hessian(energy(f), every),
    "third": lambda f, every: grad(energy(grad(energy(grad(energy(f), every)), every)), every),
}


def outside(mapped: Any, every: Any) -> dict[str, Any]:
    """Derivatives of a function that maps over nothing: what is shared gets zeros."""

    def leaves(function: Any) -> Any:
        def run(*x: Tensor) -> list[Tensor]:
            x = tuple(t.clone().requires_grad_() for t in x)
            first = torch.autograd.grad(energy(function)(*x), x, create_graph=True)
            return [*first, *torch.autograd.grad(energy(lambda: first)(), x, materialize_grads=True)]

        return run

    def batched(*x: Tensor) -> tuple[Tensor, ...]:
        x = tuple(t.clone().requires_grad_() for t in x)
        y = joined(mapped(*x))
        return torch.autograd.grad(y, x, torch.ones(3, 1).to(y) * y.detach(), is_grads_batched=True)

    return {
        "backward": leaves(mapped),
        "grad": grad(energy(mapped), every),
        "jvp": lambda *x: jvp(mapped, x, x)[1],
        "jvp of grad": lambda *x: jvp(grad(energy(mapped), every), x, x)[1],
        "hessian": hessian(lambda *x: (lambda o: (o * o).sum())(mapped(*x)[0]), every),
        "batched gradients": batched,
        "within a vmap": lambda *x: vmap(lambda _: mapped(*x))(torch.ones(3)),
    }


def examples_of_none(call: Call, mapped: set[str]) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """A call's tensors, those that are mapped over with no example at all; and vmap's in_dims."""
    dims = tuple(0 if name in mapped else None for name in call.inputs)
    return [
        x if dim is None else x[None].expand(0, *x.shape) for x, dim in zip(call.tensors, dims, strict=True)
    ], dims


def compare_over_nothing(call: Call, mapped: set[str], transform: str, backend: str) -> None:
    x, dims = examples_of_none(call, mapped)
    every = tuple(range(len(x)))
    results = []
    for function in (call.function(backend), call.math):
        of_example = OF_AN_EXAMPLE.get(transform)
        if of_example is not None:
            found = vmap(of_example(function, every), dims)(*x)
        else:
            found = outside(vmap(function, dims), every)[transform.removeprefix("outside: ")](*x)
        results.append(tree_leaves(found))
    ours, expected = results
    assert [t.shape for t in ours] == [t.shape for t in expected]
    assert largest_difference(ours, expected) == 0.0


OVER_NOTHING = [*OF_AN_EXAMPLE, *(f"outside: {name}" for name in outside(None, None))]


@pytest.mark.filterwarnings("ignore::metattn.higher_order.HigherOrderWarning")
class TestEmptyBatches:
    """vmap over a dimension of size 0, of every map, by every door; gradients of each sample of none."""

    CALL = make_call(("bias", "sinks", "softcap"), Shape(batch=2, n=3, m=4, d=2, dv=3))

    @pytest.mark.parametrize("transform", OVER_NOTHING)
    def test_transform(self, transform: str, backend: str) -> None:
        for mapped in (set(self.CALL.inputs), {"q"}, {"k", "v"}, {"bias"}, {"sinks"}):
            compare_over_nothing(self.CALL, mapped, transform, backend)

    @pytest.mark.parametrize("name", list(OPTIONS))
    def test_option(self, name: str, backend: str) -> None:
        call = make_call((name,), Shape(batch=2, n=3, m=3, d=2, dv=2, lengths=((2, 1), (1, 2))))
        for transform in ("forward", "vjp", "jvp", "double_backward", "vjp_jvp", "outside: backward"):
            compare_over_nothing(call, set(call.inputs), transform, backend)

    @pytest.mark.parametrize(("outer", "inner"), [(0, 0), (0, 3), (2, 0)])
    @pytest.mark.parametrize("transform", ["forward", "vjp", "double_backward", "vjp_jvp"])
    def test_nested(self, transform: str, outer: int, inner: int, backend: str) -> None:
        """q mapped outside, the bias inside; both, one or the other without examples."""
        x = {name: t.clone() for name, t in self.CALL.inputs.items()}
        x["q"] = x["q"].expand(outer, *x["q"].shape)
        x["bias"] = x["bias"].expand(inner, *x["bias"].shape)
        over = [tuple(0 if name == one else None for name in x) for one in ("q", "bias")]
        results = []
        for function in (self.CALL.function(backend), self.CALL.math):
            of_example = OF_AN_EXAMPLE[transform](function, tuple(range(len(x))))
            results.append(tree_leaves(vmap(vmap(of_example, over[1]), over[0])(*x.values())))
        assert [t.shape for t in results[0]] == [t.shape for t in results[1]]
        assert largest_difference(*results) == 0.0

    def test_gradients_of_each_sample(self, backend: str) -> None:
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def loss(parameters: Any, sample: Tensor) -> Tensor:
            return functional_call(layer, parameters, (sample[None],)).square().sum()

        metattn.replace_attention(layer)  # torch's own attention refuses this
        with metattn.use_backend(backend):
            found = vmap(grad(loss), (None, 0))(parameters, torch.zeros(0, 5, 8))
        assert {name: t.shape for name, t in found.items()} == {
            name: (0, *p.shape) for name, p in parameters.items()
        }

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
    monkeypatch.setattr(doors, "DRAWN", doors.DRAWN.float())
    found = DOORS[door](ours("triton"))
    expected = expected_of(door, doors.plain)
    assert largest_difference(found, expected) <= 1e-4 * max(float(x.abs().max()) for x in expected)


@pytest.mark.skipif(available_backends()["triton"] is not None, reason=f"{available_backends()['triton']}")
@pytest.mark.parametrize("transform", OVER_NOTHING)
@pytest.mark.filterwarnings("ignore::metattn.higher_order.HigherOrderWarning")
def test_empty_batches_in_single_precision(transform: str) -> None:
    call = TestEmptyBatches.CALL.to(torch.float32)
    for mapped in (set(call.inputs), {"q"}, {"bias"}):
        compare_over_nothing(call, mapped, transform, "triton")
