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
from metattn.cli.tasks import Characters, Sinusoids, handwritten_digits, nearest_centroid, rows

pytest.importorskip("sklearn", reason="the demo's extras are not installed")


def test_sinusoids_are_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    tasks = Sinusoids.draw(4000, generator)
    x, y = tasks.points(10, generator)
    assert x.shape == y.shape == (4000, 1, 10, 1)
    for drawn, low, high in ((tasks.amplitude, 0.1, 5.0), (tasks.phase, 0.0, math.pi), (x, -5.0, 5.0)):
        width = high - low
        assert low <= drawn.min() < low + 0.01 * width
        assert high - 0.01 * width < drawn.max() <= high
        assert abs(drawn.mean() - (low + high) / 2) < 0.03 * width
    expected = tasks.amplitude[7] * torch.sin(x[7] - tasks.phase[7])
    torch.testing.assert_close(y[7], expected)


def test_digits_of_the_test_are_never_trained_on() -> None:
    training, unseen = handwritten_digits()
    assert (len(training.classes), len(unseen.classes)) == (6 * 8, 4)
    seen = {image.numpy().tobytes() for images in training.classes for image in images}
    assert not any(image.numpy().tobytes() in seen for images in unseen.classes for image in images)


def test_tasks_have_distinct_classes_and_images() -> None:
    classes = tuple(
        torch.full((20, 8, 8), float(c)) + torch.arange(20).view(-1, 1, 1) / 100 for c in range(5)
    )
    generator = torch.Generator().manual_seed(0)
    (images, labels), (others, other_labels) = Characters(classes).draw(
        6, generator, ways=3, shots=5, queries=7
    )
    assert images.shape == (6, 15, 8, 8)
    assert others.shape == (6, 21, 8, 8)
    for task in range(6):
        kinds = [{int(v) for v in images[task, labels[task] == way, 0, 0]} for way in range(3)]
        assert all(len(kind) == 1 for kind in kinds)
        assert len(set.union(*kinds)) == 3
        assert kinds == [{int(v) for v in others[task, other_labels[task] == way, 0, 0]} for way in range(3)]
        assert not set(images[task, :, 0, 0].tolist()) & set(others[task, :, 0, 0].tolist())


def test_rows_keep_the_image_and_say_their_place() -> None:
    image = torch.rand(2, 8, 8)
    points = rows(image)
    assert points.shape == (2, 8, 16)
    torch.testing.assert_close(points[..., :8] * 0.37 + 0.3, image)
    assert torch.equal(points[1, :, 8:], torch.eye(8))


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
    waves, digits = results["sinusoids"], results["digits"]
    assert waves["trained"][10] < waves["trained"][0]
    assert digits["trained"][10] > 0.5 > digits["trained"][0]
    assert digits["centroid"] > 0.8
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
