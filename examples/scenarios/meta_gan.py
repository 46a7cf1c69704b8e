"""A GAN that learns a new distribution from few points in few steps: WGAN-GP inside Reptile.

    python examples/scenarios/meta_gan.py

Sources: Gulrajani et al. 2017 (arXiv 1704.00028), algorithm 1: a critic whose slope between real and
generated samples is pulled to 1 by λ·(‖∂D/∂x‖ − 1)², λ = 10, Adam with β = (0, 0.9); and Clouâtre and
Demers 2019 (arXiv 1901.02199, FIGR): generator and critic are meta-learned together by Reptile, θ ← θ +
ε·(mean φ − θ), with φ after some steps of both on one task. The critic attends over a set of points and
scores it as a whole, so that every step of it takes a second derivative of attention, here for several
tasks at once under torch.func.vmap.

Protocol: a task is a distribution in the plane, a ring or a few blobs on an ellipse whose centre, axes and
tilt differ from task to task; the GAN gets a few dozen points of it and takes a few steps. Measured on new
tasks: the sliced Wasserstein distance (the root of the mean over directions of W_2² between projections) of
generated to fresh points, before and after the steps, beside a GAN that takes the same steps from random
weights, more of them, and the distance between two fresh samples, below which nothing can be told apart.
Without any GAN a Gaussian fitted to the known points, and those points drawn again, are nearer than the short
form's generator: the task is there for the second derivatives, not to estimate densities.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from metattn.meta import Adam
from metattn.nn import SAB

LATENT = 4


@dataclass(frozen=True)
class Size:
    meta_steps: int
    tasks: int  # of a meta-step
    steps: int  # of the generator, on one task
    test_tasks: int
    scratch_steps: int  # of the longer training from random weights
    critic_steps: int = 2  # for each of the generator's
    width: int = 32
    heads: int = 2
    sets: int = 4  # of a batch
    points: int = 16  # of a set
    shots: int = 64  # points of a task that are known
    rate: float = 1e-2  # of Adam in a task
    pull: float = 1.0  # ε of Reptile, decaying to 0
    penalty: float = 10.0  # λ
    measured: int = 512  # points, for the distance


SIZES = {
    "tiny": Size(meta_steps=5, tasks=2, steps=3, test_tasks=3, scratch_steps=4, critic_steps=1, width=8,
                 sets=2, points=8, measured=128),
    "short": Size(meta_steps=60, tasks=8, steps=20, test_tasks=32, scratch_steps=60),
    "full": Size(meta_steps=5000, tasks=16, steps=20, test_tasks=200, scratch_steps=1000, critic_steps=5,
                 width=64, heads=4, sets=16, points=32, measured=2048),
}  # fmt: skip


@dataclass(frozen=True)
class Tasks:
    """In the plane: centre + turn·(axes·(cos φ, sin φ)) + noise, φ uniform or one of `modes`."""

    centre: Tensor  # [T, 2]
    axes: Tensor  # [T, 2]
    angle: Tensor  # [T]
    modes: Tensor  # [T], 0 for a ring

    @classmethod
    def draw(cls, count: int, generator: torch.Generator) -> Tasks:
        centre = 3 * torch.rand(count, 2, generator=generator) - 1.5
        axes = 0.4 + 0.8 * torch.rand(count, 2, generator=generator)
        angle = math.pi * torch.rand(count, generator=generator)
        blobs = torch.randint(2, 5, (count,), generator=generator)
        ring = torch.rand(count, generator=generator) < 0.5
        return cls(centre, axes, angle, torch.where(ring, 0, blobs))

    def sample(self, points: int, generator: torch.Generator) -> Tensor:
        """[T, points, 2]"""
        count = len(self.modes)
        uniform = torch.rand(count, points, generator=generator)
        modes = self.modes[:, None]
        phase = 2 * math.pi * torch.where(modes == 0, uniform, (uniform * modes).floor() / modes.clamp(min=1))
        x, y = (self.axes[:, None] * torch.stack([phase.cos(), phase.sin()], -1)).unbind(-1)
        cosine, sine = self.angle.cos()[:, None], self.angle.sin()[:, None]
        turned = torch.stack([cosine * x - sine * y, sine * x + cosine * y], -1)
        noise = 0.05 * torch.randn(count, points, 2, generator=generator)
        return self.centre[:, None] + turned + noise


class Generator(nn.Module):
    """Noise [sets, points, LATENT] → points [sets, points, 2], each by itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU(),
            nn.Linear(2 * width, 2),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        points: Tensor = self.layers(z)
        return points


