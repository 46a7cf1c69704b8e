"""Amortised clustering: its sets and scores against torch's distributions, EM, the model, the tiny form."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import clustering
from clustering import CLUSTERS, REACH, SIZES, SPREAD, Mixture, Pooling, Sets, SetTransformer

TINY = SIZES["tiny"]


def drawn(count: int, seed: int = 0, points: tuple[int, int] = (100, 500)) -> Sets:
    return clustering.sets(count, points, torch.Generator().manual_seed(seed))


def double(given: Sets) -> Sets:
    return Sets(given.points.double(), given.mask, Mixture(*(part.double() for part in given.truth)))


def test_the_tiny_form_runs_and_learns(tmp_path: Path) -> None:
    clustering.main(["--tiny", "--seed", "3", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "clustering-tiny.json").read_text())
    assert (tmp_path / "clustering-tiny.png").stat().st_size > 10_000
    rows = {row["quantity"]: row["ours"] for row in written["rows"]}
    assert all(math.isfinite(value) for value in rows.values())
    assert set(written["details"]["steps"].values()) == {TINY.steps}
    assert rows["true mixture"] > rows["set transformer, LL0"] > rows["one Gaussian"]
    assert rows["set transformer, LL0"] > rows["mean pooling, LL0"]
    assert rows["set transformer, LL1"] > rows["set transformer, LL0"]


def test_training_repeats_by_its_seed() -> None:
    size, reached = replace(TINY, steps=15), []
    for _ in range(2):
        torch.manual_seed(5)
        reached.append(clustering.train(SetTransformer(size), size, 7, lambda done, remark: None))
    assert reached[0] == reached[1]


def test_ctrl_c_ends_training_with_what_there_is() -> None:
    def stop(done: float, remark: str) -> None:
        if done > 0:
            raise KeyboardInterrupt

    assert 0 < len(clustering.train(Pooling(TINY), TINY, 7, stop)) < TINY.steps


def test_sets_have_the_sources_distribution() -> None:
    given = drawn(4000, points=(20, 40))
    numbers = given.mask.sum(1)
    assert (numbers.min(), numbers.max()) == (20, 40)
    assert (given.points[~given.mask] == 0).all()
    assert torch.equal(given.mask, given.mask.sort(dim=1, descending=True).values)  # points come first
    weights, means, deviations = given.truth
    assert means.abs().max() <= REACH
    assert (deviations == SPREAD).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(4000))
    # Dirichlet(1, …, 1): E π² = 2 / K(K + 1); U(-a, a): E μ² = a² / 3; both to four standard errors
    for values, wanted in ((weights[:, 0].square(), 2 / (CLUSTERS * (CLUSTERS + 1))),
                           (weights[:, -1], 1 / CLUSTERS),
                           (means[:, 0, 0].square(), REACH**2 / 3),
                           (means[:, 0, 1], 0.0)):  # fmt: skip
        assert abs(values.mean() - wanted) < 4 * values.std() / len(values) ** 0.5
    # a set's points have mean Σ π μ
    middle = clustering.mean_over(given.points[..., 0], given.mask)
    gap = middle - (weights * means[..., 0]).sum(-1)
    assert abs(gap.mean()) < 4 * gap.std() / len(gap) ** 0.5
    assert torch.equal(drawn(5).points, drawn(5).points)


def test_the_oracle_is_the_published_one() -> None:
    """Lee et al. 2019, table 3: -1.4726; more than -(ψ(5) - ψ(2) + log 2πe 0.3²), for clusters overlap."""
    given = drawn(1500, seed=1)
    found = clustering.likelihood(given, given.truth)
    error = found.std() / len(found) ** 0.5
    assert error < 0.013
    assert abs(found.mean() - -1.4726) < 3 * error
    apart = -(1 / 2 + 1 / 3 + 1 / 4 + math.log(2 * math.pi * math.e * SPREAD**2))
    assert found.mean() > apart


def test_the_likelihood_is_torchs() -> None:
    given = double(drawn(6))
    generator = torch.Generator().manual_seed(2)
    mixture = clustering.mixture_of(torch.randn(6, CLUSTERS, 5, generator=generator).double())
    found = clustering.likelihood(given, mixture)
    for index in range(6):
        weights, means, deviations = (part[index] for part in mixture)
        theirs = MixtureSameFamily(Categorical(weights), Independent(Normal(means, deviations), 1))
        points = given.points[index][given.mask[index]]
        torch.testing.assert_close(found[index], theirs.log_prob(points).mean(), rtol=1e-9, atol=1e-9)


def test_what_a_network_returns_is_a_mixture() -> None:
    mixture = clustering.mixture_of(50 * torch.randn(7, CLUSTERS, 5))
    torch.testing.assert_close(mixture.weights.sum(-1), torch.ones(7))
    assert mixture.deviations.min() > 0


def test_expectation_maximisation_never_loses() -> None:
    given = double(drawn(20, seed=3))
    mixture = Mixture(
        torch.full((20, CLUSTERS), 1 / CLUSTERS).double(),
        given.points[:, :CLUSTERS],
        torch.ones(20, CLUSTERS, 2).double(),
    )
    before = clustering.likelihood(given, mixture)
    for _ in range(15):
        mixture = clustering.update(given, mixture)
        after = clustering.likelihood(given, mixture)
        assert (after >= before - 1e-9).all()
        before = after
    assert (clustering.likelihood(given, clustering.fitted(given, given.truth, 10)) >=
            clustering.likelihood(given, given.truth)).all()  # fmt: skip


def test_an_update_of_clusters_far_apart_is_their_statistics() -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = (5, 9, 1, 0)
    centres = torch.tensor([[-40.0, 0.0], [40.0, 0.0], [0.0, 40.0], [0.0, -40.0]]).double()
    clouds = [centre + torch.randn(size, 2, generator=generator).double()
              for size, centre in zip(sizes, centres, strict=True)]  # fmt: skip
    points = torch.cat([*clouds, torch.zeros(2, 2).double()])  # two that are no points
    mask = torch.arange(len(points)) < sum(sizes)
    start = Mixture(torch.full((1, 4), 0.25).double(), centres[None], torch.ones(1, 4, 2).double())
    found = clustering.update(Sets(points[None], mask[None], start), start)
    torch.testing.assert_close(found.weights[0], torch.tensor(sizes).double() / sum(sizes))
    for index in range(2):
        torch.testing.assert_close(found.means[0, index], clouds[index].mean(0))
        torch.testing.assert_close(found.deviations[0, index], clouds[index].std(0, correction=0))
    torch.testing.assert_close(found.means[0, 2], clouds[2][0])
    assert (found.deviations[0, 2] == clustering.NARROWEST).all()  # one point has no deviation
    torch.testing.assert_close(found.means[0, 3], centres[3])  # without a point a cluster stays


def test_one_gaussian_is_the_likeliest() -> None:
    given = double(drawn(5, seed=5))
    best = clustering.single(given)
    highest = clustering.likelihood(given, best)
    for part, step in ((1, 0.05), (1, -0.05), (2, 0.05), (2, -0.05)):
        moved = list(best)
        moved[part] = best[part] + step
        assert (clustering.likelihood(given, Mixture(*moved)) < highest).all()


@pytest.mark.parametrize("kind", [SetTransformer, Pooling])
def test_models_see_a_set(kind: type[nn.Module]) -> None:
    """Neither padding, nor neighbours in the batch, nor the order of the points change the answer."""
    model = kind(TINY)
    given = drawn(4, seed=6, points=(10, 30))
    whole: Tensor = model(given.points, given.mask)
    assert whole.shape == (4, CLUSTERS, 5)
    disturbed = model(torch.where(given.mask.unsqueeze(-1), given.points, 7.0), given.mask)
    torch.testing.assert_close(disturbed, whole, rtol=1e-4, atol=1e-5)
    for index in range(4):
        points = given.points[index][given.mask[index]]
        points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(index))]
        alone = model(points[None], torch.ones(1, len(points), dtype=torch.bool))
        torch.testing.assert_close(alone[0], whole[index], rtol=1e-4, atol=1e-5)
