"""register(), and what is refused: versions, models, masks and arguments that would come out wrong."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers_cases import Layer, textbook

from benchmarks.transformers_models import SMALL, call, make, make_inputs
from metattn.integrations.transformers import BandMask, attend, mask, masks, register


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


def test_other_mask_functions_than_those_known_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions whose arguments differ, that lack one, or in which padding means more than hidden keys."""
    theirs = masking_utils.sdpa_mask

    def without_padded_queries(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        filled = theirs(*args, attention_mask=attention_mask, **kwargs)
        return filled if attention_mask is None else filled & attention_mask[:, None, : filled.shape[2], None]

    without_padded_queries.__signature__ = inspect.signature(theirs)  # type: ignore[attr-defined]
    changes: list[tuple[str, Any]] = [
        ("sdpa_mask", lambda batch_size, cache_position: None),
        ("sdpa_mask", without_padded_queries),
        ("sliding_window_causal_mask_function", None),
    ]
    for name, function in changes:
        with monkeypatch.context() as patch:
            patch.setattr(masking_utils, name, function)
            with pytest.raises(NotImplementedError, match="transformers: expected a version"):
                register()
    register()


def test_a_window_that_means_one_more_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mask functions are asked, not known."""
    theirs = masking_utils.sliding_window_overlay
    monkeypatch.setattr(masking_utils, "sliding_window_overlay", lambda size: theirs(size + 1))
    register()
    found = mask(1, 9, 9, mask_function=masking_utils.sliding_window_causal_mask_function(3))
    assert isinstance(found, BandMask)
    assert found.entries is None
    assert found[0, 0, 8].eq(0).sum() == 4


def test_made_with_it() -> None:
    config = transformers.LlamaConfig(**SMALL.decoder(), attn_implementation="metattn")
    model = transformers.LlamaForCausalLM(config)
    assert model.config._attn_implementation == "metattn"
    assert masks.kind_of_model(transformers.LlamaConfig) == "sdpa"
    assert masks.kind_of_model(make("gpt_oss").config_class) == "interface"


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


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.19.2.dev0"])
def test_an_old_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When metattn's module is imported, before anything that the old one lacks."""
    old = types.ModuleType("transformers")
    old.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", old)
    ours = "metattn.integrations.transformers"
    for name in [each for each in sys.modules if each.startswith(ours)]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=rf"transformers: expected version 5\.20 or later, got {version}"):
        importlib.import_module("metattn.integrations.transformers")
