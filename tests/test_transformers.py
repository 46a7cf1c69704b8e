"""metattn in transformers' models: the numbers of their own attention, in both orders; no mask goes wrong.

The truth is a model's own ("eager") attention in float64, with all that its code computes in float32 widened.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers import check_errors
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from transformers import AttentionInterface, StaticCache
from transformers_cases import PACKED, Layer, N, padding, textbook

import metattn
from benchmarks.transformers_models import (
    MODELS,
    SMALL,
    Size,
    both_orders,
    call,
    make,
    make_inputs,
    widened,
)
from metattn.integrations.transformers import BandMask, attend, mask
from metattn.integrations.transformers.band_mask import is_changed

DECODERS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "deepseek_v3")


@pytest.fixture
def seen_by_attend(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The masks that arrive at metattn's attention: descriptions, unless a model wanted entries."""
    arrived: list[Any] = []

    def spy(module: nn.Module, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        if len(args) > 3:
            *args, attention_mask = args
        arrived.append(attention_mask)
        return attend(module, *args, attention_mask, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, "metattn", spy)
    return arrived


def described(arrived: Any) -> bool:
    """Without N×M entries."""
    return isinstance(arrived, BandMask) and arrived.entries is None and not is_changed(arrived)


def close(ours: dict[str, Tensor], truth: dict[str, Tensor], bound: float = 1e-9) -> None:
    for name, expected in truth.items():
        assert expected.norm() > 0, name
        assert (ours[name] - expected).norm() <= bound * expected.norm(), name


def both_attentions(model: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What `run` gives with metattn, and with the model's own attention, both in float64 throughout."""
    results = []
    for implementation in ("metattn", "eager"):
        model.set_attn_implementation(implementation)
        with widened():
            results.append(run())
    return results[0], results[1]


def same_in_both_orders(name: str, seen: Tensor | None = None, size: Size = SMALL, **constants: Any) -> Any:
    model = make(name, size).double()
    inputs = {key: x.double() for key, x in make_inputs(name, size).items()}
    ours, truth = both_attentions(model, lambda: both_orders(model, inputs, seen, **constants))
    close(ours, truth)
    return model


# Whole models.


@pytest.mark.parametrize("name", MODELS)
def test_models_in_float64(name: str, seen_by_attend: list[Any]) -> None:
    model = same_in_both_orders(name)
    layers = sum("Attention" in type(m).__name__ and hasattr(m, "is_causal") for m in model.modules())
    assert len(seen_by_attend) == layers
    assert all(arrived is None or described(arrived) for arrived in seen_by_attend)


@pytest.mark.parametrize("name", MODELS)
def test_models_in_float32(name: str) -> None:
    check_dtype(name, torch.float32)


@pytest.mark.parametrize("name", ["bert", "llama", "gemma2", "gpt_oss", "t5"])
def test_models_in_bfloat16(name: str) -> None:
    check_dtype(name, torch.bfloat16)


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Errors beside the same rounded weights and inputs in float64, by the rule of all tests."""
    model, inputs = make(name).to(dtype), {key: x.to(dtype) for key, x in make_inputs(name).items()}
    found = {}
    for implementation in ("metattn", "eager"):
        model.set_attn_implementation(implementation)
        found[implementation] = flat(both_orders(model, inputs))
    with widened():
        truth = flat(both_orders(model.double(), {key: x.double() for key, x in inputs.items()}))
    check_errors(found["metattn"], found["eager"], truth, dtype)


def flat(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.flatten() for name, x in results.items()}


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_padding(name: str, side: str, seen_by_attend: list[Any]) -> None:
    keep = padding(side)
    same_in_both_orders(name, seen=keep.bool(), attention_mask=keep)
    assert all(described(arrived) and arrived.padded for arrived in seen_by_attend)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padding_of_encoder_and_decoder(name: str) -> None:
    decoder = padding("right", N - 3)
    same_in_both_orders(
        name, seen=decoder.bool(), attention_mask=padding("left"), decoder_attention_mask=decoder
    )


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
def test_packed_sequences(name: str, seen_by_attend: list[Any]) -> None:
    """By positions that start again; each sequence gives what it gives alone."""
    model = same_in_both_orders(name, position_ids=PACKED)
    assert all(described(arrived) and arrived.starts is not None for arrived in seen_by_attend)
    model.set_attn_implementation("metattn")
    embeddings = make_inputs(name)["inputs_embeds"].double()
    together = call(model, {"inputs_embeds": embeddings, "position_ids": PACKED})
    alone = call(model, {"inputs_embeds": embeddings[:1, 5:13]})
    assert (together[:1, 5:13] - alone).norm() < 1e-6 * alone.norm()


def test_chunks(seen_by_attend: list[Any]) -> None:
    """Llama 4's layers, some of which attend within chunks alone."""
    config = transformers.Llama4TextConfig(
        **SMALL.decoder(attention_chunk_size=4),
        intermediate_size_mlp=2 * SMALL.width,
        num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"],
        moe_layers=[],
    )
    torch.manual_seed(0)
    model = transformers.Llama4ForCausalLM(config).double().eval()
    inputs = {"inputs_embeds": make_inputs("llama")["inputs_embeds"].double()}
    cases: list[dict[str, Tensor]] = [{}, {"position_ids": PACKED}]
    cases += [{"attention_mask": padding(side)} for side in ("left", "both")]
    for constants in cases:
        seen = constants["attention_mask"].bool() if "attention_mask" in constants else None
        ours, truth = both_attentions(model, lambda k=constants, s=seen: both_orders(model, inputs, s, **k))
        close(ours, truth)
    assert all(described(arrived) for arrived in seen_by_attend)


def test_causal_model_made_bidirectional(seen_by_attend: list[Any]) -> None:
    same_in_both_orders("llama", is_causal=False)
    assert all(described(arrived) and arrived.high is None for arrived in seen_by_attend)


def test_masks_of_the_caller() -> None:
    """[B, 1, N, N] in place of padding: bool, or numbers."""
    allowed = (torch.rand(2, 1, N, N) > 0.3) | torch.eye(N, dtype=torch.bool)
    numbers = torch.zeros(2, 1, N, N, dtype=torch.float64).masked_fill(
        ~allowed, torch.finfo(torch.float64).min
    )
    model = same_in_both_orders("llama", attention_mask=numbers)
    inputs = {"inputs_embeds": make_inputs("llama")["inputs_embeds"].double()}
    model.set_attn_implementation("metattn")
    first, second = (both_orders(model, inputs, attention_mask=m) for m in (allowed, numbers))
    close(first, second)


def test_cross_attention_of_one_query_batch() -> None:
    q, k, v = torch.randn(1, 2, 3, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 6)
    o, weights = attend(Layer(is_causal=False), q, k, v, None)
    assert weights is None
    assert o.shape == (2, 3, 2, 6)
    torch.testing.assert_close(o, textbook(q, k, v).transpose(1, 2))


@pytest.mark.parametrize("name", DECODERS)
def test_nobody_sees_the_future_or_beyond_a_window(name: str) -> None:
    """Derivatives in embeddings that a token must not depend on are 0, in one layer of any sort."""
    size = Size(layers=2)
    model = make(name, size).double()
    model.set_attn_implementation("metattn")
    embeddings = make_inputs(name, size)["inputs_embeds"].double().requires_grad_()
    keep = padding("left")
    (gradient,) = torch.autograd.grad(
        call(model, {"inputs_embeds": embeddings, "attention_mask": keep})[:, 9].sum(), embeddings
    )
    reached = gradient.abs().amax(-1) > 0
    first = 9 - 2 * (size.window - 1) if name == "mistral" else 0
    expected = (torch.arange(N) <= 9) & (torch.arange(N) >= first) & keep.bool()
    assert torch.equal(reached, expected)


def test_dropout() -> None:
    """In training, with torch's generator; each sort of mask."""
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))
    layer = Layer(is_causal=True)
    for its in (None, mask(2, 6, 6), mask(2, 6, 6, attention_mask=padding("left", 6))):
        torch.manual_seed(3)
        o, _ = attend(layer.train(), q, k, v, its, dropout=0.4)
        torch.manual_seed(3)
        keys = its.keys[:, None, None] if isinstance(its, BandMask) and its.padded else None
        expected = metattn.attention(q, k, v, causal=True, mask=keys, dropout_p=0.4)
        torch.testing.assert_close(o.transpose(1, 2), expected, rtol=0, atol=0)
        o, _ = attend(layer.eval(), q, k, v, its, dropout=0.4)
        torch.testing.assert_close(o.transpose(1, 2), metattn.attention(q, k, v, causal=True, mask=keys))


