"""Tensors made under torch.inference_mode(): autograd may not keep them, so that it keeps copies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import Call, both_orders, finite, largest_difference, make_call
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap

import metattn

FLOAT64 = True  # what is kept is one for all backends

CASES = {
    "mask": ("mask",),
    "slopes": ("alibi",),
    "bias": ("bias",),
    "sinks": ("sinks",),
    "cu_seqlens": ("packed",),
}


def of_inference(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def pair(names: tuple[str, ...]) -> tuple[Call, dict[str, Tensor]]:
    """A call, and those of its tensors that no gradient is asked of, as made in inference mode."""
    call = make_call(names)
    given = {name: of_inference(x) for name, x in call.inputs.items() if name not in ("q", "k", "v")}
    given |= {name: of_inference(x) for name, x in call.constants.items() if isinstance(x, Tensor)}
    return call, given


def ours(call: Call, given: dict[str, Any], backend: str) -> Any:
    """(o, lse) of q, k and v, with tensors of inference mode for all else."""
    options = {**call.constants, **given, "backend": backend, "return_lse": True}
    if call.lengths is None:
        return lambda q, k, v: metattn.attention(q, k, v, **options)
    longest = [max(lengths) for lengths in zip(*call.lengths, strict=True)]
    cu = [
        of_inference(torch.tensor([0, *lengths]).cumsum(0).int())
        for lengths in zip(*call.lengths, strict=True)
    ]
    return lambda q, k, v: metattn.varlen_attention(q, k, v, *cu, *longest, **options)


def formula(call: Call) -> Any:
    others = [x for name, x in call.inputs.items() if name not in "qkv"]
    return lambda q, k, v: call.math(q, k, v, *others)


@pytest.mark.parametrize("case", CASES)
def test_both_orders(case: str, backend: str) -> None:
    call, given = pair(CASES[case])
    x = {name: call.inputs[name] for name in "qkv"}
    found, expected = (both_orders(f, x) for f in (ours(call, given, backend), formula(call)))
    assert largest_difference(found.values(), expected.values()) < 1e-12


@pytest.mark.parametrize("case", CASES)
def test_transforms(case: str, backend: str) -> None:
    call, given = pair(CASES[case])
    q, k, v = (call.inputs[name] for name in "qkv")

    def derivatives(f: Any) -> list[Tensor]:
        def loss(q: Tensor) -> Tensor:
            o, lse = f(q, k, v)
            return o.sin().sum() + finite(lse).square().sum()

        return [
            grad(loss)(q),
            jvp(grad(loss), (q,), (q.cos(),))[1],
            hessian(loss)(q),
            vmap(grad(loss))(torch.stack([q, q.sin()])),
        ]

    found, expected = (derivatives(f) for f in (ours(call, given, backend), formula(call)))
    assert largest_difference(found, expected) < 1e-11


def test_inputs_that_need_no_gradient(backend: str) -> None:
    """A query, or a cotangent, beside keys that are learned: torch's own operations refuse these."""
    call = make_call()
    q, k, v = call.tensors
    cotangent = torch.randn_like(call.math(*call.tensors)[0])

    def gradients(attend: Any, q: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        x = [t.clone().requires_grad_() for t in (k, v)]
        first = torch.autograd.grad(attend(q, *x), x, cotangent, create_graph=True)
        return (*first, *torch.autograd.grad(sum(t.sin().sum() for t in first), x))

    found = gradients(
        lambda *x: metattn.attention(*x, backend=backend), of_inference(q), of_inference(cotangent)
    )
    assert largest_difference(found, gradients(lambda *x: call.math(*x)[0], q, cotangent)) < 1e-12


def test_a_later_change_is_not_seen() -> None:
    """Inference tensors count no changes: what is kept must not be the tensor itself."""
    call, given = pair(("mask",))
    x = [t.clone().requires_grad_() for t in call.tensors]
    o = ours(call, given, "cpu")(*x)[0]
    expected = torch.autograd.grad(call.math(*x)[0].sum(), x)
    with torch.inference_mode():
        given["mask"].logical_not_()
    assert largest_difference(torch.autograd.grad(o.sum(), x), expected) < 1e-12


def test_what_was_expanded_stays_so() -> None:
    q = torch.randn(2, 2, 64, 4, requires_grad=True)
    with torch.inference_mode():
        mask = (torch.rand(2, 1, 1, 64) > 0.3).expand(2, 2, 64, 64)
    o = metattn.attention(q, q, q, mask=mask, backend="cpu")
    kept = [t for t in o.grad_fn.saved_tensors if t is not None and t.dtype == torch.bool]
    assert [t.untyped_storage().nbytes() for t in kept] == [2 * 64]
    assert torch.equal(kept[0], mask)


def test_nothing_is_copied_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    call, given = pair(("mask",))
    monkeypatch.setattr("metattn.torch_internals._copied", None)
    o = ours(call, given, "cpu")(*call.tensors)[0]
    assert largest_difference([o], [call.math(*call.tensors)[0]]) < 1e-12


def test_modules(backend: str) -> None:
    """A replaced layer takes them as torch's does, with and without weights."""
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    mask, padding = torch.ones(5, 5).triu(1) > 0, torch.zeros(2, 5) > 0
    padding[0, 4] = True

    def run(mask: Tensor, padding: Tensor) -> list[Tensor]:
        with metattn.use_backend(backend):
            y = layer(x, src_mask=mask, src_key_padding_mask=padding)
            return [y, *torch.autograd.grad(y.sin().sum(), x)]

    expected = run(mask, padding)
    metattn.replace_attention(layer)
    assert largest_difference(run(of_inference(mask), of_inference(padding)), expected) < 1e-12
