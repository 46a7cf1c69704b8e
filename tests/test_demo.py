"""The demo: its tasks, a tiny run through the command line, and what it writes."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from metattn import cli
from metattn.cli.demo import WAYS, CharacterLearner
from metattn.cli.tasks import (
    Characters,
    Sinusoids,
    handwritten_digits,
    nearest_centroid,
    scribbles,
    windows,
)

pytest.importorskip("sklearn", reason="the demo's extras are not installed")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sinusoids_are_the_papers() -> None:
    drawing = generator()
    tasks = Sinusoids.draw(4000, drawing)
    x, y = tasks.points(10, drawing)
    assert x.shape == y.shape == (4000, 1, 10, 1)
    for drawn, low, high in ((tasks.amplitude, 0.1, 5.0), (tasks.phase, 0.0, math.pi), (x, -5.0, 5.0)):
        width = high - low
        assert low <= drawn.min() < low + 0.01 * width
        assert high - 0.01 * width < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.03 * width
    expected = tasks.amplitude[7] * torch.sin(x[7] - tasks.phase[7])
    torch.testing.assert_close(y[7], expected)


def test_digits_are_all_of_scikit_learns() -> None:
    digits = handwritten_digits().classes
    assert [len(images) for images in digits] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert all(images.shape[1:] == (8, 8) and 0 <= images.min() < images.max() == 1 for images in digits)
    middles = [images[:, 3:5, 3:5].mean() for images in digits]
    assert min(range(10), key=lambda digit: middles[digit]) == 0  # the one with a hole there


def test_scribbles_repeat_by_their_seed_alone() -> None:
    first, again, other = (torch.stack(scribbles(30, 4, generator(s)).classes) for s in (0, 0, 1))
    assert torch.equal(first, again)
    every = torch.cat([first, other]).view(-1, 64)
    apart = torch.cdist(every, every).fill_diagonal_(1)
    assert apart.min() > 0


def test_scribbles_look_like_the_digits_data() -> None:
    drawn = torch.stack(scribbles(200, 10, generator()).classes)
    assert drawn.shape == (200, 10, 8, 8)
    assert 0 <= drawn.min() < drawn.max() <= 1
    digits = torch.cat(handwritten_digits().classes)
    assert abs(drawn.mean() - digits.mean()) < 0.02
    assert abs(drawn.std() - digits.std()) < 0.02
    # tall: ink in the rows at both ends, and next to none in the columns there
    for images in (drawn, digits):
        mean = images.flatten(0, -3).mean(0)
        assert mean[[0, -1]].sum(1).min() > 4 * mean[:, [0, -1]].sum(0).max()


def test_a_class_of_scribbles_is_one_character() -> None:
    """Images of a class are nearer to each other than to those of other classes, but not the same."""
    drawn = torch.stack(scribbles(60, 8, generator()).classes).flatten(2)
    within = torch.stack([torch.pdist(images).mean() for images in drawn])
    between = torch.pdist(drawn[:, 0]).mean()
    assert 0.5 < within.mean() < 0.85 * between


def test_tasks_have_distinct_classes_and_images() -> None:
    classes = tuple(
        torch.full((20, 8, 8), float(c)) + torch.arange(20).view(-1, 1, 1) / 100 for c in range(5)
    )
    (images, labels), (others, other_labels) = Characters(classes).draw(
        6, generator(), ways=3, shots=5, queries=7
    )
    assert images.shape == (6, 15, 8, 8)
    assert others.shape == (6, 21, 8, 8)
    for task in range(6):
        kinds = [{int(v) for v in images[task, labels[task] == way, 0, 0]} for way in range(3)]
        assert all(len(kind) == 1 for kind in kinds)
        assert len(set.union(*kinds)) == 3
        assert kinds == [{int(v) for v in others[task, other_labels[task] == way, 0, 0]} for way in range(3)]
        assert not set(images[task, :, 0, 0].tolist()) & set(others[task, :, 0, 0].tolist())


def test_windows_by_loops() -> None:
    images = torch.rand(2, 3, 8, 8)
    found = windows(images)
    assert found.shape == (2, 3, 16, 16)
    for row in range(4):
        for column in range(4):
            for y in range(4):
                for x in range(4):
                    down, across = 2 * row - 1 + y, 2 * column - 1 + x
                    inside = 0 <= down < 8 and 0 <= across < 8
                    wanted = images[..., down, across] if inside else torch.zeros(2, 3)
                    given = found[..., 4 * row + column, 4 * y + x] * 0.38 + 0.3
                    torch.testing.assert_close(given, wanted, atol=1e-6, rtol=1e-5)


def test_the_learner_prefers_no_class_before_a_task() -> None:
    assert torch.equal(CharacterLearner()(torch.rand(7, 8, 8)), torch.zeros(7, WAYS))


def test_nearest_centroid() -> None:
    images = torch.zeros(1, 4, 8, 8)
    images[0, 2:] = 1.0
    labels = torch.tensor([[0, 0, 1, 1]])
    assert nearest_centroid((images, labels), (images, labels)) == 1.0
    assert nearest_centroid((images, labels), (1 - images, labels)) == 0.0


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    for name in ("matplotlib", "rich"):
        pytest.importorskip(name, reason="the demo's extras are not installed")
    folder = tmp_path_factory.mktemp("demo") / "made"
    return cli.main(["demo", "--quick", "--out", str(folder)]), folder


def test_quick_run(quick: tuple[int, Path]) -> None:
    code, folder = quick
    assert code == 0
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    results: dict[str, Any] = json.loads((folder / "demo.json").read_text())
    waves, characters = results["sinusoids"], results["characters"]
    assert waves["trained"][10] < waves["trained"][0]
    for kind, chance in (("digits", 0.7), ("scribbles", 0.6)):
        read = characters[kind]
        assert read["trained"][10] > 0.5 > read["trained"][0]
        assert abs(read["nearest"] - chance) < 0.15
    assert len(waves["curves"]) == 3


def test_meta_gradient_agrees_with_float64(quick: tuple[int, Path]) -> None:
    errors = json.loads((quick[1] / "demo.json").read_text())["agreement"]
    assert errors["metattn"] <= max(4 * errors["torch math"], 5e-6)


def test_every_length_has_time_and_memory(quick: tuple[int, Path]) -> None:
    steps = json.loads((quick[1] / "demo.json").read_text())["steps"]
    assert sorted({row["length"] for row in steps}) == [128, 256]
    assert len({row["contestant"] for row in steps}) == 2
    assert all(row["seconds"] > 0 for row in steps)


def test_missing_extra_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else found(name))
    assert cli.main(["demo", "--out", str(tmp_path / "made")]) == 1
    assert (
        "metattn demo needs rich: pip install matplotlib numpy rich scikit-learn" in capsys.readouterr().err
    )
    assert not (tmp_path / "made").exists()


def test_seconds_are_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["demo", "--seconds", "0", "--out", str(tmp_path / "made")]) == 2
    assert "--seconds: expected more than 0, got 0.0" in capsys.readouterr().err
