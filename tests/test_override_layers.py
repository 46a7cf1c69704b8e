"""sdpa_override around torch's layers: MultiheadAttention and the transformer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from override_cases import CAUSAL, CLOSE, PADDING, Multihead, randn, two_orders
from torch import Tensor, nn

import metattn


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
