"""examples/scenarios/vit_digits.py: its images, penalty and attacks; and its smallest form."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import vit_digits as scenario

from metattn.nn import replace_attention

TINY = scenario.SIZES["tiny"]


def model_in_float64() -> scenario.VisionTransformer:
    return scenario.make_model(TINY, 0).double()


def test_digits_are_split_in_two_without_overlap() -> None:
    (images, labels), (held, held_labels) = scenario.digits(scenario.SIZES["short"].train, 3)
    assert len(held) == len(held_labels) == 599  # a third of 1,797
    assert len(images) == len(labels) == 1198
    assert 0 == images.min() < images.max() == 1
    together = torch.cat([images, held]).flatten(1)
    everything = scenario.digits(1198, 0)
    whole = torch.cat([everything[0][0], everything[1][0]]).flatten(1)
    assert sorted(together.sum(1).tolist()) == sorted(whole.sum(1).tolist())
    assert labels.bincount().min() > 80
    torch.testing.assert_close(scenario.digits(1198, 3)[1][0], held, rtol=0, atol=0)
    assert not torch.equal(everything[1][0], held)


def test_penalty_of_a_linear_model_is_known() -> None:
    """∂E/∂x = Wᵀ(softmax(Wx) − onehot)"""
    weight = torch.randn(10, 64, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False)).double()
    model[1].weight.data.copy_(weight)
    images, labels = torch.rand(5, 8, 8, dtype=torch.float64), torch.tensor([0, 3, 3, 9, 1])
    logits = images.flatten(1) @ weight.T
    slopes = (logits.softmax(-1) - nn.functional.one_hot(labels, 10)) @ weight
    wanted = cross_entropy(logits, labels) + 0.7 * slopes.square().sum(1).mean()
    torch.testing.assert_close(scenario.loss_of(model, images, labels, 0.7), wanted)
    torch.testing.assert_close(scenario.loss_of(model, images, labels, 0.0), cross_entropy(logits, labels))


def test_its_gradient_is_that_of_torchs_math_path() -> None:
    """The same weights in torch's modules and in what replace_attention makes of them."""
    images, labels = torch.rand(3, 8, 8, dtype=torch.float64), torch.tensor([4, 0, 7])
    gradients = []
    for replaced in (False, True):
        model = model_in_float64()
        if replaced:
            assert replace_attention(model) == TINY.layers
        with sdpa_kernel(SDPBackend.MATH):
            scenario.loss_of(model, images, labels, 0.5).backward()
        gradients.append([value.grad for value in model.parameters()])
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("steps", [1, 10])
def test_attacks_stay_in_reach_and_hurt(steps: int) -> None:
    model = model_in_float64()
    replace_attention(model)
    (images, labels), _ = scenario.digits(64, 0)
    images = images.double()
    moved = scenario.attacked(model, images, labels, 0.1, steps)
    assert (moved - images).abs().max() <= 0.1 + 1e-9
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert cross_entropy(model(moved), labels) > cross_entropy(model(images), labels)


def test_tiny_form_learns_and_the_penalty_makes_slopes_small(tmp_path: Path) -> None:
    scenario.main(["--tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "vit_digits-tiny.json").read_text())
    assert all(math.isfinite(row["ours"]) for row in results["rows"])
    plain, penalty = (results["details"]["judged"][kind][0] for kind in ("plain", "penalty"))
    assert plain["clean"] > 25  # chance is 10
    assert penalty["‖∂E/∂x‖"] < plain["‖∂E/∂x‖"]
    assert all("not implemented" in one["torch as it comes"] for one in results["details"]["times"])
    assert (tmp_path / "vit_digits-tiny.png").stat().st_size > 10_000
