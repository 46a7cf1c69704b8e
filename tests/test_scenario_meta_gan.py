"""examples/scenarios/meta_gan.py: its distributions, distance and penalty; and its smallest form."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import meta_gan as scenario
from meta_gan import Critic, Tasks, critic_loss, sliced_wasserstein


def tasks(modes: list[int]) -> Tasks:
    count = len(modes)
    return Tasks(
        torch.tensor([[1.0, -0.5]]).expand(count, 2),
        torch.tensor([[0.5, 1.0]]).expand(count, 2),
        torch.full((count,), 0.7),
        torch.tensor(modes),
    )


def unturned(points: Tensor) -> Tensor:
    """Points of `tasks` on the unit circle, but for their noise."""
    x, y = (points - torch.tensor([1.0, -0.5])).unbind(-1)
    cosine, sine = math.cos(0.7), math.sin(0.7)
    return torch.stack([(cosine * x + sine * y) / 0.5, (cosine * y - sine * x) / 1.0], -1)


def test_rings_lie_on_their_ellipses() -> None:
    points = tasks([0]).sample(4000, torch.Generator().manual_seed(0))
    circle = unturned(points)[0]
    radius = circle.norm(dim=1)
    assert abs(radius.mean() - 1) < 0.02
    assert radius.std() < 0.12
    assert circle.mean(0).norm() < 0.08
    angles = torch.atan2(circle[:, 1], circle[:, 0])
    assert torch.histc(angles, bins=8, min=-math.pi, max=math.pi).min() > 400  # of 500 each


def test_blobs_are_as_many_as_said() -> None:
    points = tasks([3]).sample(3000, torch.Generator().manual_seed(0))
    circle = unturned(points)[0]
    phases = 2 * math.pi * torch.arange(3) / 3
    centres = torch.stack([phases.cos(), phases.sin()], -1)
    gaps, nearest = torch.cdist(circle, centres).min(1)
    assert gaps.max() < 0.6
    assert nearest.bincount(minlength=3).min() > 900


def test_tasks_differ_and_repeat_by_seed() -> None:
    drawn = Tasks.draw(400, torch.Generator().manual_seed(0))
    again = Tasks.draw(400, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.centre, again.centre, rtol=0, atol=0)
    assert set(drawn.modes.tolist()) == {0, 2, 3, 4}
    assert drawn.centre.abs().max() <= 1.5
    assert abs(drawn.centre.std() - 3 / math.sqrt(12)) < 0.05


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_two() -> None:
    points = torch.randn(2, 300, 2)
    shift = torch.tensor([[[0.3, -0.4]], [[3.0, 4.0]]])
    shuffled = points[:, torch.randperm(300)]
    torch.testing.assert_close(sliced_wasserstein(points, shuffled), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        sliced_wasserstein(points, shuffled + shift), torch.tensor([0.5, 5.0]) / math.sqrt(2)
    )


def test_penalty_of_a_critic_whose_slope_is_known() -> None:
    """w·(mean of the points) has slope ‖w‖/√n in a set of n points."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([6.0, 8.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1) @ self.w

    critic = Linear()
    real, fake = (torch.randn(5, 4, 2, dtype=torch.float64) for _ in range(2))
    loss = critic_loss(critic, dict(critic.named_parameters()), real, fake, torch.rand(5).double(), 10.0)
    wanted = (fake - real).mean((0, 1)) @ critic.w + 10 * (10 / 2 - 1) ** 2
    torch.testing.assert_close(loss, wanted)


def test_gradient_for_several_tasks_is_that_of_each_by_autograd() -> None:
    """torch.func under vmap against autograd twice through the same critic, in float64."""
    size = replace(scenario.SIZES["tiny"], width=8)
    game = scenario.make_game(size, 0)
    game.critic.double()
    params = {
        name: 0.3 * torch.randn(2, *value.shape, dtype=torch.float64)
        for name, value in game.critic.named_parameters()
    }
    real, fake = (torch.randn(2, 3, 6, 2, dtype=torch.float64) for _ in range(2))
    mix = torch.rand(2, 3, dtype=torch.float64)
    together = game.critic_gradient(params, real, fake, mix)
    for task in range(2):
        critic = Critic(size.width, size.heads).double()
        critic.load_state_dict({name: value[task] for name, value in params.items()})
        t = mix[task, :, None, None]
        between = (fake[task] + t * (real[task] - fake[task])).requires_grad_()
        (slopes,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        gap = critic(fake[task]).mean() - critic(real[task]).mean()
        norms = (slopes.square().sum((1, 2)) + 1e-12).sqrt()
        (gap + 10 * (norms - 1).square().mean()).backward()
        for name, value in critic.named_parameters():
            torch.testing.assert_close(together[name][task], value.grad, rtol=1e-9, atol=1e-9)


def test_critic_does_not_see_the_order_of_the_points() -> None:
    critic = Critic(16, 2)
    x = torch.randn(3, 7, 2)
    torch.testing.assert_close(critic(x), critic(x[:, torch.randperm(7)]))


def test_a_critic_learns_to_tell_sets_apart() -> None:
    """At first its slope is nearly 0, which costs nearly λ; then the gap outweighs the penalty."""
    size = replace(scenario.SIZES["tiny"], width=16, rate=0.02)
    game = scenario.make_game(size, 0)
    params = scenario.repeated(game.critic, 1)
    state = game.adam.init(params)
    real, fake, mix = torch.randn(1, 8, 8, 2) + 2, torch.randn(1, 8, 8, 2), torch.rand(1, 8)
    before = critic_loss(game.critic, {k: v[0] for k, v in params.items()}, real[0], fake[0], mix[0], 10.0)
    for turn in range(40):
        params, state = game.adam.step(turn, params, game.critic_gradient(params, real, fake, mix), state)
    after = critic_loss(game.critic, {k: v[0] for k, v in params.items()}, real[0], fake[0], mix[0], 10.0)
    assert before > 5
    assert after < 0


def test_a_game_moves_towards_its_points() -> None:
    size = replace(scenario.SIZES["tiny"], rate=0.02)
    game = scenario.make_game(size, 0)
    random = torch.Generator().manual_seed(0)
    known = 0.1 * torch.randn(1, 64, 2, generator=random) + torch.tensor([1.5, 1.5])
    start = scenario.fresh(size, 1, 0)
    z = torch.randn(1, 1, 64, scenario.LATENT, generator=random)
    ends, _ = game.play(start, known, 15, random)
    before = sliced_wasserstein(game.generate(start[0], z)[:, 0], known)
    assert sliced_wasserstein(game.generate(ends, z)[:, 0], known) < before


def test_tiny_form_writes_figures_and_a_picture(tmp_path: Path) -> None:
    scenario.main(["--tiny", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "meta_gan-tiny.json").read_text())
    assert len(results["rows"]) == 7
    assert all(math.isfinite(row["ours"]) for row in results["rows"])
    before, *_, floor = (row["ours"] for row in results["rows"])
    assert floor < before
    assert (tmp_path / "meta_gan-tiny.png").stat().st_size > 10_000


def test_the_fitted_gaussian_has_the_points_mean_and_covariance() -> None:
    random = torch.Generator().manual_seed(0)
    known = torch.randn(2, 64, 2, generator=random) @ torch.tensor([[1.0, 0.0], [0.8, 0.5]]) + 3
    drawn = scenario.fitted_gaussian(known, 20_000, random)
    torch.testing.assert_close(drawn.mean(1), known.mean(1), rtol=0, atol=0.05)
    for task in range(2):
        torch.testing.assert_close(drawn[task].T.cov(), known[task].T.cov(), rtol=0, atol=0.05)
