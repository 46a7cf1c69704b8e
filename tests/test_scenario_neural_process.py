"""The neural process: its tasks and exact processes against torch.distributions, its model, its tiny form."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import neural_process
from neural_process import LEAST, LENGTHS, MOST, NOISE, REACH, SCALES, SIZES, Tasks, TransformerProcess

TINY = SIZES["tiny"]


def test_the_tiny_form_runs_and_learns(tmp_path: Path) -> None:
    neural_process.main(["--tiny", "--seed", "3", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "neural_process-tiny.json").read_text())
    assert (tmp_path / "neural_process-tiny.png").stat().st_size > 10_000
    rows = {row["quantity"]: row["ours"] for row in written["rows"]}
    assert all(math.isfinite(value) for value in rows.values())
    assert set(written["details"]["steps"].values()) == {TINY.steps}
    reached = written["details"]["training"]["TNP-D"]
    fifth = len(reached) // 5
    assert sum(reached[-fifth:]) / fifth > sum(reached[:fifth]) / fifth + 0.15
    assert rows["exact process, true kernel"] > rows["TNP-D, log-likelihood per target"] > -1.5


def test_training_repeats_by_its_seed() -> None:
    size, reached = replace(TINY, steps=15), []
    for _ in range(2):
        model = neural_process.build(size, 5)["TNP-D"]
        reached.append(neural_process.train(model, size, 7, lambda done, remark: None))
    assert reached[0] == reached[1]


def test_ctrl_c_ends_training_with_what_there_is() -> None:
    def stop(done: float, remark: str) -> None:
        if done > 0:
            raise KeyboardInterrupt

    model = neural_process.build(TINY, 5)["CNP"]
    assert 0 < len(neural_process.train(model, TINY, 7, stop)) < TINY.steps


def test_the_kernel_by_hand() -> None:
    length, scale = torch.tensor([0.5]).double(), torch.tensor([0.8]).double()
    x = torch.tensor([[0.0, 0.5, 1.5]]).double()
    found = neural_process.kernel(x, x, length, scale)[0]
    wanted = [[0.0, 0.5, 4.5], [0.5, 0.0, 2.0], [4.5, 2.0, 0.0]]  # (a - b)² / 2l²
    torch.testing.assert_close(found, 0.64 * torch.exp(-torch.tensor(wanted).double()))


def covariance(batch: Tasks, index: int, kernel: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Of one task's values, by loops."""
    length, scale = kernel or (batch.length[index], batch.scale[index])
    x = batch.x[index]
    rows = [
        [
            scale**2 * math.exp(-((x[i] - x[j]) ** 2) / (2 * length**2)) + (NOISE**2 if i == j else 0)
            for j in range(len(x))
        ]
        for i in range(len(x))
    ]
    return torch.tensor(rows, dtype=torch.float64)


def log_evidence(whole: Tensor, y: Tensor, chosen: list[int]) -> Tensor:
    part = whole[chosen][:, chosen]
    found: Tensor = MultivariateNormal(torch.zeros(len(chosen)).double(), part).log_prob(y[chosen])
    return found


def test_the_exact_process_is_the_conditional_of_the_joint() -> None:
    """p(target | context) = p(target, context) / p(context)."""
    batch = neural_process.tasks(3, torch.Generator().manual_seed(1), 6, 4)
    (x, y), (at, wanted) = batch.given(), batch.asked()
    mean, deviation = neural_process.posterior(x, y, at, batch.length, batch.scale)
    found = neural_process.log_density(wanted, mean, deviation)
    given = list(range(6))
    for task in range(3):
        whole = covariance(batch, task)
        for target in range(4):
            joint = log_evidence(whole, batch.y[task], [*given, 6 + target])
            conditional = joint - log_evidence(whole, batch.y[task], given)
            torch.testing.assert_close(found[task, target], conditional, rtol=1e-9, atol=1e-9)


def test_with_one_kernel_to_infer_the_exact_process_is_itself() -> None:
    batch = neural_process.tasks(1, torch.Generator().manual_seed(2), 9, 5)
    (x, y), (at, wanted) = batch.given(), batch.asked()
    exact = neural_process.posterior(x, y, at, batch.length, batch.scale)
    torch.testing.assert_close(
        neural_process.integrated(batch, batch.length, batch.scale),
        neural_process.log_density(wanted, *exact),
        rtol=1e-8,
        atol=1e-8,
    )


def test_kernels_are_weighed_by_their_evidence() -> None:
    """p(target | context) = Σ_k p(target, context | k) / Σ_k p(context | k), by loops over the kernels."""
    batch = neural_process.tasks(2, torch.Generator().manual_seed(3), 5, 3)
    lengths, scales = torch.tensor([0.15, 0.4, 0.55]).double(), torch.tensor([0.3, 0.9]).double()
    found = neural_process.integrated(batch, lengths, scales)
    given = list(range(5))
    for task in range(2):
        wholes = [covariance(batch, task, (length, scale)) for length in lengths for scale in scales]
        context = torch.stack([log_evidence(whole, batch.y[task], given) for whole in wholes])
        for target in range(3):
            chosen = [*given, 5 + target]
            joint = torch.stack([log_evidence(whole, batch.y[task], chosen) for whole in wholes])
            wanted = joint.logsumexp(0) - context.logsumexp(0)
            torch.testing.assert_close(found[task, target], wanted, rtol=1e-8, atol=1e-8)