# Caches.


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss"])
def test_steps_with_a_cache(name: str, static: bool) -> None:
    """Chunks and single tokens, left padded, past the window: the logits of the whole at once."""
    model = make(name).double()
    embeddings, keep = make_inputs(name)["inputs_embeds"].double(), padding("left")
    model.set_attn_implementation("eager")
    with widened(), torch.no_grad():
        whole = call(model, {"inputs_embeds": embeddings, "attention_mask": keep})
        model.set_attn_implementation("metattn")
        cache = StaticCache(config=model.config, max_cache_len=N + 5) if static else None
        word = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        start = 0
        for length in (4, 1, 5, 1, 1, 4):
            part = slice(start, start := start + length)
            out = model(
                inputs_embeds=embeddings[:, part],
                attention_mask=keep[:, :start],
                use_cache=True,
                **{word: cache},
            )
            cache = out.past_key_values
            seen = keep[:, part].bool()
            assert (out.logits[seen] - whole[:, part][seen]).norm() < 1e-9 * whole.norm()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma2", "t5", "bart"])
def test_generation(name: str, cache: str) -> None:
    """Greedy, padded on the left, past the window."""
    model = make(name)
    torch.manual_seed(1)
    ids, keep = torch.randint(3, 60, (2, 7)), padding("left", 7)
    tokens = {}
    for implementation in ("eager", "metattn"):
        model.set_attn_implementation(implementation)
        tokens[implementation] = model.generate(
            ids, attention_mask=keep, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0,
            cache_implementation=None if cache == "dynamic" else cache,
        )  # fmt: skip
    assert torch.equal(tokens["metattn"], tokens["eager"])


