"""Few-shot regression of sinusoids: MAML's network as published, and attention with the points as context.

    python examples/scenarios/sinusoid.py

Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), section 5.1. A task is y = A·sin(x − φ) with
A ~ U[0.1, 5], φ ~ U[0, π] and x ~ U[−5, 5]. A network of two hidden layers of 40 ReLU units is meta-trained
by MAML: one gradient step of size 0.01 on the squared error of 10 points, and Adam at a rate of 0.001. A new
task brings 5 or 10 points, on which as many gradient steps are taken as wanted. From the authors' public code
are the 25 tasks of a step, the 70,000 steps, the first weights (normal, of deviation 0.01, cut at two), and a
test on as many queries as shots.

Published: the 5-shot errors of table 2 (appendix C.1), of this network and of the same one pretrained on all
tasks without an inner step.

Beside them, trained on as many tasks: attention whose queries are points and whose keys and values are the
task's known points, which needs no gradient step (a neural process without its latent path, Kim et al. 2019,
arXiv 1901.05761); and the same learner with one gradient step on top, for which the last of the training is
MAML with learned step sizes (Meta-SGD, Li et al. 2017, arXiv 1707.09835). In that step each
known point is predicted from the others: a mask hides it from itself, and the meta-gradient is a second
derivative of masked attention.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import common
import torch
from common import OURS, PALE, THEIRS, THIRD, TRUTH, Report, Results, Row, mean_row
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import mse_loss

import metattn
from metattn.cli.tasks import Samples, Sinusoids
from metattn.meta import SGD, InnerOptimizer, MetaSGD, adapt, maml_loss

PAPER = "arXiv 1703.03400, table 2"
INNER = SGD(0.01)
APART = 100.0  # the most that two tasks can be apart, (2·5)²: a learner whose error is larger has diverged
STEPS = 10  # of gradient descent on a new task
SHOTS = (5, 10)


@dataclass(frozen=True)
class Size:
    tasks: int  # of a meta-batch
    steps: int  # of the outer optimizer
    shots: int  # of a training task; as many queries
    fewest: int  # shots of the attention learners' training tasks are from fewest to shots
    rate: float  # of the outer optimizer
    width: int  # of the attention learners
    layers: int
    last: int  # of these, which both attention learners do, each in its way, from one model
    test: int  # tasks


SIZES = {
    "tiny": Size(8, 100, 10, 5, 5e-3, 16, 1, 10, 100),
    "short": Size(25, 5000, 10, 5, 1e-3, 40, 2, 300, 2000),
    "full": Size(25, 70_000, 10, 5, 1e-3, 40, 2, 2000, 10_000),
}


def network() -> nn.Sequential:
    """MAML's, with the weights it starts from in the authors' code."""
    model = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
    for layer in model[::2]:
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        nn.init.zeros_(layer.bias)
    return model


class Layer(nn.Module):
    """h + attention of the normalised points to the context, then h + a network of each point."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.known = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query(self.first(hidden)), *self.known(context).chunk(2, -1))
        )
        hidden = hidden + self.out(metattn.attention(q, k, v, mask=mask).transpose(1, 2).flatten(2))
        changed: Tensor = hidden + self.network(self.second(hidden))
        return changed


class ContextLearner(nn.Module):
    """x [B, N, 1] and context [B, K, 2], the known (x, y) → [B, N, 1]; every x by itself."""

    def __init__(self, width: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(1, width), nn.ReLU(), nn.Linear(width, width))
        self.context_encoder = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.decoder = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1))

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden, known = self.encoder(x), self.context_encoder(context)
        for layer in self.layers:
            hidden = layer(hidden, known, mask)
        decoded: Tensor = self.decoder(hidden)
        return decoded


Task = tuple[Any, Any]  # what a learner adapts to and what it is judged by; each (inputs, targets)


def as_network(support: Samples, query: Samples) -> Task:
    return support, query


def as_context(support: Samples, query: Samples) -> Task:
    """The support as context: of the queries, and of each support point but itself."""
    known = torch.cat(support, -1)  # [tasks, 1, K, 2]
    tasks, _, shots, _ = known.shape
    others = ~torch.eye(shots, dtype=torch.bool).expand(tasks, shots, shots)
    return ((support[0], known, others), support[1]), ((query[0], known), query[1])


