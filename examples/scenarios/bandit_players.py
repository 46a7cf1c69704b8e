"""Bandits, and who plays them beside the Transformer: the optimum, Gittins, UCB1, Thompson, random."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy
import torch
from torch import Tensor

# (arms pulled so far [episodes, t], what they paid) → the arms to pull now [episodes]
Player = Callable[[Tensor, Tensor], Tensor]


def draw_bandits(episodes: int, arms: int, generator: torch.Generator) -> Tensor:
    """Chances [episodes, arms], uniform in [0, 1]."""
    return torch.rand(episodes, arms, generator=generator)


def play(player: Player, chances: Tensor, pulls: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Arms and rewards [episodes, pulls] of one episode with each bandit; chances [episodes, arms]."""
    pulled = torch.empty(len(chances), 0, dtype=torch.long)
    paid = torch.empty(len(chances), 0)
    for _ in range(pulls):
        arm = player(pulled, paid).unsqueeze(1)
        luck = torch.rand(len(chances), 1, generator=generator)
        pulled = torch.cat((pulled, arm), 1)
        paid = torch.cat((paid, (luck < chances.gather(1, arm)).float()), 1)
    return pulled, paid


def counts(pulled: Tensor, paid: Tensor, arms: int) -> tuple[Tensor, Tensor]:
    """Successes and failures [episodes, arms]."""
    zeros = torch.zeros(len(pulled), arms, dtype=paid.dtype)
    return zeros.scatter_add(1, pulled, paid), zeros.scatter_add(1, pulled, 1 - paid)


def exact_rewards(player: Player, pulls: int, arms: int) -> list[float]:
    """Expected reward of each pull for a player that does not draw, by all 2^pulls histories."""
    pulled, paid = torch.empty(1, 0, dtype=torch.long), torch.empty(1, 0, dtype=torch.float64)
    weight, expected = torch.ones(1, dtype=torch.float64), []
    for _ in range(pulls):
        arm = player(pulled, paid.float()).unsqueeze(1)
        wins, losses = counts(pulled, paid, arms)
        chance = ((wins + 1) / (wins + losses + 2)).gather(1, arm).squeeze(1)  # of Beta(wins + 1, losses + 1)
        expected.append(float((weight * chance).sum()))
        weight = torch.cat((weight * (1 - chance), weight * chance))
        pulled = torch.cat((pulled, arm), 1).repeat(2, 1)
        paid = torch.cat((paid.repeat(2, 1), torch.arange(2.0).repeat_interleave(len(arm)).unsqueeze(1)), 1)
    return expected


Hand = tuple[tuple[int, int], ...]  # (successes, failures) of the arms that were pulled, in order


def after(hand: Hand, arm: tuple[int, int] | None) -> tuple[float, Hand, Hand]:
    """The chance that an arm pays (None: one never pulled), and the hands after it did and did not."""
    wins, losses = arm or (0, 0)
    rest = list(hand)
    if arm:
        rest.remove(arm)
    won, lost = (tuple(sorted([*rest, new])) for new in ((wins + 1, losses), (wins, losses + 1)))
    return (wins + 1) / (wins + losses + 2), won, lost


def optimal_rewards(pulls: int, arms: int) -> list[float]:
    """Expected reward of each pull for the best policy there is (Bayes-optimal, finite horizon), exactly."""

    @cache
    def best(hand: Hand, left: int) -> tuple[float, tuple[int, int] | None]:
        if left == 0:
            return 0.0, None
        choices: list[tuple[int, int] | None] = [*sorted(set(hand)), *([None] if len(hand) < arms else [])]
        values = []
        for arm in choices:
            chance, won, lost = after(hand, arm)
            values.append(chance * (1 + best(won, left - 1)[0]) + (1 - chance) * best(lost, left - 1)[0])
        top = max(range(len(choices)), key=values.__getitem__)
        return values[top], choices[top]

    reached: dict[Hand, float] = {(): 1.0}
    expected = []
    for left in range(pulls, 0, -1):
        following: dict[Hand, float] = {}
        total = 0.0
        for hand, weight in reached.items():
            chance, won, lost = after(hand, best(hand, left)[1])
            total += weight * chance
            for new, share in ((won, chance), (lost, 1 - chance)):
                following[new] = following.get(new, 0.0) + weight * share
        reached = following
        expected.append(total)
    return expected


def gittins_indices(pulls: int, levels: int = 2001) -> Tensor:
    """[left, successes, failures]: the λ of a sure arm that is worth as much, to 1 / (levels − 1).

    Finite-horizon Gittins indices: V_h(λ) = max(0, p − λ + p·V_{h−1}(won) + (1 − p)·V_{h−1}(lost)).
    """
    wins, losses = torch.meshgrid(*2 * [torch.arange(pulls + 1.0)], indexing="ij")
    chance = (wins + 1) / (wins + losses + 2)
    indices = torch.zeros(pulls + 1, pulls + 1, pulls + 1)
    for sure in torch.linspace(0, 1, levels).split(101):
        gain = torch.zeros(len(sure), pulls + 1, pulls + 1)
        for left in range(1, pulls + 1):
            won, lost = torch.zeros_like(gain), torch.zeros_like(gain)
            won[:, :-1], lost[:, :, :-1] = gain[:, 1:], gain[:, :, 1:]
            worth = chance - sure[:, None, None] + chance * won + (1 - chance) * lost
            highest = torch.where(worth >= 0, sure[:, None, None], 0.0).amax(0)
            indices[left] = torch.maximum(indices[left], highest)
            gain = worth.clamp_min(0)
    return indices


def first_best(scores: Tensor) -> Tensor:
    """Of equally good arms the first, so that no draw is needed; arms are alike before they are pulled."""
    return scores.argmax(1)


def gittins(pulls: int, arms: int) -> Player:
    indices = gittins_indices(pulls)

    def player(pulled: Tensor, paid: Tensor) -> Tensor:
        wins, losses = (count.long() for count in counts(pulled, paid, arms))
        return first_best(indices[pulls - pulled.shape[1]][wins, losses])

    return player


def upper_confidence(arms: int, width: float) -> Player:
    """UCB1 with statistics that begin with a success and a failure, as in RL²; width 0 is greedy."""

    def player(pulled: Tensor, paid: Tensor) -> Tensor:
        wins, losses = counts(pulled, paid, arms)
        number = wins + losses + 2
        now = math.log(2 * arms + pulled.shape[1])
        return first_best((wins + 1) / number + width * (2 * now / number).sqrt())

    return player


def thompson(arms: int, seed: int, optimistic: bool = False) -> Player:
    """Each arm by a draw from its posterior; optimistic: by the posterior's mean where that is more."""
    generator = numpy.random.default_rng(seed)

    def player(pulled: Tensor, paid: Tensor) -> Tensor:
        wins, losses = (count + 1 for count in counts(pulled, paid, arms))
        drawn = torch.from_numpy(generator.beta(wins.numpy(), losses.numpy()))
        return first_best(torch.maximum(drawn, wins / (wins + losses)) if optimistic else drawn)

    return player


def uniform(arms: int, generator: torch.Generator) -> Player:
    return lambda pulled, paid: torch.randint(arms, (len(pulled),), generator=generator)


# keys and values of the positions so far, each [episodes, heads, t, width / heads]; () before the first
