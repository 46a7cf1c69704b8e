"""Sinusoids: the tasks' distribution, the learners against what they claim to be, the tiny form."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import sinusoid
from sinusoid import ADAPTED, IN_CONTEXT, MAML, SIZES, ContextLearner

TINY = SIZES["tiny"]


def drawn(tasks: int, shots: int, seed: int = 0) -> tuple[sinusoid.Samples, sinusoid.Samples]:
    return sinusoid.draw_tasks(tasks, shots, torch.Generator().manual_seed(seed))


def test_the_tiny_form_runs_and_learns(tmp_path: Path) -> None:
    sinusoid.main(["--tiny", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "sinusoid-tiny.json").read_text())
    assert (tmp_path / "sinusoid-tiny.png").stat().st_size > 10_000
    rows = {row["quantity"]: row for row in written["rows"]}
    assert all(math.isfinite(row["ours"]) and row["error"] > 0 for row in rows.values())
    published = {name: row["published"] for name, row in rows.items() if "5-shot MSE: MLP, MAML" in name}
    assert published == {f"5-shot MSE: MLP, MAML, {n}": x for n, x in
                         (("1 step", "0.67"), ("5 steps", "0.38"), ("10 steps", "0.35"))}  # fmt: skip
    errors = written["details"]["errors"]
    square = drawn(TINY.test, 10, 10**6 + 10)[1][1].square().mean().item()  # the error of always answering 0
    assert errors[IN_CONTEXT.name]["10"][0][0] < 0.8 * square
    before, after = errors[ADAPTED.name]["10"][0]
    assert after < before


def test_tasks_are_those_of_the_paper() -> None:
    support, query = drawn(4000, 5)
    x = torch.cat([support[0], query[0]], 2).double().view(4000, 10)
    y = torch.cat([support[1], query[1]], 2).double().view(4000, 10, 1)
    # A·sin(x − φ) is a·sin x + b·cos x; support and query must agree on both
    waves = torch.stack([x.sin(), x.cos()], -1)
    a, b = torch.linalg.lstsq(waves, y, driver="gelsd").solution.squeeze(-1).unbind(-1)
    assert (waves @ torch.stack([a, b], -1).unsqueeze(-1) - y).abs().max() < 1e-4
    amplitude, phase = torch.hypot(a, b), torch.atan2(-b, a)
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5.0, 5.0)):
        assert values.min() > low - 1e-3
        assert values.max() < high + 1e-3
        counts = torch.histc(values, 10, low, high) / values.numel()
        assert (counts - 0.1).abs().max() < 5 * (0.09 / values.numel()) ** 0.5  # uniform


def test_the_network_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    model = sinusoid.network()
    assert [tuple(value.shape) for value in model.parameters()] == [
        (40, 1),
        (40,),
        (40, 40),
        (40,),
        (1, 40),
        (1,),
    ]
    weights = model[2].weight
    assert 0.0085 < weights.std() < 0.0091  # a normal of 0.01 cut at two deviations has 0.0088
    assert weights.abs().max() <= 0.02
    assert all(model[place].bias.count_nonzero() == 0 for place in (0, 2, 4))


def test_errors_are_those_of_gradient_descent() -> None:
    torch.manual_seed(0)
    tasks = drawn(3, 5)
    trained = sinusoid.train(MAML, replace(TINY, steps=2), 0, lambda done, remark: None)
    found = sinusoid.errors(MAML, trained, tasks, 3)
    for task in range(3):
        model = sinusoid.network()
        model.load_state_dict(trained.model.state_dict())
        descent = torch.optim.SGD(model.parameters(), lr=0.01)
        (x, y), (wanted_x, wanted_y) = ([part[task] for part in samples] for samples in tasks)
        for step in range(4):
            torch.testing.assert_close(found[task, step], mse_loss(model(wanted_x), wanted_y).detach())
            descent.zero_grad()
            mse_loss(model(x), y).backward()
            descent.step()


@pytest.mark.parametrize("layers", [1, 2])
def test_a_known_point_is_predicted_from_the_others(layers: int) -> None:
    torch.manual_seed(0)
    model = ContextLearner(16, layers).double()
    support, query = ([part.double() for part in samples] for samples in drawn(1, 6))
    (inputs, _), ((asked, known), _) = sinusoid.as_context(tuple(support), tuple(query))
    x, context, others = (part[0] for part in inputs)
    together = model(x, context, others[None])
    for place in range(6):
        rest = torch.cat([context[:, :place], context[:, place + 1 :]], 1)
        torch.testing.assert_close(together[:, place], model(x, rest)[:, place])
    shuffled = known[0][:, torch.randperm(6)]
    torch.testing.assert_close(model(asked[0], known[0]), model(asked[0], shuffled))
    assert (model(asked[0], known[0]) - model(asked[0], known[0][:, :5])).abs().max() > 1e-4


def test_training_repeats_and_can_be_stopped() -> None:
    size = replace(TINY, steps=4, last=2)
    once, again = (sinusoid.train(IN_CONTEXT, size, 3, lambda done, remark: None) for _ in range(2))
    assert once.losses == again.losses
    for one, other in zip(once.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert once.steps == 2
    last = [
        sinusoid.train(each, size, 3, lambda done, remark: None, once.model) for each in (IN_CONTEXT, ADAPTED)
    ]
    assert [one.steps for one in last] == [2, 2]
    assert not torch.equal(last[0].model.encoder[0].weight, once.model.encoder[0].weight)
    assert not torch.equal(last[0].model.encoder[0].weight, last[1].model.encoder[0].weight)

    def interrupt(done: float, remark: str) -> None:
        raise KeyboardInterrupt

    assert sinusoid.train(IN_CONTEXT, size, 3, interrupt).steps == 1
