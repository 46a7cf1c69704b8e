"""2-D navigation: its world, returns and losses by hand, the meta-gradient, the tiny form."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import navigation
from navigation import FASTEST, SIZES, EpisodePolicy, Episodes, PositionPolicy

from metattn.meta import SGD, maml_loss

TINY = SIZES["tiny"]
KINDS = (PositionPolicy, EpisodePolicy)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def policy_of(kind: type[nn.Module], spread: float = 0.5) -> nn.Module:
    """With directions of its own."""
    torch.manual_seed(3)
    policy = kind(TINY)
    for parameter in policy.parameters():
        nn.init.normal_(parameter, std=spread)
    return policy


def played(policy: nn.Module, goals: Tensor, episodes: int = 3, horizon: int = 6, seed: int = 1) -> Episodes:
    params = navigation.shared(policy, len(goals))
    return navigation.play(policy, params, goals, episodes, horizon, generator(seed))


def test_the_tiny_form_runs(tmp_path: Path) -> None:
    navigation.main(["--tiny", "--seed", "1", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "navigation-tiny.json").read_text())
    assert (tmp_path / "navigation-tiny.png").stat().st_size > 10_000
    rows = {row["quantity"]: row["ours"] for row in written["rows"]}
    assert len(rows) == 4 * (TINY.steps + 1) + 1
    assert all(math.isfinite(value) and value < 0 for value in rows.values())
    assert max(rows, key=rows.__getitem__) == "straight to the goal"
    assert {name: len(before) for name, (before, _) in written["details"]["learning"].items()} == {
        "MAML": TINY.rounds, "pretrained": TINY.rounds, "MAML, attention": TINY.attentive
    }  # fmt: skip


def test_maml_learns_to_adapt() -> None:
    """An untrained policy gains little by a step; after some rounds a step is worth much."""
    size = replace(TINY, tasks=10, episodes=20, updates=3)
    trained = navigation.train(PositionPolicy, True, 16, size, 0, lambda done, remark: None)
    gains = [after / before for before, after in zip(trained.before, trained.after, strict=True)]
    assert sum(gains[-3:]) < 0.75 * sum(gains[:3])


@pytest.mark.parametrize("kind", KINDS)
def test_training_repeats_by_its_seed(kind: type[nn.Module]) -> None:
    def curves(seed: int) -> tuple[list[float], list[float]]:
        trained = navigation.train(kind, True, 2, replace(TINY, tasks=2), seed, lambda done, remark: None)
        return trained.before, trained.after

    assert curves(4) == curves(4) != curves(5)


def test_ctrl_c_ends_training_with_what_there_is() -> None:
    def stop(done: float, remark: str) -> None:
        if done > 0:
            raise KeyboardInterrupt

    assert len(navigation.train(PositionPolicy, True, 8, TINY, 0, stop).after) == 2


def test_goals_fill_the_square() -> None:
    goals = navigation.draw_goals(20_000, generator())
    assert goals.abs().max() <= 0.5
    square = goals.square().sum(1)  # E = 2 / 12
    assert abs(square.mean() - 1 / 6) < 4 * square.std() / len(goals) ** 0.5
    assert torch.equal(navigation.draw_goals(3, generator(1)), navigation.draw_goals(3, generator(1)))


def test_episodes_follow_the_rules() -> None:
    goals = torch.tensor([[0.05, 0.0], [0.4, -0.3]])
    episodes = played(EpisodePolicy(TINY), goals, episodes=200, horizon=8)
    assert (episodes.places[:, :, 0] == 0).all()
    velocities = episodes.places[:, :, 1:] - episodes.places[:, :, :-1]
    wanted = (FASTEST * episodes.actions[:, :, :-1]).clamp(-FASTEST, FASTEST)
    torch.testing.assert_close(velocities, wanted, rtol=0, atol=1e-6)
    distances = (episodes.places[:, :, 1:] - goals[:, None, None]).norm(dim=-1)
    expected = torch.where(episodes.on[:, :, :-1], -distances.square(), 0.0)
    torch.testing.assert_close(episodes.rewards[:, :, :-1], expected, rtol=1e-4, atol=1e-6)
    ends = torch.cat((torch.zeros(2, 200, 1), (distances < navigation.NEAR).float()), 2).cumsum(2) > 0
    assert torch.equal(episodes.on, ~ends)
    assert ends.any()
    seen = torch.cat((episodes.places[:, :, 1:], velocities, episodes.rewards[:, :, :-1, None]), -1)
    torch.testing.assert_close(episodes.seen[:, :, 1:], seen, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_playing_is_the_forward_pass(kind: type[nn.Module]) -> None:
    """Step by step with what is kept, for parameters of each task's own, as all at once."""
    policy = policy_of(kind)
    params = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator(2))
        for name, value in navigation.shared(policy, 2).items()
    }
    goals = navigation.draw_goals(2, generator())
    episodes = navigation.play(policy, params, goals, 3, 6, generator(1))
    for task in range(2):
        own = {name: value[task] for name, value in params.items()}
        outputs = functional_call(policy, own, (episodes.seen[task],))
        means, logs = outputs.chunk(2, -1)
        wanted = Normal(means, logs.exp()).log_prob(episodes.actions[task]).sum(-1)
        torch.testing.assert_close(episodes.logs[task], wanted.detach(), rtol=1e-4, atol=1e-4)


