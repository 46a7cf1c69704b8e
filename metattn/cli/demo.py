"""`metattn demo`: meta-learn sinusoids and handwriting with twice-differentiable attention."""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

import metattn
from metattn.bench.answers import make_inputs
from metattn.bench.cases import Case
from metattn.bench.files import json_text
from metattn.bench.peers import MATH, contestant
from metattn.cli.tasks import (
    Characters,
    Samples,
    Sinusoids,
    handwritten_digits,
    nearest_centroid,
    scribbles,
    windows,
)
from metattn.measure import in_fresh_process, interleave, machine
from metattn.meta import SGD, AttentionMetaLearner, MetaSGD, adapt, maml_loss
from metattn.nn import CrossAttentionBlock, LayerNorm

EXTRAS = ("matplotlib", "numpy", "rich", "sklearn")
SHOTS = 10  # points of a sinusoid to learn it from: the paper's K
WAYS = 5  # characters to tell apart, of which one image each is shown
SHOWN_STEPS = (0, 1, 5, 10)

Advance = Callable[[str, float, str], None]  # (stage, share of it done, remark)


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    sinusoid_iterations: int
    character_iterations: int
    scribbles: tuple[int, int]  # classes to train on, images of each
    new_sinusoids: int
    new_character_tasks: int
    lengths: tuple[int, ...]
    seconds: float  # of measuring a length


FULL = Size(800, 1000, (1500, 10), 400, 150, (1024, 2048, 4096), 1.0)
QUICK = Size(30, 40, (200, 8), 20, 20, (128, 256), 0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("metattn-demo"), help="folder for demo.png and demo.json"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds' worth of everything")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and tasks (default 0)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=70.0,
        help="training ends earlier where the machine would need longer (default 70)",
    )


def run(args: argparse.Namespace) -> int:
    for name in EXTRAS:  # said now rather than after a minute's work
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    if args.seconds <= 0:
        raise ValueError(f"--seconds: expected more than 0, got {args.seconds}")
    from metattn.bench import files
    from metattn.cli import _demo_report

    files.writable("--out", args.out)
    size = QUICK if args.quick else FULL
    started = time.perf_counter()
    with _demo_report.progress() as advance:
        results: dict[str, Any] = {"machine": machine(), "seed": args.seed}
        with one_thread():
            results["sinusoids"], learner = sinusoids(size, args.seed, args.seconds * 0.4, advance)
            results["characters"] = characters(size, args.seed, args.seconds * 0.6, advance)
        results["agreement"] = agreement(learner, args.seed)
        results["steps"] = second_order_steps(size, advance)
    results["seconds"] = time.perf_counter() - started
    _demo_report.picture(results, args.out / "demo.png")
    (args.out / "demo.json").write_text(json_text(results))
    _demo_report.show(results)
    print(f"{results['seconds']:.0f} seconds; written to {args.out}")
    return 0


@contextmanager
def one_thread() -> Iterator[None]:
    """The learners' tensors are too small to share out: more threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def meta_train(
    learner: nn.Module,
    loss: Callable[[], Tensor],
    groups: list[dict[str, Any]],
    *,
    iterations: int,
    seconds: float,
    report: Callable[[float, str], None],
) -> int:
    """Adam on `loss`, its step size falling as a cosine to 0 at the end of the iterations, or the seconds."""
    optimizer = torch.optim.Adam(groups)
    highest = [group["lr"] for group in optimizer.param_groups]
    started = time.perf_counter()
    smooth = None
    for iteration in range(iterations):
        done = max(iteration / iterations, (time.perf_counter() - started) / seconds)
        if done >= 1:
            return iteration
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        smooth = value.item() if smooth is None else 0.95 * smooth + 0.05 * value.item()
        report(done, f"loss after adaptation {smooth:.2f}")
    return iterations


# Sinusoids.

SINUSOID_STEPS, SINUSOID_RATE = 3, 0.01


def sinusoids(
    size: Size, seed: int, seconds: float, advance: Advance
) -> tuple[dict[str, Any], AttentionMetaLearner]:
    """Trains on sinusoids, then adapts to new ones: losses by step, beside the same network untrained."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    learner = AttentionMetaLearner(input_size=1, hidden_size=40, output_size=1)
    params = dict(learner.named_parameters())
    test = torch.Generator().manual_seed(seed + 1)
    new = Sinusoids.draw(size.new_sinusoids, test)
    support, query = new.points(SHOTS, test), new.points(SHOTS, test)
    rate = SGD(SINUSOID_RATE)
    untrained = adapted_scores(learner, params, mse_loss, mse_loss, support, query, rate)

    def loss() -> Tensor:
        tasks = Sinusoids.draw(16, generator)
        return maml_loss(
            learner,
            params,
            mse_loss,
            tasks.points(SHOTS, generator),
            tasks.points(SHOTS, generator),
            steps=SINUSOID_STEPS,
            optimizer=rate,
        )

    iterations = meta_train(
        learner,
        loss,
        [{"params": list(params.values()), "lr": 2e-3}],
        iterations=size.sinusoid_iterations,
        seconds=seconds,
        report=lambda done, remark: advance("sinusoids", done, remark),
    )
    trained = adapted_scores(learner, params, mse_loss, mse_loss, support, query, rate)
    advance("sinusoids", 1.0, f"loss {trained[0]:.2f} before adaptation, {trained[10]:.2f} after 10 steps")
    results = {
        "iterations": iterations,
        "tasks": size.new_sinusoids,
        "trained": trained,
        "untrained": untrained,
        "curves": curves(learner, params, new, support),
    }
    return results, learner


