"""In-context linear regression: a causal transformer reads examples and predicts the next value.

    python examples/scenarios/in_context.py

Source: Garg, Tsipras, Liang and Valiant 2022 (arXiv 2208.01066), section 3 and appendix A. A prompt is x_1,
w·x_1, x_2, w·x_2, … with x ~ N(0, I_d) and w ~ N(0, I_d), without noise; the model predicts w·x_i at x_i's
token from the i − 1 examples before it, and is trained on the squared error of all of them, with a
curriculum over dimensions and lengths. No weight changes at test time: a new function is learned by
attention alone.

Protocol: squared error divided by d against the number of examples, on fresh functions. The optimum is
known: for a Gaussian w the least-squares solution of smallest norm is the posterior mean, its error is 1 −
i/d with i < d examples and 0 from d on. Beside it the source's simpler estimators: the mean of the 3
nearest neighbours' values, and averaging, ŵ = mean of y·x. Attention is differentiated once here.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn

from metattn.nn import CausalBlock


@dataclass(frozen=True)
class Size:
    dims: int
    points: int  # of a prompt: examples and the last query
    width: int
    layers: int
    heads: int
    steps: int
    rate: float
    decay: bool  # of the rate, to 0 along a half cosine
    dims_start: int  # the curriculum: dimensions and points at the beginning, …
    points_start: int
    interval: int  # … and the steps until there is one dimension and are two points more
    batch: int = 64
    test: int = 1280  # prompts


SIZES = {
    "tiny": Size(2, 5, 16, 2, 2, 60, 3e-3, True, 1, 3, 20, test=128),
    "short": Size(5, 11, 64, 3, 2, 4500, 1e-3, True, 2, 5, 100),
    "full": Size(20, 41, 64, 3, 2, 500_000, 1e-4, False, 5, 11, 2000),
}


def prompts(
    count: int, points: int, dims: int, active: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x [count, points, dims], of which the first `active` coordinates are not 0, and w·x [count, points]."""
    x = torch.randn(count, points, dims, generator=generator)
    x[..., active:] = 0
    w = torch.randn(count, dims, 1, generator=generator)
    return x, (x @ w).squeeze(-1)


def curriculum(size: Size, step: int) -> tuple[int, int]:
    """Dimensions and points of the prompts at a step."""
    stage = step // size.interval
    return min(size.dims_start + stage, size.dims), min(size.points_start + 2 * stage, size.points)


