"""sdpa_override among what else torch has around its function: kernels, threads, modes, transforms."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F  # noqa: N812
from override_cases import CLOSE, math, randn, two_orders
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as bound_at_import
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import metattn


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, 4, 3, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)


# The ways to write the call, each with the same two heads of keys for four of queries.
MASK = torch.tensor([[True, False, True, True, False]] * 3)
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "keywords": ((), {"enable_gqa": True}),
    "all positional": ((MASK, 0.0, False), {"enable_gqa": True}),
    "all keywords": (
        (),
        {"attn_mask": MASK, "dropout_p": 0.0, "is_causal": False, "scale": 0.3, "enable_gqa": True},
    ),
    "causal": ((), {"is_causal": True, "enable_gqa": True}),
    "float mask": ((torch.linspace(-1, 1, 15, dtype=torch.float64).view(3, 5),), {"enable_gqa": True}),
    "lower right": ((causal_lower_right(3, 5),), {"enable_gqa": True}),
    "upper left": ((), {"attn_mask": causal_upper_left(3, 5), "scale": 0.2, "enable_gqa": True}),
}


@pytest.mark.parametrize(("args", "kwargs"), CALLS.values(), ids=CALLS.keys())
def test_arguments(args: tuple[Any, ...], kwargs: dict[str, Any], qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """Values and both orders, the derivatives taken outside; the name was bound before any override."""
    with metattn.sdpa_override() as override:
        output = bound_at_import(*qkv, *args, **kwargs)
    assert override.calls == 1
    assert "Forward" in type(output.grad_fn).__name__ or "metattn" in str(output.grad_fn), output.grad_fn
    expected = math(*qkv, *args, **kwargs)
    for x, y in zip(two_orders(output, list(qkv)), two_orders(expected, list(qkv)), strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_all_by_name(qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v = qkv
    with metattn.sdpa_override() as override:
        output = bound_at_import(value=v, key=k, query=q, enable_gqa=True)
    assert override.calls == 1
    torch.testing.assert_close(output, math(q, k, v, enable_gqa=True), **CLOSE)


def test_what_does_not_pass_through_torchs_function() -> None:
    """The operator itself, and a ScriptModule: no mode hears of them, torch computes."""

    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    with pytest.warns(DeprecationWarning, match="jit"):
        scripted = torch.jit.script(Attends())
    x = randn(1, 2, 3, 4)
    expected = Attends()(x)
    with metattn.sdpa_override() as override:
        for output in (scripted(x), torch.ops.aten.scaled_dot_product_attention(x, x, x)):
            torch.testing.assert_close(output, expected, **CLOSE)
    assert override.calls == 0


def test_kernels_named_at_any_depth() -> None:
    x = randn(1, 2, 3, 4).detach()
    override = metattn.sdpa_override()
    with override:
        F.scaled_dot_product_attention(x, x, x)
        assert override.calls == 1
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            F.scaled_dot_product_attention(x, x, x)
            assert override.calls == 1
            with override:
                F.scaled_dot_product_attention(x, x, x)  # this kernel was named before the override
                assert override.calls == 2
                with sdpa_kernel(SDPBackend.MATH):
                    F.scaled_dot_product_attention(x, x, x)
                    assert override.calls == 2
            F.scaled_dot_product_attention(x, x, x)
            assert override.calls == 2
        F.scaled_dot_product_attention(x, x, x)
        assert override.calls == 3


def test_an_error_inside_ends_the_override() -> None:
    x = randn(1, 2, 3, 4)
    override = metattn.sdpa_override()
    with pytest.raises(ValueError, match="attn_mask"), override:
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(2, 2, dtype=torch.float64))
    before = override.calls
    F.scaled_dot_product_attention(x, x, x)
    assert override.calls == before


def test_one_object_in_several_threads() -> None:
    """Each thread's entry is its own: one that has none has torch's function; all are counted together."""
    x = randn(1, 2, 3, 4).detach()
    override = metattn.sdpa_override()
    inside, done = threading.Barrier(3), threading.Barrier(3)

    def work(enters: bool) -> None:
        with override if enters else contextlib.nullcontext():
            inside.wait(60)
            for _ in range(20):
                F.scaled_dot_product_attention(x, x, x)
            done.wait(60)
        F.scaled_dot_product_attention(x, x, x)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(work, (True, True, False)))
    assert override.calls == 40


def test_an_entry_remembers_its_own_kernels() -> None:
    """Entered by another thread too, inside a named kernel, an object goes on as it was here."""
    x = randn(1, 2, 3, 4).detach()
    override = metattn.sdpa_override()
    entered, checked = threading.Event(), threading.Event()

    def other() -> None:
        with sdpa_kernel(SDPBackend.MATH), override:
            F.scaled_dot_product_attention(x, x, x)
            entered.set()
            checked.wait(60)

    thread = threading.Thread(target=other)
    with override:
        thread.start()
        entered.wait(60)
        # sdpa_kernel's setting is the process's: what another thread named, torch hears here too
        F.scaled_dot_product_attention(x, x, x)
        assert override.calls == 1
        checked.set()
        thread.join()
        F.scaled_dot_product_attention(x, x, x)
        assert override.calls == 2


@pytest.mark.parametrize("order", ["override inside", "transform inside"])
def test_transforms_of_torch_func(order: str) -> None:
    q, k, v = (randn(2, 3, 4).detach() for _ in range(3))
    tangent = torch.randn_like(q)

    def loss(q: Tensor) -> Tensor:
        within = metattn.sdpa_override() if order == "override inside" else contextlib.nullcontext()
        with within:
            return F.scaled_dot_product_attention(q, k[0], v[0]).sin().sum()

    def all_of(loss: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [vmap(grad(loss))(q), *jvp(grad(loss), (q,), (tangent,))]

    around = metattn.sdpa_override() if order == "transform inside" else contextlib.nullcontext()
    with around:
        found = all_of(loss)
    expected = all_of(lambda q: math(q, k[0], v[0]).sin().sum())
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, **CLOSE)


def test_beside_other_modes() -> None:
    class Log(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    x = randn(1, 2, 3, 4)
    with metattn.sdpa_override() as override, Log() as inner:
        F.scaled_dot_product_attention(x, x, x)
    assert override.calls == 1
    assert F.scaled_dot_product_attention in inner.seen
    with Log() as outer, metattn.sdpa_override() as override:
        F.scaled_dot_product_attention(x, x, x)
    assert override.calls == 1
    assert F.scaled_dot_product_attention not in outer.seen  # the override stands before it


class Twice(torch.autograd.Function):
    """Attention whose backward attends again, as a reversible layer's does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.scaled_dot_product_attention(x, x, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.scaled_dot_product_attention(x, x, x), x, *gradients)
        return gradient


