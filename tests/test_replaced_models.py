"""replace_attention in models: what is kept, and both orders before and after."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metattn
from metattn.nn import MultiheadAttention, replace_attention

E, HEADS, L = 12, 3, 5


def test_replace_keeps_everything() -> None:
    attention = nn.MultiheadAttention(E, HEADS, dropout=0.1, dtype=torch.float64).eval()
    attention.in_proj_bias.requires_grad_(False)
    model = nn.ModuleDict({"first": nn.ModuleList([attention, nn.Linear(E, E)]), "again": attention})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    calls: list[str] = []
    handle = attention.register_forward_hook(lambda *_: calls.append("hook"))

    assert replace_attention(model) == 1
    swapped = model["again"]
    assert type(swapped) is MultiheadAttention
    assert model["first"][0] is swapped
    assert all(value is parameters[name] for name, value in model.named_parameters(remove_duplicate=False))
    assert not swapped.training
    assert model["first"].training
    assert not swapped.in_proj_bias.requires_grad
    assert swapped.in_proj_weight.dtype == torch.float64

    x = torch.randn(L, 1, E, dtype=torch.float64)
    swapped(x, x, x)
    handle.remove()
    swapped(x, x, x)
    assert calls == ["hook"]
    assert replace_attention(model) == 0


def test_replace_takes_the_model_itself() -> None:
    module = nn.MultiheadAttention(E, HEADS)
    assert metattn.replace_attention(module) == 1
    assert type(module) is MultiheadAttention


def test_replace_leaves_behaviour_of_others() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return "own"

    instance = nn.MultiheadAttention(E, HEADS)
    instance.forward = lambda *_: "replaced"  # type: ignore[method-assign,assignment]
    model = nn.ModuleDict(
        {"own": Own(E, HEADS), "instance": instance, "plain": nn.MultiheadAttention(E, HEADS)}
    )
    with pytest.warns(UserWarning, match="left as it is") as caught:
        assert replace_attention(model) == 1
    assert ["own (Own)" in str(w.message) for w in caught] == [True, False]
    assert model["own"]() == "own"
    assert model["instance"]() == "replaced"
    assert type(model["plain"]) is MultiheadAttention


def test_replace_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        replace_attention({})  # type: ignore[arg-type]


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says when its nested tensors cannot be used
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, **options)
        return nn.TransformerEncoder(layer, 2)


def with_hook(model: nn.TransformerEncoder) -> None:
    """A hook keeps torch's layers from their fused call, but not the encoder from its nested tensors."""
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(lambda *_: None)


@pytest.mark.parametrize("prepare", [lambda model: None, with_hook], ids=["no hook", "hook"])
@pytest.mark.parametrize("options", [{"batch_first": True}, {}], ids=["batch first", "length first"])
@pytest.mark.parametrize("mode", ["train", "eval", "eval without grad", "inference"])
def test_transformer_encoder_before_and_after(
    mode: str, options: dict[str, Any], prepare: Callable[[nn.TransformerEncoder], None]
) -> None:
    model = encoder(**options).train(mode == "train")
    prepare(model)
    x = torch.randn(3, 6, 16)
    padding = torch.arange(6) >= torch.tensor([[6], [4], [3]])
    causal = nn.Transformer.generate_square_subsequent_mask(6)
    calls: list[dict[str, Any]] = [{}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}]
    context: Callable[[], Any] = {
        "eval without grad": torch.no_grad,
        "inference": torch.inference_mode,
    }.get(mode, torch.enable_grad)

    def outputs() -> list[Tensor]:
        src = x if options else x.transpose(0, 1)
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are a prototype
            return [model(src, **call) for call in calls]

    before = outputs()
    assert replace_attention(model) == 2
    for expected, got in zip(before, outputs(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_whole_transformer_before_and_after() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 1, 1, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    src, tgt = (torch.randn(2, n, 16, dtype=torch.float64) for n in (6, 5))
    options = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)}
    before = model(src, tgt, **options)
    assert replace_attention(model) == 3
    torch.testing.assert_close(model(src, tgt, **options), before)


def test_swapped_encoder_has_second_derivatives_where_torch_has_none() -> None:
    model = encoder(batch_first=True)
    x, direction = torch.randn(2, 6, 16, requires_grad=True), torch.randn(2, 6, 16)

    def penalty() -> list[Tensor]:
        (gradient,) = torch.autograd.grad((model(x) * direction).sum(), x, create_graph=True)
        leaves = [x, *model.parameters()]
        return list(torch.autograd.grad(gradient.square().sum(), leaves, materialize_grads=True))

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="not implemented"):
        penalty()
    with sdpa_kernel(SDPBackend.MATH):
        expected = penalty()
    replace_attention(model)
    for a, b in zip(expected, penalty(), strict=True):
        assert ((a - b).norm() / a.norm().clamp(min=1e-6)).item() < 1e-4
