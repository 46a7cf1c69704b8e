"""Bernoulli bandits: exact oracles against each other and by hand, the policy's decoder, the tiny form."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "scenarios"))

import bandit_players
import bandits
from bandits import SIZES, Player, Policy

TINY = SIZES["tiny"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within(values: Tensor, wanted: float) -> bool:
    """To four standard errors."""
    return bool(abs(values.mean() - wanted) < 4 * values.std() / len(values) ** 0.5)


def test_the_tiny_form_runs_and_learns(tmp_path: Path) -> None:
    bandits.main(["--tiny", "--seed", "2", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "bandits-tiny.json").read_text())
    assert (tmp_path / "bandits-tiny.png").stat().st_size > 10_000
    rows = {row["quantity"].partition(": ")[2]: row["ours"] for row in written["rows"]}
    assert all(math.isfinite(value) for value in rows.values())
    (setup,) = written["details"]["setups"]
    assert len(setup["curve"]) == TINY.rounds
    assert rows["best possible"] >= rows["Transformer, expected"] > rows["Thompson"] > rows["random"]
    assert rows["Transformer, expected"] > 2.2  # random 2, greedy 2.272, the best 2.278


def test_training_repeats_by_its_seed() -> None:
    size = replace(TINY, rounds=3)
    curves = [bandits.train(4, 2, size, 7, lambda done, remark: None).curve for _ in range(2)]
    assert curves[0] == curves[1]
    assert curves[0] != bandits.train(4, 2, size, 8, lambda done, remark: None).curve


def test_ctrl_c_ends_training_with_what_there_is() -> None:
    def stop(done: float, remark: str) -> None:
        if done > 0:
            raise KeyboardInterrupt

    assert len(bandits.train(4, 2, TINY, 7, stop).curve) == 2


def test_bandits_pay_by_their_chances() -> None:
    chances = bandits.draw_bandits(20_000, 3, generator())
    assert within(chances[:, 0], 0.5)
    assert within(chances[:, 1].square(), 1 / 3)
    assert within(chances.amax(1), 3 / 4)
    pulled, paid = bandits.play(lambda pulled, paid: torch.full((len(pulled),), 1), chances, 2, generator(1))
    assert (pulled == 1).all()
    assert within(paid[:, 0] * paid[:, 1], 1 / 3)  # E p²: both pulls of an episode are of one bandit
    assert within((paid[:, 0] - chances[:, 1]), 0.0)
    assert within((paid[:, 0] - chances[:, 1]) * chances[:, 1], 0.0)


def test_successes_and_failures() -> None:
    pulled, paid = torch.tensor([[2, 0, 2, 2], [1, 1, 1, 1]]), torch.tensor([[1.0, 0, 1, 0], [0.0, 0, 1, 0]])
    wins, losses = bandit_players.counts(pulled, paid, 3)
    assert wins.tolist() == [[0, 0, 2], [0, 1, 0]]
    assert losses.tolist() == [[1, 0, 1], [0, 3, 0]]


def test_the_optimum_by_hand() -> None:
    """One arm: always a half. Two pulls: stay after a success (2/3), change after a failure (1/2)."""
    assert bandits.optimal_rewards(6, 1) == pytest.approx(6 * [0.5])
    assert bandits.optimal_rewards(2, 2) == pytest.approx([1 / 2, 1 / 2 * 2 / 3 + 1 / 2 * 1 / 2])


def test_the_optimum_is_the_best_of_all_policies() -> None:
    """Two arms, three pulls: 2⁷ policies, one choice for each history."""
    histories = [history for length in range(3) for history in itertools.product((0, 1), repeat=length)]

    def worth(choices: dict[tuple[int, ...], int]) -> float:
        def player(pulled: Tensor, paid: Tensor) -> Tensor:
            return torch.tensor([choices[tuple(row)] for row in paid.long().tolist()])

        return sum(bandits.exact_rewards(player, 3, 2))

    worths = [
        worth(dict(zip(histories, arms, strict=True)))
        for arms in itertools.product((0, 1), repeat=len(histories))
    ]
    assert max(worths) == pytest.approx(sum(bandits.optimal_rewards(3, 2)), abs=1e-12)


def test_the_published_setups() -> None:
    """6.6 by Gittins' indices and 5.0 at random for 10 pulls of 5 arms; more than 10 arms help nobody."""
    best = sum(bandits.optimal_rewards(10, 5))
    assert best == pytest.approx(6.65998787, abs=1e-8)
    assert bandits.optimal_rewards(10, 50) == bandits.optimal_rewards(10, 10)
    index = sum(bandits.exact_rewards(bandits.gittins(10, 5), 10, 5))
    assert 6.55 <= index <= best + 1e-9
    greedy = sum(bandits.exact_rewards(bandits.upper_confidence(5, 0.0), 10, 5))
    assert greedy < index
    chances = bandits.draw_bandits(20_000, 5, generator(3))
    assert within(bandits.play(bandits.uniform(5, generator(4)), chances, 10, generator(5))[1].sum(1), 5.0)


