"""Amortised clustering: a set transformer reads a cloud of points and writes down the mixture that fits it.

    python examples/scenarios/clustering.py

Source: Lee et al. 2019 (arXiv 1810.00825), section 5.3 and 2.3.1 of its supplement. A set has n ~ U{100…500}
points in the plane from a mixture of 4 Gaussians: means U(-4, 4) in each coordinate, standard deviation 0.3,
weights from the symmetric Dirichlet distribution with parameter 1. The model answers with weights, means and
standard deviations, and is trained on the log-likelihood of the very points it has read. Sets of different
sizes share a batch by a mask.

Protocol: log-likelihood per point, a mean over the points of a set and then over sets; as the model answers
(LL0) and after one EM update of its answer (LL1). The oracle is the mixture that the points were drawn from;
the likeliest mixture is better than that, and what EM finds from there is shown beside it. Attention is
differentiated once here.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import common
import torch
from common import OURS, PALE, THEIRS, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn

from metattn.nn import ISAB, PMA, SAB

CLUSTERS = 4
REACH, SPREAD = 4.0, 0.3  # means lie in [-REACH, REACH]²; the clusters' standard deviation
NORM = 1.0  # of a step's gradient at most: a narrow cluster far from its points may have one of hundreds
NARROWEST = SPREAD / 10  # EM's least standard deviation: a cluster of one point has none


@dataclass(frozen=True)
class Size:
    width: int
    heads: int
    inducing: int  # points of an ISAB
    points: tuple[int, int]  # of a set, at least and at most, …
    early: tuple[int, int]  # … and in training's first 7 steps of 10
    steps: int
    rate: float
    later: float  # the rate after these
    batch: int = 10
    test: int = 1000  # sets


SIZES = {
    "tiny": Size(32, 2, 4, (20, 60), (20, 60), 150, 3e-3, 3e-4, test=100),
    "short": Size(64, 4, 16, (100, 500), (20, 100), 4200, 2e-3, 2e-4),
    "full": Size(128, 4, 16, (100, 500), (100, 500), 50_000, 1e-3, 1e-4),
}


class Mixture(NamedTuple):
    """Gaussians with diagonal covariances, K for each of B sets."""

    weights: Tensor  # [B, K]
    means: Tensor  # [B, K, 2]
    deviations: Tensor  # [B, K, 2]


class Sets(NamedTuple):
    points: Tensor  # [B, N, 2], 0 where a set has no more
    mask: Tensor  # bool [B, N]
    truth: Mixture


def sets(count: int, points: tuple[int, int], generator: torch.Generator) -> Sets:
    """Sets with their own numbers of points, each from its own mixture."""
    numbers = torch.randint(points[0], points[1] + 1, (count,), generator=generator)
    most = int(numbers.max())
    shares = -torch.rand(count, CLUSTERS, generator=generator).clamp(min=1e-30).log()
    weights = shares / shares.sum(
        -1, keepdim=True
    )  # exponential variables over their sum: Dirichlet(1, …, 1)
    means = REACH * (2 * torch.rand(count, CLUSTERS, 2, generator=generator) - 1)
    labels = torch.multinomial(weights, most, replacement=True, generator=generator)
    centres = means.gather(1, labels.unsqueeze(-1).expand(-1, -1, 2))
    mask = torch.arange(most) < numbers.unsqueeze(-1)
    drawn = centres + SPREAD * torch.randn(count, most, 2, generator=generator)
    truth = Mixture(weights, means, torch.full_like(means, SPREAD))
    return Sets(torch.where(mask.unsqueeze(-1), drawn, 0.0), mask, truth)


def joint(points: Tensor, mixture: Mixture) -> Tensor:
    """log π_k N(x; μ_k, σ_k²): [B, N, K]."""
    scaled = (points.unsqueeze(2) - mixture.means.unsqueeze(1)) / mixture.deviations.unsqueeze(1)
    constants = mixture.weights.clamp(min=1e-10).log() - mixture.deviations.log().sum(-1)
    return constants.unsqueeze(1) - 0.5 * scaled.square().sum(-1) - math.log(2 * math.pi)


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each set's points: [B, N] → [B]."""
    return torch.where(mask, values, 0.0).sum(-1) / mask.sum(-1)


