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
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as bound_at_import
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import metattn

CLOSE = {"rtol": 1e-9, "atol": 1e-10}


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return randn(2, 4, 3, 8), randn(2, 2, 5, 8), randn(2, 2, 5, 8)


def math(*args: Any, **kwargs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        result: Tensor = F.scaled_dot_product_attention(*args, **kwargs)
        return result


def two_orders(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)  # type: ignore[arg-type]
    return [output, *first, *second]


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


@pytest.mark.parametrize("setting", ["training", "evaluation", "evaluation without gradients"])
def test_torchs_layers_leave_out_their_fused_call(setting: str) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.train(setting == "training")
    x = randn(2, 5, 8)
    with torch.set_grad_enabled("without" not in setting):
        expected = layer(x)
        with metattn.sdpa_override() as override:
            found = layer(x)
    assert override.calls == 1
    torch.testing.assert_close(found, expected, **CLOSE)


def test_weights_are_torchs_own_formula() -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    with metattn.sdpa_override() as override:
        output, weights = attention(x, x, x)
    assert override.calls == 0
    assert torch.equal(output, attention(x, x, x)[0])
    assert weights.shape == (2, 5, 5)


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


class Attends(nn.Module):
    """A model's own attention, with heads split as most split them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Multihead(nn.Module):
    """torch's module, without weights or in its plain formula with them."""

    def __init__(self, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dtype=torch.float64, **options)
        self.need_weights = need_weights

    def forward(self, *tensors: Tensor, **options: Any) -> Tensor:
        return self.attention(*(tensors * 3)[:3], need_weights=self.need_weights, **options)[0]


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64, **options)


PADDING = torch.tensor([[False] * 4 + [True], [False] * 2 + [True] * 3])
CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "padding": ({"batch_first": True}, {"key_padding_mask": PADDING}),
    "mask": ({}, {"attn_mask": torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5)}),
    "blocks": ({}, {"attn_mask": torch.linspace(-1, 1, 100, dtype=torch.float64).view(4, 5, 5)}),
    "both masks": ({"batch_first": True}, {"attn_mask": CAUSAL, "key_padding_mask": PADDING}),
    "causal": ({"batch_first": True}, {"attn_mask": CAUSAL, "is_causal": True}),
    "more keys": ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True, "bias": False}, {}),
}


@pytest.mark.parametrize(("options", "masks"), KINDS.values(), ids=KINDS.keys())
def test_multihead_attention(options: dict[str, Any], masks: dict[str, Tensor]) -> None:
    """Both orders, in the inputs and parameters, are those of the formula that gives weights."""
    plain, module = Multihead(True, **options), Multihead(**options)
    module.load_state_dict(plain.state_dict())
    x = randn(2, 5, 8) if module.attention.batch_first else randn(5, 2, 8)
    with metattn.sdpa_override() as override:
        output = module(x, **masks)
    assert override.calls == 1
    found = two_orders(output, [x, *module.parameters()])
    expected = two_orders(plain(x, **masks), [x, *plain.parameters()])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("inputs", ["cross", "one memory", "other features", "unbatched"])
def test_multihead_attention_of_other_inputs(inputs: str) -> None:
    sizes = {"kdim": 6, "vdim": 4} if inputs == "other features" else {}
    plain, module = (Multihead(need_weights, batch_first=True, **sizes) for need_weights in (True, False))
    module.load_state_dict(plain.state_dict())
    x, y = randn(2, 5, 8), randn(2, 3, 8)
    leaves = {
        "cross": [x, y, randn(2, 3, 8)],
        "one memory": [x, y],
        "other features": [x, randn(2, 3, 6), randn(2, 3, 4)],
        "unbatched": [randn(5, 8), randn(3, 8), randn(3, 8)],
    }[inputs]
    given = [*leaves, leaves[-1]][:3]
    with metattn.sdpa_override() as override:
        output = module(*given)
    assert override.calls == 1
    for a, b in zip(two_orders(output, leaves), two_orders(plain(*given), leaves), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_multihead_attention_drops_in_training() -> None:
    module, x = Multihead(dropout=0.5), randn(5, 2, 8)
    with metattn.sdpa_override():
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))


def test_multihead_attention_refuses_what_does_not_fit() -> None:
    x = randn(5, 2, 8)
    with metattn.sdpa_override(), pytest.raises(ValueError, match="attn_mask: expected shape"):
        Multihead()(x, attn_mask=torch.zeros(1, 5, dtype=torch.bool))


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


class TestTransformersWithMasks:
    """torch's encoder in evaluation pads by its fused calls; in training it looks into its mask."""

    @staticmethod
    def encoder() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, dtype=torch.float64)
        return nn.TransformerEncoder(layer, 2)

    @pytest.mark.parametrize("training", [False, True])
    @pytest.mark.parametrize("gradients", [False, True])
    def test_padding_in_eager_mode(self, training: bool, gradients: bool) -> None:
        encoder, x = self.encoder().train(training), randn(2, 5, 8)
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[1, 3:] = True
        with torch.set_grad_enabled(gradients):
            expected = encoder(x, src_key_padding_mask=padding)
            with metattn.sdpa_override() as override:
                found = encoder(x, src_key_padding_mask=padding)
        assert override.calls == 2
        torch.testing.assert_close(found[~padding], expected[~padding], **CLOSE)

    @pytest.mark.parametrize("training", [False, True])
    def test_mask_in_code_that_is_compiled_in_parts(self, training: bool) -> None:
        encoder, x, mask = self.encoder().train(training), randn(2, 5, 8), randn(5, 5)
        expected = encoder(x, mask=mask)
        torch._dynamo.reset()
        with metattn.sdpa_override():
            found = torch.compile(lambda: encoder(x, mask=mask), backend="eager")()
        torch.testing.assert_close(found, expected, **CLOSE)


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