class InContext(nn.Module):
    """GPT-2's blocks over prompts: x [B, points, d], y [B, points] → predictions [B, points]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.read_in = nn.Linear(size.dims, size.width)
        self.places = nn.Parameter(0.02 * torch.randn(2 * size.points, size.width))
        self.blocks = nn.Sequential(*(CausalBlock(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        self.read_out = nn.Linear(size.width, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        values = nn.functional.pad(y.unsqueeze(-1), (0, x.shape[-1] - 1))  # y in the first coordinate
        tokens = torch.stack([x, values], dim=2).flatten(1, 2)  # x_1, y_1, x_2, …
        hidden = self.blocks(self.read_in(tokens) + self.places[: tokens.shape[1]])
        predicted: Tensor = self.read_out(self.norm(hidden[:, ::2]))
        return predicted.squeeze(-1)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """Predictions [B, points]: of the solution of smallest norm of the examples before."""
    found = [torch.zeros_like(y[:, 0])]
    for i in range(1, x.shape[1]):
        w = torch.linalg.lstsq(x[:, :i].double(), y[:, :i, None].double(), driver="gelsd").solution
        found.append((x[:, i, None].double() @ w).flatten().to(y.dtype))
    return torch.stack(found, 1)


def nearest(x: Tensor, y: Tensor, neighbours: int = 3) -> Tensor:
    """Predictions [B, points]: the mean value of the nearest of the examples before."""
    found = [torch.zeros_like(y[:, 0])]
    for i in range(1, x.shape[1]):
        distances = (x[:, :i] - x[:, i, None]).square().sum(-1)
        close = distances.topk(min(i, neighbours), largest=False).indices
        found.append(y[:, :i].gather(1, close).mean(1))
    return torch.stack(found, 1)


def averaging(x: Tensor, y: Tensor) -> Tensor:
    """Predictions [B, points]: ŵ·x with ŵ the mean of y·x over the examples before."""
    totals = (x * y.unsqueeze(-1)).cumsum(1)[:, :-1]
    counts = torch.arange(1, x.shape[1]).unsqueeze(-1)
    later = (totals / counts * x[:, 1:]).sum(-1)
    return torch.cat([torch.zeros_like(y[:, :1]), later], 1)


def train(size: Size, seed: int, report: Report) -> tuple[InContext, list[float]]:
    """The model and its losses, step by step; Ctrl-C ends the training early."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = InContext(size)
    optimizer = torch.optim.Adam(model.parameters(), lr=size.rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, size.steps) if size.decay else None
    losses: list[float] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(size.steps):
            active, points = curriculum(size, step)
            x, y = prompts(size.batch, points, size.dims, active, generator)
            loss = (model(x, y) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
            if step % 20 == 0:
                recent = losses[-100:]
                report(step / size.steps, f"d={active} loss {sum(recent) / len(recent) / active:.3f}·d")
    return model, losses


@torch.no_grad()
def evaluate(model: InContext, size: Size, seed: int) -> dict[str, Tensor]:
    """Squared errors divided by d, [test, points], of the model and of the other estimators."""
    x, y = prompts(size.test, size.points, size.dims, size.dims, torch.Generator().manual_seed(seed + 10**6))
    predictions = {
        "transformer": torch.cat([model(*both) for both in zip(x.split(256), y.split(256), strict=True)]),
        "least squares": least_squares(x, y),
        "3 nearest neighbours": nearest(x, y),
        "averaging": averaging(x, y),
    }
    return {name: (found - y).square() / size.dims for name, found in predictions.items()}


def rows(errors: dict[str, Tensor], size: Size) -> list[Row]:
    of = f"mean over {size.test} prompts, squared error / d"
    d = size.dims
    exact = "exact: posterior mean"
    near = "0 (optimum; the source's transformer is near it at d = 20)"
    wanted = {
        d // 2: f"{1 - (d // 2) / d:.3g} (optimum)",
        d: near,
        2 * d: near,
    }
    found = [
        mean_row(
            f"transformer, {i} examples",
            errors["transformer"][:, i].tolist(),
            of,
            published=published,
            source=exact if i < d else f"{exact}; arXiv 2208.01066, figure 2",
        )
        for i, published in wanted.items()
    ]
    found.append(
        mean_row(f"averaging, {2 * d} examples", errors["averaging"][:, 2 * d].tolist(), of,
                 published=f"{(d + 1) / (2 * d):.3g}", source="exact: (d + 1)/i")
    )  # fmt: skip
    found.append(
        mean_row(
            f"3 nearest neighbours, {2 * d} examples", errors["3 nearest neighbours"][:, 2 * d].tolist(), of
        )
    )
    return found


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    curves, steps = results.details["curves"], results.details["losses"]
    d = results.details["size"]["dims"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    colours = {
        "transformer": OURS,
        "least squares": TRUTH,
        "3 nearest neighbours": THIRD,
        "averaging": THEIRS,
    }
    for name, curve in curves.items():
        mean, error = torch.tensor(curve["mean"]), torch.tensor(curve["error"])
        shown = range(len(mean))
        width = 2.2 if name == "transformer" else 1.4
        left.plot(
            shown,
            mean,
            color=colours[name],
            lw=width,
            ls="--" if name == "least squares" else "-",
            label=name,
        )
        left.fill_between(shown, mean - error, mean + error, color=colours[name], alpha=0.2, lw=0)
    left.axhline(1, color=PALE, lw=1, label="always 0")
    left.axvline(d, color=PALE, lw=1, ls=":")
    left.annotate("d examples", (d, 1.62), color=TRUTH, ha="left", xytext=(4, 0), textcoords="offset points")
    left.set(xlabel="examples in the prompt", ylabel="squared error / d", ylim=(-0.03, 1.75))
    left.set_title("A new linear function, learned from its prompt")
    left.legend(frameon=False, fontsize=8, loc="upper right", bbox_to_anchor=(1.0, 0.93))
    right.semilogy([step for step, _ in steps], [loss for _, loss in steps], color=OURS, lw=1.2)
    right.set(xlabel="step", ylabel="training loss / active dimensions")
    right.set_title("Training: jumps are the curriculum's")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    with common.progress("in-context regression") as report:
        model, losses = train(size, options.seed, report)
    errors = evaluate(model, size, options.seed)
    smooth = max(1, len(losses) // 200)
    means = [
        (i, sum(losses[i : i + smooth]) / len(losses[i : i + smooth]) / curriculum(size, i)[0])
        for i in range(0, len(losses), smooth)
    ]
    curves = {
        name: {
            "mean": error.mean(0).tolist(),
            "error": (1.96 * error.std(0) / len(error) ** 0.5).tolist(),
        }
        for name, error in errors.items()
    }
    differs = {
        "full": "the source's Tiny transformer (3 layers, 2 heads, width 64) in place of its standard one "
        "(12 layers, 8 heads, width 256).",
        "short": "d = 5 in place of 20, prompts of 11 points in place of 41, the source's Tiny transformer, "
        f"{size.steps} steps in place of 500,000 at a rate of {size.rate:g} that decays in place of a "
        f"constant 0.0001, and a curriculum of stages of {size.interval} steps in place of 2,000.",
        "tiny": "everything is smaller.",
    }[options.form]
    if len(losses) < size.steps:
        differs += f" Stopped after {len(losses)} of {size.steps} steps."
    results = Results(
        "in_context",
        options.form,
        f"w·x with x and w from N(0, I), d = {size.dims}; a transformer of {size.layers} layers, "
        f"{size.heads} heads and width {size.width}, {size.steps} steps of Adam on {size.batch} prompts "
        f"each; errors on {size.test} new functions.",
        differs,
        rows(errors, size),
        {"size": asdict(size), "curves": curves, "losses": means, "steps": len(losses)},
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
