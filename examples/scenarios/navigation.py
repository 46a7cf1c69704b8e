"""2-D navigation: a policy that one step of the policy gradient takes to a new goal (MAML for RL).

    python examples/scenarios/navigation.py

A point starts in the middle of the unit square and is to reach a goal in it, drawn anew for each task, which
it is not shown. It sees its position; its velocity is clipped to [−0.1, 0.1] in each direction; the reward is
minus the squared distance to the goal; an episode ends within 0.01 of it or after 100 steps (Finn et al.
2017, arXiv 1703.03400, section 5.3 and appendix A.2). MAML seeks the policy that is best after one step of
the policy gradient, of size 0.1, on 20 episodes. In the test there are three steps, on 40 episodes each, the
later ones half as long. The source shows its returns in a plot alone (figure 4), and its program rewards
by the distance, not by its square; so no published number stands beside these.

Here the outer loop takes steps of Adam on the exact meta-gradient (`metattn.meta.maml_loss`), with a clipped
surrogate after adaptation (ProMP, Rothfuss et al. 2019, arXiv 1810.06784), where the source has TRPO. The
inner loss is −E[π/π₀·A]: its gradient is the policy gradient, and its second derivative that of the return
we expect (ProMP's low-variance curvature), which −E[log π·A] does not have. As in the authors' program
velocities are a tenth of the Gaussian policy's actions, a baseline linear in position, time and their powers
is fitted to every batch, and advantages are standardised.

Two policies are meta-learned: the source's network, which sees the position, and one that attends to the
episode so far, (position, last velocity, last reward) at each step, by a `metattn.nn.CausalBlock`: it can
make out where the goal is within an episode, and its meta-gradient is a second derivative of attention.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import common
import torch
from bandits import Kept, continued
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, mean_row
from torch import Tensor, nn
from torch.func import functional_call, vmap

from metattn.meta import SGD, adapt, maml_loss
from metattn.nn import CausalBlock

REACH, NEAR, FASTEST = 0.5, 0.01, 0.1  # goals within ±REACH; near enough; of a velocity's components
DISCOUNT, CLIP = 0.99, 0.2
INNER = 0.1  # size of the first inner step; of those after it, in the test, half as much
RATES = (0.05, 0.1, 0.2, 0.5, 1.0)  # of what was not trained for one: the best is taken
SHOWN = 4  # goals in the picture
MAML, ATTENTIVE = "MAML", "MAML, attention"
COLOURS = {"random": PALE, "pretrained": THEIRS, MAML: OURS, ATTENTIVE: THIRD}


@dataclass(frozen=True)
class Size:
    rounds: int  # of play and learning
    attentive: int  # rounds of the attentive policy
    tasks: int  # in a round
    episodes: int  # of a task, before and again after adaptation
    horizon: int
    updates: int  # of Adam, on a round's episodes
    rate: float
    width: int
    attention: int  # the attentive policy's width
    test: int  # goals
    shots: int  # episodes to adapt on in the test, and to be judged by
    steps: int  # inner steps in the test


SIZES = {
    "tiny": Size(8, 2, 6, 8, 20, 2, 1e-2, 16, 8, 6, 8, 1),
    "short": Size(45, 22, 20, 20, 100, 3, 5e-3, 64, 16, 40, 40, 3),
    "full": Size(500, 500, 20, 20, 100, 3, 1e-3, 100, 64, 40, 40, 3),
}

Params = Mapping[str, Tensor]


class Episodes(NamedTuple):
    """[tasks, episodes, steps, …]; `on` is False after an episode's end."""

    seen: Tensor  # what the policy sees [.., features]
    actions: Tensor  # [.., 2]
    rewards: Tensor
    on: Tensor  # bool
    logs: Tensor  # log-probabilities of the actions
    places: Tensor  # positions before the actions [.., 2]


def draw_goals(tasks: int, generator: torch.Generator) -> Tensor:
    """[tasks, 2], uniform in the square."""
    return REACH * (2 * torch.rand(tasks, 2, generator=generator) - 1)


