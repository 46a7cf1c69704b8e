"""metattn in transformers' models: the numbers of their own attention, in both orders; no mask goes wrong.

The truth is a model's own ("eager") attention in float64, with all that its code computes in float32 widened.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from helpers import check_errors
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from transformers import AttentionInterface, AttentionMaskInterface, StaticCache, masking_utils

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
from metattn.integrations import _transformers_masks as masks
from metattn.integrations.transformers import BandMask, attend, mask, register

N = SMALL.length
DECODERS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "deepseek_v3")
PACKED = torch.tensor([[*range(5), *range(8), *range(3)], [*range(2), *range(14)]])  # positions


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
    assert all(arrived is None or isinstance(arrived, BandMask) for arrived in seen_by_attend)


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


def padding(side: str, length: int = N) -> Tensor:
    """[2, length] ones and zeros."""
    keep = torch.ones(2, length, dtype=torch.int64)
    if side in ("left", "both"):
        keep[0, :3] = 0
    if side in ("right", "both"):
        keep[1, -4:] = 0
    if side == "holes":
        keep[:, 1:4] = 0
        keep[1, 7] = 0
    return keep


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("name", ["bert", "modernbert", "gpt2", "llama", "mistral", "gemma2", "gpt_oss"])
def test_padding(name: str, side: str, seen_by_attend: list[Any]) -> None:
    keep = padding(side)
    same_in_both_orders(name, seen=keep.bool(), attention_mask=keep)
    assert all(isinstance(arrived, BandMask) and arrived.padded for arrived in seen_by_attend)


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
    assert all(arrived.starts is not None for arrived in seen_by_attend)
    model.set_attn_implementation("metattn")
    embeddings = make_inputs(name)["inputs_embeds"].double()
    together = call(model, {"inputs_embeds": embeddings, "position_ids": PACKED})
    alone = call(model, {"inputs_embeds": embeddings[:1, 5:13]})
    assert (together[:1, 5:13] - alone).norm() < 1e-6 * alone.norm()


def test_chunks() -> None:
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
    for constants in ({}, {"attention_mask": padding("left")}, {"attention_mask": padding("both")}):
        seen = constants["attention_mask"].bool() if constants else None
        ours, truth = both_attentions(model, lambda k=constants, s=seen: both_orders(model, inputs, s, **k))
        close(ours, truth)


def test_causal_model_made_bidirectional(seen_by_attend: list[Any]) -> None:
    same_in_both_orders("llama", is_causal=False)
    assert all(arrived.high is None for arrived in seen_by_attend)


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
        start = 0
        for length in (4, 1, 5, 1, 1, 4):
            part = slice(start, start := start + length)
            out = model(
                inputs_embeds=embeddings[:, part],
                attention_mask=keep[:, :start],
                cache=cache,
                use_cache=True,
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


# Masks, case by case.


class Layer(nn.Module):
    """What an attention function is told of a layer."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.eval()


