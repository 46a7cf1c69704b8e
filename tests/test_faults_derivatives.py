"""Known ways in which attention kernels fail (docs/faults.md): who asks for which derivatives, and how."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from faults import DEVICES, Leaves, both_orders, check, mask_of, plain, qkv, randn, relative_error, seeds_for
from torch import Tensor

import metattn
from metattn import backends
from metattn.problem import Primals


@pytest.mark.parametrize("scale", [0.0, -0.7, 1e4])
def test_scales(backend: str, scale: float) -> None:
    check(backend, qkv(n=65, m=67, d=16), scale=scale)


def test_gradients_carry_a_graph_to_the_third_order(backend: str) -> None:
    dtype, close = torch.float64, {"rtol": 1e-9, "atol": 1e-11}
    if backend == "triton":
        dtype, close = torch.float32, {"rtol": 1e-3, "atol": 1e-4}
    leaves = {name: t.to(DEVICES[backend], dtype) for name, t in qkv(batch=1, n=3, m=4, d=3).items()}

    def orders(call: Callable[..., Tensor]) -> list[tuple[Tensor, ...]]:
        inputs = [t.clone().requires_grad_() for t in leaves.values()]
        value = call(q=inputs[0], k=inputs[1], v=inputs[2]).square().sum()
        result = []
        for order in range(3):
            gradients = torch.autograd.grad(value, inputs, create_graph=order < 2)
            assert all((t.grad_fn is not None) == (order < 2) for t in gradients)
            result.append(gradients)
            value = sum((t.sin().sum() for t in gradients), torch.zeros((), device=DEVICES[backend]))
        return result

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ours = orders(partial(metattn.attention, backend=backend))
    caught = [w for w in caught if w.category is not RuntimeWarning]  # numpy's, in the interpreter
    assert [w.category for w in caught] == [metattn.HigherOrderWarning]
    assert "reference" in str(caught[0].message)
    for order, exact in zip(ours, orders(partial(plain, metattn.attention)), strict=True):
        for found, expected in zip(order, exact, strict=True):
            torch.testing.assert_close(found, expected, **close)


class Calls:
    """Records what a backend's maps are asked for, by argument."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        module = backends.load(backend)
        for name in ("forward", "vjp", "jvp", "vjp_jvp"):
            monkeypatch.setattr(module, name, partial(self._record, name, getattr(module, name)))
        # the short way serves no call now: all take the maps' functions
        monkeypatch.setattr(module, "run_plain", lambda *_: None, raising=False)

    def _record(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append((name, inspect.signature(function).bind(*arguments).arguments))
        return function(*arguments)

    def named(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.mark.parametrize(
    "wanted", [("q",), ("k",), ("v",), ("bias",), ("q", "v"), ("k", "bias")], ids="-".join
)
def test_only_some_inputs_are_differentiated(
    backend: str, wanted: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = qkv() | {"bias": randn(1, 2, 5, 7)}
    held = {name: t for name, t in everything.items() if name not in wanted}
    check(backend, {name: everything[name] for name in wanted}, **held)

    calls = Calls(monkeypatch, backend)
    tensors = {name: t.to(DEVICES[backend], torch.float32) for name, t in everything.items()}
    for name in wanted:
        tensors[name].requires_grad_()
    o = metattn.attention(**tensors, backend=backend)
    inputs = [tensors[name] for name in wanted]
    loss = sum(t.square().sum() for t in torch.autograd.grad(o.sum(), inputs, create_graph=True))
    gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    needs = tuple(name in wanted for name in Primals._fields)
    assert [call["needs"] for call in calls.named("vjp")] == [needs]
    for call in (*calls.named("jvp"), *calls.named("vjp_jvp")):
        assert tuple(t is not None for t in call["tangents"]) == needs
        assert call.get("needs", needs) == needs
    if wanted == ("v",):  # linear in v: the second order is of the cotangent alone
        assert all(t is None or not t.any() for t in gradients)


def test_undefined_cotangents(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, backend)
    leaves = [t.to(DEVICES[backend], torch.float32).requires_grad_() for t in qkv().values()]
    o, lse = metattn.attention(*leaves, return_lse=True, backend=backend)
    torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    q, k, v = torch.autograd.grad(lse.sum(), leaves, allow_unused=True, materialize_grads=True)
    of_o, of_lse = calls.named("vjp")
    assert [of_o[name] is None for name in ("do", "dlse")] == [False, True]
    assert [of_lse[name] is None for name in ("do", "dlse")] == [True, False]
    expected = torch.autograd.grad(
        plain(metattn.attention, q=leaves[0], k=leaves[1], v=leaves[2], return_lse=True)[1].sum(), leaves[:2]
    )
    torch.testing.assert_close((q, k), expected)
    assert not v.any()


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "mask"])
def test_changed_in_place_between_forward_and_backward(backend: str, name: str) -> None:
    leaves = {n: t.to(DEVICES[backend], torch.float32).requires_grad_() for n, t in qkv().items()}
    others = {"bias": randn(5, 7).to(DEVICES[backend]).float(), "mask": mask_of(5, 7).to(DEVICES[backend])}
    tensors: Leaves = leaves | others
    o = metattn.attention(**tensors, backend=backend)
    with torch.no_grad():
        tensors[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        o.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_around_forward_alone(backend: str, dtype: torch.dtype) -> None:
    def autocast(**arguments: Any) -> Any:
        with torch.autocast(DEVICES[backend], dtype=dtype):
            return metattn.attention(**arguments)

    leaves = {name: t.to(DEVICES[backend], dtype).float() for name, t in qkv(n=17, m=33).items()}
    o, lse = (t.detach() for t in autocast(**leaves, return_lse=True))
    assert o.dtype == dtype
    seeds = {name: t.to(dtype) for name, t in seeds_for(leaves, o, lse).items()}
    ours = both_orders(partial(autocast, return_lse=True, backend=backend), leaves, seeds)
    exact = both_orders(
        partial(plain, metattn.attention, return_lse=True),
        {name: t.double() for name, t in leaves.items()},
        {name: t.double() for name, t in seeds.items()},
    )
    for name, t in ours.items():
        assert t.dtype == (dtype if name in ("o", "second do") else torch.float32)
        # three roundings to the dtype at most on the way to a second-order output
        assert relative_error(t, exact[name]) <= 3 * torch.finfo(dtype).eps, name


def test_autocast_around_both_orders(backend: str) -> None:
    leaves = {name: t.to(DEVICES[backend]).float() for name, t in qkv(n=17, m=33).items()}
    o, lse = (t.detach() for t in metattn.attention(**leaves, return_lse=True))
    seeds = seeds_for(leaves, o, lse)
    call = partial(metattn.attention, return_lse=True, backend=backend)
    outside = both_orders(lambda **t: call(**{n: x.bfloat16() for n, x in t.items()}), leaves, seeds)
    with torch.autocast(DEVICES[backend], dtype=torch.bfloat16):
        inside = both_orders(call, leaves, seeds)
    for name, t in inside.items():
        assert torch.equal(t, outside[name]), name


def test_two_backward_passes(backend: str) -> None:
    leaves = [t.to(DEVICES[backend], torch.float32).requires_grad_() for t in qkv().values()]
    o = metattn.attention(*leaves, backend=backend)
    once = torch.autograd.grad(o.sum(), leaves, retain_graph=True, create_graph=True)
    again = torch.autograd.grad(o.sum(), leaves, retain_graph=True, create_graph=True)
    second = [
        torch.autograd.grad(sum(t.square().sum() for t in first), leaves, retain_graph=True)
        for first in (once, once, again)
    ]
    for first, *others in zip(once, again, strict=True):
        assert torch.equal(first, others[0])
    for first, *others in zip(*second, strict=True):
        assert all(torch.equal(first, other) for other in others)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Callable[..., Any]]] = {
    "vmap": torch.func.vmap,
    "vmap-of-q": lambda f: lambda q, k, v: torch.func.vmap(f, in_dims=(0, None, None))(q, k[0], v[0]),
    "vmap-of-k": lambda f: lambda q, k, v: torch.func.vmap(f, in_dims=(None, 0, None))(q[0], k, v[0]),
    "vmap-of-v": lambda f: lambda q, k, v: torch.func.vmap(f, in_dims=(None, None, 0))(q[0], k[0], v),
    "vmap-other-dimension": lambda f: (
        lambda q, k, v: torch.func.vmap(f, in_dims=(1, 2, 0), out_dims=1)(q.movedim(0, 1), k.movedim(0, 2), v)
    ),
    "vmap-twice": lambda f: (
        lambda q, k, v: torch.func.vmap(torch.func.vmap(f, (0, None, 0)), (0, 0, None))(
            torch.stack((q, q + 1)), k[:2], v
        )
    ),
    "vmap-of-grad": lambda f: torch.func.vmap(
        torch.func.grad(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2))
    ),
    "vmap-of-jvp": lambda f: torch.func.vmap(lambda q, k, v: torch.func.jvp(f, (q, k, v), (k, q, v))),
    "vmap-of-grad-of-grad": lambda f: torch.func.vmap(
        lambda q, k, v: torch.func.grad(
            lambda q: torch.func.grad(lambda k: f(q, k, v).square().sum())(k).square().sum()
        )(q)
    ),
    "jacrev": lambda f: lambda q, k, v: torch.func.jacrev(f, argnums=(0, 1, 2))(q[0], k[0], v[0]),
    "jacfwd": lambda f: lambda q, k, v: torch.func.jacfwd(f, argnums=(0, 1, 2))(q[0], k[0], v[0]),
    "hessian": lambda f: (
        lambda q, k, v: torch.func.hessian(lambda *x: f(*x).square().sum(), argnums=(0, 1, 2))(
            q[0], k[0], v[0]
        )
    ),
    "jacrev-of-jacrev": lambda f: (
        lambda q, k, v: torch.func.jacrev(torch.func.jacrev(lambda q: f(q, k[0], v[0]).square().sum()))(q[0])
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms(backend: str, transform: Callable[[Callable[..., Tensor]], Callable[..., Any]]) -> None:
    dtype, close = torch.float64, {"rtol": 1e-9, "atol": 1e-11}
    if backend == "triton":
        dtype, close = torch.float32, {"rtol": 1e-4, "atol": 1e-5}
    tensors = [randn(3, 1, 2, 3, 2, seed=seed).to(DEVICES[backend], dtype) for seed in range(3)]

    def call(function: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda q, k, v: function(q=q, k=k, v=v, causal=True)

    ours = transform(call(partial(metattn.attention, backend=backend)))(*tensors)
    expected = transform(call(partial(plain, metattn.attention)))(*tensors)
    torch.testing.assert_close(ours, expected, **close)
