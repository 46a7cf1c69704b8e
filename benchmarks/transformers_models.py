"""Hugging Face models with metattn's attention beside their own: errors, time and memory of both orders.

    python -m benchmarks.transformers_models [--models llama …] [--out benchmarks/results/transformers]

Every model is small and has random weights. Errors are those of logits, of the gradient of a random sum of
them and of a Hessian-vector product, in float32 beside the model's own attention ("eager") in float64, which
`widened` makes float64 throughout. Times are those of one second-order step: forward, gradient with a graph,
and the gradient of that gradient's square. Memory is the peak of such a step, in a fresh process for each
attention and length. One thread, unless told otherwise: with as many as there are cores, whoever else works
on them is in every figure.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from metattn import measure
from metattn.bench.files import json_text
from metattn.integrations.transformers import register

register()
OURS, THEIRS = "metattn", "eager"
VOCABULARY = 64
LENGTH = 512  # of what is timed
LONG = (1024, 2048)  # of what memory is taken of
ENCODERS = ("bert", "modernbert", "vit")


@dataclass(frozen=True)
class Size:
    """Of a model."""

    width: int = 32
    heads: int = 4
    groups: int = 2  # of heads that share keys, where a model has such
    layers: int = 2
    window: int = 5
    length: int = 16

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def decoder(self, **more: Any) -> dict[str, Any]:
        """What configurations of decoders have in common."""
        return {
            "vocab_size": VOCABULARY,
            "hidden_size": self.width,
            "intermediate_size": 2 * self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "max_position_embeddings": max(2 * self.length, 64),
            **more,
        }


SMALL, LARGE = Size(), Size(width=256, heads=8, window=128, length=LENGTH)


def _bert(s: Size) -> PreTrainedModel:
    config = transformers.BertConfig(**s.decoder(), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return transformers.BertForMaskedLM(config)


def _modernbert(s: Size) -> PreTrainedModel:
    config = transformers.ModernBertConfig(
        **s.decoder(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2),
        local_attention=2 * s.window,
        global_attn_every_n_layers=2,
    )
    return transformers.ModernBertForMaskedLM(config)


def _vit(s: Size) -> PreTrainedModel:
    config = transformers.ViTConfig(
        **s.decoder(), image_size=4 * s.length, patch_size=4, num_channels=1, num_labels=10
    )
    config.image_size = (4, 4 * s.length)  # a strip: as many patches as tokens
    return transformers.ViTForImageClassification(config)


def _gpt2(s: Size) -> PreTrainedModel:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=s.width, n_layer=s.layers, n_head=s.heads,
        n_positions=max(2 * s.length, 64), bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, scale_attn_by_inverse_layer_idx=True,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def _llama(s: Size) -> PreTrainedModel:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**s.decoder()))


def _mistral(s: Size) -> PreTrainedModel:
    return transformers.MistralForCausalLM(transformers.MistralConfig(**s.decoder(sliding_window=s.window)))


def _qwen3(s: Size) -> PreTrainedModel:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**s.decoder()))


def _gemma2(s: Size) -> PreTrainedModel:
    config = transformers.Gemma2Config(
        **s.decoder(sliding_window=s.window), attn_logit_softcapping=5.0, query_pre_attn_scalar=s.head_dim
    )
    return transformers.Gemma2ForCausalLM(config)


def _gemma3(s: Size) -> PreTrainedModel:
    config = transformers.Gemma3TextConfig(
        **s.decoder(sliding_window=s.window),
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=s.head_dim,
    )
    return transformers.Gemma3ForCausalLM(config)


def _gpt_oss(s: Size) -> PreTrainedModel:
    config = transformers.GptOssConfig(
        **s.decoder(sliding_window=s.window),
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=2,
    )
    config._experts_implementation = "eager"  # torch's grouped product has no float64
    return transformers.GptOssForCausalLM(config)


def _deepseek_v3(s: Size) -> PreTrainedModel:
    config = transformers.DeepseekV3Config(
        **s.decoder(num_key_value_heads=s.heads, head_dim=s.head_dim),
        q_lora_rank=s.width // 2, kv_lora_rank=s.width // 2,
        qk_nope_head_dim=s.head_dim, qk_rope_head_dim=s.head_dim, v_head_dim=s.head_dim // 2,
        first_k_dense_replace=s.layers,
    )  # fmt: skip
    return transformers.DeepseekV3ForCausalLM(config)


def _t5(s: Size) -> PreTrainedModel:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=s.width, d_kv=s.head_dim, d_ff=2 * s.width, num_layers=s.layers,
        num_heads=s.heads, dropout_rate=0.0, decoder_start_token_id=0, relative_attention_num_buckets=8,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _bart(s: Size) -> PreTrainedModel:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=s.width, encoder_layers=s.layers, decoder_layers=s.layers,
        encoder_attention_heads=s.heads, decoder_attention_heads=s.heads, encoder_ffn_dim=2 * s.width,
        decoder_ffn_dim=2 * s.width, max_position_embeddings=max(2 * s.length, 64), dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def _whisper(s: Size) -> PreTrainedModel:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=s.width, encoder_layers=s.layers,
        decoder_layers=s.layers, encoder_attention_heads=s.heads, decoder_attention_heads=s.heads,
        encoder_ffn_dim=2 * s.width, decoder_ffn_dim=2 * s.width, max_source_positions=s.length,
        max_target_positions=max(2 * s.length, 64), pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None, dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


MODELS: dict[str, tuple[str, Callable[[Size], PreTrainedModel]]] = {
    "bert": ("encoder", _bert),
    "modernbert": ("windows to both sides", _modernbert),
    "vit": ("image encoder", _vit),
    "gpt2": ("causal, scale of each layer", _gpt2),
    "llama": ("causal, grouped heads", _llama),
    "mistral": ("causal, grouped heads, window", _mistral),
    "qwen3": ("causal, grouped heads, normed", _qwen3),
    "gemma2": ("causal, softcap, window in half the layers", _gemma2),
    "gemma3": ("causal, window in half the layers", _gemma3),
    "gpt_oss": ("causal, sinks, window in half the layers", _gpt_oss),
    "deepseek_v3": ("latent attention, values of another width", _deepseek_v3),
    "t5": ("encoder-decoder, learned position bias", _t5),
    "bart": ("encoder-decoder", _bart),
    "whisper": ("speech encoder-decoder", _whisper),
}


def make(name: str, size: Size = SMALL, seed: int = 0) -> PreTrainedModel:
    """The model in evaluation, in float32, with weights so large that rows of attention are far from even."""
    torch.manual_seed(seed)
    model = MODELS[name][1](size).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(1.2 * noise * weight[0].numel() ** -0.5)
            else:
                weight.add_(0.1 * noise)
    return model


def make_inputs(name: str, size: Size = SMALL, batch: int = 2, seed: int = 1) -> dict[str, Tensor]:
    """Floating inputs: embeddings, pixels or spectra; a decoder's are shorter than its encoder's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    n = size.length
    embeddings = draw(batch, n, size.width)
    if name == "vit":
        return {"pixel_values": draw(batch, 1, 4, 4 * n)}
    if name == "whisper":
        return {
            "input_features": draw(batch, 8, 2 * n),
            "decoder_inputs_embeds": draw(batch, n - 3, size.width),
        }
    if name in ("t5", "bart"):
        return {"inputs_embeds": embeddings, "decoder_inputs_embeds": draw(batch, n - 3, size.width)}
    return {"inputs_embeds": embeddings}


