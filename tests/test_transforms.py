"""torch.func's transforms, and how they compose, against the same transforms of plain maths in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import OPTIONS, Call, RecordedMaps, Shape, finite, largest_difference, make_call
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

import metattn
from metattn.higher_order import HigherOrderWarning

SMALL = Shape(batch=2, n=3, m=2, d=2, dv=1, lengths=((2, 1), (1, 0), (0, 1)))
Function = Callable[..., Any]

FLOAT64 = True  # finite differences need it: backends that lack it are tested in test_triton.py


def loss(function: Function) -> Function:
    def value(*x: Tensor) -> Tensor:
        o, lse = function(*x)
        return o.sin().sum() + finite(lse).square().sum()

    return value


def directions(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same for every example of a vmap: not random."""
    return tuple(
        (torch.arange(t.numel(), dtype=t.dtype) * 0.7 + i).sin().view(t.shape) for i, t in enumerate(x)
    )


def dot(xs: Any, ys: Any) -> Tensor:
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


# Each takes a function of x that returns (o, lse), and gives a function of x.
FIRST: dict[str, Callable[[Function, tuple[int, ...]], Function]] = {
    "grad": lambda f, args: grad(loss(f), args),
    "jvp": lambda f, args: lambda *x: jvp(f, x, directions(x))[1],
    "vjp": lambda f, args: lambda *x: vjp(f, *x)[1](tuple(t.cos() for t in f(*x))),
}
SECOND: dict[str, Callable[[Function, tuple[int, ...]], Function]] = {
    "grad of grad": lambda f, args: grad(lambda *x: dot(grad(loss(f), args)(*x), directions(x)), args),
    "jvp of grad": lambda f, args: lambda *x: jvp(grad(loss(f), args), x, directions(x))[1],
    "grad of jvp": lambda f, args: grad(lambda *x: jvp(loss(f), x, directions(x))[1], args),
    "jvp of vjp": lambda f, args: (
        lambda *x: jvp(lambda *y: vjp(f, *y)[1](tuple(t.cos() for t in f(*y))), x, directions(x))[1]
    ),
}
JVP_OF_JVP = {
    "jvp of jvp": lambda f, args: lambda *x: jvp(lambda *y: jvp(f, y, directions(x))[1], x, directions(x))[1]
}
THIRD: dict[str, Callable[[Function, tuple[int, ...]], Function]] = {
    f"{outer} of {name}": (
        (lambda f, args, of=of: grad(lambda *x: dot(of(f, args)(*x), directions(x)), args))
        if outer == "grad"
        else (lambda f, args, of=of: lambda *x: jvp(of(f, args), x, directions(x))[1])
    )
    for outer in ("grad", "jvp")
    for name, of in SECOND.items()
}


def compare(transform: Callable[[Function, tuple[int, ...]], Function], call: Call, backend: str) -> None:
    args = tuple(range(len(call.tensors)))
    ours, expected = (transform(f, args)(*call.tensors) for f in (call.function(backend), live_math(call)))
    if isinstance(expected, Tensor):
        ours, expected = (ours,), (expected,)
    scale = max(float(x.abs().max()) for x in expected)
    ours = tuple(x.nan_to_num(neginf=0.0) if x.isneginf().any() else x for x in ours)
    assert largest_difference(ours, expected) < 1e-12 * max(scale, 1.0)


def live_math(call: Call) -> Function:
    return lambda *x: (lambda o, lse: (o, finite(lse)))(*call.math(*x))


