"""Glyphs: how they are drawn, how tasks are made of them, logits against loops, the tiny form."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import glyphs
from glyphs import METHODS, PIXELS, SHOTS, SIZES, UNTRAINED, CrossAttention, Pixels

from metattn.meta import SGD


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def straight(start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """One glyph of one stroke, a line: [1, 1, 4, 2]."""
    t = torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]).unsqueeze(-1)
    return ((1 - t) * torch.tensor(start) + t * torch.tensor(end)).view(1, 1, 4, 2)


def test_the_tiny_form_runs_and_learns(tmp_path: Path) -> None:
    glyphs.main(["--tiny", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "glyphs-tiny.json").read_text())
    assert (tmp_path / "glyphs-tiny.png").stat().st_size > 10_000
    rows = {row["quantity"]: row for row in written["rows"]}
    assert len(rows) == 2 * len(SHOTS) * len(METHODS)
    assert all(0 <= row["ours"] <= 1 and math.isfinite(row["error"]) for row in rows.values())
    for method in METHODS:
        found = rows[f"glyphs, 5-way 5-shot: {method.name}"]
        assert found["ours"] - found["error"] > 1 / 5


def test_ink_of_a_straight_stroke() -> None:
    width = torch.tensor([0.2])
    ink = glyphs.render(straight((-0.5, 0.0), (0.5, 0.0)), width)[0]
    area = (0.2 + math.pi * 0.1**2) * (PIXELS / 2) ** 2  # a rectangle and two half discs
    assert abs(ink.sum() - area) < 0.02 * area
    assert ink[13:15, 8:20].min() == 1
    assert ink[:11].max() == ink[17:].max() == 0
    # x runs along a row, y down the rows
    corner = glyphs.render(straight((0.6, -0.8), (0.8, -0.8)), width)[0]
    assert corner[:7, 20:].max() > 0.5
    assert corner[7:].max() == corner[:, :20].max() == 0


def test_curves_pass_where_bernstein_says() -> None:
    points = torch.tensor([[-0.8, 0.5], [-0.8, -0.9], [0.8, -0.9], [0.8, 0.5]]).view(1, 1, 4, 2)
    ink = glyphs.render(points, torch.tensor([0.1]))[0]
    middle = 0.25 * 0.5 - 0.75 * 0.9  # (p0 + 3 p1 + 3 p2 + p3) / 8 at t = 1/2
    column = ink[:, 13:15].mean(1)
    centre = (column * torch.arange(PIXELS)).sum() / column.sum()
    assert abs((centre + 0.5) / PIXELS * 2 - 1 - middle) < 0.02


def test_the_pen_is_smooth_and_missing_strokes_are_not_drawn() -> None:
    drawn = glyphs.draw_classes(15, generator())
    width = torch.full((15,), 0.12)
    fine = glyphs.render(drawn, width, pixels=4 * PIXELS)
    coarse = glyphs.render(drawn, width)
    assert (avg_pool2d(fine.unsqueeze(1), 4)[:, 0] - coarse).abs().mean() < 0.01
    strokes = (~drawn.isnan().any(-1).any(-1)).sum(1)
    assert set(strokes.tolist()) == {1, 2, 3}
    single = drawn[strokes == 1]
    torch.testing.assert_close(glyphs.render(single[:, :1], width[: len(single)]), coarse[strokes == 1])


def test_variations_are_an_affine_map_and_noise() -> None:
    points = straight((-0.5, 0.0), (0.5, 0.0)).expand(20_000, -1, -1, -1)
    varied = glyphs.vary(points, generator())
    centre = varied.mean((1, 2))
    assert centre.mean(0).abs().max() < 0.01  # shifts of ±0.2 about 0
    # the mean of four moved points: the shift, and the noise after a map of determinant near 1
    assert abs(centre[:, 1].std() - (0.2**2 / 3 + 0.08**2 / 4) ** 0.5) < 0.005
    across = varied[:, 0, 3] - varied[:, 0, 0]
    angle = torch.atan2(across[:, 1], across[:, 0])
    assert abs(angle.mean()) < 0.01
    assert angle.std() > (math.pi / 6) / 3**0.5  # the turn, and more by the noise
    assert torch.equal(varied, glyphs.vary(points, generator()))


def test_trials_keep_classes_apart() -> None:
    drawn, digits = glyphs.trials(SIZES["tiny"], 0)
    assert [len(part) for part in (drawn.training, drawn.validation, drawn.test)] == list(
        SIZES["tiny"].classes
    )
    assert [len(part) for part in (digits.training, digits.validation, digits.test)] == [40, 8, 4]
    every = [*drawn.training, *drawn.validation, *drawn.test]
    assert all(images.shape == (SIZES["tiny"].images, PIXELS, PIXELS) for images in every)
    firsts = torch.stack([images.mean(0).flatten() for images in every])
    assert torch.pdist(firsts).min() > 0.5
    assert all(images.shape[1:] == (PIXELS, PIXELS) for images in (*digits.training, *digits.test))
    assert (
        0 <= min(images.min() for images in digits.test) <= max(images.max() for images in digits.test) <= 1
    )


def test_episodes_do_not_repeat_an_image() -> None:
    classes = [
        torch.full((9, PIXELS, PIXELS), 100.0 * c) + torch.arange(9.0).view(-1, 1, 1) for c in range(7)
    ]
    (support, labels), (query, answers) = glyphs.episodes(classes, 20, 5, 3, 6, generator())
    assert support.shape == (20, 15, PIXELS, PIXELS)
    assert query.shape == (20, 30, PIXELS, PIXELS)
    of_support, of_query = support[:, :, 0, 0].view(20, 5, 3), query[:, :, 0, 0].view(20, 5, 6)
    together = torch.cat([of_support, of_query], -1)
    assert (together.sort(-1).values.diff(dim=-1) > 0).all()  # nine images, all different
    classes_of = (together / 100).floor()
    assert (classes_of == classes_of[..., :1]).all()  # of one class
    assert (classes_of[..., 0].sort(-1).values.diff(dim=-1) > 0).all()  # and five classes
    assert len({tuple(row) for row in classes_of[..., 0].tolist()}) > 10
    assert torch.equal(labels[0], torch.arange(5).repeat_interleave(3))
    assert torch.equal(answers[0], torch.arange(5).repeat_interleave(6))


def test_prototype_logits_by_loops() -> None:
    support, query = torch.randn(2, 6, 4), torch.randn(2, 5, 4)
    found = glyphs.prototype_logits(support, query, 3)
    for task in range(2):
        for place in range(5):
            for label in range(3):
                mean = (support[task, 2 * label] + support[task, 2 * label + 1]) / 2
                wanted = -(query[task, place] - mean).square().sum() / 16
                torch.testing.assert_close(found[task, place, label], wanted)


@pytest.mark.parametrize("shots", [1, 2])
def test_cross_attention_by_loops(shots: int) -> None:
    torch.manual_seed(0)
    ways, width, heads = 3, 8, 2
    model = CrossAttention(width, heads).double().eval()
    images, asked = (
        torch.rand(2, ways * shots, PIXELS, PIXELS).double(),
        torch.rand(2, 4, PIXELS, PIXELS).double(),
    )
    found = model.logits(images, asked, ways)
    known, wanted = (
        torch.stack([model.encoder(task) for task in part]).flatten(3).transpose(2, 3)
        for part in (images, asked)
    )  # [task, image, place, feature]
    plain = glyphs.prototype_logits(known.transpose(2, 3).flatten(2), wanted.transpose(2, 3).flatten(2), ways)
    size = width // heads
    for task in range(2):
        for place in range(4):
            for label in range(ways):
                points = known[task, label * shots : (label + 1) * shots]
                keys = model.key(points + model.places).flatten(0, 1)
                values = model.value(points).flatten(0, 1)
                queries, own = (
                    model.query(wanted[task, place] + model.places),
                    model.value(wanted[task, place]),
                )
                apart = 0.0
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    weights = (queries[:, part] @ keys[:, part].T / size**0.5).softmax(-1)
                    apart = apart + (own[:, part] - weights @ values[:, part]).square().sum()
                torch.testing.assert_close(found[task, place, label], plain[task, place, label] - apart / 16)


def test_accuracy_counts_right_answers() -> None:
    classes = [torch.rand(1, PIXELS, PIXELS, generator=generator(c)).expand(8, -1, -1) for c in range(6)]
    tasks = glyphs.episodes(classes, 3, 5, 1, 2, generator())
    assert glyphs.accuracies(UNTRAINED, Pixels(), tasks, 5, SGD(0.1)).tolist() == [1, 1, 1]
    (images, labels), (query, answers) = tasks
    wrong = answers.clone()
    wrong[0, :4] = (wrong[0, :4] + 1) % 5
    found = glyphs.accuracies(UNTRAINED, Pixels(), ((images, labels), (query, wrong)), 5, SGD(0.1))
    torch.testing.assert_close(found, torch.tensor([0.6, 1.0, 1.0]))