class widened(TorchFunctionMode):  # noqa: N801, a context manager that reads as a word
    """In it models in float64 compute all in float64, norms and softmax and routing too.

    Their code says float32 there, where it means more than bfloat16.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and torch.float32 in (*args, *kwargs.values())):
                return args[0]
            if kwargs.get("dtype") == torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def call(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """The logits."""
    without_cache = {} if model.config.model_type in ENCODERS else {"use_cache": False}
    logits = model(**without_cache, **inputs).logits
    assert isinstance(logits, Tensor)
    return logits


def both_orders(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], seen: Tensor | None = None, **constants: Any
) -> dict[str, Tensor]:
    """Logits; gradients of their sum with random weights; the Hessian's product with a random direction.

    In the inputs, one after the other, and in all parameters as one vector. `seen` [B, N] leaves logits out.
    """
    generator = torch.Generator().manual_seed(2)

    def draw_like(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator).to(x)

    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    weights = [p for p in model.parameters() if p.requires_grad]
    variables = [*leaves.values(), *weights]
    logits = call(model, {**leaves, **constants})
    if seen is not None:
        logits = logits[seen]
    first = torch.autograd.grad(
        (logits * draw_like(logits)).sum(), variables, create_graph=True, materialize_grads=True
    )
    product = sum((gradient * draw_like(gradient)).sum() for gradient in first)
    assert isinstance(product, Tensor)
    second = torch.autograd.grad(product, variables, materialize_grads=True)
    results = {"logits": logits}
    for word, found in (("gradient", first), ("hvp", second)):
        results |= {f"{word}, {name}": x for name, x in zip(leaves, found, strict=False)}
        results[f"{word}, parameters"] = torch.cat([x.flatten() for x in found[len(leaves) :]])
    return {name: x.detach() for name, x in results.items()}


def step(model: PreTrainedModel, inputs: Mapping[str, Tensor], implementation: str) -> Callable[[], Any]:
    """A second-order step in all parameters, as a call: its gradients."""
    weights = [p for p in model.parameters() if p.requires_grad]

    def run() -> Any:
        model.set_attn_implementation(implementation)
        loss = call(model, inputs).square().mean()
        first = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
        product = sum(g.square().sum() for g in first if g is not None)
        assert isinstance(product, Tensor)
        return torch.autograd.grad(product, weights, allow_unused=True)

    return run


# Measurements.


def errors(name: str) -> dict[str, dict[str, float]]:
    """Relative errors of every result in float32, ours and theirs, beside theirs in float64."""
    model, inputs = make(name), make_inputs(name)
    found = {}
    for implementation in (OURS, THEIRS):
        model.set_attn_implementation(implementation)
        found[implementation] = both_orders(model, inputs)
    model.set_attn_implementation(THEIRS)
    with widened():
        truth = both_orders(model.double(), {key: x.double() for key, x in inputs.items()})
    return {
        result: {who: float((x[result] - expected).norm() / expected.norm()) for who, x in found.items()}
        for result, expected in truth.items()
    }


def times(name: str, seconds: float) -> dict[str, Any]:
    """Both attentions' second-order steps in turn."""
    model, inputs = make(name, LARGE), make_inputs(name, LARGE, batch=1)
    candidates = {who: step(model, inputs, who) for who in (OURS, THEIRS)}
    timings = measure.interleave(candidates, seconds=seconds, least=5, warmup=1)
    ratio = measure.per_round(timings[THEIRS].samples, timings[OURS].samples)
    return {
        "seconds": {who: {**t.summary(), "samples": t.samples} for who, t in timings.items()},
        "ratio": ratio.summary(),
    }


