"""Bernoulli bandits: a causal Transformer learns from reward alone to explore, and then to exploit.

    python examples/scenarios/bandits.py

An episode is a new bandit of K arms, each of which pays 1 with a chance p ~ U[0, 1] of its own, and N pulls.
The policy is never told the chances: at each pull it sees which arms it pulled in this episode and what they
paid. All it learns within an episode it learns by attention, without a gradient step (RL², Duan et al. 2016,
arXiv 1611.02779; SNAIL, Mishra et al. 2018, arXiv 1707.03141, section 5.2.1). It is a stack of
`metattn.nn.CausalBlock` over tokens (last arm, last reward, time), trained by proximal policy gradients
(Schulman et al. 2017, arXiv 1707.06347) with generalised advantages; pulls are decoded with a cache.

In both sources' tables N counts pulls and K counts arms; the figure is an episode's total reward, on average.
The prior is known, so there is more to compare with. For N = 10 the best that any policy can do is computed
exactly, by dynamic programming over multisets of (successes, failures): no more than 10 arms are touched, so
that 4435 states do, for 50 arms as for 10. A policy that does not draw has 2¹⁰ reward sequences, over which
its expected reward is summed exactly too. Our Gittins indices are those of the finite horizon; the sources'
are a discounted approximation.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import common
import torch
from bandit_players import (
    Player,
    draw_bandits,
    exact_rewards,
    first_best,
    gittins,
    optimal_rewards,
    play,
    thompson,
    uniform,
    upper_confidence,
)
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn
from torch.nn.functional import log_softmax, mse_loss

from metattn import attention
from metattn.nn import CausalBlock

SNAIL = "arXiv 1707.03141, table 3"
# total reward by (pulls, arms): Gittins, random and RL² as in both papers, SNAIL as in its own
PUBLISHED: dict[tuple[int, int], dict[str, str]] = {
    (10, 5): {"Gittins": "6.6", "random": "5.0", "RL²": "6.7", "SNAIL": "6.6 ± 0.1"},
    (10, 10): {"Gittins": "6.6", "random": "5.0", "RL²": "6.7", "SNAIL": "6.7 ± 0.1"},
    (10, 50): {"Gittins": "6.5", "random": "5.1", "RL²": "6.8", "SNAIL": "6.7 ± 0.1"},
    (100, 5): {"Gittins": "78.3", "random": "49.9", "RL²": "78.7", "SNAIL": "79.1 ± 1.0"},
    (100, 10): {"Gittins": "82.8", "random": "49.9", "RL²": "83.5", "SNAIL": "83.5 ± 0.8"},
    (100, 50): {"Gittins": "85.2", "random": "49.8", "RL²": "84.9", "SNAIL": "85.1 ± 0.6"},
}
EXACT = 10  # pulls up to which expectations are summed exactly
TRACE = 0.3  # λ of the advantages, as in both sources
CLIP = 0.2
CONFIDENCES = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)  # of UCB1, the best is taken
OUR_NAME = "Transformer"


@dataclass(frozen=True)
class Size:
    setups: tuple[tuple[int, int], ...]  # (pulls, arms)
    rounds: int  # of play and then learning from it
    pulls: int  # of all episodes of a round
    epochs: int  # passes over a round's episodes
    batches: int  # in a pass
    rate: float
    entropy: float  # its weight at first; it falls to 0 with the rate
    width: int
    layers: int
    heads: int
    test: int  # episodes


SIZES = {
    "tiny": Size(((4, 2),), 25, 1200, 2, 2, 1e-2, 0.02, 16, 1, 2, 4000),
    "short": Size(((10, 5),), 150, 20_000, 3, 4, 5e-3, 0.02, 32, 2, 2, 40_000),
    "full": Size(tuple(PUBLISHED), 300, 100_000, 4, 8, 2e-3, 0.02, 64, 3, 4, 40_000),
}

Kept = tuple[Tensor, ...]


def continued(block: CausalBlock, x: Tensor, kept: Kept) -> tuple[Tensor, Kept]:
    """The block's output for one position more, x [episodes, 1, width], and what the next one needs."""
    heads = block.qkv(block.norm(x)).unflatten(-1, (3, block.num_heads, -1))
    q, k, v = heads.permute(2, 0, 3, 1, 4)
    if kept:
        k, v = torch.cat((kept[0], k), 2), torch.cat((kept[1], v), 2)
    x = x + block.project(attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.mlp(x), (k, v)


class Policy(nn.Module):
    """A causal Transformer over (last arm, last reward, time): the arms' logits, and the reward to come."""

    def __init__(self, pulls: int, arms: int, size: Size) -> None:
        super().__init__()
        self.event = nn.Embedding(2 * arms + 1, size.width)  # nothing yet, or an arm and what it paid
        self.time = nn.Embedding(pulls, size.width)
        self.blocks = nn.ModuleList(
            CausalBlock(size.width, size.heads, hidden_dim=2 * size.width) for _ in range(size.layers)
        )
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, arms + 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, pulled: Tensor, paid: Tensor) -> tuple[Tensor, Tensor]:
        """Arms and rewards [episodes, t] → logits [episodes, t + 1, arms], values [episodes, t + 1]."""
        x = self.event(events(pulled, paid)) + self.time.weight[: pulled.shape[1] + 1]
        for block in self.blocks:
            x = block(x)
        return self.read(x)

    def read(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.head(self.norm(x))
        return out[..., :-1], out[..., -1]

    def likeliest(self, pulled: Tensor, paid: Tensor) -> Tensor:
        """A player that does not draw."""
        return first_best(self(pulled, paid)[0][:, -1])

    def decoder(self) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The same for the last position alone, pull after pull: earlier keys and values are kept."""
        kept: list[Kept] = []

        def step(pulled: Tensor, paid: Tensor) -> tuple[Tensor, Tensor]:
            if pulled.shape[1] == 0:
                kept[:] = [()] * len(self.blocks)
            x = self.event(events(pulled[:, -1:], paid[:, -1:])[:, -1:]) + self.time.weight[pulled.shape[1]]
            for place, block in enumerate(self.blocks):
                x, kept[place] = continued(block, x, kept[place])
            logits, value = self.read(x)
            return logits[:, 0], value[:, 0]

        return step


def events(pulled: Tensor, paid: Tensor) -> Tensor:
    """[episodes, t] → [episodes, t + 1]: 0, then 1 + 2·arm + reward."""
    return torch.cat((torch.zeros(len(pulled), 1).long(), 1 + 2 * pulled + paid.long()), 1)


def drawing(policy: Policy, generator: torch.Generator, logs: list[Tensor], values: list[Tensor]) -> Player:
    """The policy as it is trained: arms drawn; writes down their log-probabilities and the values."""
    step = policy.decoder()

    def player(pulled: Tensor, paid: Tensor) -> Tensor:
        logits, value = step(pulled, paid)
        arm = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        logs.append(log_softmax(logits, -1).gather(1, arm))
        values.append(value.unsqueeze(1))
        return arm.squeeze(1)

    return player


def decoded(policy: Policy) -> Player:
    """As policy.likeliest, without beginning anew at every pull."""
    step = policy.decoder()
    return lambda pulled, paid: first_best(step(pulled, paid)[0])


def advantages(paid: Tensor, values: Tensor) -> Tensor:
    """A_t = Σ_i λ^i·δ_{t+i},  δ_t = r_t + V_{t+1} − V_t,  0 beyond the last pull; all [episodes, pulls]."""
    found = paid + torch.cat((values[:, 1:], torch.zeros(len(values), 1)), 1) - values
    for index in range(paid.shape[1] - 2, -1, -1):
        found[:, index] += TRACE * found[:, index + 1]
    return found


@dataclass
class Trained:
    policy: Policy
    curve: list[tuple[int, float]] = field(default_factory=list)  # episodes so far, reward of the next


def train(pulls: int, arms: int, size: Size, seed: int, report: Report) -> Trained:
    """Rounds of play and of learning from it; Ctrl-C ends it early with what there is."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    trained = Trained(Policy(pulls, arms, size))
    policy, episodes = trained.policy, size.pulls // pulls
    optimizer = torch.optim.Adam(policy.parameters(), lr=size.rate, betas=(0.9, 0.99), fused=True)
    with contextlib.suppress(KeyboardInterrupt):
        for turn in range(size.rounds):
            left = 1 - turn / size.rounds
            for group in optimizer.param_groups:
                group["lr"] = size.rate * min(1.0, 10 * (1 - left) + 0.1) * left
            logs: list[Tensor] = []
            values: list[Tensor] = []
            with torch.no_grad():
                player = drawing(policy, generator, logs, values)
                pulled, paid = play(player, draw_bandits(episodes, arms, generator), pulls, generator)
            trained.curve.append((turn * episodes, paid.sum(1).mean().item()))
            played = (pulled, paid, torch.cat(logs, 1), torch.cat(values, 1))
            learn(policy, optimizer, played, size, size.entropy * left, generator)
            report(turn / size.rounds, f"N={pulls}, K={arms}: reward {trained.curve[-1][1]:.3f}")
    return trained


def learn(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    played: tuple[Tensor, Tensor, Tensor, Tensor],
    size: Size,
    entropy: float,
    generator: torch.Generator,
) -> None:
    """Steps on the clipped surrogate, the values' squared error and the policy's entropy."""
    pulled, paid, before, values = played
    gains = advantages(paid, values)
    targets = gains + values
    gains = (gains - gains.mean()) / (gains.std() + 1e-6)
    for _ in range(size.epochs):
        for rows in torch.randperm(len(pulled), generator=generator).chunk(size.batches):
            logits, predicted = policy(pulled[rows, :-1], paid[rows, :-1])
            logs = log_softmax(logits, -1)
            ratio = (logs.gather(2, pulled[rows].unsqueeze(2)).squeeze(2) - before[rows]).exp()
            gain = gains[rows]
            surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
            spread = -(logs.exp() * logs).sum(-1).mean()
            loss = 0.5 * mse_loss(predicted, targets[rows]) - surrogate - entropy * spread
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
            optimizer.step()


def value(player: Player, pulls: int, arms: int, seed: int) -> float:
    """Total reward, exactly where that is possible, for a player that does not draw."""
    if pulls <= EXACT:
        return sum(exact_rewards(player, pulls, arms))
    generator = torch.Generator().manual_seed(seed)
    return play(player, draw_bandits(4000, arms, generator), pulls, generator)[1].sum(1).mean().item()


@torch.no_grad()
def judge(trained: Trained, pulls: int, arms: int, size: Size, seed: int) -> dict[str, Any]:
    """Total rewards of the players over the same test bandits, and their expected reward by pull."""
    generator = torch.Generator().manual_seed(seed + 10**6)
    width = max(CONFIDENCES, key=lambda width: value(upper_confidence(arms, width), pulls, arms, seed))
    fixed = {
        OUR_NAME: trained.policy.likeliest,
        "Gittins": gittins(pulls, arms),
        f"UCB1, c = {width}": upper_confidence(arms, width),
        "greedy": upper_confidence(arms, 0.0),
    }
    players = {
        **fixed,
        OUR_NAME: decoded(trained.policy),
        "Thompson": thompson(arms, seed),
        "random": uniform(arms, generator),
    }
    chances = draw_bandits(size.test, arms, generator)
    totals, by_pull = {}, {}
    for name, player in players.items():
        paid = torch.cat([play(player, part, pulls, generator)[1] for part in chances.split(40_000 // pulls)])
        totals[name] = paid.sum(1).tolist()
        by_pull[name] = paid.mean(0).tolist()
    if pulls <= EXACT:
        by_pull |= {name: exact_rewards(player, pulls, arms) for name, player in fixed.items()}
        by_pull["optimum"] = optimal_rewards(pulls, arms)
    return {"pulls": pulls, "arms": arms, "totals": totals, "by pull": by_pull, "curve": trained.curve}


def rows(found: dict[str, Any]) -> list[Row]:
    by_pull, setup = found["by pull"], f"N={found['pulls']}, K={found['arms']}"
    published = PUBLISHED.get((found["pulls"], found["arms"]), {})
    beside = {name: (published[name], SNAIL) for name in ("Gittins", "random") if published}
    if published:
        beside[OUR_NAME] = (f"SNAIL {published['SNAIL']}, RL² {published['RL²']}", SNAIL)
    made = []
    for name, totals in found["totals"].items():
        figure, source = beside.get(name, ("", ""))
        of = f"total reward, mean over {len(totals)} episodes"
        made.append(
            mean_row(f"{setup}: {name}", totals, of, published=figure, source=source, better="higher")
        )
    if "optimum" in by_pull:
        for quantity, name in ((f"{OUR_NAME}, expected", OUR_NAME), ("best possible", "optimum")):
            of = "total reward, exactly"
            made.append(Row(f"{setup}: {quantity}", sum(by_pull[name]), None, of, better="higher"))
    return made


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    setups = results.details["setups"]
    figure, panels = plt.subplots(
        len(setups), 3, figsize=(14, 3.9 * len(setups)), layout="constrained", squeeze=False
    )
    for (learning, regret, compared), setup in zip(panels, setups, strict=True):
        pulls, arms, by_pull = setup["pulls"], setup["arms"], setup["by pull"]
        published = PUBLISHED.get((pulls, arms), {})
        names = [name for name in by_pull if name != "optimum"]
        colours = dict(zip(names, (OURS, THEIRS, THIRD, "#c99a5b", "#8a6fb0", PALE), strict=True))
        played, reward = zip(*setup["curve"], strict=True)
        learning.plot(
            [one / 1000 for one in played], reward, color=OURS, lw=1.6, label="Transformer, arms drawn"
        )
        lines = [("random", pulls / 2, PALE), ("greedy", sum(by_pull["greedy"]), "#c99a5b")]
        lines += [("best possible", sum(by_pull["optimum"]), TRUTH)] if "optimum" in by_pull else []
        for name, height, colour in lines:
            learning.axhline(height, color=colour, ls="--", lw=1.2, label=name)
        learning.set(xlabel="thousands of episodes played", ylabel="total reward of an episode")
        learning.set_title(f"Learning: N={pulls} pulls of K={arms} arms")
        learning.legend(frameon=False, loc="center right")
        number = range(1, pulls + 1)
        for name in names:
            best = arms / (arms + 1)  # E max p
            thick = 2.6 if name == OUR_NAME else 1.5
            regret.plot(
                number, [best - one for one in by_pull[name]], color=colours[name], lw=thick, label=name
            )
        if "optimum" in by_pull:
            lost = [best - one for one in by_pull["optimum"]]
            regret.plot(number, lost, color=TRUTH, ls=":", lw=1.8, label="best possible")
        regret.xaxis.get_major_locator().set_params(integer=True)
        regret.set(xlabel="pull", ylabel="regret: E max p − expected reward", ylim=(0, None))
        regret.set_title("What a pull loses to always knowing the best arm")
        regret.legend(frameon=False, fontsize=8)
        setup_rows = {row.quantity.partition(": ")[2]: row for row in results.rows
                      if row.quantity.startswith(f"N={pulls}, K={arms}:")}  # fmt: skip
        for place, name in enumerate(reversed(names)):
            row = setup_rows[name]
            compared.errorbar(row.ours, place, xerr=row.error, fmt="o", color=colours[name], capsize=3)
            compared.annotate(f"{row.ours:.2f}", (row.ours, place), xytext=(0, 6), textcoords="offset points",
                              ha="center", fontsize=8)  # fmt: skip
        compared.set_yticks(range(len(names)), names[::-1])
        theirs = [("Gittins", "Gittins", THEIRS), ("random", "random", PALE), ("SNAIL", OUR_NAME, OURS)]
        for label, name, colour in theirs if published else ():
            middle, _, error = published[label].partition(" ± ")
            compared.errorbar(float(middle), len(names) - 1.22 - names.index(name), xerr=float(error or 0),
                              fmt="D", mfc="none", color=colour, ms=5, capsize=3)  # fmt: skip
        if "optimum" in by_pull:
            compared.axvline(sum(by_pull["optimum"]), color=TRUTH, ls=":", lw=1.8)
        compared.set(xlabel="total reward of an episode, with 95 % intervals", ylim=(-0.6, len(names) - 0.4))
        compared.set_title("Dots: ours; diamonds: published (SNAIL on top)" if published else "Total reward")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    found, stopped, begun = [], [], time.process_time()
    with common.progress("bandits") as report:
        for place, (pulls, arms) in enumerate(size.setups):

            def part(done: float, remark: str, place: int = place) -> None:
                report((place + done) / len(size.setups), remark)

            trained = train(pulls, arms, size, options.seed, part)
            if len(trained.curve) < size.rounds:
                stopped.append(f"N={pulls}, K={arms} after {len(trained.curve)} rounds")
            found.append(judge(trained, pulls, arms, size, options.seed))
    differs = {
        "tiny": "two arms and four pulls, for which nothing is published.",
        "short": "one setup of many, a small network and few episodes.",
        "full": "setups of 500 and more pulls are left out.",
    }[options.form]
    if stopped:
        differs = f"{differs} Stopped early: {', '.join(stopped)}."
    made = [row for one in found for row in rows(one)]
    for one in found:
        one["totals"] = {name: sum(totals) / len(totals) for name, totals in one["totals"].items()}
    results = Results(
        "bandits",
        options.form,
        f"K arms with chances U[0, 1], N pulls an episode; width {size.width}, {size.layers} layers; "
        f"{size.rounds} rounds of {size.pulls} pulls and {size.epochs} passes over them; tested by its "
        f"likeliest arms on {size.test} new bandits, the same for all players; exactly where N ≤ {EXACT}.",
        differs,
        made,
        {"size": asdict(size), "setups": found, "CPU seconds": time.process_time() - begun},
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