@dataclass(frozen=True)
class Learner:
    name: str
    attends: bool
    trained_steps: int  # inner steps in training
    steps: tuple[int, ...]  # inner steps on a new task
    colour: str
    published: tuple[str, ...] = ()  # 5-shot, after these steps

    @property
    def arranged(self) -> Callable[[Samples, Samples], Task]:
        return as_context if self.attends else as_network


IN_CONTEXT = Learner("attention, in context", True, 0, (0,), OURS)
ADAPTED = Learner("attention, in context and Meta-SGD", True, 1, (1,), THIRD)
MAML = Learner("MLP, MAML", False, 1, (1, 5, 10), THEIRS, ("0.67", "0.38", "0.35"))
PRETRAINED = Learner("MLP, pretrained", False, 0, (1, 5, 10), PALE, ("2.41", "2.23", "2.19"))
LEARNERS = (MAML, PRETRAINED, IN_CONTEXT, ADAPTED)
BEFORE = "attention, before"  # what both that attend start their last steps from


def draw_tasks(tasks: int, shots: int, generator: torch.Generator) -> tuple[Samples, Samples]:
    sines = Sinusoids.draw(tasks, generator)
    return sines.points(shots, generator), sines.points(shots, generator)


@dataclass
class Trained:
    model: nn.Module
    inner: InnerOptimizer
    steps: int
    losses: list[float]  # means of 1 % of the steps


def train(learner: Learner, size: Size, seed: int, report: Report, start: nn.Module | None = None) -> Trained:
    """From the start, or the last steps from a model that has done the others; Ctrl-C ends it early."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed if start is None else seed + 1)
    if start is not None:
        model = copy.deepcopy(start)
    else:
        model = ContextLearner(size.width, size.layers) if learner.attends else network()
    params = dict(model.named_parameters())
    steps = size.last if start is not None else size.steps - size.last if learner.attends else size.steps
    rates = MetaSGD(params, lr=1e-3) if learner is ADAPTED else None
    inner = INNER if rates is None else rates.optimizer()
    learned = [*params.values(), *(() if rates is None else rates.parameters())]
    optimizer = torch.optim.Adam(learned, lr=size.rate if start is None else 0.3 * size.rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if learner.attends else None
    losses: list[float] = []
    with contextlib.suppress(KeyboardInterrupt):
        for step in range(steps):
            shots = size.shots
            if learner.attends:
                shots = int(torch.randint(size.fewest, size.shots + 1, (), generator=generator))
            support, query = learner.arranged(*draw_tasks(size.tasks, shots, generator))
            if learner.trained_steps:
                loss = maml_loss(
                    model, params, mse_loss, support, query, optimizer=inner, steps=learner.trained_steps
                )
            else:  # one set a task, so that the tasks are a batch
                inputs = query[0] if isinstance(query[0], tuple) else (query[0],)
                loss = mse_loss(model(*(part.flatten(0, 1) for part in inputs)), query[1].flatten(0, 1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            losses.append(loss.item())
            if step % 20 == 0:
                recent = losses[-100:]
                report(step / steps, f"{learner.name}: loss {sum(recent) / len(recent):.3f}")
    each = max(1, steps // 100)
    parts = [losses[i : i + each] for i in range(0, len(losses), each)]
    return Trained(model, inner, len(losses), [sum(part) / len(part) for part in parts])


def errors(learner: Learner, trained: Trained, tasks: tuple[Samples, Samples], steps: int) -> Tensor:
    """Mean squared errors of each task's queries after 0 … steps gradient steps: [tasks, steps + 1]."""
    model, inner = trained.model, trained.inner
    start = {name: value.detach() for name, value in model.named_parameters()}

    def of_task(support: Any, query: Any) -> Tensor:
        params, found = start, []
        for step in range(steps + 1):
            if step:
                params = adapt(model, params, mse_loss, support, optimizer=inner, steps=1)
            inputs = query[0] if isinstance(query[0], tuple) else (query[0],)
            found.append(mse_loss(functional_call(model, params, inputs), query[1]))
        return torch.stack(found)

    with torch.no_grad():
        found: Tensor = vmap(of_task, chunk_size=1000)(*learner.arranged(*tasks))
    return found.nan_to_num(nan=torch.inf)