def memory(name: str, length: int) -> dict[str, Any]:
    """Peak bytes of a step of each attention, in fresh processes."""
    found: dict[str, Any] = {"model": name, "length": length}
    for who in (OURS, THEIRS):
        request = {"model": name, "length": length, "attention": who, "threads": torch.get_num_threads()}
        found[who] = measure.in_fresh_process("benchmarks.transformers_peak", request)["bytes"]
    return found


# Report.


def table(results: Mapping[str, Any]) -> str:
    """Markdown."""

    def pair(row: Mapping[str, Any], word: str) -> str:
        of = [e for result, e in row["errors"].items() if result.startswith(word)]
        return " / ".join(f"{max(e[who] for e in of):.1e}" for who in (OURS, THEIRS))

    def spread(summary: Mapping[str, Any], scale: float, unit: str) -> str:
        low, high = summary["quartiles"]
        digits = 2 if unit == "×" else 0
        return f"{summary['median'] * scale:.{digits}f}{unit} ±{(high - low) / 2 * scale:.{digits}f}"

    lines = [
        "# transformers' models with metattn",
        "",
        "Relative errors in float32, metattn / eager, beside eager in float64; the largest of inputs' and "
        "parameters'. Time of a second-order step in float32.",
        "",
        "| model |  | logits | gradient | Hessian-vector product | metattn, ms | eager, ms | eager / ours |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        seconds = row["times"]["seconds"]
        words = [row["model"], row["what"], *(pair(row, word) for word in ("logits", "gradient", "hvp"))]
        numbers = [spread(seconds[who], 1e3, "") for who in (OURS, THEIRS)]
        lines.append("| " + " | ".join([*words, *numbers, spread(row["times"]["ratio"], 1.0, "×")]) + " |")
    lines += ["", "| peak of a second-order step | metattn | eager |  |", "| --- | ---: | ---: | ---: |"]
    for row in results["memory"]:
        ours, theirs = row[OURS], row[THEIRS]
        if ours is not None:
            lines.append(
                f"| {row['model']}, N={row['length']} | {ours / 2**20:,.0f} MiB | {theirs / 2**20:,.0f} MiB "
                f"| {theirs / ours:.1f}× |"
            )
    said, size = results["machine"], results["size"]
    lines += [
        "",
        f"* Times: width {size['width']}, {size['heads']} heads, {size['layers']} layers, windows of "
        f"{size['window']}, length {size['length']} (memory: as said), batch 1; median ± half the distance "
        "between the quartiles; the two take turns, and ratios are taken in each round. Errors: width "
        f"{SMALL.width}, {SMALL.heads} heads, {SMALL.layers} layers, length {SMALL.length}, batch 2.",
        "* Memory: the peak of resident memory beyond weights and inputs, in a fresh process.",
        f"* {said['cpu']}, {said['threads']} of {said['cores']} cores used, load {said['load']:.1f} at the "
        f"start, torch {said['versions']['torch']}, transformers {results['transformers']}, "
        f"Python {said['versions']['python']}, commit {said['commit']}.",
        "",
        "Written by `python -m benchmarks.transformers_models --out benchmarks/results/transformers`.",
    ]
    return "\n".join(lines) + "\n"


def wrong(row: Mapping[str, Any]) -> list[str]:
    """Results whose error is more than max(4 times eager's, 5e-6)."""
    return [
        f"{row['model']}, {result}: {e[OURS]:.1e}, eager {e[THEIRS]:.1e}"
        for result, e in row["errors"].items()
        if not e[OURS] <= max(4 * e[THEIRS], 5e-6)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seconds", type=float, default=4.0, help="of rounds for each model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = measure.machine()
    rows = []
    for name in arguments.models:
        rows.append({"model": name, "what": MODELS[name][0], "errors": errors(name)})
        rows[-1]["times"] = times(name, arguments.seconds)
        print(name, f"{rows[-1]['times']['ratio']['median']:.2f}×", *wrong(rows[-1]), flush=True)
    results = {
        "machine": machine,
        "transformers": metadata.version("transformers"),
        "size": vars(LARGE),
        "rows": rows,
        "memory": [memory("llama", n) for n in LONG] if "llama" in arguments.models else [],
    }
    print(table(results))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "models.json").write_text(json_text(results))
        (arguments.out / "models.md").write_text(table(results))
    return 1 if any(wrong(row) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