class Critic(nn.Module):
    """Sets [sets, points, 2] → one score each, whatever the order of the points."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(2, width), nn.SiLU(), nn.Linear(width, width))
        # without norms: the scale of the points is what the critic judges by
        self.attend = SAB(width, heads, layer_norm=False)
        self.score = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.score(self.attend(self.embed(x)).mean(1))
        return scores.squeeze(-1)


def critic_loss(
    critic: nn.Module, params: dict[str, Tensor], real: Tensor, fake: Tensor, mix: Tensor, penalty: float
) -> Tensor:
    """E D(fake) − E D(real) + λ·E (‖∂D/∂x‖ − 1)², with x between real and fake by mix.

    real, fake: [sets, points, 2]; mix: [sets], 1 for real. The norm is over a whole set.
    """

    def score(points: Tensor) -> Tensor:
        return functional_call(critic, params, (points,)).sum()

    slopes = grad(score)(torch.lerp(fake, real, mix[:, None, None]))
    norms = (slopes.square().sum((1, 2)) + 1e-12).sqrt()
    scores: Tensor = functional_call(critic, params, (torch.cat([fake, real]),))
    found, wanted = scores.chunk(2)
    return found.mean() - wanted.mean() + penalty * (norms - 1).square().mean()


class Game:
    """Generators and critics of several tasks, trained side by side: every parameter is [T, …]."""

    def __init__(self, size: Size, generator: Generator, critic: Critic) -> None:
        self.size, self.generator, self.critic = size, generator, critic
        self.adam = Adam(size.rate, betas=(0.0, 0.9))

        def generator_loss(params: dict[str, Tensor], judge: dict[str, Tensor], z: Tensor) -> Tensor:
            return -functional_call(critic, judge, (functional_call(generator, params, (z,)),)).mean()

        def loss(params: dict[str, Tensor], real: Tensor, fake: Tensor, mix: Tensor) -> Tensor:
            return critic_loss(critic, params, real, fake, mix, size.penalty)

        self.critic_gradient = vmap(grad(loss))
        self.generator_gradient = vmap(grad(generator_loss))

    def generate(self, params: dict[str, Tensor], z: Tensor) -> Tensor:
        """[T, sets, points, 2]"""
        return vmap(lambda weights, noise: functional_call(self.generator, weights, (noise,)))(params, z)

    def play(
        self,
        start: tuple[dict[str, Tensor], dict[str, Tensor]],
        known: Tensor,
        steps: int,
        random: torch.Generator,
        watch: Any = None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Steps of WGAN-GP on the points known [T, shots, 2]; watch(step, generators) after each."""
        size = self.size
        generators, critics = start
        states = [self.adam.init(params) for params in start]
        tasks = len(known)
        shape = (tasks, size.sets, size.points)
        turn = 0
        for step in range(steps):
            for _ in range(size.critic_steps):
                chosen = torch.randint(known.shape[1], shape, generator=random).flatten(1)
                real = known.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2)).unflatten(1, shape[1:])
                with torch.no_grad():
                    fake = self.generate(generators, torch.randn(*shape, LATENT, generator=random))
                mix = torch.rand(shape[:2], generator=random)
                slopes = self.critic_gradient(critics, real, fake, mix)
                critics, states[1] = self.adam.step(turn, critics, slopes, states[1])
                turn += 1
            z = torch.randn(*shape, LATENT, generator=random)
            slopes = self.generator_gradient(generators, critics, z)
            generators, states[0] = self.adam.step(step, generators, slopes, states[0])
            if watch is not None:
                watch(step + 1, generators)
        return generators, critics


def make_game(size: Size, seed: int) -> Game:
    torch.manual_seed(seed)
    return Game(size, Generator(size.width), Critic(size.width, size.heads))


def repeated(module: nn.Module, tasks: int) -> dict[str, Tensor]:
    return {
        name: value.detach().expand(tasks, *value.shape).clone() for name, value in module.named_parameters()
    }


