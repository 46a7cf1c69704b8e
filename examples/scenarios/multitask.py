"""One learner for sines, lines, parabolas and steps: joint training, ANIL and MAML, in context or not.

    python examples/scenarios/multitask.py

A task is a function of one of four families, drawn anew, of which 10 points are known; the learner is not
told the family. One network for all of them is trained in six ways. It is given the known points as a context
to attend to, or not; and it adapts nothing to them, its head (ANIL, Raghu et al. 2020, arXiv 1909.09157), or
all of itself (MAML, Finn et al. 2017, arXiv 1703.03400; in context with learned step sizes: Meta-SGD, Li et
al. 2017, arXiv 1707.09835). Joint training without adaptation and context can but learn the mean of all
functions. The network is `ContextLearner` of sinusoid.py; attention without a single key gives zeros, so that
the same network serves where there is no context.

The mixture of families is after Vuorio et al. 2019 (arXiv 1910.13616), with ranges of our own that give the
families like magnitudes; so no published figure stands beside these. Errors are squared errors divided by the
family's mean square: 1 is the error of always answering 0.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, Row, mean_row
from sinusoid import ContextLearner, Task, as_context
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import mse_loss

from metattn.cli.tasks import Samples
from metattn.meta import SGD, InnerOptimizer, MetaSGD, adapt, maml_loss

REACH = 5.0  # x lies in [-REACH, REACH]
SHOTS = 10
INNER = SGD(0.02)  # where the step sizes are not learned


@dataclass(frozen=True)
class Size:
    tasks: int  # of each family in a step
    steps: int
    last: int  # of these, which those with a context do each in its way, from one model
    rate: float
    width: int
    layers: int
    test: int  # tasks of each family


SIZES = {
    "tiny": Size(2, 24, 5, 5e-3, 16, 1, 8),
    "short": Size(5, 1200, 120, 2e-3, 32, 2, 250),
    "full": Size(8, 40_000, 4000, 1e-3, 64, 3, 1000),
}


@dataclass(frozen=True)
class Family:
    name: str
    square: float  # E y²
    parameters: tuple[tuple[float, float], ...]  # uniform between
    of: Callable[..., Tensor]  # (x, parameters …) → y


def parabola(x: Tensor, bend: Tensor, centre: Tensor, height: Tensor) -> Tensor:
    """The bend, in ±[0.02, 0.2], is given as a number in ±[0, 0.18]."""
    return (bend + 0.02 * bend.sign()) * (x - centre).square() + height


FAMILIES = (
    Family(
        "sines",
        (5**3 - 0.1**3) / (3 * 4.9) / 2,
        ((0.1, 5.0), (0.0, 2 * math.pi)),
        lambda x, a, phase: a * torch.sin(x - phase),
    ),
    Family("lines", 25 / 9 + 4 / 3, ((-1.0, 1.0), (-2.0, 2.0)), lambda x, slope, height: slope * x + height),
    Family(
        "parabolas",
        (0.2**3 - 0.02**3) / (3 * 0.18) * (125 + 150 + 16.2) + 4 / 3,
        ((-0.18, 0.18), (-3.0, 3.0), (-2.0, 2.0)),
        parabola,
    ),
    Family(
        "steps",
        3 + 4 / 3,
        ((-3.0, 3.0), (-3.0, 3.0), (-2.0, 2.0)),
        lambda x, jump, place, height: jump * torch.where(x > place, 1.0, -1.0) + height,
    ),
)


def draw_functions(family: Family, tasks: int, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """`tasks` functions as one: x [tasks, …] → y of the same shape."""
    drawn = [low + (high - low) * torch.rand(tasks, generator=generator) for low, high in family.parameters]

    def values(x: Tensor) -> Tensor:
        return family.of(x, *(one.view(-1, *(1,) * (x.dim() - 1)) for one in drawn))

    return values


def draw_tasks(family: Family, tasks: int, generator: torch.Generator) -> tuple[Samples, Samples]:
    """Support and query, each of SHOTS points: x and y [tasks, 1, SHOTS, 1]."""
    values = draw_functions(family, tasks, generator)
    x = REACH * (2 * torch.rand(2, tasks, 1, SHOTS, 1, generator=generator) - 1)
    return (x[0], values(x[0])), (x[1], values(x[1]))


def mixed(tasks: int, generator: torch.Generator) -> tuple[Samples, Samples]:
    """`tasks` of every family, divided by the root of its mean square."""
    support, query = [], []
    for family in FAMILIES:
        for samples, (x, y) in zip((support, query), draw_tasks(family, tasks, generator), strict=True):
            samples.append((x, y / family.square**0.5))
    return tuple(tuple(map(torch.cat, zip(*samples, strict=True))) for samples in (support, query))


def without_context(support: Samples, query: Samples) -> Task:
    """The support to adapt to alone; a context without points."""
    nothing = torch.zeros(*support[0].shape[:2], 0, 2)
    return ((support[0], nothing), support[1]), ((query[0], nothing), query[1])


@dataclass(frozen=True)
class Way:
    name: str
    context: bool
    adapts: str  # what the names of the parameters that are adapted begin with; "-" for none
    steps: int  # on a new task; one in training
    colour: str

    @property
    def arranged(self) -> Callable[[Samples, Samples], Task]:
        return as_context if self.context else without_context

    def adapted(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in model.named_parameters() if name.startswith(self.adapts)}


NONE, HEAD, ALL = "-", "decoder", ""
WAYS = (
    Way("joint", False, NONE, 0, PALE),
    Way("ANIL", False, HEAD, 5, "#c99a5b"),
    Way("MAML", False, ALL, 5, THEIRS),
    Way("joint, in context", True, NONE, 0, OURS),
    Way("ANIL, in context", True, HEAD, 1, THIRD),
    Way("MAML, in context", True, ALL, 1, TRUTH),
)
IN_CONTEXT = WAYS[3]
BEFORE = "in context, before"  # what all those with a context start their last steps from


@dataclass
class Trained:
    model: nn.Module
    inner: InnerOptimizer
    steps: int


def train(way: Way, size: Size, seed: int, report: Report, start: nn.Module | None = None) -> Trained:
    """From the start, or the last steps from a model that has done the others; Ctrl-C ends it early."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed if start is None else seed + 1)
    model = ContextLearner(size.width, size.layers) if start is None else copy.deepcopy(start)
    steps = size.last if start is not None else size.steps - size.last if way.context else size.steps
    rate = size.rate if start is None else 0.3 * size.rate
    rates = MetaSGD(way.adapted(model), lr=1e-3) if way.context and way.adapts != NONE else None
    inner = INNER if rates is None else rates.optimizer()
    learned = [*model.parameters(), *(() if rates is None else rates.parameters())]
    optimizer = torch.optim.Adam(learned, lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses: list[float] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(steps):
            support, query = way.arranged(*mixed(size.tasks, generator))
            if way.adapts == NONE:  # one set a task, so that the tasks are a batch
                loss = mse_loss(model(*(part.flatten(0, 1) for part in query[0])), query[1].flatten(0, 1))
            else:
                loss = maml_loss(
                    model, way.adapted(model), mse_loss, support, query, optimizer=inner, steps=1
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            if step % 20 == 0:
                recent = losses[-100:]
                report(step / steps, f"{way.name}: error {sum(recent) / len(recent):.3f}")
    return Trained(model, inner, len(losses))


def predictions(way: Way, trained: Trained, support: Samples, query: Samples) -> Tensor:
    """For the queries, after the way's gradient steps: [tasks, 1, queries, 1]."""
    model, inner = trained.model, trained.inner
    params = {name: value.detach() for name, value in way.adapted(model).items()}

    def of_task(support: Any, query: Any) -> Tensor:
        adapted = adapt(model, params, mse_loss, support, optimizer=inner, steps=way.steps)
        values: Tensor = functional_call(model, adapted, query[0])
        return values

    with torch.no_grad():
        found: Tensor = vmap(of_task, chunk_size=250)(*way.arranged(support, query))
    return found


def judge(way: Way, trained: Trained, size: Size, seed: int) -> dict[str, list[float]]:
    """By family, the error of every test task."""
    generator = torch.Generator().manual_seed(seed + 10**6)
    found = {}
    for family in FAMILIES:
        tasks = draw_tasks(family, size.test, generator)
        support, query = (tuple((x, y / family.square**0.5)) for x, y in tasks)
        values = predictions(way, trained, support, query)
        found[family.name] = (values - query[1]).square().flatten(1).mean(1).tolist()
    return found


def rows(found: dict[str, dict[str, list[float]]], size: Size) -> list[Row]:
    of = f"squared error / mean square, mean over {size.test} tasks"
    made = [
        mean_row(
            f"all families: {way}",
            [error for errors in of_way.values() for error in errors],
            f"{of} of each family",
        )
        for way, of_way in found.items()
    ]
    made += [
        mean_row(f"{family.name}: {way}", of_way[family.name], of)
        for family in FAMILIES
        for way, of_way in found.items()
    ]
    return made


def examples(trained: dict[str, Trained], seed: int) -> list[dict[str, Any]]:
    """One task of each family, and what is made of it."""
    shown = []
    for family in FAMILIES:
        generator = torch.Generator().manual_seed(seed + 4)
        values = draw_functions(family, 1, generator)
        x = REACH * (2 * torch.rand(1, 1, SHOTS, 1, generator=generator) - 1)
        grid = torch.linspace(-REACH, REACH, 121).view(1, 1, -1, 1)
        unit = family.square**0.5
        curves = {
            way.name: predictions(
                way, trained[way.name], (x, values(x) / unit), (grid, values(grid) / unit)
            ).flatten()
            for way in WAYS
        }
        shown.append(
            {
                "known": (x.flatten().tolist(), values(x).flatten().tolist()),
                "truth": (grid.flatten().tolist(), values(grid).flatten().tolist()),
                "curves": {name: (unit * curve).tolist() for name, curve in curves.items()},
            }
        )
    return shown


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(14, 4.2), layout="constrained")
    bars, fits = figure.subfigures(1, 2, width_ratios=(1.1, 1))
    panel = bars.subplots()
    groups = ["all families", *(family.name for family in FAMILIES)]
    for other, way in enumerate(WAYS):
        for place, group in enumerate(groups):
            row = next(row for row in results.rows if row.quantity == f"{group}: {way.name}")
            panel.bar(
                place + 0.14 * (other - 2.5),
                row.ours,
                0.13,
                yerr=row.error,
                color=way.colour,
                ecolor="#222222",
                error_kw={"lw": 0.8},
                label=way.name if place == 0 else None,
            )
    panel.set_xticks(range(len(groups)), groups)
    panel.axhline(1, color="#222222", lw=0.8, ls=":")
    panel.set(yscale="log", ylabel="squared error / mean square")
    panel.set_title(f"New functions, {SHOTS} points known")
    panel.legend(frameon=False, fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.08))
    for fit, family, shown in zip(
        fits.subplots(2, 2, sharex=True).flat, FAMILIES, results.details["examples"], strict=True
    ):
        fit.plot(*shown["truth"], color=TRUTH, ls="--", lw=1.2, label="truth")
        for way in (WAYS[0], WAYS[2], IN_CONTEXT):
            fit.plot(shown["truth"][0], shown["curves"][way.name], color=way.colour, lw=1.8, label=way.name)
        fit.plot(*shown["known"], "o", color=TRUTH, ms=4, label="known points")
        fit.set_title(family.name, fontsize=9.5)
        handles, labels = fit.get_legend_handles_labels()
    fits.legend(handles, labels, frameon=False, fontsize=8, ncol=5, loc="outside lower center")
    return figure


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    trained: dict[str, Trained] = {}
    found: dict[str, dict[str, list[float]]] = {}
    seconds: dict[str, float] = {}
    stages = [(way.name, way) for way in WAYS]
    stages.insert(WAYS.index(IN_CONTEXT), (BEFORE, IN_CONTEXT))
    with common.progress("families") as report:
        for place, (name, way) in enumerate(stages):

            def part(done: float, remark: str, place: int = place) -> None:
                report((place + done) / len(stages), remark)

            begun = time.process_time()
            before = trained[BEFORE].model if BEFORE in trained else None
            trained[name] = train(way, size, options.seed, part, before)
            if name != BEFORE:
                found[name] = judge(way, trained[name], size, options.seed)
            seconds[name] = time.process_time() - begun
    done = {way.name: trained[way.name].steps + way.context * trained[BEFORE].steps for way in WAYS}
    stopped = [f"{name} after {steps}" for name, steps in done.items() if steps < size.steps]
    differs = "families, ranges and network of our own."
    if options.form != "full":
        differs = f"{differs} A smaller network and fewer steps than in the full form."
    if stopped:
        differs = f"{differs} Stopped early: {', '.join(stopped)} steps.".strip()
    results = Results(
        "multitask",
        options.form,
        f"{size.steps} steps of Adam on {size.tasks} tasks of each of {len(FAMILIES)} families; in context "
        f"the first {size.steps - size.last} jointly, the last {size.last} each way, from 0.3 of the rate; "
        f"width {size.width}, {size.layers} layers; one inner step in training; in the test, on {size.test} "
        f"tasks of each family, {WAYS[1].steps} of size {INNER.lr}, or {WAYS[-1].steps} of learned size in "
        "context.",
        differs,
        rows(found, size),
        {
            "size": asdict(size),
            "CPU seconds": seconds,
            "examples": examples(trained, options.seed),
        },
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