def kept(of_tasks: Tensor) -> Tensor:
    """Errors of tasks, without those that diverged: a handful of ten thousand would be all of the mean."""
    return of_tasks[of_tasks <= APART]


def rows(found: dict[str, dict[int, Tensor]], size: Size) -> list[Row]:
    made = []
    for shots in SHOTS:
        for learner in LEARNERS:
            of_tasks = found[learner.name][shots]
            for place, steps in enumerate(learner.steps):
                values = kept(of_tasks[:, steps])
                published = learner.published[place] if learner.published and shots == 5 else ""
                made.append(
                    mean_row(
                        f"{shots}-shot MSE: {learner.name}, {steps} step{'' if steps == 1 else 's'}",
                        values.tolist(),
                        f"mean over {len(values)} tasks",
                        published=published,
                        source=PAPER if published else "",
                    )
                )
                if len(values) < len(of_tasks):
                    share = 100 * (1 - len(values) / len(of_tasks))
                    made.append(
                        Row(
                            f"{shots}-shot, diverged, %: {learner.name}, {steps} steps",
                            share,
                            of=f"{size.test} tasks",
                        )
                    )
    return made


def predictions(learner: Learner, trained: Trained, support: Samples, query: Samples) -> Tensor:
    """For the queries, after as many steps as the learner takes: their shape."""
    model, inner, steps = trained.model, trained.inner, learner.steps[-1]
    start = {name: value.detach() for name, value in model.named_parameters()}

    def of_task(support: Any, query: Any) -> Tensor:
        params = adapt(model, start, mse_loss, support, optimizer=inner, steps=steps)
        inputs = query[0] if isinstance(query[0], tuple) else (query[0],)
        values: Tensor = functional_call(model, params, inputs)
        return values

    with torch.no_grad():
        found: Tensor = vmap(of_task)(*learner.arranged(support, query))
    return found


def examples(trained: dict[str, Trained], seed: int) -> dict[str, Any]:
    """Two tasks and what the learners make of five points of each."""
    sines = Sinusoids(torch.tensor([4.0, 2.0]), torch.tensor([0.6, 2.2]))
    support = sines.points(5, torch.Generator().manual_seed(seed + 2))
    query = sines.at(torch.linspace(-5, 5, 121).view(1, 1, -1, 1).expand(2, -1, -1, -1))
    return {
        "support": [part.flatten(1).tolist() for part in support],
        "truth": [part.flatten(1).tolist() for part in query],
        "curves": {
            learner.name: predictions(learner, trained[learner.name], support, query).flatten(1).tolist()
            for learner in LEARNERS
        },
    }


def draw(results: Results) -> Any:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    details = results.details
    figure, panels = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    for panel, shots in zip(panels, SHOTS, strict=False):
        for learner in LEARNERS:
            mean, error = (torch.tensor(x) for x in details["errors"][learner.name][str(shots)])
            if learner is IN_CONTEXT:
                panel.axhline(float(mean[0]), color=learner.colour, lw=2.2, label=learner.name)
                continue
            steps = range(len(mean))
            marker = "D" if learner is ADAPTED else None
            panel.plot(steps, mean, color=learner.colour, lw=2, marker=marker, ms=4, label=learner.name)
            panel.fill_between(steps, mean - error, mean + error, color=learner.colour, alpha=0.2, lw=0)
            if learner.published and shots == 5:
                published = [float(value) for value in learner.published]
                name = "published" if learner is MAML else None
                panel.plot(learner.steps, published, "o", color=TRUTH, mfc="none", ms=7, label=name)
        panel.set(xlabel="gradient steps", ylabel="mean squared error", yscale="log")
        panel.yaxis.set_major_locator(FixedLocator([a * 10.0**b for b in range(-4, 1) for a in (1, 2, 5)]))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        panel.set_title(f"New tasks, {shots} points")
    shown = details["examples"]
    for place, panel in enumerate(panels[2:]):
        x, y = (part[place] for part in shown["truth"])
        panel.plot(x, y, color=TRUTH, ls="--", lw=1.2, label="truth" if place == 0 else None)
        for learner in (MAML, PRETRAINED, IN_CONTEXT):
            panel.plot(x, shown["curves"][learner.name][place], color=learner.colour, lw=1.8)
        known = [part[place] for part in shown["support"]]
        panel.plot(*known, "o", color=TRUTH, ms=5, label="known points" if place == 0 else None)
        panel.set(xlabel="x", ylim=(-5.6, 5.6))
        panel.set_title(f"A = {(4, 2)[place]}; MLPs after {STEPS} steps")
    figure.legend(*merged(panels[0], panels[2]), frameon=False, ncol=7, loc="outside lower center")
    return figure