def moved(places: Tensor, actions: Tensor) -> Tensor:
    return places + (FASTEST * actions).clamp(-FASTEST, FASTEST)


def log_probability(outputs: Tensor, actions: Tensor) -> Tensor:
    """Of actions [.., 2] under Gaussians; outputs [.., 4]: means and logarithms of deviations."""
    means, logs = outputs.chunk(2, -1)
    return -(0.5 * ((actions - means) / logs.exp()).square() + logs + 0.5 * math.log(2 * math.pi)).sum(-1)


def undirected(layer: nn.Linear) -> None:
    """A policy that begins without a direction."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class PositionPolicy(nn.Module):
    """position → mean of the action, by two hidden layers; a deviation of its own for each component."""

    features = 2

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, size.width), nn.ReLU(),
            nn.Linear(size.width, size.width), nn.ReLU(),
            nn.Linear(size.width, 2),
        )  # fmt: skip
        self.deviation = nn.Parameter(torch.zeros(2))  # its logarithm
        undirected(self.layers[-1])

    def forward(self, seen: Tensor) -> Tensor:
        """[.., 2] → [.., 4]."""
        means = self.layers(seen)
        return torch.cat((means, self.deviation.expand_as(means)), -1)

    def act(self, seen: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        """[episodes, features] of this step → outputs [episodes, 4], and what is to be kept for the next."""
        return self(seen), ()


class EpisodePolicy(nn.Module):
    """Attends to (position, last velocity, last reward) of all steps of the episode so far."""

    features = 5

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.attention
        self.embed = nn.Linear(self.features, width)
        self.block = CausalBlock(width, width // 8, hidden_dim=2 * width)
        self.norm = nn.LayerNorm(width)
        self.means = nn.Linear(width, 2)
        self.deviation = nn.Parameter(torch.zeros(2))
        undirected(self.means)

    def forward(self, seen: Tensor) -> Tensor:
        """[episodes, steps, 5] → [episodes, steps, 4]."""
        return self.read(self.block(self.embed(seen)))

    def read(self, x: Tensor) -> Tensor:
        means = self.means(self.norm(x))
        return torch.cat((means, self.deviation.expand_as(means)), -1)

    def act(self, seen: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        x, kept = continued(self.block, self.embed(seen.unsqueeze(1)), kept)
        return self.read(x).squeeze(1), kept


class Acting(nn.Module):
    """policy.act as a module's forward, which functional_call calls."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, seen: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        return self.policy.act(seen, kept)


def shared(policy: nn.Module, tasks: int) -> dict[str, Tensor]:
    """The policy's own parameters for every task: [tasks, ..], views."""
    return {name: value.detach().expand(tasks, *value.shape) for name, value in policy.named_parameters()}


@torch.no_grad()
def play(
    policy: nn.Module, params: Params, goals: Tensor, episodes: int, horizon: int, generator: torch.Generator
) -> Episodes:
    """Episodes of every task; params [tasks, ..], goals [tasks, 2]."""
    acting = Acting(policy)

    def act(params: Params, seen: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
        named = {f"policy.{name}": value for name, value in params.items()}
        return functional_call(acting, named, (seen, kept))

    shape = (len(goals), episodes)
    places, rewards = torch.zeros(*shape, 2), torch.zeros(*shape)
    velocities, on = torch.zeros(*shape, 2), torch.ones(*shape, dtype=torch.bool)
    kept: Kept = ()
    steps: list[tuple[Tensor, ...]] = []
    for _ in range(horizon):
        seen = torch.cat((places, velocities, rewards.unsqueeze(-1)), -1)[..., : policy.features]
        outputs, kept = vmap(act)(params, seen, kept)
        means, logs = outputs.chunk(2, -1)
        actions = means + logs.exp() * torch.randn(means.shape, generator=generator)
        following = moved(places, actions)
        distance = (following - goals.unsqueeze(1)).norm(dim=-1)
        rewards = torch.where(on, -distance.square(), 0.0)
        steps.append((seen, actions, rewards, on, log_probability(outputs, actions), places))
        velocities, places = following - places, following
        on = on & (distance >= NEAR)
    return Episodes(*(torch.stack(part, 2) for part in zip(*steps, strict=True)))


def standardised_advantages(episodes: Episodes) -> Tensor:
    """Discounted return to come − a baseline linear in position, time and powers, fitted to each task."""
    rewards, on = episodes.rewards, episodes.on.float()
    to_come = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[..., 0])
    for step in range(rewards.shape[2] - 1, -1, -1):
        following = rewards[..., step] + DISCOUNT * following
        to_come[..., step] = following
    now = (torch.arange(rewards.shape[2]) / 100).expand_as(rewards).unsqueeze(-1)
    places = episodes.places
    basis = torch.cat((places, places.square(), now, now.square(), now**3, torch.ones_like(now)), -1)
    basis, target = (basis * on.unsqueeze(-1)).flatten(1, 2).double(), (to_come * on).flatten(1, 2).double()
    square = basis.mT @ basis + 1e-5 * torch.eye(basis.shape[-1]).double()
    weights = torch.linalg.solve(square, basis.mT @ target.unsqueeze(-1))
    gains = (target - (basis @ weights).squeeze(-1)).float()
    number, valid = on.flatten(1).sum(1, keepdim=True), on.flatten(1)
    gains = (gains - (gains * valid).sum(1, keepdim=True) / number) * valid
    gains = gains / ((gains.square().sum(1, keepdim=True) / number).sqrt() + 1e-6)
    return gains.view_as(rewards)


