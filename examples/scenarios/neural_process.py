"""A transformer neural process against the exact Gaussian process: regression in one forward pass.

    python examples/scenarios/neural_process.py

Source: Nguyen and Grover 2022 (arXiv 2207.04179), section 5.1, TNP-D: the one-dimensional meta-regression
of Kim et al. 2019 (arXiv 1901.05761). A task is a draw of a Gaussian process with an RBF kernel whose length
and scale are drawn anew, U[0.1, 0.6) and U[0.1, 1), at points in [-2, 2], with noise of 0.02 in every value.
From 3 to 46 context points the model predicts a mean and a standard deviation for each target. These numbers
and the sizes of models and training are those of the authors' public code.

Every token attends to the context alone, which is cross attention: queries of all tokens, keys and values of
the context's. No mask is needed. Attention is differentiated once here.

Protocol: log-likelihood of the targets, a mean over the points of a task and then over tasks. Beside it, on
the same tasks: the same model with the mean of the context in the place of attention; a conditional neural
process (Garnelo et al. 2018, arXiv 1807.01613), which pools a set by its mean; the exact process with the
true kernel, in float64; and the exact process that has to infer the kernel too, which no model can beat on
average.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn

import metattn

NOISE = 0.02
LENGTHS, SCALES = (0.1, 0.6), (0.1, 1.0)
REACH = 2.0  # points lie in [-REACH, REACH]
TESTED = 16  # tasks of a test batch
LEAST, MOST = 3, 50  # context points and targets: each at least, together fewer than


@dataclass(frozen=True)
class Size:
    width: int
    layers: int
    heads: int
    hidden: int  # of a layer's MLP
    embedding: int  # layers of the MLP that embeds a point
    pooled: int  # width of the conditional neural process
    steps: int
    rate: float
    batch: int
    test: int  # batches of test tasks
    nodes: tuple[int, int]  # lengths and scales over which an unknown kernel is integrated


SIZES = {
    "tiny": Size(32, 2, 2, 64, 2, 32, 180, 5e-3, 16, 8, (12, 6)),
    "short": Size(64, 4, 4, 128, 3, 128, 4000, 1e-3, 16, 128, (32, 16)),
    "full": Size(64, 6, 4, 128, 4, 128, 100_000, 5e-4, 16, 3000, (32, 16)),
}


@dataclass(frozen=True)
class Tasks:
    """A batch with points in common numbers: the first `context` are given, the others are targets."""

    x: Tensor  # [B, N]
    y: Tensor  # [B, N]
    context: int
    length: Tensor  # [B], of the kernel
    scale: Tensor  # [B]

    def given(self) -> tuple[Tensor, Tensor]:
        return self.x[:, : self.context], self.y[:, : self.context]

    def asked(self) -> tuple[Tensor, Tensor]:
        return self.x[:, self.context :], self.y[:, self.context :]


def kernel(a: Tensor, b: Tensor, length: Tensor, scale: Tensor) -> Tensor:
    """s² exp(-(a - b)² / 2l²): a [..., N], b [..., M], length and scale [...] → [..., N, M]."""
    distance = (a.unsqueeze(-1) - b.unsqueeze(-2)) / length[..., None, None]
    return scale[..., None, None].square() * torch.exp(-0.5 * distance.square())


def tasks(
    batch: int, generator: torch.Generator, context: int | None = None, targets: int | None = None
) -> Tasks:
    """Draws of the process, in float64; numbers of points are drawn where they are not given."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    context = whole(LEAST, MOST - LEAST) if context is None else context
    targets = whole(LEAST, MOST - context) if targets is None else targets
    x = uniform(-REACH, REACH, batch, context + targets)
    length, scale = uniform(*LENGTHS, batch), uniform(*SCALES, batch)
    covariance = kernel(x, x, length, scale) + NOISE**2 * torch.eye(x.shape[1], dtype=x.dtype)
    white = torch.randn(batch, x.shape[1], 1, generator=generator, dtype=x.dtype)
    y = (torch.linalg.cholesky(covariance) @ white).squeeze(-1)
    return Tasks(x, y, context, length, scale)


