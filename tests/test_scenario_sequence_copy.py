"""examples/scenarios/sequence_copy.py: its ciphers, MAML against eager attention, and its smallest form."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from helpers import relative_error

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import sequence_copy as scenario

from metattn.meta import SGD, maml_loss

SIZE = replace(scenario.SIZES["tiny"], letters=6, length=3)


def test_ciphers_are_permutations_that_a_tasks_texts_share() -> None:
    (support, targets), (query, _) = scenario.ciphers(50, SIZE, torch.Generator().manual_seed(0))
    assert support.shape == query.shape == (50, SIZE.shots, 7)
    assert targets is support
    assert (support[..., 3] == 12).all()
    rules = []
    for texts in torch.cat([support, query], 1):
        plain, secret = texts[:, :3], texts[:, 4:] - 6
        assert all(len(set(text)) == 3 for text in plain.tolist())
        pairs = set(zip(plain.flatten().tolist(), secret.flatten().tolist(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
        assert {value for pair in pairs for value in pair} <= set(range(6))
        rules.append(frozenset(pairs))
    assert len(set(rules)) > 40


def test_the_model_reads_what_is_before_a_letter_alone() -> None:
    model = scenario.Speller(SIZE)
    texts = scenario.ciphers(1, SIZE, torch.Generator().manual_seed(0))[0][0][0]
    logits = model(texts)
    assert logits.shape == (SIZE.shots, 3, 6)
    changed = texts.clone()
    changed[:, 5] = 6 + (changed[:, 5] - 5) % 6  # the second letter of the cipher
    again = model(changed)
    torch.testing.assert_close(again[:, :2], logits[:, :2], rtol=0, atol=1e-6)
    assert (again[:, 2] - logits[:, 2]).abs().max() > 1e-4


def test_loss_of_logits_that_know_the_cipher_is_none() -> None:
    texts = scenario.ciphers(1, SIZE, torch.Generator().manual_seed(0))[0][0][0]
    knowing = 50.0 * torch.nn.functional.one_hot(texts[:, 4:] - 6, 6)
    assert scenario.spelled(knowing, texts) < 1e-6
    torch.testing.assert_close(scenario.spelled(0 * knowing, texts).item(), math.log(6))


def test_meta_gradient_is_that_of_eager_attention() -> None:
    support, query = scenario.ciphers(2, SIZE, torch.Generator().manual_seed(0))
    gradients = {}
    for attention in ("metattn", "eager"):
        torch.manual_seed(0)
        model = scenario.Speller(SIZE, attention).double()
        params = dict(model.named_parameters())
        loss = maml_loss(model, params, scenario.spelled, support, query, optimizer=SGD(0.3), steps=2)
        gradients[attention] = torch.autograd.grad(loss, list(params.values()))
    for ours, theirs in zip(gradients["metattn"], gradients["eager"], strict=True):
        assert relative_error(ours, theirs)[0] < 5e-6  # transformers' softmax and norms are float32 even here


def test_tiny_form_writes_figures_and_a_picture(tmp_path: Path) -> None:
    scenario.main(["--tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "sequence_copy-tiny.json").read_text())
    assert len(results["rows"]) == 4
    assert all(0 <= row["ours"] <= 100 for row in results["rows"])
    assert all(math.isfinite(loss) for loss in results["details"]["losses"])
    assert (tmp_path / "sequence_copy-tiny.png").stat().st_size > 10_000