class Targets(NamedTuple):
    """What the losses make of a policy's outputs: for one task, or with tasks in front."""

    actions: Tensor
    gains: Tensor  # advantages, 0 after an episode's end
    share: Tensor  # of each step in the mean over all steps that count
    logs: Tensor  # log π₀


def samples(episodes: Episodes) -> tuple[Tensor, Targets]:
    """As metattn.meta takes them."""
    on = episodes.on.float()
    share = on / on.sum((1, 2), keepdim=True)
    return episodes.seen, Targets(episodes.actions, standardised_advantages(episodes), share, episodes.logs)


def inner_loss(outputs: Tensor, targets: Targets) -> Tensor:
    """−E[r·A], r = π/π₀, π₀ the policy that the episodes were played by."""
    ratio = (log_probability(outputs, targets.actions) - targets.logs).exp()
    return -(ratio * targets.gains * targets.share).sum()


def outer_loss(outputs: Tensor, targets: Targets) -> Tensor:
    """−E[min(r·A, clip(r)·A)]."""
    ratio = (log_probability(outputs, targets.actions) - targets.logs).exp()
    worth = torch.minimum(ratio * targets.gains, ratio.clamp(1 - CLIP, 1 + CLIP) * targets.gains)
    return -(worth * targets.share).sum()


def adapted(policy: nn.Module, params: Params, episodes: Episodes, rate: float) -> dict[str, Tensor]:
    """One inner step on every task; params, before and after, [tasks, ..]."""

    def step(params: Params, seen: Tensor, targets: Targets) -> dict[str, Tensor]:
        return adapt(policy, params, inner_loss, (seen, targets), optimizer=SGD(rate), steps=1)

    with torch.no_grad():
        return vmap(step)(params, *samples(episodes))


def returns(episodes: Episodes) -> Tensor:
    """Mean undiscounted return of each task [tasks]."""
    return episodes.rewards.sum(2).mean(1)


@dataclass
class Trained:
    policy: nn.Module
    before: list[float] = field(default_factory=list)  # by round: mean return with the policy as it is
    after: list[float] = field(default_factory=list)  # and after an inner step