def test_backward_of_an_autograd_function() -> None:
    """What a backward attends is metattn's if the backward is inside, torch's if it is outside."""
    x = randn(1, 2, 3, 4)
    with metattn.sdpa_override() as override:
        output = Twice.apply(x)
        assert override.calls == 1
        (inside,) = torch.autograd.grad(output.sin().sum(), x)
        assert override.calls == 2
        output = Twice.apply(x)
    (outside,) = torch.autograd.grad(output.sin().sum(), x)
    assert override.calls == 3
    torch.testing.assert_close(inside, outside, **CLOSE)


def test_checkpoint() -> None:
    """The recomputation has to be inside too: by a backward inside, or by context_fn."""
    x = randn(1, 2, 3, 4)
    expected = two_orders(math(x, x, x), [x])

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    with metattn.sdpa_override() as override:
        found = two_orders(checkpoint(attend, x, use_reentrant=False), [x])
    assert override.calls > 1
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)

    again = metattn.sdpa_override()
    output = checkpoint(attend, x, use_reentrant=False, context_fn=lambda: (metattn.sdpa_override(), again))
    for a, b in zip(two_orders(output, [x]), expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    assert again.calls > 0

    with metattn.sdpa_override():
        output = checkpoint(attend, x, use_reentrant=False)
    with pytest.raises(Exception, match="Recomputed values"):
        output.sin().sum().backward()


BACKWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "autograd.grad": lambda y, x: torch.autograd.grad(y, x)[0],
    "grad of two": lambda y, x: torch.autograd.grad([y, x.sum()], {"x": x})["x"] - 1,  # type: ignore[call-overload]
    "batched grad": lambda y, x: torch.autograd.grad(y, x, torch.ones(1), is_grads_batched=True)[0][0],
    "autograd.backward": lambda y, x: (torch.autograd.backward(y), x.grad)[1],  # type: ignore[return-value]
    "Tensor.backward": lambda y, x: (y.backward(), x.grad)[1],  # type: ignore[return-value,no-untyped-call]
    "Tensor.backward, arguments": lambda y, x: (y.backward(torch.ones(()), False, inputs=[x]), x.grad)[1],  # type: ignore
}


@pytest.mark.parametrize("other", [False, True], ids=["alone", "inside another mode"])
@pytest.mark.parametrize("backward", BACKWARDS.values(), ids=BACKWARDS.keys())
def test_backward_inside(backward: Callable[[Tensor, Tensor], Tensor], other: bool) -> None:
    """However it is started, a backward pass inside finds the override, and afterwards it is as it was."""
    (expected,) = torch.autograd.grad(Twice.apply(x := randn(1, 2, 3, 4)).sin().sum(), x)
    with torch.device("cpu") if other else contextlib.nullcontext(), metattn.sdpa_override() as override:
        y = Twice.apply(x).sin().sum()
        found = backward(y, x)
        assert override.calls == 2
        F.scaled_dot_product_attention(x, x, x)
        assert override.calls == 3
    torch.testing.assert_close(found, expected, **CLOSE)


def test_export() -> None:
    """An exported program has metattn's operator in it, and needs no override to run."""

    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(x, x, x)

    x = torch.randn(1, 2, 3, 4)
    with metattn.sdpa_override():
        program = torch.export.export(Attends(), (x,))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert any(re.match(r"metattn\.", name) for name in called)
    torch.testing.assert_close(program.module()(x), Attends()(x))