def test_tasks_have_the_sources_ranges() -> None:
    generator = torch.Generator().manual_seed(4)
    batches = [neural_process.tasks(16, generator) for _ in range(400)]
    contexts = {batch.context for batch in batches}
    targets = {batch.x.shape[1] - batch.context for batch in batches}
    assert (min(contexts), max(contexts)) == (LEAST, MOST - LEAST - 1) == (3, 46)
    assert min(targets) == LEAST
    assert max(batch.x.shape[1] for batch in batches) <= MOST - 1
    for name, (low, high) in (("length", LENGTHS), ("scale", SCALES)):
        values = torch.cat([getattr(batch, name) for batch in batches])
        assert low <= values.min() < low + 0.01
        assert high - 0.01 < values.max() <= high
        # a uniform variable's mean, to four standard errors
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / 12**0.5 / len(values) ** 0.5
    x = torch.cat([batch.x.flatten() for batch in batches])
    assert x.abs().max() <= REACH
    assert abs(x.mean()) < 4 * 2 * REACH / 12**0.5 / len(x) ** 0.5
    twice = [neural_process.tasks(4, torch.Generator().manual_seed(9)) for _ in range(2)]
    assert torch.equal(twice[0].y, twice[1].y)


def test_values_are_drawn_from_the_kernel() -> None:
    """Squares of whitened values, y' K⁻¹ y, are chi-squared with as many degrees as there are points."""
    generator = torch.Generator().manual_seed(5)
    squares, points = 0.0, 0
    for _ in range(60):
        batch = neural_process.tasks(16, generator)
        whole = neural_process.kernel(batch.x, batch.x, batch.length, batch.scale)
        whole += NOISE**2 * torch.eye(batch.x.shape[1]).double()
        solved = torch.linalg.solve(whole, batch.y.unsqueeze(-1)).squeeze(-1)
        squares += float((batch.y * solved).sum())
        points += batch.y.numel()
    assert abs(squares / points - 1) < 4 * (2 / points) ** 0.5


def test_the_true_kernel_is_calibrated_and_beats_the_inferred_one() -> None:
    generator = torch.Generator().manual_seed(6)
    nodes = (
        neural_process.midpoints(*LENGTHS, TINY.nodes[0]),
        neural_process.midpoints(*SCALES, TINY.nodes[1]),
    )
    misses, exact, inferred = [], [], []
    for _ in range(12):
        batch = neural_process.tasks(16, generator, 12, 6)
        (x, y), (at, wanted) = batch.given(), batch.asked()
        mean, deviation = neural_process.posterior(x, y, at, batch.length, batch.scale)
        misses.append(((wanted - mean) / deviation)[:, 0])  # one target a task: independent
        exact.append(neural_process.log_density(wanted, mean, deviation).mean(1))
        inferred.append(neural_process.integrated(batch, *nodes).mean(1))
    squares = torch.cat(misses).square()
    assert abs(squares.mean() - 1) < 4 * (2 / len(squares)) ** 0.5
    gap = torch.cat(exact) - torch.cat(inferred)
    assert gap.mean() > 2 * gap.std() / len(gap) ** 0.5


@pytest.mark.parametrize("attends", [True, False], ids=["attention", "mean"])
def test_context_in_any_order_and_targets_alone(attends: bool) -> None:
    model = TransformerProcess(TINY, attends)
    batch = neural_process.tasks(3, torch.Generator().manual_seed(7), 8, 5)
    (x, y), (at, _) = batch.given(), batch.asked()
    x, y, at = x.float(), y.float(), at.float()
    mean, deviation = model(x, y, at)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for found, wanted in zip(model(x[:, order], y[:, order], at), (mean, deviation), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    alone = [model(x, y, at[:, [target]]) for target in range(5)]
    torch.testing.assert_close(torch.cat([found for found, _ in alone], 1), mean, rtol=1e-4, atol=1e-5)
    changed, _ = model(x, y + torch.arange(8) / 8, at)
    assert (changed - mean).abs().max() > 1e-3


def test_a_layer_is_torchs_with_the_sources_mask() -> None:
    """torch.nn.TransformerEncoderLayer, in which a mask lets every token see the context's columns alone."""
    layer = neural_process.Layer(TINY, attends=True)
    theirs = nn.TransformerEncoderLayer(TINY.width, TINY.heads, TINY.hidden, 0.0, batch_first=True)
    theirs.self_attn.load_state_dict(layer.pool.attention.state_dict())
    theirs.linear1.load_state_dict(layer.mlp[0].state_dict())
    theirs.linear2.load_state_dict(layer.mlp[2].state_dict())
    theirs.norm1.load_state_dict(layer.first.state_dict())
    theirs.norm2.load_state_dict(layer.second.state_dict())
    tokens = torch.randn(4, 11, TINY.width)
    hidden = torch.ones(11, 11, dtype=torch.bool)
    hidden[:, :7] = False
    torch.testing.assert_close(layer(tokens, 7), theirs(tokens, src_mask=hidden), rtol=1e-4, atol=1e-5)


def test_the_conditional_process_has_a_least_deviation() -> None:
    model = neural_process.build(TINY, 0)["CNP"]
    batch = neural_process.tasks(2, torch.Generator().manual_seed(8), 5, 4)
    _, deviation = model(batch.x[:, :5].float(), batch.y[:, :5].float(), batch.x.float())
    assert deviation.shape == (2, 9)
    assert deviation.min() > 0.1