# What one does with models.


def loss(model: nn.Module, weights: dict[str, Tensor], **inputs: Tensor) -> Tensor:
    logits: Tensor = functional_call(model, weights, (), {**inputs, "use_cache": False}).logits
    return logits.square().mean()


def test_meta_gradient_of_each_parameter() -> None:
    """MAML: a step on one text, then the loss on another; by torch.func, and mapped over tasks."""
    model = make("llama").double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    texts = torch.stack([make_inputs("llama", seed=s)["inputs_embeds"].double() for s in (1, 2)])

    def adapted(weights: dict[str, Tensor], text: Tensor) -> Tensor:
        step = grad(lambda w: loss(model, w, inputs_embeds=text))(weights)
        return loss(model, {n: w - 0.1 * step[n] for n, w in weights.items()}, inputs_embeds=text.flip(1))

    ours, truth = both_attentions(model, lambda: [grad(adapted)(weights, text) for text in texts])
    for one, other in zip(ours, truth, strict=True):
        scale = max(x.norm() for x in other.values())
        assert all((one[name] - x).norm() < 1e-10 * scale for name, x in other.items())
        assert all(one[name].norm() > 1e-6 * scale for name in other if "_proj" in name)
    model.set_attn_implementation("metattn")
    with widened():
        mapped = vmap(grad(adapted), (None, 0))(weights, texts)
    for name, x in mapped.items():
        assert (x - torch.stack([each[name] for each in ours])).norm() < 1e-10 * scale