def log_density(y: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return -0.5 * ((y - mean) / deviation).square() - deviation.log() - 0.5 * math.log(2 * math.pi)


def posterior(x: Tensor, y: Tensor, at: Tensor, length: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The exact process: mean and standard deviation [B, T] of noisy values at `at`, from x and y [B, N]."""
    covariance = kernel(x, x, length, scale) + NOISE**2 * torch.eye(x.shape[1], dtype=x.dtype)
    root = torch.linalg.cholesky(covariance)
    across = torch.linalg.solve_triangular(root, kernel(x, at, length, scale), upper=False)  # [B, N, T]
    white = torch.linalg.solve_triangular(root, y.unsqueeze(-1), upper=False)
    variance = scale.unsqueeze(-1).square() + NOISE**2 - across.square().sum(1)
    return (across * white).sum(1), variance.sqrt()


def midpoints(low: float, high: float, count: int) -> Tensor:
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count


def integrated(batch: Tasks, lengths: Tensor, scales: Tensor) -> Tensor:
    """Log-density [B, T] of each target under the process whose kernel is not known, but its prior is.

    p(y | context) = Σ_k p(k | context) p(y | context, k), over all kernels k of these lengths and scales,
    which are equally likely before the context is seen.
    """
    (x, y), (at, wanted) = batch.given(), batch.asked()
    unit = torch.ones_like(lengths)
    x, at, length = x.unsqueeze(1), at.unsqueeze(1), lengths.expand(len(x), -1)
    spectrum, basis = torch.linalg.eigh(kernel(x, x, length, unit))  # [B, L, N], [B, L, N, N]
    across = kernel(at, x, length, unit) @ basis  # [B, L, T, N]
    white = (basis.mT @ y[:, None, :, None]).squeeze(-1)  # [B, L, N]
    power = scales.square()[:, None]  # [S, 1]
    total = power * spectrum.clamp(min=0).unsqueeze(2) + NOISE**2  # [B, L, S, N]
    evidence = -0.5 * (white.unsqueeze(2).square() / total + total.log()).sum(-1)  # [B, L, S]
    across = across.unsqueeze(2)  # [B, L, 1, T, N]
    mean = power * (across @ (white.unsqueeze(2) / total).unsqueeze(-1)).squeeze(-1)  # [B, L, S, T]
    explained = power.square() * (across.square() @ total.reciprocal().unsqueeze(-1)).squeeze(-1)
    deviation = (power + NOISE**2 - explained).sqrt()
    densities = log_density(wanted[:, None, None], mean, deviation).flatten(1, 2)  # [B, kernels, T]
    weights = evidence.flatten(1).log_softmax(-1).unsqueeze(-1)
    return torch.logsumexp(weights + densities, 1)


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Mean(nn.Module):
    """In attention's place: every query gets the mean of the values."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        pooled: Tensor = self.out(self.value(context).mean(1, keepdim=True))
        return pooled.expand_as(query)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = metattn.nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, query: Tensor, context: Tensor) -> Tensor:
        attended: Tensor = self.attention(query, context, context, need_weights=False)[0]
        return attended


class Layer(nn.Module):
    """x = norm(x + pooled(context)), then x = norm(x + MLP(x)); the tokens' first `given` are the context."""

    def __init__(self, size: Size, attends: bool) -> None:
        super().__init__()
        self.pool: nn.Module = Attention(size.width, size.heads) if attends else Mean(size.width)
        self.mlp = perceptron((size.width, size.hidden, size.width))
        self.first, self.second = nn.LayerNorm(size.width), nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor, given: int) -> Tensor:
        tokens = self.first(tokens + self.pool(tokens, tokens[:, :given]))
        changed: Tensor = self.second(tokens + self.mlp(tokens))
        return changed


