"""examples/scenarios/in_context.py: prompts, estimators with known errors, the smallest form."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import in_context as scenario


def some(count: int, points: int, dims: int) -> tuple[torch.Tensor, torch.Tensor]:
    return scenario.prompts(count, points, dims, dims, torch.Generator().manual_seed(0))


def test_prompts_are_linear_and_standard_normal() -> None:
    x, y = some(4000, 7, 5)
    assert abs(x.mean()) < 0.01
    assert abs(x.var() - 1) < 0.02
    assert abs(y.var() / 5 - 1) < 0.1  # w·x of standard normals has variance d
    w = torch.linalg.lstsq(x[:, :6].double(), y[:, :6, None].double()).solution
    torch.testing.assert_close((x[:, 6:].double() @ w).flatten(), y[:, 6].double(), rtol=1e-3, atol=1e-3)
    assert abs(w.var() - 1) < 0.05


def test_prompts_leave_inactive_dimensions_at_zero() -> None:
    x, _ = scenario.prompts(3, 4, 5, 2, torch.Generator().manual_seed(1))
    assert x[..., 2:].abs().max() == 0
    assert x[..., :2].abs().min() > 0


def test_curriculum_is_the_sources() -> None:
    """5 dimensions and 11 points at first; one and two more every 2,000 steps, up to 20 and 41."""
    full = scenario.SIZES["full"]
    assert scenario.curriculum(full, 0) == scenario.curriculum(full, 1999) == (5, 11)
    assert scenario.curriculum(full, 2000) == (6, 13)
    assert scenario.curriculum(full, 30_000) == scenario.curriculum(full, 499_999) == (20, 41)


def test_least_squares_has_the_errors_of_theory() -> None:
    """1 − i/d with i < d examples; from d on, none."""
    x, y = some(6000, 9, 4)
    errors = (scenario.least_squares(x, y) - y).square() / 4
    for i in range(4):
        sigma = errors[:, i].std().item() / math.sqrt(len(errors))
        assert abs(errors[:, i].mean().item() - (1 - i / 4)) < 5 * sigma
    assert errors[:, 5:].median() < 1e-10


def test_averaging_has_the_error_of_theory() -> None:
    """(d + 1)/i"""
    x, y = some(6000, 9, 4)
    errors = (scenario.averaging(x, y) - y).square() / 4
    for i in (1, 4, 8):
        sigma = errors[:, i].std().item() / math.sqrt(len(errors))
        assert abs(errors[:, i].mean().item() - 5 / i) < 5 * sigma


def test_nearest_neighbours_by_hand() -> None:
    x = torch.tensor([[[0.0], [1.0], [10.0], [0.4], [9.0]]])
    y = torch.tensor([[1.0, 3.0, 8.0, 2.0, 0.0]])
    torch.testing.assert_close(
        scenario.nearest(x, y), torch.tensor([[0.0, 1.0, 2.0, 4.0, (8 + 3 + 2) / 3]]), rtol=0, atol=1e-6
    )


def test_a_prediction_sees_the_examples_before_it_alone() -> None:
    model = scenario.InContext(scenario.SIZES["tiny"])
    size = scenario.SIZES["tiny"]
    x, y = some(3, size.points, size.dims)
    before = model(x, y)
    later_x, later_y = x.clone(), y.clone()
    later_x[:, 3:] += 1
    later_y[:, 2:] += 1  # the value at the query itself, too
    after = model(later_x, later_y)
    torch.testing.assert_close(before[:, :3], after[:, :3], rtol=0, atol=1e-6)
    assert (before[:, 3] - after[:, 3]).abs().min() > 1e-4


def test_tiny_form_writes_figures_and_a_picture(tmp_path: Path) -> None:
    scenario.main(["--tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "in_context-tiny.json").read_text())
    assert len(results["rows"]) == 5
    assert all(math.isfinite(row["ours"]) for row in results["rows"])
    assert (tmp_path / "in_context-tiny.png").stat().st_size > 10_000


def test_the_model_learns_prompts_that_come_again() -> None:
    model = scenario.InContext(scenario.SIZES["tiny"])
    x, y = some(8, 5, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x, y) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