def likelihood(given: Sets, mixture: Mixture) -> Tensor:
    """Log-likelihood per point, [B]."""
    return mean_over(joint(given.points, mixture).logsumexp(-1), given.mask)


def update(given: Sets, mixture: Mixture) -> Mixture:
    """One update of expectation maximisation."""
    shares = torch.where(given.mask.unsqueeze(-1), joint(given.points, mixture).softmax(-1), 0.0)  # [B, N, K]
    counts = shares.sum(1)  # [B, K]
    share = shares / counts.clamp(min=1e-10).unsqueeze(1)
    empty = (counts < 1e-6).unsqueeze(-1)
    means = torch.where(empty, mixture.means, share.mT @ given.points)
    squares = (given.points.unsqueeze(2) - means.unsqueeze(1)).square()
    variances = (share.unsqueeze(-1) * squares).sum(1)
    deviations = torch.where(empty, mixture.deviations, variances.sqrt().clamp(min=NARROWEST))
    return Mixture(counts / counts.sum(-1, keepdim=True), means, deviations)


def fitted(given: Sets, mixture: Mixture, updates: int = 100) -> Mixture:
    for _ in range(updates):
        mixture = update(given, mixture)
    return mixture


def single(given: Sets) -> Mixture:
    """The likeliest single Gaussian, as a mixture of one."""
    means = torch.stack([mean_over(given.points[..., i], given.mask) for i in range(2)], -1)
    squares = (given.points - means.unsqueeze(1)).square()
    variances = torch.stack([mean_over(squares[..., i], given.mask) for i in range(2)], -1)
    return Mixture(torch.ones(len(means), 1), means.unsqueeze(1), variances.sqrt().unsqueeze(1))


def mixture_of(raw: Tensor) -> Mixture:
    """What the numbers [B, K, 5] that a network returns stand for."""
    logits, means, widths = raw.split((1, 2, 2), -1)
    return Mixture(logits.squeeze(-1).softmax(-1), means, nn.functional.softplus(widths) + 1e-4)


class SetTransformer(nn.Module):
    """ISAB, ISAB, PMA with a seed for each cluster, SAB: points [B, N, 2], mask [B, N] → [B, K, 5]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, heads = size.width, size.heads
        self.embed = nn.Linear(2, width)
        self.encode = nn.ModuleList(ISAB(width, heads, size.inducing, layer_norm=False) for _ in range(2))
        self.pool = PMA(width, heads, CLUSTERS, layer_norm=False)
        self.relate = SAB(width, heads, layer_norm=False)
        self.out = nn.Linear(width, 5)

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        hidden = self.embed(points)
        for block in self.encode:
            hidden = block(hidden, mask)
        found: Tensor = self.out(self.relate(self.pool(hidden, mask)))
        return found


class Pooling(nn.Module):
    """What the source calls rFF + Pooling: an MLP for each point, the mean over a set's, an MLP."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width

        def layers(first: int, count: int) -> list[nn.Module]:
            widths = [first] + count * [width]
            return [part for i in range(count) for part in (nn.Linear(*widths[i : i + 2]), nn.ReLU())]

        self.encode = nn.Sequential(*layers(2, 4))
        self.decode = nn.Sequential(*layers(width, 3), nn.Linear(width, 5 * CLUSTERS))

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        hidden = torch.where(mask.unsqueeze(-1), self.encode(points), 0.0)
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        found: Tensor = self.decode(pooled)
        return found.unflatten(-1, (CLUSTERS, 5))