def test_mapped_over_paddings() -> None:
    """vmap over tasks whose texts are padded differently: none may look at another's values."""
    model = make("mistral").double()
    model.set_attn_implementation("metattn")
    weights = {name: p.detach() for name, p in model.named_parameters()}
    texts = torch.stack([make_inputs("mistral", seed=s)["inputs_embeds"].double() for s in (1, 2)])
    keeps = torch.stack([padding("left"), padding("right")])

    def gradient(text: Tensor, keep: Tensor) -> Tensor:
        def seen(text: Tensor) -> Tensor:
            inputs = {"inputs_embeds": text, "attention_mask": keep, "use_cache": False}
            logits = functional_call(model, weights, (), inputs).logits
            return (logits * keep[..., None]).square().mean()

        return grad(seen)(text)

    mapped = vmap(gradient)(texts, keeps)
    alone = torch.stack([gradient(text, keep) for text, keep in zip(texts, keeps, strict=True)])
    assert (mapped - alone).norm() < 1e-10 * alone.norm()


def test_hessian_vector_product_forward_over_reverse() -> None:
    model = make("gemma2").double()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    text = make_inputs("gemma2")["inputs_embeds"].double()

    def product() -> dict[str, Tensor]:
        gradient = grad(lambda text: loss(model, weights, inputs_embeds=text))
        return {"hvp": jvp(gradient, (text,), (text.flip(1),))[1]}

    close(*both_attentions(model, product))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant: bool) -> None:
    """With dropout, whose masks come again; both orders where torch's checkpoint has them."""
    model = make("llama").double().train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    model.set_attn_implementation("metattn")
    inputs = {"inputs_embeds": make_inputs("llama")["inputs_embeds"].double()}

    def run() -> dict[str, Tensor]:
        torch.manual_seed(5)
        if not reentrant:
            return both_orders(model, inputs, attention_mask=padding("right"))
        text = inputs["inputs_embeds"].clone().requires_grad_()
        logits = call(model, {"inputs_embeds": text, "attention_mask": padding("right")})
        model.zero_grad()
        logits.square().mean().backward()
        assert text.grad is not None
        return {"gradient": text.grad}

    plain = run()
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    else:  # its name before
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    close(run(), plain, 1e-12)


def test_autocast() -> None:
    model, inputs = make("llama"), make_inputs("llama")
    found = {}
    for implementation in ("metattn", "eager"):
        model.set_attn_implementation(implementation)
        with torch.autocast("cpu", torch.bfloat16):
            found[implementation] = flat(both_orders(model, inputs))
    with widened():
        truth = flat(both_orders(model.double(), {name: x.double() for name, x in inputs.items()}))
    check_errors(found["metattn"], found["eager"], truth, torch.bfloat16)


@pytest.mark.parametrize(("name", "padded"), [("llama", False), ("gemma2", True), ("bart", False)])
def test_compiled(name: str, padded: bool) -> None:
    """In one graph: logits and the first gradient."""
    torch._dynamo.reset()
    model = make(name).double()
    model.set_attn_implementation("metattn")
    inputs = {key: x.double().requires_grad_() for key, x in make_inputs(name).items()}
    keep = padding("left")
    constants: dict[str, Any] = {"attention_mask": keep} if padded else {}
    results = []
    for function in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        logits = function(**inputs, **constants, use_cache=False).logits
        if padded:
            logits = logits[keep.bool()]
        gradients = torch.autograd.grad(logits.square().mean(), list(inputs.values()))
        results.append({"logits": logits, **dict(zip(inputs, gradients, strict=True))})
    close(results[1], results[0], 1e-6)


@pytest.mark.parametrize("constants", [{"attention_mask": padding("left")}, {"position_ids": PACKED}])
def test_layers_compiled_one_by_one(constants: dict[str, Tensor]) -> None:
    """The mask is made outside of what is compiled, and taken apart at its door."""
    torch._dynamo.reset()
    model = make("mistral").double()
    model.set_attn_implementation("metattn")
    inputs = {**make_inputs("mistral"), **constants}
    inputs["inputs_embeds"] = inputs["inputs_embeds"].double()
    with torch.no_grad():
        plain = call(model, inputs)
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        assert (call(model, inputs) - plain).norm() < 1e-6 * plain.norm()