def adapted_scores(
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor, Tensor], Tensor],
    support: Samples,
    query: Samples,
    optimizer: SGD,
) -> list[float]:
    """The mean score on the queries after 0, 1, … 10 steps on the support, over all tasks."""
    scores = []
    with torch.no_grad():
        current = {name: value.expand(len(support[0]), *value.shape) for name, value in params.items()}
        for step in range(max(SHOWN_STEPS) + 1):
            if step:
                current = vmap(lambda p, s: adapt(model, p, loss_fn, s, steps=1, optimizer=optimizer))(
                    current, support
                )
            by_task = vmap(lambda p, q: score(functional_call(model, p, (q[0],)), q[1]))(current, query)
            scores.append(by_task.mean().item())
    return scores


def curves(
    model: nn.Module, params: Mapping[str, Tensor], tasks: Sinusoids, support: Samples
) -> list[dict[str, list[float]]]:
    """What the picture shows of three tasks of small, middle and large amplitude."""
    order = tasks.amplitude.argsort()
    grid = torch.linspace(-5, 5, 101).view(1, -1, 1)
    found = []
    for share in (0.25, 0.6, 0.95):
        index = int(order[int(share * (len(order) - 1))])
        one = Sinusoids(tasks.amplitude[index : index + 1], tasks.phase[index : index + 1])
        points = support[0][index], support[1][index]
        with torch.no_grad():
            adapted = adapt(model, params, mse_loss, points, steps=10, optimizer=SGD(SINUSOID_RATE))
            before, after = (functional_call(model, dict(p), (grid,)) for p in (params, adapted))
        found.append(
            {
                "x": grid.flatten().tolist(),
                "truth": one.at(grid)[1].flatten().tolist(),
                "before": before.flatten().tolist(),
                "after": after.flatten().tolist(),
                "support_x": points[0].flatten().tolist(),
                "support_y": points[1].flatten().tolist(),
            }
        )
    return found


# Characters.

CHARACTER_STEPS = 2  # the first moves the last layer alone, which starts at 0; the second all of them


class CharacterLearner(nn.Module):
    """A small vision transformer: an image's windows attend to each other, a linear layer reads all."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.place = nn.Parameter(0.3 * torch.randn(16, width))
        self.block = CrossAttentionBlock(width, 4, hidden_dim=2 * width)
        self.norm = LayerNorm(16 * width, elementwise_affine=False)
        self.head = nn.Linear(16 * width, WAYS)
        for parameter in self.head.parameters():  # no class is preferred before a task is seen
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 8, 8] → logits [batch, WAYS]."""
        points = self.embed(windows(images)) + self.place
        logits: Tensor = self.head(self.norm(self.block(points, points).flatten(1)))
        return logits


def characters(size: Size, seed: int, seconds: float, advance: Advance) -> dict[str, Any]:
    """Trains on scribbles, then adapts to new ones and to handwritten digits, one image of each class.

    No digit is trained on. How scribbles look and the step sizes were chosen by the accuracy on digits 0-4.
    """
    torch.manual_seed(seed)
    generator, test = (torch.Generator().manual_seed(seed + index) for index in range(2))
    training = scribbles(*size.scribbles, generator)
    unseen = {"digits": handwritten_digits(), "scribbles": scribbles(100, 20, test)}
    new = {
        name: classes.draw(size.new_character_tasks, test, ways=WAYS, shots=1, queries=10)
        for name, classes in unseen.items()
    }
    learner = CharacterLearner()
    params = dict(learner.named_parameters())
    rates = MetaSGD(params, 0.05)

    def accuracies(name: str) -> list[float]:
        return adapted_scores(learner, params, cross_entropy, accuracy, *new[name], rates.optimizer())

    def loss() -> Tensor:
        support, query = training.draw(8, generator, ways=WAYS, shots=1, queries=3)
        return maml_loss(
            learner,
            params,
            cross_entropy,
            support,
            query,
            steps=CHARACTER_STEPS,
            optimizer=rates.optimizer(),
        )

    untrained = {name: accuracies(name) for name in new}
    iterations = meta_train(
        learner,
        loss,
        [{"params": list(params.values()), "lr": 2e-3}, {"params": list(rates.parameters()), "lr": 1e-3}],
        iterations=size.character_iterations,
        seconds=seconds,
        report=lambda done, remark: advance("characters", done, remark),
    )
    results: dict[str, Any] = {"iterations": iterations, "tasks": size.new_character_tasks}
    for name, tasks in new.items():
        results[name] = {
            "trained": accuracies(name),
            "untrained": untrained[name],
            "nearest": nearest_centroid(*tasks),
        }
    trained = results["digits"]["trained"]
    advance(
        "characters", 1.0, f"accuracy {trained[0]:.0%} before adaptation, {trained[10]:.0%} after 10 steps"
    )
    results["shown"] = shown(learner, params, training, *new["digits"], rates.optimizer())
    return results