def test_indices_of_gittins() -> None:
    """One pull left: the arm's mean. Two: λ with p − λ + p·(p' − λ) = 0, p' = (s + 2) / (s + f + 3)."""
    indices = bandit_players.gittins_indices(5, levels=4001)
    wins, losses = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    chance, won = (wins + 1) / (wins + losses + 2), (wins + 2) / (wins + losses + 3)
    torch.testing.assert_close(indices[1, :4, :4], chance, rtol=0, atol=2.6e-4)
    torch.testing.assert_close(indices[2, :4, :4], chance * (1 + won) / (1 + chance), rtol=0, atol=2.6e-4)
    inside = indices[1:, :2, :2]  # whatever is ahead is inside the table
    assert (inside[1:] - inside[:-1]).min() >= 0  # more pulls left, more to be learned


@pytest.mark.parametrize("name", ["greedy", "gittins", "policy"])
def test_exact_rewards_are_those_of_play(name: str) -> None:
    torch.manual_seed(0)
    policy = Policy(5, 3, TINY)
    torch.nn.init.normal_(policy.head.weight)
    players: dict[str, Player] = {
        "greedy": bandits.upper_confidence(3, 0.0),
        "gittins": bandits.gittins(5, 3),
        "policy": policy.likeliest,
    }
    with torch.no_grad():
        exact = bandits.exact_rewards(players[name], 5, 3)
        chances = bandits.draw_bandits(20_000, 3, generator(6))
        paid = bandits.play(players[name], chances, 5, generator(7))[1]
    assert all(within(paid[:, index], wanted) for index, wanted in enumerate(exact))


def test_thompson_draws_from_the_posterior() -> None:
    """After a success of arm 0 and a failure of arm 1: P(Beta(2, 1) > Beta(1, 2)) = 5/6."""
    pulled, paid = torch.tensor([[0, 1]]).expand(20_000, 2), torch.tensor([[1.0, 0.0]]).expand(20_000, 2)
    assert within((bandits.thompson(2, 0)(pulled, paid) == 0).double(), 5 / 6)
    assert (bandits.thompson(2, 0, optimistic=True)(pulled, paid) == 0).float().mean() > 5 / 6 + 0.02


def test_the_decoder_is_the_policy() -> None:
    torch.manual_seed(1)
    policy = Policy(6, 4, replace(TINY, layers=2))
    torch.nn.init.normal_(policy.head.weight)
    step = policy.decoder()
    with torch.no_grad():
        for _ in range(2):  # it begins anew with every run
            pulled, paid = torch.randint(4, (5, 5)), torch.randint(2, (5, 5)).float()
            logits, values = policy(pulled, paid)
            for index in range(6):
                one = step(pulled[:, :index], paid[:, :index])
                torch.testing.assert_close(one[0], logits[:, index], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(one[1], values[:, index], rtol=1e-4, atol=1e-5)


def test_advantages_by_the_formula() -> None:
    paid, values = torch.rand(3, 4, generator=generator()), torch.rand(3, 4, generator=generator(1))
    found = bandits.advantages(paid, values)
    following = torch.cat((values, torch.zeros(3, 1)), 1)
    errors = [paid[:, t] + following[:, t + 1] - following[:, t] for t in range(4)]
    for t in range(4):
        wanted = sum(bandits.TRACE ** (i - t) * errors[i] for i in range(t, 4))
        torch.testing.assert_close(found[:, t], wanted)