class TestCompositions:
    @pytest.mark.parametrize("name", list(OPTIONS))
    @pytest.mark.parametrize("transform", list(FIRST | SECOND))
    def test_two_orders_are_fused(self, transform: str, name: str, backend: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error", HigherOrderWarning)
            compare((FIRST | SECOND)[transform], make_call((name,), SMALL), backend)

    @pytest.mark.parametrize(
        "names", [("plain",), ("bias", "sinks", "softcap", "dropout"), ("packed", "grouped")], ids="+".join
    )
    @pytest.mark.parametrize("transform", list(JVP_OF_JVP | THIRD))
    def test_beyond_them_one_warning_at_least(
        self, transform: str, names: tuple[str, ...], backend: str
    ) -> None:
        with pytest.warns(HigherOrderWarning):
            compare((JVP_OF_JVP | THIRD)[transform], make_call(names, SMALL), backend)

    def test_nested_forward_mode_keeps_the_outer_tangents(self, backend: str) -> None:
        """jvp of jvp of grad: inside a Function's jvp torch switches forward mode off, for all levels."""
        call = make_call(("bias",), SMALL)
        with pytest.warns(HigherOrderWarning):
            compare(
                lambda f, args: (
                    lambda *x: jvp(
                        lambda *y: jvp(grad(loss(f), args), y, directions(x))[1], x, directions(x)
                    )[1]
                ),
                call,
                backend,
            )

    def test_forward_ad_without_functorch(self, backend: str) -> None:
        """torch.autograd.forward_ad: of the call, and of its backward."""
        call = make_call(("bias", "sinks"), SMALL)
        moves = directions(call.tensors)

        def derivatives(function: Function) -> tuple[Tensor, ...]:
            with forward_ad.dual_level():
                x = [
                    forward_ad.make_dual(t.clone().requires_grad_(), move)
                    for t, move in zip(call.tensors, moves, strict=True)
                ]
                o, lse = function(*x)
                first = torch.autograd.grad(o.sin().sum() + finite(lse).square().sum(), x, create_graph=True)
                return tuple(forward_ad.unpack_dual(t).tangent for t in (o, lse, *first))

        with warnings.catch_warnings():
            warnings.simplefilter("error", HigherOrderWarning)
            ours = derivatives(call.function(backend))
        assert largest_difference(ours, derivatives(live_math(call))) < 1e-12

    def test_a_vjp_function_outlives_its_transform(self, backend: str) -> None:
        """What vjp returns may be called, and differentiated, after the transform is over."""
        call = make_call(shape=SMALL)
        x = [t.requires_grad_() for t in call.tensors]
        results = []
        for function in (call.function(backend), call.math):
            (o, lse), pullback = vjp(function, *x)
            first = pullback((o.detach().cos(), lse.detach()))
            results.append(torch.autograd.grad(dot(first, directions(tuple(x))), x))
        assert largest_difference(*results) < 1e-12


class TestJacobiansAndHessians:
    @pytest.mark.parametrize(
        "names", [("plain",), ("bias",), ("sinks", "softcap"), ("grouped", "causal")], ids="+".join
    )
    @pytest.mark.parametrize("jacobian", [jacrev, jacfwd], ids=["jacrev", "jacfwd"])
    def test_jacobian(self, jacobian: Function, names: tuple[str, ...], backend: str) -> None:
        call = make_call(names, SMALL)
        args = tuple(range(len(call.tensors)))
        ours = jacobian(lambda *x: call.function(backend)(*x)[0], args)(*call.tensors)
        assert largest_difference(ours, jacobian(lambda *x: call.math(*x)[0], args)(*call.tensors)) < 1e-12

    @pytest.mark.parametrize(
        "names", [("plain",), ("bias", "sinks", "alibi"), ("dropout",), ("packed",)], ids="+".join
    )
    @pytest.mark.parametrize(
        "second",
        [
            hessian,
            lambda f, args: jacrev(jacrev(f, args), args),
            lambda f, args: jacrev(jacfwd(f, args), args),
        ],
        ids=["hessian", "jacrev of jacrev", "jacrev of jacfwd"],
    )
    def test_hessian(self, second: Function, names: tuple[str, ...], backend: str) -> None:
        call = make_call(names, SMALL)
        args = tuple(range(len(call.tensors)))
        with warnings.catch_warnings():
            warnings.simplefilter("error", HigherOrderWarning)
            ours = second(loss(call.function(backend)), args)(*call.tensors)
        expected = second(loss(live_math(call)), args)(*call.tensors)
        for row, expected_row in zip(ours, expected, strict=True):
            assert largest_difference(row, expected_row) < 1e-12

    def test_hessian_vector_product_three_ways(self, backend: str) -> None:
        call = make_call(("bias", "sinks"))
        x, moves, args = call.tensors, directions(call.tensors), tuple(range(5))
        f = loss(call.function(backend))
        forward_over_reverse = jvp(grad(f, args), x, moves)[1]
        reverse_over_forward = grad(lambda *y: jvp(f, y, moves)[1], args)(*x)
        leaves = [t.clone().requires_grad_() for t in x]
        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        reverse_over_reverse = torch.autograd.grad(dot(first, moves), leaves)
        assert largest_difference(forward_over_reverse, reverse_over_forward) < 1e-12
        assert largest_difference(forward_over_reverse, reverse_over_reverse) < 1e-12

    def test_batched_gradients(self, backend: str) -> None:
        """is_grads_batched, torch.autograd.functional and their own, older, vmap."""
        call = make_call(("bias",), SMALL)
        x = tuple(t.requires_grad_() for t in call.tensors)
        jacobians = []
        for function in (call.function(backend), call.math):
            o = function(*x)[0]
            basis = torch.eye(o.numel(), dtype=o.dtype).view(-1, *o.shape)
            jacobians.append(torch.autograd.grad(o, x, basis, is_grads_batched=True))
        assert largest_difference(*jacobians) < 1e-12


EXAMPLES = 3


def examples(
    call: Call, mapped: set[str], dims: dict[str, int]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The inputs, those that are mapped drawn anew for each example, and vmap's in_dims."""
    tensors, in_dims = [], []
    for name, x in call.inputs.items():
        if name in mapped:
            drawn = torch.randn(EXAMPLES, *x.shape, dtype=x.dtype)
            drawn = drawn.masked_fill((x == -torch.inf).expand_as(drawn), -torch.inf)
            tensors.append(drawn.movedim(0, dims.get(name, 0)))
            in_dims.append(dims.get(name, 0))
        else:
            tensors.append(x)
            in_dims.append(None)
    return tuple(tensors), tuple(in_dims)


def one_by_one(
    function: Function, tensors: tuple[Tensor, ...], in_dims: tuple[int | None, ...]
) -> tuple[Tensor, ...]:
    results = [
        function(*(x if dim is None else x.select(dim, i) for x, dim in zip(tensors, in_dims, strict=True)))
        for i in range(EXAMPLES)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))


MAPPED = [{"q", "k", "v", "bias", "sinks"}, {"q"}, {"k"}, {"v"}, {"bias"}, {"sinks"}, {"q", "bias"}]
VMAPPED = {"forward": lambda f, args: f} | FIRST | SECOND


class TestVmap:
    @pytest.mark.parametrize(
        "mapped", MAPPED, ids=lambda names: "all" if len(names) == 5 else "+".join(sorted(names))
    )
    @pytest.mark.parametrize("transform", list(VMAPPED))
    def test_of_transforms(self, transform: str, mapped: set[str], backend: str) -> None:
        """Over all inputs or some; bias, sinks, slopes shared by the batch, their gradients per example."""
        call = make_call(("bias_of_heads", "sinks", "softcap", "mask", "dropout", "alibi"), SMALL)
        tensors, in_dims = examples(call, mapped, {"k": -1, "bias": 2})
        args = tuple(range(len(tensors)))
        with warnings.catch_warnings():
            warnings.simplefilter("error", HigherOrderWarning)
            ours = vmap(VMAPPED[transform](live(call, backend), args), in_dims)(*tensors)
        expected = one_by_one(VMAPPED[transform](live_math(call), args), tensors, in_dims)
        assert largest_difference(ours, expected) < 1e-11

    @pytest.mark.parametrize("name", list(OPTIONS))
    @pytest.mark.parametrize("transform", ["forward", "grad", "jvp", "grad of grad", "jvp of grad"])
    def test_of_every_option(self, transform: str, name: str, backend: str) -> None:
        call = make_call((name,), SMALL)
        tensors, in_dims = examples(call, set(call.inputs), {})
        args = tuple(range(len(tensors)))
        ours = vmap(VMAPPED[transform](live(call, backend), args), in_dims)(*tensors)
        assert (
            largest_difference(ours, one_by_one(VMAPPED[transform](live_math(call), args), tensors, in_dims))
            < 1e-11
        )

    @pytest.mark.parametrize(
        "name", ["plain", "bias", "bias_of_heads", "sinks_of_batch", "dropout", "packed"]
    )
    @pytest.mark.parametrize("transform", ["forward", "grad", "grad of grad"])
    def test_nested_twice(self, transform: str, name: str, backend: str) -> None:
        """The outer vmap over q and bias, the inner over k, and v shared by all."""
        call = make_call((name,), SMALL)
        names = tuple(call.inputs)
        outer, inner = ({"q", "bias", "sinks"}, {"k", "bias"})
        tensors = []
        for key, x in call.inputs.items():
            sizes = [3] * (key in outer) + [2] * (key in inner)
            tensors.append(torch.randn(*sizes, *x.shape, dtype=x.dtype))
        args = tuple(range(len(names)))

        def nested(function: Function) -> tuple[Tensor, ...]:
            over = [tuple(0 if key in some else None for key in names) for some in (outer, inner)]
            return vmap(vmap(VMAPPED[transform](function, args), over[1]), over[0])(*tensors)

        assert largest_difference(nested(live(call, backend)), nested(live_math(call))) < 1e-11

    def test_of_a_mask(self, backend: str) -> None:
        call = make_call()
        q, k, v = call.tensors
        mask = torch.rand(EXAMPLES, 2, 1, 5, 4) > 0.3

        def masked(m: Tensor) -> Tensor:
            return metattn.attention(q, k, v, mask=m, backend=backend)

        assert largest_difference([vmap(masked)(mask)], [torch.stack([masked(m) for m in mask])]) < 1e-13

    @pytest.mark.parametrize("randomness", ["same", "different"])
    def test_dropout_randomness(self, randomness: str, backend: str) -> None:
        """A drawn seed follows vmap's rules; a given one drops what it drops for an example alone."""
        q = torch.ones(EXAMPLES, 1, 1, 8, 8)

        def dropped(x: Tensor) -> Tensor:
            return metattn.attention(x, x, torch.eye(8).expand(1, 1, 8, 8), dropout_p=0.5, backend=backend)

        o = vmap(dropped, randomness=randomness)(q)
        assert torch.equal(o[0], o[1]) == (randomness == "same")
        with pytest.raises(RuntimeError, match="randomness"):
            vmap(dropped)(q)

    def test_mapped_cu_seqlens_are_refused(self, backend: str) -> None:
        q, cu = torch.randn(4, 2, 3), torch.tensor([[0, 1, 4], [0, 2, 4]], dtype=torch.int32)
        with pytest.raises(NotImplementedError, match="cu_seqlens"):
            vmap(lambda c: metattn.varlen_attention(q, q, q, c, c, 4, 4, backend=backend))(cu)


def live(call: Call, backend: str) -> Function:
    return lambda *x: (lambda o, lse: (o, finite(lse)))(*call.function(backend)(*x))


class TestFolding:
    """vmap folds into the batch without a copy where the strides allow it, and expands no shared bias."""

    def test_views(self, backend: str) -> None:
        q, k, v = (torch.randn(EXAMPLES, 2, 2, 4, 3) for _ in range(3))
        shared = torch.randn(1, 2, 4, 3)
        bias = torch.randn(1, 2, 4, 4)
        with RecordedMaps() as recorded:
            vmap(lambda *x: metattn.attention(*x, bias=bias, backend=backend))(q, k, v)
        primals = recorded.calls.pop()[1].primals
        assert primals.q.shape == (2 * EXAMPLES, 2, 4, 3)
        assert [x.data_ptr() for x in primals[:3]] == [x.data_ptr() for x in (q, k, v)]
        assert primals.bias.shape == (1, 2, 4, 4)
        with recorded:
            vmap(lambda x: metattn.attention(x, shared, shared, backend=backend))(q[:, :1])
        primals = recorded.calls.pop()[1].primals
        assert primals.k.data_ptr() == shared.data_ptr()
        assert primals.k.stride(0) == 0

    def test_packed_views(self, backend: str) -> None:
        q = torch.randn(EXAMPLES, 5, 2, 3)
        cu = torch.tensor([0, 2, 5], dtype=torch.int32)
        with RecordedMaps() as recorded:
            vmap(lambda x: metattn.varlen_attention(x, x, x, cu, cu, 3, 3, backend=backend))(q)
        primals = recorded.calls.pop()[1].primals
        assert primals.q.shape == (1, 2, 5 * EXAMPLES, 3)
        assert primals.q.data_ptr() == q.data_ptr()

    def test_a_shared_bias_with_a_gradient_is_expanded_by_stride(self, backend: str) -> None:
        q, bias = torch.randn(EXAMPLES, 1, 2, 4, 3), torch.randn(1, 2, 4, 4)

        def loss(bias: Tensor, x: Tensor) -> Tensor:
            return metattn.attention(x, x, x, bias=bias, backend=backend).sum()

        with RecordedMaps() as recorded:
            vmap(grad(loss), (None, 0))(bias, q)
        name, given, _ = recorded.calls.pop()
        assert name == "vjp"
        assert given.primals.bias.shape == (EXAMPLES, 2, 4, 4)
        assert given.primals.bias.stride(0) == 0
        assert given.primals.bias.data_ptr() == bias.data_ptr()
