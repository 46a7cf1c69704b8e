"""Every door through which torch reaches a second derivative: right, or an error; never another number.

What is expected is the plain formula's through the same door, or torch.autograd.grad's where torch itself is
wrong there.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import pytest
import torch
from helpers import OPTIONS, Shape, finite, largest_difference, make_call
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import metattn
from benchmarks import doors
from benchmarks.doors import DOORS, Attention, expected_of, tensors
from metattn.autodiff import HigherOrderWarning
from metattn.backends import available_backends

FLOAT64 = True  # backends that lack it: TestSinglePrecision

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def ours(backend: str | None) -> Attention:
    return lambda q, k, v: metattn.attention(q, k, v, causal=True, backend=backend)


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
    """They are constants: their derivative, on whatever level it is asked for, is an error."""

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
    def test_refused(self, case: str) -> None:
        q, k, v = tensors(3)

        def attend(slopes: Tensor, factor: Tensor | float = 1.0) -> Tensor:
            scaled = q * (factor.sum() if isinstance(factor, Tensor) else factor)
            return metattn.attention(scaled, k, v, alibi_slopes=slopes, backend="cpu")

        with pytest.raises(Exception, match="alibi_slopes"):
            self.CASES[case](attend, torch.tensor([0.5, 0.25], dtype=torch.float64))

    def test_mapped_slopes_beside_forward_mode(self, backend: str) -> None:
        q, k, v, move = tensors(4)
        slopes = torch.rand(3, 2, dtype=torch.float64)

        def tangent(slopes: Tensor) -> Tensor:
            return jvp(
                lambda q: metattn.attention(q, k, v, alibi_slopes=slopes, backend=backend), (q,), (move,)
            )[1]

        assert largest_difference(vmap(tangent)(slopes), map(tangent, slopes)) < 1e-12


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
    monkeypatch.setattr(doors, "DRAWN", doors.DRAWN.float())
    found = DOORS[door](ours("triton"))
    expected = expected_of(door)
    assert largest_difference(found, expected) <= 1e-4 * max(float(x.abs().max()) for x in expected)