def merged(*panels: Any) -> tuple[list[Any], list[str]]:
    """The entries of several panels' legends."""
    entries = [entry for panel in panels for entry in zip(*panel.get_legend_handles_labels(), strict=True)]
    return [handle for handle, _ in entries], [label for _, label in entries]


def main(arguments: Sequence[str] | None = None) -> None:
    start = time.perf_counter()
    options = common.parse(__doc__ or "", arguments)
    size = SIZES[options.form]
    trained: dict[str, Trained] = {}
    seconds: dict[str, float] = {}
    stages = [(learner.name, learner) for learner in LEARNERS]
    stages.insert(LEARNERS.index(IN_CONTEXT), (BEFORE, IN_CONTEXT))
    with common.progress("sinusoids") as report:
        for place, (name, learner) in enumerate(stages):

            def part(done: float, remark: str, place: int = place) -> None:
                report((place + done) / len(stages), remark)

            begun = time.process_time()
            before = trained[BEFORE].model if BEFORE in trained else None
            trained[name] = train(learner, size, options.seed, part, before)
            seconds[name] = time.process_time() - begun
    found: dict[str, dict[int, Tensor]] = {learner.name: {} for learner in LEARNERS}
    for shots in SHOTS:
        generator = torch.Generator().manual_seed(options.seed + 10**6 + shots)
        tasks = draw_tasks(size.test, shots, generator)
        for learner in LEARNERS:
            steps = max(learner.steps)
            found[learner.name][shots] = errors(learner, trained[learner.name], tasks, steps)
    wide = [1.96 * kept(of).std().item() / 600**0.5 for of in found[MAML.name][5].unbind(1)]
    differs = {
        "full": "",
        "short": f"{size.steps} steps of the outer optimizer in place of 70,000.",
        "tiny": "everything is smaller.",
    }[options.form]
    done = {each.name: trained[each.name].steps + each.attends * trained[BEFORE].steps for each in LEARNERS}
    stopped = [f"{name} after {steps}" for name, steps in done.items() if steps < size.steps]
    if stopped:
        differs = f"{differs} Stopped early: {', '.join(stopped)} steps.".strip()
    results = Results(
        "sinusoid",
        options.form,
        f"{size.steps} steps of Adam on {size.tasks} tasks for every learner; MLPs on {size.shots} points, "
        f"attention on {size.fewest} to {size.shots}, the last {size.last} steps with Meta-SGD or without, "
        f"from one model and 0.3 of the rate, which decays; errors on {size.test} new tasks; those above "
        f"{APART:g}, which no two tasks are apart, are counted and left out of the means. The source gives "
        "no intervals. Of 600 tasks, as many as its code tests on, they would be "
        f"±{wide[1]:.2f}, ±{wide[5]:.2f} and ±{wide[10]:.2f} for MAML's MLP after 1, 5 and 10 steps.",
        differs,
        rows(found, size),
        {
            "size": asdict(size),
            "errors": {
                name: {
                    str(shots): [
                        [part(kept(of_steps)).item() for of_steps in of.unbind(1)]
                        for part in (torch.mean, lambda values: 1.96 * values.std() / len(values) ** 0.5)
                    ]
                    for shots, of in of_shots.items()
                }
                for name, of_shots in found.items()
            },
            "CPU seconds": seconds,
            "losses": {name: one.losses for name, one in trained.items()},
            "examples": examples(trained, options.seed),
        },
    )
    common.finish(results, options, draw, start)


if __name__ == "__main__":
    main()