class TransformerProcess(nn.Module):
    """TNP-D: context x, y [B, N] and targets' x [B, T] → mean and standard deviation [B, T]."""

    everywhere = False  # trained on the targets alone

    def __init__(self, size: Size, attends: bool = True) -> None:
        super().__init__()
        self.embed = perceptron((2,) + size.embedding * (size.width,))
        self.layers = nn.ModuleList(Layer(size, attends) for _ in range(size.layers))
        self.head = perceptron((size.width, size.hidden, 2))

    def forward(self, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.cat([y, torch.zeros_like(at)], 1)  # a target's value is 0
        tokens = self.embed(torch.stack([torch.cat([x, at], 1), values], -1))
        for layer in self.layers:
            tokens = layer(tokens, x.shape[1])
        mean, raw = self.head(tokens[:, x.shape[1] :]).unbind(-1)
        return mean, raw.exp()


class ConditionalProcess(nn.Module):
    """CNP as in the source's comparison: two encoders, each pooled by the mean, and a decoder; σ > 0.1."""

    everywhere = True  # trained on the context's points too

    def __init__(self, size: Size) -> None:
        super().__init__()
        wide = size.pooled
        self.before = nn.ModuleList(perceptron((2,) + 4 * (wide,)) for _ in range(2))
        self.after = nn.ModuleList(perceptron(3 * (wide,)) for _ in range(2))
        self.decode = perceptron((2 * wide + 1, wide, wide, 2))

    def forward(self, x: Tensor, y: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        points = torch.stack([x, y], -1)
        pooled = [
            after(before(points).mean(1)) for before, after in zip(self.before, self.after, strict=True)
        ]
        summary = torch.cat(pooled, -1).unsqueeze(1).expand(-1, at.shape[1], -1)
        mean, raw = self.decode(torch.cat([summary, at.unsqueeze(-1)], -1)).unbind(-1)
        return mean, 0.1 + 0.9 * nn.functional.softplus(raw)


Model = TransformerProcess | ConditionalProcess


def build(size: Size, seed: int) -> dict[str, Model]:
    torch.manual_seed(seed)
    return {
        "TNP-D": TransformerProcess(size),
        "mean for attention": TransformerProcess(size, attends=False),
        "CNP": ConditionalProcess(size),
    }


def likelihoods(model: Model, batch: Tasks, everywhere: bool = False) -> Tensor:
    """Log-densities [B, T] of the targets; of all points where `everywhere`."""
    (x, y), (at, wanted) = batch.given(), (batch.x, batch.y) if everywhere else batch.asked()
    mean, deviation = model(x.float(), y.float(), at.float())
    return log_density(wanted.float(), mean, deviation)


def train(model: Model, size: Size, seed: int, report: Report) -> list[float]:
    """Trains in place; the log-likelihoods, step by step. Ctrl-C ends the training early."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps)
    reached: list[float] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(size.steps):
            found = likelihoods(model, tasks(size.batch, generator), model.everywhere).mean()
            optimizer.zero_grad()
            (-found).backward()
            optimizer.step()
            schedule.step()
            reached.append(found.item())
            if step % 20 == 0:
                recent = reached[-100:]
                report(step / size.steps, f"log-likelihood {sum(recent) / len(recent):.2f}")
    return reached


def test_tasks(size: Size, seed: int) -> Iterator[Tasks]:
    generator = torch.Generator().manual_seed(seed + 10**6)
    for _ in range(size.test):
        yield tasks(TESTED, generator)


@torch.no_grad()
def evaluate(models: dict[str, Model], size: Size, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Mean log-likelihood of each task's targets [batches, TESTED], by every model and process; each batch's
    number of context points.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in (*models, "exact", "integrated")}
    contexts = []
    nodes = midpoints(*LENGTHS, size.nodes[0]), midpoints(*SCALES, size.nodes[1])
    for batch in test_tasks(size, seed):
        (x, y), (at, wanted) = batch.given(), batch.asked()
        for name, model in models.items():
            found[name].append(likelihoods(model, batch).mean(1).double())
        exact = log_density(wanted, *posterior(x, y, at, batch.length, batch.scale))
        found["exact"].append(exact.mean(1))
        found["integrated"].append(integrated(batch, *nodes).mean(1))
        contexts.append(batch.context)
    return {name: torch.stack(parts) for name, parts in found.items()}, torch.tensor(contexts)


def rows(found: dict[str, Tensor]) -> list[Row]:
    def row(quantity: str, values: Tensor, better: str = "higher", **published: str) -> Row:
        # the tasks of a batch have as many points: it is batches that are independent
        of = f"mean over {len(values)} batches of {TESTED} tasks"
        return mean_row(quantity, values.mean(1).tolist(), of, better=better, **published)

    return [
        row(
            "TNP-D, log-likelihood per target",
            found["TNP-D"],
            published="1.39 ± 0.00",
            source="arXiv 2207.04179, table 1, RBF",
        ),
        row("the same with the mean for attention", found["mean for attention"]),
        row("CNP", found["CNP"]),
        row("exact process, true kernel", found["exact"]),
        row("exact process, kernel inferred", found["integrated"]),
        row("gap of TNP-D to the true kernel", found["exact"] - found["TNP-D"], "lower"),
        row("gap of TNP-D to the inferred kernel", found["integrated"] - found["TNP-D"], "lower"),
    ]


@torch.no_grad()
def scenes(models: dict[str, Model], seed: int, counts: Sequence[int] = (4, 10, 25)) -> list[dict[str, Any]]:
    """Tasks to look at: their context, and what the process and the models say along a line."""
    generator = torch.Generator().manual_seed(seed + 2 * 10**6)
    line = torch.linspace(-REACH, REACH, 121, dtype=torch.float64)
    shown = []
    for count in counts:
        batch = tasks(1, generator, count, LEAST)
        x, y = batch.given()
        predicted = {"exact": posterior(x, y, line[None], batch.length, batch.scale)}
        for name, model in models.items():
            predicted[name] = model(x.float(), y.float(), line[None].float())
        bands = {
            name: [[round(value, 4) for value in part[0].tolist()] for part in both]
            for name, both in predicted.items()
        }
        shown.append({"x": x[0].tolist(), "y": y[0].tolist(), "line": line.tolist(), "bands": bands})
    return shown


def by_context(found: dict[str, Tensor], contexts: Tensor, wide: int = 4) -> dict[str, list[list[float]]]:
    """Context points, mean and half a 95 % interval, in groups of `wide` numbers of context points."""
    curves: dict[str, list[list[float]]] = {}
    for name, values in found.items():
        curves[name] = []
        for low in range(LEAST, MOST - LEAST, wide):
            chosen = values[(contexts >= low) & (contexts < low + wide)].mean(1)
            if len(chosen) > 1:
                error = common.half_interval(chosen.tolist())
                curves[name].append([low + (wide - 1) / 2, chosen.mean().item(), error])
    return curves


NAMES = {
    "exact": ("exact process, true kernel", TRUTH, "--"),
    "integrated": ("exact process, kernel inferred", PALE, "--"),
    "TNP-D": ("TNP-D", OURS, "-"),
    "mean for attention": ("mean for attention", THEIRS, "-"),
    "CNP": ("CNP", THIRD, "-"),
}


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    shown, curves = results.details["scenes"], results.details["curves"]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.6), layout="constrained")
    for axis, scene in zip(axes.flat, shown, strict=False):
        line = torch.tensor(scene["line"])
        for name in ("exact", "mean for attention", "TNP-D"):
            label, colour, style = NAMES[name]
            mean, deviation = (torch.tensor(part) for part in scene["bands"][name])
            axis.plot(line, mean, color=colour, ls=style, lw=2 if name == "TNP-D" else 1.3, label=label)
            if name != "mean for attention":
                axis.fill_between(
                    line, mean - 2 * deviation, mean + 2 * deviation, color=colour, alpha=0.17, lw=0
                )
        axis.plot(scene["x"], scene["y"], "o", color="black", ms=3.5, zorder=5)
        axis.set_title(f"{len(scene['x'])} context points, mean ± 2 standard deviations")
    axes[0, 0].legend(frameon=False, fontsize=8)
    last = axes[1, 1]
    for name, (label, colour, style) in NAMES.items():
        at, mean, error = torch.tensor(curves[name]).T
        last.plot(at, mean, color=colour, ls=style, lw=2 if name == "TNP-D" else 1.4, label=label)
        last.fill_between(at, mean - error, mean + error, color=colour, alpha=0.2, lw=0)
    last.set(xlabel="context points", ylabel="log-likelihood per target")
    last.set_title("Test tasks")
    last.legend(frameon=False, fontsize=8, loc="lower right", ncols=2)
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    models = build(size, options.seed)
    steps, training = {}, {}
    for name, model in models.items():
        with common.progress(name) as report:
            reached = train(model, size, options.seed, report)
        smooth = max(1, len(reached) // 100)
        parts = [reached[i : i + smooth] for i in range(0, len(reached), smooth)]
        steps[name], training[name] = len(reached), [round(sum(part) / len(part), 4) for part in parts]
    found, contexts = evaluate(models, size, options.seed)
    whole = SIZES["full"]
    differs = {
        "full": "",
        "short": f"{size.layers} layers in place of {whole.layers}, an embedding of {size.embedding} layers "
        f"in place of {whole.embedding}, {size.steps} steps in place of {whole.steps:,}, "
        f"a rate of {size.rate:g} in place of {whole.rate:g}, {16 * size.test} test tasks in place of "
        f"{16 * whole.test:,}.",
        "tiny": "everything is smaller.",
    }[options.form]
    stopped = [f"{name} after {done}" for name, done in steps.items() if done < size.steps]
    if stopped:
        differs += f" Stopped early: {', '.join(stopped)} of {size.steps} steps."
    results = Results(
        "neural_process",
        options.form,
        "Draws of a Gaussian process, RBF kernel of length U[0.1, 0.6) and scale U[0.1, 1), noise 0.02, 3 to "
        f"46 context points in [-2, 2]; {size.layers} layers, {size.heads} heads, width {size.width}; "
        f"{size.steps} steps of Adam on {size.batch} tasks each.",
        differs,
        rows(found),
        {
            "size": asdict(size),
            "steps": steps,
            "training": training,
            "curves": by_context(found, contexts),
            "scenes": scenes(models, options.seed),
        },
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
