"""Families of functions: their distributions, what each way of training sees and adapts, the tiny form."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import multitask
from multitask import FAMILIES, SHOTS, SIZES, WAYS, ContextLearner, Family, Way

from metattn.cli.tasks import Samples
from metattn.meta import SGD

TINY = SIZES["tiny"]
BY_FAMILY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_tiny_form_runs_and_learns(tmp_path: Path) -> None:
    multitask.main(["--tiny", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "multitask-tiny.json").read_text())
    assert (tmp_path / "multitask-tiny.png").stat().st_size > 10_000
    rows = {row["quantity"]: row["ours"] for row in written["rows"]}
    assert len(rows) == (1 + len(FAMILIES)) * len(WAYS)
    assert all(math.isfinite(value) for value in rows.values())
    for way in ("ANIL", "MAML", "joint, in context"):
        assert rows[f"all families: {way}"] < rows["all families: joint"]


@BY_FAMILY
def test_mean_squares_are_the_families(family: Family) -> None:
    values = multitask.draw_functions(family, 40_000, generator())
    squares = values(10 * torch.rand(40_000, 5, generator=generator(1)) - 5).square().mean(1).double()
    assert abs(squares.mean() - family.square) < 5 * squares.std() / 200


@BY_FAMILY
def test_support_and_query_are_of_one_function(family: Family) -> None:
    """A function of few parameters that fits all points of both exactly is found."""
    support, query = multitask.draw_tasks(family, 50, generator())
    x = torch.cat([support[0], query[0]], 2).double().flatten(1)
    y = torch.cat([support[1], query[1]], 2).double().flatten(1)
    assert x.shape == (50, 2 * SHOTS)
    assert x.abs().max() <= 5
    if family.name == "steps":
        assert all(len(torch.unique(row)) <= 2 for row in y)
        ordered = y.gather(1, x.argsort(1))
        assert ((ordered.diff(dim=1) != 0).sum(1) <= 1).all()
        return
    basis = {
        "sines": [x.sin(), x.cos()],
        "lines": [x, torch.ones_like(x)],
        "parabolas": [x.square(), x, torch.ones_like(x)],
    }[family.name]
    matrix = torch.stack(basis, -1)
    fit = torch.linalg.lstsq(matrix, y.unsqueeze(-1), driver="gelsd").solution
    assert ((matrix @ fit).squeeze(-1) - y).abs().max() < 1e-4
    first = fit[:, 0, 0].abs()
    if family.name == "parabolas":
        assert first.min() > 0.02 - 1e-5
        assert first.max() < 0.2 + 1e-5


def test_batches_hold_every_family_at_unit_scale() -> None:
    (x, y), (query_x, query_y) = multitask.mixed(500, generator())
    assert x.shape == y.shape == query_x.shape == query_y.shape == (2000, 1, SHOTS, 1)
    for part in y.split(500):
        assert 0.8 < part.square().mean() < 1.2


def test_ways_adapt_what_they_say() -> None:
    model = ContextLearner(8, 1)
    everything = set(dict(model.named_parameters()))
    head = {"decoder.0.weight", "decoder.0.bias", "decoder.1.weight", "decoder.1.bias"}
    assert [set(way.adapted(model)) for way in WAYS] == 2 * [set(), head, everything]


def test_only_those_with_a_context_or_steps_see_the_support() -> None:
    size = replace(TINY, steps=2, last=1)
    support, query = multitask.mixed(1, generator())
    other = (support[0], support[1] + 1)
    for way in WAYS:
        trained = multitask.train(way, size, 0, lambda done, remark: None)
        one, two = (multitask.predictions(way, trained, given, query) for given in (support, other))
        assert one.shape == query[1].shape
        assert torch.equal(one, two) == (way.name == "joint")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_all_have_the_same_number_of_steps(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in context share the first ones, and do the last on functions that these have not seen."""
    size = replace(TINY, steps=3, last=1)
    batches = []

    def spy(tasks: int, source: torch.Generator) -> tuple[Samples, Samples]:
        batches.append(drawn := mixed(tasks, source))
        return drawn

    mixed = multitask.mixed
    monkeypatch.setattr(multitask, "mixed", spy)
    first = multitask.train(way, size, 0, lambda done, remark: None)
    assert first.steps == (2 if way.context else 3)
    if way.context:
        last = multitask.train(way, size, 0, lambda done, remark: None, first.model)
        assert last.steps == 1
        assert not any(torch.equal(batches[2][0][0], support[0]) for support, _ in batches[:2])
        assert any(
            not torch.equal(a, b)
            for a, b in zip(last.model.parameters(), first.model.parameters(), strict=True)
        )


@pytest.mark.parametrize("way", WAYS[4:], ids=lambda way: way.name)
def test_step_sizes_in_context_are_learned(way: Way) -> None:
    trained = multitask.train(way, replace(TINY, steps=3, last=0), 0, lambda done, remark: None)
    assert isinstance(trained.inner, SGD)
    assert isinstance(trained.inner.lr, dict)
    assert any((rates != 1e-3).any() for rates in trained.inner.lr.values())


def test_training_repeats_and_can_be_stopped() -> None:
    size = replace(TINY, steps=2, last=0)
    once, again = (multitask.train(WAYS[-1], size, 3, lambda done, remark: None) for _ in range(2))
    for one, two in zip(once.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)

    def interrupt(done: float, remark: str) -> None:
        raise KeyboardInterrupt

    assert multitask.train(WAYS[0], size, 3, interrupt).steps == 1