def test_a_policy_begins_without_a_direction() -> None:
    for kind in KINDS:
        means, deviations = kind(TINY)(torch.randn(4, 5, kind.features)).chunk(2, -1)
        assert (means == 0).all()
        assert (deviations == 0).all()


def test_advantages_by_hand() -> None:
    """Least squares on the steps before an end, then mean 0 and variance 1 over them."""
    episodes = played(PositionPolicy(TINY), torch.tensor([[0.05, 0.0], [0.0, 0.02]]), 200, 12)
    assert not episodes.on.all()
    found = navigation.standardised_advantages(episodes)
    for task in range(2):
        to_come, now = torch.zeros(200, 12).double(), torch.arange(12).double() / 100
        for step in range(12):
            powers = navigation.DISCOUNT ** torch.arange(12 - step).double()
            to_come[:, step] = (powers * episodes.rewards[task, :, step:]).sum(1)
        places, on = episodes.places[task].double(), episodes.on[task]
        columns = [*places.unbind(-1), *places.square().unbind(-1)]
        columns += [column.expand(200, 12) for column in (now, now**2, now**3, torch.ones(12).double())]
        basis = torch.stack(columns, -1)[on]
        ridge = torch.linalg.inv(basis.T @ basis + 1e-5 * torch.eye(8).double())
        rest = to_come[on] - basis @ ridge @ basis.T @ to_come[on]
        wanted = (rest - rest.mean()) / rest.std(correction=0)
        torch.testing.assert_close(found[task][on].double(), wanted, rtol=1e-3, atol=1e-3)
        assert (found[task][~on] == 0).all()


def losses(kind: type[nn.Module]) -> tuple[nn.Module, Tensor, navigation.Targets]:
    policy = policy_of(kind)
    seen, targets = navigation.samples(played(policy, navigation.draw_goals(1, generator())))
    return policy, seen[0], navigation.Targets(*(part[0] for part in targets))


@pytest.mark.parametrize("loss", [navigation.inner_loss, navigation.outer_loss])
def test_losses_have_the_policy_gradient(loss: Callable[[Tensor, navigation.Targets], Tensor]) -> None:
    policy, seen, targets = losses(PositionPolicy)
    outputs = policy(seen)
    logs = navigation.log_probability(outputs, targets.actions)
    wanted = torch.autograd.grad(-(logs * targets.gains).mean(), policy.layers[0].weight, retain_graph=True)
    found = torch.autograd.grad(loss(outputs, targets), policy.layers[0].weight)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)


def test_the_inner_loss_has_the_curvature_of_the_return() -> None:
    """Its Hessian is −E[A·(∇²log π + ∇log π ∇log πᵀ)], in the deviations' logarithms."""
    policy, seen, targets = losses(PositionPolicy)
    means = policy(seen).detach()[..., :2]

    def logs(deviation: Tensor) -> Tensor:
        return navigation.log_probability(torch.cat((means, deviation.expand_as(means)), -1), targets.actions)

    def loss(deviation: Tensor) -> Tensor:
        return navigation.inner_loss(torch.cat((means, deviation.expand_as(means)), -1), targets)

    here = policy.deviation.detach()
    scores = torch.autograd.functional.jacobian(logs, here)
    plain = torch.autograd.functional.hessian(
        lambda deviation: -(logs(deviation) * targets.gains).mean(), here
    )
    crossed = -torch.einsum("es,esi,esj->ij", targets.gains, scores, scores) / targets.gains.numel()
    found = torch.autograd.functional.hessian(loss, here)
    torch.testing.assert_close(found, plain + crossed, rtol=1e-3, atol=1e-5)
    assert (found - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_meta_gradient_is_that_of_differences(kind: type[nn.Module]) -> None:
    """Through the inner step and, for the one, causal attention: in float64, along a direction."""
    policy = policy_of(kind, 0.3).double()
    goals = navigation.draw_goals(2, generator())
    single = policy_of(kind, 0.3)
    (seen, known), (later, judged) = (navigation.samples(played(single, goals, seed=seed)) for seed in (1, 2))
    known, judged = (navigation.Targets(*(part.double() for part in one)) for one in (known, judged))

    def meta_loss() -> Tensor:
        return maml_loss(
            policy, dict(policy.named_parameters()), navigation.inner_loss, (seen.double(), known),
            (later.double(), judged), optimizer=SGD(0.1), steps=1, outer_loss_fn=navigation.inner_loss,
        )  # fmt: skip

    parameters = list(policy.parameters())
    gradients = torch.autograd.grad(meta_loss(), parameters)
    directions = [torch.randn(one.shape, generator=generator(5), dtype=torch.float64) for one in parameters]
    slope = sum((one * direction).sum() for one, direction in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=step)
        values.append(meta_loss().detach())
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.sub_(direction, alpha=step)
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, rtol=1e-5, atol=1e-7)


def test_straight_to_the_goal() -> None:
    """0.25 along one axis: distances 0.15, 0.05, 0 after the steps; nothing more after the end."""
    found = navigation.straight(torch.tensor([[0.25, 0.0], [0.0, 0.0], [0.25, -0.05]]), 50)
    wanted = torch.tensor([-(0.15**2) - 0.05**2, 0.0, -(0.15**2) - 0.05**2])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
