"""sdpa_override around compiled code and inside of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F  # noqa: N812
from override_cases import CAUSAL, CLOSE, PADDING, Attends, Multihead, layer, math, randn
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import metattn


def compiled(function: Callable[..., Any]) -> tuple[Callable[..., Any], Any]:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


def attentions(counter: Any) -> tuple[int, int]:
    """How many in the graphs are metattn's, and torch's."""
    nodes = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    torchs = ("scaled_dot_product", "_native_multi_head", "_encoder_layer_fwd", "softmax")
    return sum("metattn" in n for n in nodes), sum(any(name in n for name in torchs) for n in nodes)


def slow(function: Callable[[], Tensor]) -> Tensor:
    """By torch's operations one by one."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return function()
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": Attends,
    "multihead": lambda: Multihead(batch_first=True),
    "encoder layer": layer,
}


@pytest.mark.parametrize("setting", ["training", "evaluation", "no gradients", "grad", "autocast"])
@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_once(name: str, where: str, setting: str) -> None:
    """One graph for every override, and metattn's attention in it."""
    model = MODELS[name]().train(setting in ("training", "autocast"))
    gradients = setting in ("training", "evaluation")
    if setting == "autocast":
        model = model.float()

    def run(x: Tensor) -> Tensor:
        if setting == "grad":
            return grad(lambda x: model(x).sin().sum())(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            return model(x)

    def run_inside(x: Tensor) -> Tensor:
        with metattn.sdpa_override():
            return run(x)

    function, counter = compiled(run_inside if where == "inside" else run)
    close = {"rtol": 3e-2, "atol": 3e-2} if setting == "autocast" else CLOSE
    for _ in range(3):
        x = torch.randn(2, 5, 8, dtype=torch.float32 if setting == "autocast" else torch.float64)
        x.requires_grad_(gradients)
        around = metattn.sdpa_override() if where == "around" else contextlib.nullcontext()
        with torch.set_grad_enabled(gradients):
            with around:
                found = function(x)
            expected = slow(lambda: run(x))  # noqa: B023
            torch.testing.assert_close(found, expected, **close)
            if gradients:
                leaves = [x, *model.parameters()]
                for a, b in zip(
                    torch.autograd.grad(found.sin().sum(), leaves),
                    torch.autograd.grad(expected.sin().sum(), leaves),
                    strict=True,
                ):
                    torch.testing.assert_close(a, b, **CLOSE)
    assert counter.frame_count == 1
    assert attentions(counter) == (1, 0)


FUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "padding": ({}, {"src_key_padding_mask": PADDING}),
    "mask": ({"activation": "gelu"}, {"src_mask": CAUSAL}),
    "both masks": ({}, {"src_mask": CAUSAL, "src_key_padding_mask": PADDING}),
    "norm first": ({"norm_first": True}, {"src_mask": CAUSAL, "is_causal": True}),
    "blocks": ({}, {"src_mask": torch.linspace(-1, 1, 100, dtype=torch.float64).view(4, 5, 5)}),
}


@pytest.mark.parametrize(("options", "masks"), FUSED.values(), ids=FUSED.keys())
def test_compiled_layers_leave_out_their_fused_call(options: dict[str, Any], masks: dict[str, Any]) -> None:
    model, x = layer(**options).eval(), randn(2, 5, 8)
    function, counter = compiled(model)
    with torch.no_grad():
        with metattn.sdpa_override():
            found = function(x, **masks)
        torch.testing.assert_close(found, slow(lambda: model(x, **masks)), **CLOSE)
    assert attentions(counter) == (1, 0)


def test_a_compiled_encoder_makes_no_nested_tensors() -> None:
    model, x = nn.TransformerEncoder(layer(), 2).eval(), randn(2, 5, 8)
    function, counter = compiled(lambda x: model(x, src_key_padding_mask=PADDING))
    with torch.no_grad():
        with metattn.sdpa_override():
            found = function(x)
        expected = slow(lambda: model(x, src_key_padding_mask=PADDING))
        torch.testing.assert_close(found, expected, **CLOSE)
    assert attentions(counter) == (2, 0)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_kernels_named_for_compiled_code(where: str) -> None:
    """Within the override they are torch's own; where they were named before it, it is metattn's."""

    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    def attend_by_math(x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(x)

    x = randn(1, 2, 3, 4)
    function, counter = compiled(attend_by_math if where == "inside" else attend)
    around = sdpa_kernel(SDPBackend.MATH) if where == "around" else contextlib.nullcontext()
    with metattn.sdpa_override(), around:
        torch.testing.assert_close(function(x), math(x, x, x), **CLOSE)
    assert attentions(counter) == (0, 1)
    function, counter = compiled(attend)
    with sdpa_kernel(SDPBackend.MATH), metattn.sdpa_override():
        torch.testing.assert_close(function(x), math(x, x, x), **CLOSE)
    assert attentions(counter) == (1, 0)


def test_overrides_that_come_and_go_around_compiled_code() -> None:
    """One graph without and one with them, whether one object is entered again or another; none counts."""
    x = randn(1, 2, 3, 4)
    function, counter = compiled(lambda x: F.scaled_dot_product_attention(x, x, x).sin().sum())
    (expected,) = torch.autograd.grad(function(x), x)
    override = metattn.sdpa_override()
    for again in (override, override, metattn.sdpa_override()):
        with again:
            value = function(x)
        torch.testing.assert_close(torch.autograd.grad(value, x)[0], expected, **CLOSE)
        assert again.calls == 0
    function(x)
    assert counter.frame_count == 2
    assert attentions(counter) == (1, 1)


def test_transforms_inside_compiled_code() -> None:
    k, v = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))

    def both(attend: Callable[..., Tensor], qs: Tensor, q: Tensor, tangent: Tensor) -> list[Tensor]:
        def loss(q: Tensor) -> Tensor:
            return attend(q, k, v).sin().sum()

        return [vmap(grad(loss))(qs), jvp(grad(loss), (q,), (tangent,))[1]]

    function, counter = compiled(lambda *x: both(F.scaled_dot_product_attention, *x))
    for _ in range(2):
        x = [torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 4), (3, 4), (3, 4))]
        with metattn.sdpa_override():
            found = function(*x)
        for a, b in zip(found, both(math, *x), strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
    assert counter.frame_count == 1


def test_functions_in_code_that_is_compiled_in_parts() -> None:
    """After a graph break the mode hears of functions in eager mode: each is still its own."""

    def broken(x: Tensor) -> Tensor:
        return x if bool((x > 0).all()) else x.sin()

    def function(x: Tensor) -> Tensor:
        return torch.cos(x) - torch.sin(x) + broken(x) + broken(x + 1)

    x = randn(5)
    torch._dynamo.reset()
    with metattn.sdpa_override():
        found = torch.compile(function, backend="eager")(x)
    torch.testing.assert_close(found, function(x), **CLOSE)


def test_the_layout_is_torchs_own() -> None:
    """Queries that are transposed views, in a module of sequences first."""
    module = nn.MultiheadAttention(8, 2, dtype=torch.float64)
    x = randn(3, 5, 8).transpose(0, 1)
    expected, _ = module(x, x, x, need_weights=False)
    with metattn.sdpa_override():
        found, _ = module(x, x, x, need_weights=False)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, **CLOSE)