def train(model: nn.Module, size: Size, seed: int, report: Report) -> list[float]:
    """Trains in place; the log-likelihoods, step by step. Ctrl-C ends the training early."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.rate, fused=True)
    reached: list[float] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(size.steps):
            late = step >= size.steps * 7 // 10
            for group in optimizer.param_groups:
                group["lr"] = size.later if late else size.rate
            given = sets(size.batch, size.points if late else size.early, generator)
            found = likelihood(given, mixture_of(model(given.points, given.mask))).mean()
            optimizer.zero_grad()
            (-found).backward()
            nn.utils.clip_grad_norm_(model.parameters(), NORM)
            optimizer.step()
            reached.append(found.item())
            if step % 20 == 0:
                recent = reached[-100:]
                report(step / size.steps, f"log-likelihood {sum(recent) / len(recent):.3f}")
    return reached


Scores = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def evaluate(models: dict[str, nn.Module], size: Size, seed: int) -> tuple[Scores, Sets, Mixture]:
    """LL0 and LL1 of all test sets, and some of these sets with what the first model makes of them."""
    generator = torch.Generator().manual_seed(seed + 10**6)
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in (*models, "truth", "EM", "single")}
    for index in range(0, size.test, 50):
        given = sets(min(50, size.test - index), size.points, generator)
        for name, model in models.items():
            mixture = mixture_of(model(given.points, given.mask))
            parts[name].append((likelihood(given, mixture), likelihood(given, update(given, mixture))))
            if index == 0 and name == next(iter(models)):
                shown, seen = given, mixture
        best, one = fitted(given, given.truth), single(given)
        parts["truth"].append((likelihood(given, given.truth), likelihood(given, update(given, given.truth))))
        parts["EM"].append((likelihood(given, best), likelihood(given, update(given, best))))
        parts["single"].append((likelihood(given, one), likelihood(given, one)))
    scores = {
        name: (torch.cat([first for first, _ in both]), torch.cat([second for _, second in both]))
        for name, both in parts.items()
    }
    return scores, shown, seen


TRANSFORMER, POOLING = "ISAB(16) + PMA", "rFF + Pooling"
TABLE = "arXiv 1810.00825, table 3"


def rows(scores: Scores) -> list[Row]:
    def row(quantity: str, values: Tensor, better: str = "higher", **published: str) -> Row:
        of = f"mean over {len(values)} sets"
        return mean_row(quantity, values.tolist(), of, better=better, **published)

    names = list(scores)
    ours, pooling = scores[names[0]], scores[names[1]]
    truth = scores["truth"][0]
    return [
        row("set transformer, LL0", ours[0], published="-1.5009 ± 0.0068", source=f"{TABLE}, {TRANSFORMER}"),
        row("set transformer, LL1", ours[1], published="-1.4530 ± 0.0037", source=f"{TABLE}, {TRANSFORMER}"),
        row("mean pooling, LL0", pooling[0], published="-2.0006 ± 0.0123", source=f"{TABLE}, {POOLING}"),
        row("mean pooling, LL1", pooling[1], published="-1.6186 ± 0.0042", source=f"{TABLE}, {POOLING}"),
        row("true mixture", truth, published="-1.4726", source=f"{TABLE}, oracle"),
        row("true mixture after one EM update", scores["truth"][1]),
        row("EM from the true mixture, 100 updates", scores["EM"][0]),
        row("one Gaussian", scores["single"][0]),
        row("gap of the set transformer's LL0 to the true mixture", truth - ours[0], "lower"),
    ]


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt
    from matplotlib.patches import Ellipse

    details = results.details
    figure, axes = plt.subplot_mosaic(
        [["0", "1", "2"], ["3", "4", "5"], ["curve"] * 3], figsize=(9, 9.2), layout="constrained"
    )
    for place, scene in enumerate(details["scenes"]):
        axis = axes[str(place)]
        x, y = torch.tensor(scene["points"]).T
        axis.scatter(x, y, s=5, color=PALE, lw=0)
        for kind, colour in (("truth", TRUTH), ("found", OURS)):
            weights, means, deviations = (scene[kind][part] for part in ("weights", "means", "deviations"))
            for weight, mean, deviation in zip(weights, means, deviations, strict=True):
                wide, high = (4 * side for side in deviation)  # two standard deviations each way
                dashed = "--" if kind == "truth" else "-"
                axis.add_patch(Ellipse(mean, wide, high, fill=False, color=colour, lw=1.5, ls=dashed))
                if kind == "found":
                    axis.plot(*mean, "+", color=colour, ms=4 + 10 * weight)
        axis.set(xlim=(-5.2, 5.2), ylim=(-5.2, 5.2), aspect="equal", xticks=(), yticks=())
        axis.set_title(f"{scene['number']} points: {scene['ours']:.2f}, truth {scene['oracle']:.2f}")
    last = axes["curve"]
    for (name, curve), colour in zip(details["training"].items(), (OURS, THEIRS), strict=True):
        last.plot(
            [step for step, _ in curve], [value for _, value in curve], color=colour, lw=1.3, label=name
        )
    truth = next(row.ours for row in results.rows if row.quantity == "true mixture")
    last.axhline(truth, color=TRUTH, ls="--", lw=1.2, label="true mixture")
    if results.form != "tiny":
        last.axhline(-1.5009, color=OURS, ls=":", lw=1.2, label="published, set transformer")
        last.axhline(-2.0006, color=THEIRS, ls=":", lw=1.2, label="published, mean pooling")
    last.set(xlabel="step", ylabel="log-likelihood per point", ylim=(-4, -1.3))
    last.set_title("Training")
    last.legend(frameon=False, fontsize=8, loc="center right", ncols=2)
    figure.suptitle(
        "Solid: the mixture that the set transformer reads off the points; dashed: the true one", fontsize=11
    )
    return figure


def scene(given: Sets, found: Mixture, index: int) -> dict[str, Any]:
    """One set for the picture, with rounded numbers."""

    def plain(values: Tensor) -> Any:
        return [[round(value, 3) for value in row] for row in values.tolist()]

    def of(mixture: Mixture) -> dict[str, Any]:
        weights = [round(weight, 3) for weight in mixture.weights[index].tolist()]
        return {
            "weights": weights,
            "means": plain(mixture.means[index]),
            "deviations": plain(mixture.deviations[index]),
        }

    return {
        "number": int(given.mask[index].sum()),
        "points": plain(given.points[index][given.mask[index]][:250]),
        "truth": of(given.truth),
        "found": of(found),
        "ours": likelihood(given, found)[index].item(),
        "oracle": likelihood(given, given.truth)[index].item(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    torch.manual_seed(options.seed)
    models: dict[str, nn.Module] = {"set transformer": SetTransformer(size), "mean pooling": Pooling(size)}
    steps, training = {}, {}
    for name, model in models.items():
        with common.progress(name) as report:
            reached = train(model, size, options.seed, report)
        smooth = max(1, len(reached) // 150)
        parts = [reached[i : i + smooth] for i in range(0, len(reached), smooth)]
        steps[name] = len(reached)
        training[name] = [(smooth * i, round(sum(part) / len(part), 4)) for i, part in enumerate(parts)]
    scores, shown, seen = evaluate(models, size, options.seed)
    whole = SIZES["full"]
    always = (
        f"gradients clipped at a norm of {NORM:g}, one run in place of five, with the interval over test "
        "sets."
    )
    differs = {
        "full": always,
        "short": f"width {size.width} in place of {whole.width}, {size.steps} steps in place of "
        f"{whole.steps:,}, of which the first 7 of 10 on sets of {size.early[0]} to {size.early[1]} points, "
        f"a rate of {size.rate:g} then {size.later:g} in place of {whole.rate:g} then {whole.later:g}, "
        f"{always}",
        "tiny": "everything is smaller.",
    }[options.form]
    stopped = [f"{name} after {done}" for name, done in steps.items() if done < size.steps]
    if stopped:
        differs += f" Stopped early: {', '.join(stopped)} of {size.steps} steps."
    results = Results(
        "clustering",
        options.form,
        f"Sets of {size.points[0]} to {size.points[1]} points from 4 Gaussians in the plane; two ISABs with "
        f"{size.inducing} inducing points, PMA, SAB, {size.heads} heads, width {size.width}; {size.steps} "
        f"steps of Adam on {size.batch} sets each, rate {size.rate:g}, then {size.later:g} for the last 3 of "
        "10.",
        differs,
        rows(scores),
        {
            "size": asdict(size),
            "steps": steps,
            "training": training,
            "scenes": [scene(shown, seen, index) for index in range(6)],
        },
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