def train(
    kind: type[nn.Module], adapting: bool, rounds: int, size: Size, seed: int, report: Report
) -> Trained:
    """By MAML, or (not adapting) one policy for all goals; Ctrl-C ends it early with what there is."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = Trained(kind(size))
    policy = trained.policy
    optimizer = torch.optim.Adam(policy.parameters(), lr=size.rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, rounds), eta_min=size.rate / 10)
    with contextlib.suppress(KeyboardInterrupt):
        for turn in range(rounds):
            goals = draw_goals(size.tasks, generator)
            params = shared(policy, size.tasks)
            support = play(policy, params, goals, size.episodes, size.horizon, generator)
            trained.before.append(returns(support).mean().item())
            query = support
            if adapting:
                params = adapted(policy, params, support, INNER)
                query = play(policy, params, goals, size.episodes, size.horizon, generator)
            trained.after.append(returns(query).mean().item())
            known, judged = samples(support), samples(query)
            for _ in range(size.updates):
                optimizer.zero_grad()
                maml_loss(
                    policy,
                    dict(policy.named_parameters()),
                    inner_loss,
                    known,
                    judged,
                    optimizer=SGD(INNER),
                    steps=int(adapting),
                    outer_loss_fn=outer_loss,
                ).backward()
                nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
            schedule.step()
            remark = f"{kind.__name__}: return {trained.before[-1]:.1f} → {trained.after[-1]:.1f}"
            report(turn / rounds, remark)
    return trained


def straight(goals: Tensor, horizon: int) -> Tensor:
    """Returns [tasks] of whoever knows the goal and goes there without noise."""
    places, total, on = (
        torch.zeros_like(goals),
        torch.zeros(len(goals)),
        torch.ones(len(goals), dtype=torch.bool),
    )
    for _ in range(horizon):
        places = moved(places, (goals - places) / FASTEST)
        distance = (places - goals).norm(dim=-1)
        total = total - torch.where(on, distance.square(), 0.0)
        on = on & (distance >= NEAR)
    return total


@dataclass
class Judged:
    returns: list[list[float]]  # after 0, 1, … inner steps, of every goal
    paths: list[list[Any]]  # before and after all steps: of the first goals, one episode's positions each


def judge(policy: nn.Module, rate: float, goals: Tensor, size: Size, seed: int) -> Judged:
    """Inner steps on new goals, the first of size `rate` and the others half as long."""
    generator = torch.Generator().manual_seed(seed)
    params = shared(policy, len(goals))
    judged = Judged([], [])
    for step in range(size.steps + 1):
        episodes = play(policy, params, goals, size.shots, size.horizon, generator)
        judged.returns.append(returns(episodes).tolist())
        if step in (0, size.steps):
            judged.paths.append([
                [[round(number, 3) for number in place] for place in places[on].tolist()]
                for places, on in zip(episodes.places[:SHOWN, 0], episodes.on[:SHOWN, 0], strict=True)
            ])  # fmt: skip
        if step < size.steps:
            params = adapted(policy, params, episodes, rate if step == 0 else rate / 2)
    return judged


def tuned_rate(policy: nn.Module, size: Size, seed: int) -> float:
    """The inner step size with the best returns after a step and more, on goals of its own."""
    goals = draw_goals(max(2, size.test // 2), torch.Generator().manual_seed(seed + 2 * 10**6))

    def reached(rate: float) -> float:
        return torch.tensor(judge(policy, rate, goals, size, seed).returns[1:]).mean().item()

    return max(RATES, key=reached)


def quantity(name: str, steps: int) -> str:
    return f"{name}, {steps} step{'' if steps == 1 else 's'}"


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    details = results.details
    goals = details["goals"]
    figure, panels = plt.subplots(1, 4, figsize=(17, 4.4), layout="constrained")
    number = range(details["size"]["steps"] + 1)
    for name, colour in COLOURS.items():
        rows = [next(row for row in results.rows if row.quantity == quantity(name, step)) for step in number]
        lost, errors = [-row.ours for row in rows], [row.error or 0.0 for row in rows]
        panels[0].errorbar(number, lost, yerr=errors, color=colour, marker="o", capsize=3, lw=2, label=name)
    panels[0].axhline(-results.rows[-1].ours, color=TRUTH, ls=":", lw=1.8, label="straight to the goal")
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    panels[0].set(yscale="log", xlabel="gradient steps on a new goal", ylabel="− return (log scale)")
    panels[0].invert_yaxis()
    panels[0].set_title("New goals (up is better)")
    panels[0].set_ylim(bottom=2000)  # room for the legend
    panels[0].legend(frameon=False, fontsize=8, loc="lower left", ncol=2)
    for name, (before, after) in details["learning"].items():
        panels[1].plot(
            [-one for one in after],
            color=COLOURS[name],
            lw=1.8,
            label=name if before == after else f"{name}, after a step",
        )
        if before != after:
            panels[1].plot([-one for one in before], color=COLOURS[name], lw=1.2, alpha=0.5, ls="--",
                           label=f"{name}, before")  # fmt: skip
    panels[1].set(yscale="log", xlabel="round of training", ylabel="− return (log scale)")
    panels[1].invert_yaxis()
    panels[1].set_title("Training")
    panels[1].legend(frameon=False, fontsize=8)
    for panel, name in zip(panels[2:], (MAML, ATTENTIVE), strict=True):
        before, after = details["paths"][name]
        shades = ("#1b6ca8", "#b04a3a", "#6a9a3b", "#8a6fb0")
        for path in before:
            panel.plot(*zip(*path, strict=True), color=PALE, lw=0.5, alpha=0.7)
        for path, goal, shade in zip(after, goals, shades, strict=False):
            panel.plot(*zip(*path, strict=True), color=shade, lw=0.8)
            panel.plot(*goal, "*", color=shade, ms=17, mec="white", zorder=5)
        panel.set(
            xlabel="stars: goals, in their episodes' colours",
            xlim=(-0.75, 0.75),
            ylim=(-0.75, 0.75),
            aspect="equal",
        )
        panel.set_title(f"{name}: before (grey), after")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size, seed = SIZES[options.form], options.seed
    plans = {  # kind, whether it is meta-learned, rounds
        MAML: (PositionPolicy, True, size.rounds),
        "pretrained": (PositionPolicy, False, size.rounds),
        "random": (PositionPolicy, False, 0),
        ATTENTIVE: (EpisodePolicy, True, size.attentive),
    }
    goals = draw_goals(size.test, torch.Generator().manual_seed(seed + 10**6))
    learning: dict[str, Any] = {}
    judged: dict[str, Judged] = {}
    tuned: dict[str, float] = {}
    seconds: dict[str, float] = {}
    with common.progress("navigation") as report:
        for place, (name, (kind, adapting, rounds)) in enumerate(plans.items()):

            def part(done: float, remark: str, place: int = place) -> None:
                report((place + done) / len(plans), remark)

            begun = time.process_time()
            trained = train(kind, adapting, rounds, size, seed, part)
            if rounds:
                learning[name] = (trained.before, trained.after)
            tuned[name] = INNER if adapting else tuned_rate(trained.policy, size, seed)
            judged[name] = judge(trained.policy, tuned[name], goals, size, seed)
            seconds[name] = time.process_time() - begun
    differs = "a clipped surrogate and Adam for TRPO, ProMP's curvature in the inner loss."
    if options.form != "full":
        differs = f"{differs} A smaller network and fewer rounds than in the full form."
    stopped = [name for name, (before, _) in learning.items() if len(before) < plans[name][2]]
    if stopped:
        differs = f"{differs} Stopped early: {', '.join(stopped)}."
    of = f"return, mean over {size.test} goals, {size.shots} episodes each"
    rows = [
        mean_row(quantity(name, step), reached, of, better="higher")
        for name, one in judged.items()
        for step, reached in enumerate(one.returns)
    ]
    rows.append(mean_row("straight to the goal", straight(goals, size.horizon).tolist(), of, better="higher"))
    results = Results(
        "navigation",
        options.form,
        f"{size.rounds} rounds ({size.attentive} with attention) of {size.tasks} goals, each with "
        f"{size.episodes} episodes of {size.horizon} steps before and after an inner step of {INNER}; "
        f"{size.updates} steps of Adam a round. Tested with inner steps of {INNER}, then {INNER / 2}, on "
        f"{size.shots} episodes; pretrained and random with the best of {RATES} for {INNER}.",
        differs,
        rows,
        {
            "size": asdict(size),
            "learning": learning,
            "goals": goals[:SHOWN].tolist(),
            "paths": {name: one.paths for name, one in judged.items()},
            "inner step": tuned,
            "CPU seconds": seconds,
        },
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