def shown(
    model: nn.Module,
    params: Mapping[str, Tensor],
    training: Characters,
    support: Samples,
    query: Samples,
    optimizer: SGD,
) -> dict[str, Any]:
    """What the picture shows: scribbles, and the first task's digits with the answers after 10 steps."""
    one, asked = ((images[0], labels[0]) for images, labels in (support, query))
    with torch.no_grad():
        adapted = adapt(model, params, cross_entropy, one, steps=10, optimizer=optimizer)
        right = functional_call(model, adapted, (asked[0],)).argmax(-1) == asked[1]
    each = 6
    return {
        "scribbles": [images[:each].tolist() for images in training.classes[:WAYS]],
        "support": one[0].tolist(),
        "query": asked[0].unflatten(0, (WAYS, -1))[:, :each].tolist(),
        "right": right.unflatten(0, (WAYS, -1))[:, :each].tolist(),
    }


def accuracy(scores: Tensor, labels: Tensor) -> Tensor:
    return (scores.argmax(-1) == labels).float().mean()


# Second order.


def agreement(learner: AttentionMetaLearner, seed: int) -> dict[str, float]:
    """‖g − g64‖ / ‖g64‖ of the meta-gradient in float32, g64 by torch's own attention in float64."""
    generator = torch.Generator().manual_seed(seed + 2)
    tasks = Sinusoids.draw(16, generator)
    support, query = tasks.points(SHOTS, generator), tasks.points(SHOTS, generator)
    plain = copy.deepcopy(learner)
    attention = nn.MultiheadAttention(
        learner.attention.embed_dim, learner.attention.num_heads, batch_first=True
    )
    attention.load_state_dict(learner.attention.state_dict())
    plain.attention = attention  # type: ignore[assignment]

    def gradient(model: nn.Module, dtype: torch.dtype, context: AbstractContextManager[Any]) -> Tensor:
        model = copy.deepcopy(model).to(dtype)
        samples = [(x.to(dtype), y.to(dtype)) for x, y in (support, query)]
        with context:
            params = dict(model.named_parameters())
            loss = maml_loss(
                model,
                params,
                mse_loss,
                samples[0],
                samples[1],
                steps=SINUSOID_STEPS,
                optimizer=SGD(SINUSOID_RATE),
            )
            gradients = torch.autograd.grad(loss, list(params.values()))
        return torch.cat([g.flatten().double() for g in gradients])

    exact = gradient(plain, torch.float64, sdpa_kernel(SDPBackend.MATH))
    fused = gradient(learner, torch.float32, nullcontext())
    eager = gradient(plain, torch.float32, sdpa_kernel(SDPBackend.MATH))
    return {
        "metattn": ((fused - exact).norm() / exact.norm()).item(),
        MATH: ((eager - exact).norm() / exact.norm()).item(),
    }


def second_order_steps(size: Size, advance: Advance) -> list[dict[str, Any]]:
    """Time, and peak memory in fresh processes, of forward, gradient and its gradient, against torch math."""
    step = "second-order step"
    measured = []
    names = [f"metattn {automatic_backend()}", MATH]
    for index, length in enumerate(size.lengths):
        case = Case("demo", 1, 2, length, 64, steps=(step,))
        inputs = make_inputs(case)
        advance("second-order step", index / len(size.lengths), f"N = {length}")
        timings = interleave(
            {name: contestant(case, name).start(step, inputs) for name in names},
            seconds=size.seconds,
            least=3,
            warmup=1,
        )
        for name in names:
            request = {
                "case": case.asdict(),
                "contestant": name,
                "step": step,
                "threads": torch.get_num_threads(),
                "answer": None,
            }
            measured.append(
                {
                    "length": length,
                    "contestant": name,
                    "seconds": timings[name].median,
                    "bytes": in_fresh_process("metattn.bench.peak", request)["bytes"],
                }
            )
    advance("second-order step", 1.0, "")
    return measured


def automatic_backend() -> str:
    x = torch.zeros(1, 1, 1, 64)
    return metattn.explain(x, x, x).backend