def fresh(size: Size, tasks: int, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random weights of their own for every task."""
    torch.manual_seed(seed)
    stacks = (
        stack_module_state([Generator(size.width) for _ in range(tasks)])[0],
        stack_module_state([Critic(size.width, size.heads) for _ in range(tasks)])[0],
    )
    generators, critics = ({name: value.detach() for name, value in stack.items()} for stack in stacks)
    return generators, critics


def meta_train(size: Size, seed: int, report: Report) -> tuple[Game, int]:
    """Reptile over tasks; the game with the weights to start from, and how many meta-steps were taken."""
    game = make_game(size, seed)
    random = torch.Generator().manual_seed(seed)
    done = 0
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(size.meta_steps):
            known = Tasks.draw(size.tasks, random).sample(size.shots, random)
            start = (repeated(game.generator, size.tasks), repeated(game.critic, size.tasks))
            ends = game.play(start, known, size.steps, random)
            pull = size.pull * (1 - step / size.meta_steps)
            with torch.no_grad():
                for module, end in zip((game.generator, game.critic), ends, strict=True):
                    for name, value in module.named_parameters():
                        value.lerp_(end[name].mean(0), pull)
            done = step + 1
            report(done / size.meta_steps * 0.8, f"meta-step {done}")
    return game, done


def sliced_wasserstein(first: Tensor, second: Tensor, directions: int = 64) -> Tensor:
    """[T, n, 2] twice → [T]: the root of the mean over directions of W_2² between the projections."""
    angles = math.pi * torch.arange(directions) / directions
    onto = torch.stack([angles.cos(), angles.sin()])  # [2, directions]
    gaps = (first @ onto).sort(1).values - (second @ onto).sort(1).values
    return gaps.square().mean((1, 2)).sqrt()


def rounded(points: Tensor) -> list[Any]:
    """Of the tasks that are drawn, to a pixel."""
    return [[[round(x, 3) for x in point] for point in task] for task in points[:3].tolist()]


def fitted_gaussian(known: Tensor, count: int, random: torch.Generator) -> Tensor:
    """[T, shots, 2] → as many points [T, count, 2] of each task's Gaussian by mean and covariance."""
    mean = known.mean(1, keepdim=True)
    covariance = (known - mean).mT @ (known - mean) / (known.shape[1] - 1)
    drawn = torch.randn(len(known), count, 2, generator=random)
    return mean + drawn @ torch.linalg.cholesky(covariance).mT


def evaluate(game: Game, seed: int, report: Report) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Distances by name [test tasks], and curves and points for the picture."""
    size = game.size
    random = torch.Generator().manual_seed(seed + 10**6)
    tasks = Tasks.draw(size.test_tasks, random)
    known = tasks.sample(size.shots, random)
    target, other = (tasks.sample(size.measured, random) for _ in range(2))
    z = torch.randn(size.test_tasks, 1, size.measured, LATENT, generator=random)
    curves: dict[str, list[tuple[int, float]]] = {"meta-learned": [], "from scratch": []}
    again = torch.randint(size.shots, (size.test_tasks, size.measured, 1), generator=random)
    distances = {
        "floor": sliced_wasserstein(other, target),
        "Gaussian": sliced_wasserstein(fitted_gaussian(known, size.measured, random), target),
        "known": sliced_wasserstein(known.gather(1, again.expand(-1, -1, 2)), target),
    }
    shown: dict[str, Any] = {"target": rounded(target)}
    meta = (repeated(game.generator, size.test_tasks), repeated(game.critic, size.test_tasks))
    starts = {
        "meta-learned": (meta, 2 * size.steps),
        "from scratch": (fresh(size, size.test_tasks, seed), size.scratch_steps),
    }
    for number, (name, (start, steps)) in enumerate(starts.items()):

        def watch(step: int, generators: dict[str, Tensor], name: str = name, number: int = number) -> None:
            with torch.no_grad():
                made = game.generate(generators, z)[:, 0]
            distance = sliced_wasserstein(made, target)
            curves[name].append((step, distance.mean().item()))
            if step in (0, size.steps, size.scratch_steps):
                distances[f"{name}, {step}"] = distance
                shown[f"{name}, {step}"] = rounded(made)
            report(0.8 + 0.1 * number, f"{name}, step {step}")

        watch(0, start[0])
        game.play(start, known, steps, copy.deepcopy(random).manual_seed(seed + 1), watch)
    return distances, {"curves": curves, "shown": shown}


def rows(distances: dict[str, Tensor], size: Size) -> list[Row]:
    of = f"mean over {size.test_tasks} new tasks, sliced Wasserstein distance"
    names = {
        "meta-learned, 0": "meta-learned, before any step",
        f"meta-learned, {size.steps}": f"meta-learned, {size.steps} steps",
        f"from scratch, {size.steps}": f"random weights, {size.steps} steps",
        f"from scratch, {size.scratch_steps}": f"random weights, {size.scratch_steps} steps",
        "Gaussian": "no GAN: a Gaussian fitted to the known points",
        "known": "no GAN: the known points, drawn again",
        "floor": "two fresh samples of the same distribution",
    }
    return [mean_row(label, distances[name].tolist(), of) for name, label in names.items()]


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    size, shown = results.details["size"], results.details["shown"]
    figure = plt.figure(figsize=(11, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(0.8, 1))
    axis = left.subplots()
    for name, colour in (("meta-learned", OURS), ("from scratch", THEIRS)):
        steps, values = zip(*results.details["curves"][name], strict=True)
        axis.plot(
            steps, values, color=colour, lw=2, label="from random weights" if name != "meta-learned" else name
        )
    floor = next(row.ours for row in results.rows if row.quantity.startswith("two fresh"))
    axis.axhline(floor, color=TRUTH, lw=1, ls="--", label="two fresh samples")
    axis.axvline(size["steps"], color=PALE, lw=1, ls=":", label="steps in meta-training")
    axis.set(
        xlabel="steps of the generator on a new task", ylabel="sliced Wasserstein distance", xscale="symlog"
    )
    axis.set_xlim(left=0)
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False, fontsize=8.5)
    axis.set_title(f"A new distribution from {size['shots']} points")
    columns = {
        "meta-learned, 0": ("meta-learned,\nno step", THIRD),
        f"meta-learned, {size['steps']}": (f"meta-learned,\n{size['steps']} steps", OURS),
        f"from scratch, {size['steps']}": (f"from scratch,\n{size['steps']} steps", THEIRS),
        f"from scratch, {size['scratch_steps']}": (f"from scratch,\n{size['scratch_steps']} steps", THEIRS),
    }
    count = len(shown["target"])
    grid = right.subplots(count, len(columns), squeeze=False, sharex=True, sharey=True)
    for task, row in enumerate(grid):
        for axis, (name, (title, colour)) in zip(row, columns.items(), strict=True):
            for points, options in (
                (shown["target"][task], {"color": PALE, "s": 2, "alpha": 0.5}),
                (shown[name][task], {"color": colour, "s": 3, "alpha": 0.6}),
            ):
                x, y = zip(*points, strict=True)
                axis.scatter(x, y, lw=0, **options)
            axis.set(xlim=(-2.9, 2.9), ylim=(-2.9, 2.9), xticks=[], yticks=[], aspect="equal")
            if task == 0:
                axis.set_title(title, fontsize=9, color=colour)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    with common.progress("meta-GAN") as report:
        game, done = meta_train(size, options.seed, report)
        distances, details = evaluate(game, options.seed, report)
    differs = (
        "distributions in the plane in place of images of new classes, for which the source shows pictures "
        "and no figures; several tasks a meta-step in place of one, Adam in place of SGD in a task, and "
        f"{size.critic_steps} steps of the critic for one of the generator in place of one."
    )
    if done < size.meta_steps:
        differs += f" Stopped after {done} of {size.meta_steps} meta-steps."
    results = Results(
        "meta_gan",
        options.form,
        f"{done} meta-steps of Reptile on {size.tasks} tasks each; a task's GAN sees {size.shots} points "
        f"and takes {size.steps} steps of the generator and {size.critic_steps} of the critic for each, "
        f"λ = {size.penalty:g}, on {size.sets} sets of {size.points} points.",
        differs,
        rows(distances, size),
        {"size": asdict(size), **details},
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