def textbook(
    q: Tensor, k: Tensor, v: Tensor, numbers: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """softmax(qkᵀ/√d + numbers) v; rows of lowest numbers alone give zeros."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if numbers is not None:
        scores = scores + numbers
    dead = (scores < -1e30).all(-1, keepdim=True)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).masked_fill(dead, 0.0)


def patterns() -> dict[str, Any]:
    u = masking_utils
    return {
        "causal": u.causal_mask_function,
        "full": u.bidirectional_mask_function,
        "window": u.sliding_window_causal_mask_function(3),
        "window 1": u.sliding_window_causal_mask_function(1),
        "window 0": u.sliding_window_causal_mask_function(0),
        "window 99": u.sliding_window_causal_mask_function(99),
        "both sides": u.sliding_window_bidirectional_mask_function(2),
        "chunks": u.chunked_causal_mask_function(3, torch.tensor([0, 2])),
        "remapped": u.remap_positions_for_packed_sequence(
            u.causal_mask_function, (torch.arange(80) * 3 % 11).view(2, 40)
        ),
        "causal or some": u.or_masks(u.causal_mask_function, lambda b, h, q, k: (q + k) % 3 == 0),
        "blocks": u.or_masks(
            u.causal_mask_function, u.blockwise_overlay(torch.arange(40).expand(2, 40) // 4)
        ),
    }


@settings(max_examples=500, deadline=None)
@given(
    name=st.sampled_from(sorted(patterns())),
    n=st.integers(1, 7),
    past=st.integers(0, 6),
    tail=st.integers(0, 4),
    dropped=st.integers(0, 4),
    hidden=st.lists(st.booleans(), min_size=20, max_size=20) | st.none(),
    biased=st.booleans(),
)
def test_every_mask_is_transformers_own(
    name: str, n: int, past: int, tail: int, dropped: int, hidden: list[bool] | None, biased: bool
) -> None:
    """Entries and attention, for queries behind `past` keys, of which a cache has dropped the first ones, or
    which a static cache's unused tail follows."""
    dropped = min(dropped, past)
    m = past - dropped + n + tail
    arguments: dict[str, Any] = {
        "batch_size": 2,
        "q_length": n,
        "kv_length": m,
        "q_offset": past,
        "kv_offset": dropped,
        "mask_function": patterns()[name],
        "dtype": torch.float64,
    }
    if hidden is not None:
        keep = ~torch.tensor(hidden).view(2, 10)
        arguments["attention_mask"] = keep.repeat(1, 2)[:, : past + n]
    expected = masking_utils.eager_mask(**arguments)
    found = mask(**arguments)
    assert isinstance(found, BandMask)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.equal(found.dense(), expected)
    assert torch.equal(found + 0.0, expected)
    assert torch.equal(found.alive(), expected == 0)
    generator = torch.Generator().manual_seed(n + 10 * m)
    q, k, v = (
        torch.randn(2, h, length, d, generator=generator, dtype=torch.float64)
        for h, length, d in ((4, n, 3), (2, m, 3), (2, m, 5))
    )
    bias = torch.randn(1, 4, n, m, generator=generator, dtype=torch.float64) if biased else None
    o, _ = attend(Layer(is_causal=name != "full"), q, k, v, found, position_bias=bias)
    numbers = expected if bias is None else expected + bias
    torch.testing.assert_close(o.transpose(1, 2), textbook(q, k, v, numbers), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [transformers.LlamaConfig, transformers.Gemma2Config])
@pytest.mark.parametrize("name", sorted(patterns()))
def test_masks_in_a_traced_graph(name: str, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All entries; or none, for what a model that knows torch's attention says itself."""
    make("llama"), make("gemma2")  # their code is imported
    monkeypatch.setattr(masks, "is_tracing", lambda tensor: True)
    keep = padding("left", 6).bool()
    for n, past, keys, seen in (
        (6, 0, 6, None),
        (6, 0, 6, keep),
        (2, 4, 6, None),
        (1, 5, 6, None),
        (3, 0, 6, None),
    ):
        arguments: dict[str, Any] = {
            "batch_size": 2,
            "q_length": n,
            "kv_length": keys,
            "q_offset": past,
            "mask_function": patterns()[name],
            "attention_mask": seen,
            "dtype": torch.float64,
        }
        found, expected = mask(config=config(), **arguments), masking_utils.eager_mask(**arguments)
        plain = seen is None and past == 0 and (name == "full" or (name == "causal" and n == keys))
        assert (found is None) == (plain and config is transformers.LlamaConfig)
        if found is not None:
            assert torch.equal(found if found.dtype == torch.bool else found == 0, expected == 0)


@pytest.mark.parametrize("window", [None, 3, 0])
@pytest.mark.parametrize("extra", ["nothing", "bias", "sinks", "sinks of queries", "padding"])
def test_sequences_of_a_row(window: int | None, extra: str) -> None:
    """Packed by positions, with what does and what does not go to varlen_attention."""
    u = masking_utils
    inner = u.causal_mask_function if window is None else u.sliding_window_causal_mask_function(window)
    ids = u.find_packed_sequence_indices(PACKED)
    function = u.and_masks(
        u.remap_positions_for_packed_sequence(inner, PACKED), u.packed_sequence_mask_function(ids)
    )
    keep = padding("holes").bool() if extra == "padding" else None
    arguments = {"batch_size": 2, "q_length": N, "kv_length": N, "mask_function": function}
    arguments |= {"dtype": torch.float64, "attention_mask": keep}
    found, expected = mask(**arguments), masking_utils.eager_mask(**arguments)
    assert isinstance(found, BandMask)
    assert found.starts is not None
    assert found.starts.tolist() == [0, 5, 13, 16, 18, 32]
    assert torch.equal(found.dense(), expected)
    q, k, v = (torch.randn(2, h, N, 4, dtype=torch.float64) for h in (4, 2, 2))
    bias = torch.randn(2, 4, N, N, dtype=torch.float64) if extra == "bias" else None
    shape = {"sinks": (4,), "sinks of queries": (2, 4, N, 1)}.get(extra)
    sinks = None if shape is None else torch.randn(shape, dtype=torch.float64)
    o, _ = attend(Layer(is_causal=True), q, k, v, found, position_bias=bias, sinks=sinks)
    of_row = sinks.view(1, 4, 1, 1) if extra == "sinks" and sinks is not None else sinks
    numbers = expected if bias is None else expected + bias
    torch.testing.assert_close(o.transpose(1, 2), textbook(q, k, v, numbers, of_row), rtol=1e-12, atol=1e-12)


def test_one_sequence_a_row_is_no_packing() -> None:
    u = masking_utils
    for first, starts in (((0, 0), None), ((0, 5), [0, 8, 13, 16])):
        function = u.chunked_causal_mask_function(8, torch.tensor(first))
        found = mask(2, 8, 8, mask_function=function)
        assert isinstance(found, BandMask)
        assert (None if found.starts is None else found.starts.tolist()) == starts
        assert found.high == 0


def test_a_static_cache_gives_entries_for_steps_and_a_description_for_the_prompt() -> None:
    for n, past, described in ((4, 0, True), (1, 0, False), (1, 3, False), (2, 3, False)):
        offset = torch.tensor(past)
        found = mask(2, n, 9, q_offset=offset, dtype=torch.float64)
        assert isinstance(found, BandMask) == described
        expected = masking_utils.eager_mask(2, n, 9, q_offset=past, dtype=torch.float64)
        assert torch.equal(found + 0.0, expected)
        offset += 5  # as a cache does in place: a mask that was made stays what it is
        assert torch.equal(found + 0.0, expected)


def test_keys_that_no_query_sees_are_left_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unused tail of a static cache, and what a step's window has passed; with their bias and padding."""
    calls: list[Any] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        calls.append((k.shape[2], options))
        return metattn.attention(q, k, v, **options)

    monkeypatch.setattr("metattn.integrations.transformers.attention", spy)
    window = masking_utils.sliding_window_causal_mask_function(3)
    layer = Layer(is_causal=True)
    q, k, bias = torch.randn(2, 2, 4, 4), torch.randn(2, 2, 9, 4), torch.randn(1, 2, 4, 9)
    attend(layer, q, k, k, mask(2, 4, 9), position_bias=bias)
    attend(
        layer, q, k, k, mask(2, 4, 9, q_offset=5, mask_function=window, attention_mask=padding("right", 9))
    )
    attend(layer, q[:, :, :1], k, k, mask(2, 1, 9, q_offset=8, mask_function=window))
    (first, options), (second, others), (third, least) = calls
    assert (first, second, third) == (4, 6, 3)
    assert options["causal"] == others["causal"] == "bottom-right"
    assert options["bias"].shape == (1, 2, 4, 4)
    assert "mask" not in options
    assert others["window"] == (2, -1)
    assert others["mask"].shape == (2, 1, 1, 6)
    assert not {"mask", "window"} & least.keys()


def test_a_description_is_a_tensor_to_others() -> None:
    keep = padding("left", 6).bool()
    found = mask(2, 6, 6, attention_mask=keep, dtype=torch.bfloat16)
    expected = masking_utils.eager_mask(2, 6, 6, attention_mask=keep, dtype=torch.bfloat16)
    assert isinstance(found, BandMask)
    assert found.ndim == 4
    assert found.device == expected.device
    assert torch.equal(found[:, :, -2:], expected[:, :, -2:])
    assert torch.equal(torch.cat([found, found], -1), torch.cat([expected, expected], -1))
    assert torch.equal(found.bool(), expected.bool())
    for same in (found.to("cpu"), found.detach(), found.contiguous(), copy.deepcopy(found)):
        assert isinstance(same, BandMask)
        assert torch.equal(same.dense(), expected)
    wider = found.to(torch.float32)
    assert isinstance(wider, BandMask)
    assert torch.equal(wider + 0.0, masking_utils.eager_mask(2, 6, 6, attention_mask=keep))
    assert found.to("meta").keys.device.type == "meta"
    assert repr(found) == "BandMask([2, 1, 6, 6], None ≤ j − i ≤ 0, padded=True)"


WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor], object]] = {
    "masked_fill_": lambda its, x: its.masked_fill_(x > 0, -2.5),
    "add_": lambda its, x: its.add_(x.clamp(max=0)),
    "all of it": lambda its, x: its.__setitem__(..., x),
    "a part": lambda its, x: its.__setitem__((slice(None), 0, 2), x[:, 0, 2]),
    "by indices": lambda its, x: its.__setitem__((..., [1, 3], [0, 2]), 0.5),
    "through a view": lambda its, x: its[:, :, 1:].transpose(2, 3).diagonal(dim1=2, dim2=3).fill_(-1.0),
    "through an alias": lambda its, x: its.detach().copy_(x),
    "out": lambda its, x: torch.mul(x, 2, out=its),
    "twice": lambda its, x: its.mul_(0).add_(x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_description_can_be_written_to(write: Callable[..., object], inference: bool) -> None:
    with torch.inference_mode(inference):
        keep = padding("right", 6).bool()
        q, k, v, x = (
            torch.randn(2, h, 6, d, dtype=torch.float64) for h, d in ((2, 4), (2, 4), (2, 4), (1, 6))
        )
        found = mask(2, 6, 6, attention_mask=keep, dtype=torch.float64)
        expected = masking_utils.eager_mask(2, 6, 6, attention_mask=keep, dtype=torch.float64)
        assert isinstance(found, BandMask)
        before = copy.deepcopy(found)
        write(found, x)
        write(expected, x)
        assert torch.equal(found + 0, expected)
        for same in (found.clone(), found.to(torch.float64, copy=True), copy.deepcopy(found)):
            assert isinstance(same, BandMask)
            assert torch.equal(same.dense(), expected)
        assert repr(found) == "BandMask([2, 1, 6, 6], numbers)"
        o, _ = attend(Layer(is_causal=False), q, k, v, found)
        torch.testing.assert_close(o.transpose(1, 2), textbook(q, k, v, expected), rtol=1e-12, atol=1e-12)
        untouched = masking_utils.eager_mask(2, 6, 6, attention_mask=keep, dtype=torch.float64)
        assert not masks.is_changed(before)
        assert torch.equal(before.dense(), untouched)


def test_what_was_written_to_a_description_has_gradients() -> None:
    q, k, v, x = (torch.randn(2, h, 6, d, dtype=torch.float64) for h, d in ((2, 4), (2, 4), (2, 4), (1, 6)))
    x = x.mul(0).requires_grad_()  # no other values than those that stood there
    gradients = []
    for its in (mask(2, 6, 6, dtype=torch.float64), masking_utils.eager_mask(2, 6, 6, dtype=torch.float64)):
        assert its is not None
        its[:, :, :, 0] = x[:, :, :, 0]
        o = attend(Layer(is_causal=False), q, k, v, its)[0]
        (first,) = torch.autograd.grad(o.square().sum(), x, create_graph=True)
        gradients += [first, *torch.autograd.grad(first.square().sum(), x)]
    for ours, theirs in zip(gradients[:2], gradients[2:], strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_descriptions_in_compiled_code(backend: str) -> None:
    """They may be looked at there, and written to before and between calls, but not within."""
    q, k, v = (torch.randn(2, 2, 6, 4) for _ in range(3))

    def looks(q: Tensor, its: Tensor) -> Tensor:
        return attend(Layer(is_causal=False), q, k, v, its)[0] + 0 * its[:, 0].clamp(min=-1).sum()

    torch._dynamo.reset()
    compiled = torch.compile(looks, backend=backend, fullgraph=True)
    found = mask(2, 6, 6)
    assert found is not None
    for step in range(3):
        torch.testing.assert_close(compiled(q, found), looks(q, found))
        found[..., step] = -3.0
    torch.testing.assert_close(compiled(q, mask(2, 6, 6)), looks(q, mask(2, 6, 6)))

    def doubled(its: Tensor) -> None:
        its.mul_(2)

    def assigned(its: Tensor) -> None:
        its[..., 0] = -1.0

    for write in (doubled, assigned):
        with pytest.raises(Exception, match="a BandMask cannot be written to in compiled code"):
            torch.compile(write, backend=backend, fullgraph=True)(mask(2, 6, 6))


def test_a_description_that_was_made_in_inference_mode_or_before() -> None:
    """Reading it there leaves no inference tensor behind."""
    found = mask(2, 6, 6)
    assert isinstance(found, BandMask)
    with torch.inference_mode():
        assert found[0, 0].shape == (6, 6)
    found[0, 0, 5] = -1.0
    assert found[0, 0, 5].eq(-1).all()


def test_forward_mode_of_what_was_written_to_a_description() -> None:
    q, k, v, x = (torch.randn(2, h, 6, d, dtype=torch.float64) for h, d in ((2, 4), (2, 4), (2, 4), (1, 6)))
    tangents = []
    for its in (mask(2, 6, 6, dtype=torch.float64), masking_utils.eager_mask(2, 6, 6, dtype=torch.float64)):
        assert its is not None
        with forward_ad.dual_level():
            # no other values than those that stood there
            its[:, :, :, 0] = forward_ad.make_dual(torch.zeros(2, 1, 6, dtype=torch.float64), x[..., 0])
            tangents.append(forward_ad.unpack_dual(attend(Layer(is_causal=False), q, k, v, its)[0]).tangent)
    with forward_ad.dual_level():  # the same of a mask that is dual itself, and of its copies
        direction = torch.zeros(2, 1, 6, 6, dtype=torch.float64)
        direction[..., 0] = x[..., 0]
        for looked_at in (False, True):
            found = mask(2, 6, 6, dtype=torch.float64)
            assert isinstance(found, BandMask)
            if looked_at:
                assert found[0, 0, 0, 0] == 0
            its = forward_ad.make_dual(found, direction)
            for same in (its, its.clone(), its.to(torch.float64, copy=True)):
                o = attend(Layer(is_causal=False), q, k, v, same)[0]
                tangents.append(forward_ad.unpack_dual(o).tangent)
    assert tangents[1].abs().max() > 0
    for tangent in tangents:
        torch.testing.assert_close(tangent, tangents[1], rtol=1e-12, atol=1e-12)


def test_a_description_is_none_of_the_callers_tensors() -> None:
    keep = padding("right", 6).bool()
    found = mask(2, 6, 6, attention_mask=keep)
    assert found is not None
    before = found + 0
    keep[:] = True
    assert torch.equal(found + 0, before)


def test_a_description_that_was_looked_at_is_still_one() -> None:
    found = mask(2, 6, 6)
    assert isinstance(found, BandMask)
    assert found[0, 0].shape == (6, 6)
    assert not masks.is_changed(found)
    assert repr(found) == "BandMask([2, 1, 6, 6], None ≤ j − i ≤ 0, padded=False)"
    with pytest.raises(RuntimeError, match="cannot change its shape in place"):
        found.squeeze_(1)


def test_keys_of_an_indexer() -> None:
    q, k, v = (torch.randn(2, h, 6, 4, dtype=torch.float64) for h in (4, 2, 2))
    indices = torch.stack([torch.stack([torch.randperm(6)[:3] for _ in range(6)]) for _ in range(2)])
    chosen = torch.zeros(2, 1, 6, 6, dtype=torch.bool).scatter(-1, indices[:, None], True)
    numbers = torch.zeros(2, 1, 6, 6, dtype=torch.float64).masked_fill(
        ~chosen, torch.finfo(torch.float64).min
    )
    causal = masking_utils.eager_mask(2, 6, 6, dtype=torch.float64)
    full = torch.zeros(1, dtype=torch.float64)
    cases = ((None, full), (mask(2, 6, 6), causal), (causal == 0, causal), (causal, causal))
    for its, meant in cases:
        o, _ = attend(Layer(is_causal=False), q, k, v, its, indices=indices)
        dead = ((numbers == 0) & (meant == 0)).any(-1)[..., None].logical_not()
        expected = textbook(q, k, v, numbers + meant).masked_fill(dead, 0.0)
        torch.testing.assert_close(o.transpose(1, 2).masked_fill(dead, 0.0), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sinks", [(4,), (2, 4, 5, 1)], ids=["of heads", "of queries"])
def test_two_orders_in_everything(sinks: tuple[int, ...]) -> None:
    q, k, v = (
        torch.randn(2, h, 5, d, dtype=torch.float64, requires_grad=True) for h, d in ((4, 3), (2, 3), (2, 2))
    )
    bias = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(sinks, dtype=torch.float64, requires_grad=True)
    found = mask(2, 5, 5, attention_mask=padding("left", 5), dtype=torch.float64)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sink: Tensor) -> Tensor:
        layer = Layer(is_causal=True)
        return attend(layer, q, k, v, found, scaling=0.7, softcap=2.0, sinks=sink, position_bias=bias)[0]

    assert torch.autograd.gradcheck(run, (q, k, v, bias, sink))
    assert torch.autograd.gradgradcheck(run, (q, k, v, bias, sink))


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
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
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


# register(), and what is refused.


def test_metattn_alone_imports_no_transformers() -> None:
    code = "import sys, metattn, metattn.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_register(monkeypatch: pytest.MonkeyPatch) -> None:
    for interface in (AttentionInterface, AttentionMaskInterface):
        monkeypatch.setattr(interface, "_global_mapping", dict(interface._global_mapping))
    assert register() == "metattn"
    assert register("second_order") == "second_order"
    assert register("second_order") == "second_order"
    model = make("llama")
    model.set_attn_implementation("second_order")
    assert model.config._attn_implementation == "second_order"
    for name in ("sdpa", "eager", "my_flash", "paged|metattn", "some/kernel", ""):
        with pytest.raises(ValueError, match="name: expected an identifier"):
            register(name)
    AttentionInterface.register("taken", attend)
    AttentionMaskInterface.register("taken", masking_utils.eager_mask)
    with pytest.raises(ValueError, match="name: expected one that is free, got 'taken'"):
        register("taken")
    with pytest.raises(TypeError, match="name: expected a str, got int"):
        register(3)  # type: ignore[arg-type]


def test_other_masks_than_those_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions in which a window means one more, is written otherwise or missing, or arguments differ."""
    code = masking_utils.sliding_window_overlay(1).__code__
    changes: list[Callable[[pytest.MonkeyPatch], None]] = [
        lambda p: p.setitem(masks._READERS, code, lambda named: masks.Pattern(low=-named["sliding_window"])),
        lambda p: p.delitem(masks._READERS, code),
        lambda p: p.delattr(masking_utils, "sliding_window_bidirectional_mask_function"),
        lambda p: p.setattr(masking_utils, "sdpa_mask", lambda batch_size, cache_position: None),
    ]
    for change in changes:
        with monkeypatch.context() as patch:
            change(patch)
            with pytest.raises(NotImplementedError, match="transformers: expected a version"):
                register()
    register()


def test_made_with_it() -> None:
    config = transformers.LlamaConfig(**SMALL.decoder(), attn_implementation="metattn")
    model = transformers.LlamaForCausalLM(config)
    assert model.config._attn_implementation == "metattn"
    assert masks.kind_of_model(transformers.LlamaConfig) == "sdpa"
    assert masks.kind_of_model(transformers.Gemma2Config) == "interface"


def test_models_that_attend_by_themselves() -> None:
    """They would never call metattn, and are told so; transformers itself says it when one is switched."""
    config = transformers.BloomConfig(
        vocab_size=64, hidden_size=16, n_layer=1, n_head=2, attn_implementation="metattn"
    )
    model = transformers.BloomForCausalLM(config)
    ids = torch.arange(6)[None]
    torch._dynamo.reset()
    for function in (model, torch.compile(model, backend="eager")):
        with pytest.raises(
            ValueError, match="attn_implementation: expected 'eager' or 'sdpa' for BloomConfig"
        ):
            function(ids)


def test_attention_weights_are_refused() -> None:
    model = make("llama")
    model.set_attn_implementation("metattn")
    with pytest.raises(NotImplementedError, match="output_attentions: expected False"):
        call(model, {**make_inputs("llama"), "output_attentions": True})
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_refusals() -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)
    layer = Layer(is_causal=True)
    with pytest.raises(
        ValueError, match="attention_mask: expected a mask where a causal call has several queries"
    ):
        attend(layer, q, k, k, None)
    with pytest.raises(ValueError, match="attention_mask: expected a mask for 3 queries and 5 keys"):
        attend(layer, q, k, k, mask(1, 3, 4))
    with pytest.raises(TypeError, match="attention_mask: expected a Tensor or None, got dict"):
        attend(layer, q, k, k, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="attention_mask: expected bool or floating numbers"):
        attend(layer, q, k, k, torch.ones(1, 1, 3, 5, dtype=torch.int64))
    for shape in ((1, 1, 3, 4), (2, 1, 3, 5), (1, 3, 3, 5), (1, 1, 1, 3, 5)):
        with pytest.raises(ValueError, match="attention_mask: expected a shape that broadcasts to"):
            attend(layer, q, k, k, torch.zeros(shape))
    for low, high in ((-1, 4), (0, 5)):
        with pytest.raises(ValueError, match=f"indices: expected keys from 0 to 4, got {low} to {high}"):
            attend(layer, q, k, k, torch.zeros(1), indices=torch.tensor([low, high]).expand(1, 3, 2))
    with pytest.raises(ValueError, match=r"indices: expected shape \[1, 3, any\], got \[1, 2, 1\]"):
        attend(layer, q, k, k, torch.zeros(1), indices=torch.zeros(1, 2, 1, dtype=torch.int64))
    with pytest.raises(TypeError, match="indices: expected a Tensor of integers"):
        attend(layer, q, k, k, torch.zeros(1), indices=torch.zeros(1, 3, 1))
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q: expected it beside an attention_mask"):
        attend(layer, q, q, q, None, cu_seq_lens_q=torch.tensor([0, 3]))
    with pytest.raises(NotImplementedError, match="block_indices: expected None"):
        attend(layer, q, q, q, None, block_indices=torch.zeros(1))
    o, _ = attend(layer, q[:, :, :1], k, k, None)  # a single query sees every key
    torch.testing.assert_close(o.transpose(1, 2), textbook(q[:, :, :1], k, k))


@pytest.mark.parametrize("shape", [(1,), (2,), (8,), (2, 2), (4, 1, 1, 1), (2, 4, 5, 8)])
def test_sinks_for_other_heads_are_refused(shape: tuple[int, ...]) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    with pytest.raises(ValueError, match=r"sinks: expected shape \[4\] or \[2, 4, 5, 1\]"):
        attend(nn.Identity(), q, k, k, None, is_causal=False, s_aux=torch.ones(shape))


@pytest.mark.parametrize("shape", [(4,), (1, 4, 1, 1), (4, 1, 1, 1), (2, 1, 2, 1), (1, 1, 1, 1)])
def test_sinks_by_shape_not_by_number(shape: tuple[int, ...]) -> None:
    """As many of them as there are heads need not be one a head."""
    batch = max(2, shape[0]) if len(shape) > 1 else 2
    q, k, v = (torch.randn(batch, 4, 2, 8, dtype=torch.float64) for _ in range(3))
    sinks = torch.randn(shape, dtype=torch.float64)
    o, _ = attend(nn.Identity(), q, k, v, None, scaling=1.0, is_causal=False, sinks=sinks)
    each = (sinks.view(1, 4, 1, 1) if len(shape) == 1 else sinks).expand(batch, 4, 2, 1)
    weights = torch.cat([q @ k.mT, each], -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(o.transpose(1, 2), weights @ v)
