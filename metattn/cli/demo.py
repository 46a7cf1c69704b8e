"""`metattn demo`: meta-learn sinusoids and handwritten digits with twice-differentiable attention."""

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
from metattn.cli.tasks import Samples, Sinusoids, handwritten_digits, nearest_centroid, rows
from metattn.measure import in_fresh_process, interleave, machine
from metattn.meta import SGD, AttentionMetaLearner, adapt, maml_loss

EXTRAS = ("matplotlib", "numpy", "rich", "sklearn")
SHOTS = 10  # points of a sinusoid to learn it from: the paper's K
WAYS, DIGIT_SHOTS, DIGIT_QUERIES, DIGIT_STEPS = 3, 5, 15, 5
SHOWN_STEPS = (0, 1, 5, 10)

Advance = Callable[[str, float, str], None]  # (stage, share of it done, remark)


@dataclass(frozen=True)
class Size:
    """How much is computed."""

    sinusoid_iterations: int
    digit_iterations: int
    new_sinusoids: int
    new_digit_tasks: int
    lengths: tuple[int, ...]
    seconds: float  # of measuring a length


FULL = Size(800, 320, 400, 60, (1024, 2048, 4096), 1.0)
QUICK = Size(30, 15, 20, 10, (128, 256), 0.1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("metattn-demo"), help="folder for demo.png and demo.json"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds' worth of everything")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and tasks (default 0)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="training ends earlier where the machine would need longer (default 60)",
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
            results["sinusoids"], learner = sinusoids(size, args.seed, args.seconds * 0.5, advance)
            results["digits"] = digits(size, args.seed, args.seconds * 0.5, advance)
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
    untrained = adapted_scores(learner, params, mse_loss, mse_loss, support, query, SINUSOID_RATE)

    def loss() -> Tensor:
        tasks = Sinusoids.draw(16, generator)
        return maml_loss(
            learner,
            params,
            mse_loss,
            tasks.points(SHOTS, generator),
            tasks.points(SHOTS, generator),
            steps=SINUSOID_STEPS,
            optimizer=SGD(SINUSOID_RATE),
        )

    iterations = meta_train(
        learner,
        loss,
        [{"params": list(params.values()), "lr": 2e-3}],
        iterations=size.sinusoid_iterations,
        seconds=seconds,
        report=lambda done, remark: advance("sinusoids", done, remark),
    )
    trained = adapted_scores(learner, params, mse_loss, mse_loss, support, query, SINUSOID_RATE)
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
    lr: float | dict[str, Tensor],
) -> list[float]:
    """The mean score on the queries after 0, 1, … 10 steps on the support, over all tasks."""
    scores = []
    with torch.no_grad():
        current = {name: value.expand(len(support[0]), *value.shape) for name, value in params.items()}
        for step in range(max(SHOWN_STEPS) + 1):
            if step:
                current = vmap(lambda p, s: adapt(model, p, loss_fn, s, steps=1, optimizer=SGD(lr)))(
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


# Digits.


def digits(size: Size, seed: int, seconds: float, advance: Advance) -> dict[str, Any]:
    """Trains on digits 0-5, then adapts to classes of 6-9: accuracy by step; the nearest centroid's."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    training, unseen = handwritten_digits()
    test = torch.Generator().manual_seed(seed + 1)
    task = {"ways": WAYS, "shots": DIGIT_SHOTS}
    support, query = unseen.draw(size.new_digit_tasks, test, queries=DIGIT_QUERIES, **task)

    learner = AttentionMetaLearner(16, 32, WAYS, pooling="attention")
    for parameter in learner.decoder[1].parameters():  # no class is preferred before a task is seen
        nn.init.zeros_(parameter)
    params = dict(learner.named_parameters())
    # Step sizes are learned too, one a parameter (Meta-SGD, arXiv 1707.09835), as logarithms.
    logs = {
        name: torch.tensor(math.log(0.1 if name.startswith("decoder") else 0.01), requires_grad=True)
        for name in params
    }

    def rates() -> dict[str, Tensor]:
        return {name: log.exp() for name, log in logs.items()}

    def accuracies() -> list[float]:
        points = [(rows(images), labels) for images, labels in (support, query)]
        return adapted_scores(learner, params, cross_entropy, accuracy, points[0], points[1], rates())

    def loss() -> Tensor:
        drawn = training.draw(4, generator, queries=DIGIT_SHOTS, **task)
        points = [(rows(images), labels) for images, labels in drawn]
        return maml_loss(
            learner, params, cross_entropy, points[0], points[1], steps=DIGIT_STEPS, optimizer=SGD(rates())
        )

    untrained = accuracies()
    iterations = meta_train(
        learner,
        loss,
        [{"params": list(params.values()), "lr": 4e-3}, {"params": list(logs.values()), "lr": 2e-2}],
        iterations=size.digit_iterations,
        seconds=seconds,
        report=lambda done, remark: advance("digits", done, remark),
    )
    trained = accuracies()
    advance("digits", 1.0, f"accuracy {trained[0]:.0%} before adaptation, {trained[10]:.0%} after 10 steps")
    return {
        "iterations": iterations,
        "tasks": size.new_digit_tasks,
        "trained": trained,
        "untrained": untrained,
        "centroid": nearest_centroid(support, query),
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
