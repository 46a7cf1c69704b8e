"""A MAML gradient of three inner steps, compiled and eager, with metattn's attention and the plain formula.

    python -m benchmarks.compiled_maml [--threads 1 2] [--out benchmarks/results/compiled-maml]
        [--page docs/recipes/compile.md]

One task of N points, one layer of attention of width 32 with 4 heads, float32; torch.func.grad inside
torch.func.grad, compiled whole by Inductor with fullgraph=True. The four gradients are compared with the
plain formula's in float64, then timed in turn, in rounds; a round takes each for a moment.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import grad

import metattn
from benchmarks.publish import publish
from metattn.bench.tables import ratio
from metattn.measure import interleave, machine, per_round

ROW = 0.03  # seconds
WIDTH, HEADS, STEPS, RATE = 32, 4, 3, 0.1
LENGTHS = (10, 25, 64, 256, 1024)
TOLERANCE = 1e-4  # of the meta-gradient in float32
MARKS = ("<!-- compiled:begin (written by `python -m benchmarks.compiled_maml`) -->", "<!-- compiled:end -->")
GOALS = {10: 1.0, 25: 1.0, 64: 1.2, 256: 2.0, 1024: 2.5}  # compiled plain / compiled ours

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Params = dict[str, Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def meta_gradient(attend: Attention) -> Callable[..., Params]:
    """Of the loss on a query set after STEPS steps on a support set."""

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(-2, -3)

    def loss(params: Params, x: Tensor, y: Tensor) -> Tensor:
        hidden = x @ params["in"]
        q, k, v = (heads(hidden @ params[name]) for name in "qkv")
        mixed = attend(q, k, v).transpose(-2, -3).flatten(-2)
        return ((hidden + mixed @ params["o"]) @ params["out"] - y).square().mean()

    def adapted(params: Params, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        for _ in range(STEPS):
            gradients = grad(loss)(params, x, y)
            params = {name: value - RATE * gradients[name] for name, value in params.items()}
        return loss(params, query_x, query_y)

    found: Callable[..., Params] = grad(adapted)
    return found


def problem(points: int) -> tuple[Params, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator)

    params = {"in": draw(2, WIDTH) / 2, "out": draw(WIDTH, 1) / WIDTH**0.5}
    params |= {name: draw(WIDTH, WIDTH) / WIDTH**0.5 for name in "qkvo"}
    return params, draw(1, points, 2), draw(1, points, 1), draw(1, points, 2), draw(1, points, 1)


def in_a_row(call: Callable[[], object]) -> float:
    """Seconds a call, of as many in a row as ROW takes: so a training loop makes them.

    A single one among three others' would find their code in the processor's caches, and its own nowhere.
    """
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < ROW:
        call()
        calls += 1
    return passed / calls


def measure(points: int, threads: int, seconds: float) -> dict[str, Any]:
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    params, *samples = problem(points)
    eager = {"ours": meta_gradient(metattn.attention), "plain": meta_gradient(plain)}
    functions = {f"{name} eager": function for name, function in eager.items()}
    functions |= {
        f"{name} compiled": torch.compile(function, fullgraph=True) for name, function in eager.items()
    }
    wide = {name: value.double() for name, value in params.items()}
    exact = eager["plain"](wide, *(x.double() for x in samples))
    errors, compiling = {}, {}
    for name, function in functions.items():
        start = time.perf_counter()
        found = function(params, *samples)
        compiling[name] = time.perf_counter() - start
        errors[name] = max(
            float((found[key].double() - value).norm() / value.norm()) for key, value in exact.items()
        )
        if errors[name] > TOLERANCE:
            raise AssertionError(f"{name}, {points} points: the meta-gradient is off by {errors[name]:.1e}")
    timings = interleave(
        {
            name: (lambda function=function: function(params, *samples))
            for name, function in functions.items()
        },
        seconds=seconds,
        least=15,
        most=1000,
        warmup=3,
        once=in_a_row,
    )
    samples_of = {name: timing.samples for name, timing in timings.items()}
    ratios = {
        "compiled": per_round(samples_of["plain compiled"], samples_of["ours compiled"]),
        "eager": per_round(samples_of["plain eager"], samples_of["ours eager"]),
        "compiling": per_round(samples_of["ours eager"], samples_of["ours compiled"]),
    }
    return {
        "points": points,
        "threads": threads,
        "errors": errors,
        "first_call_seconds": compiling,
        "times": {name: {"samples": t.samples, **t.summary()} for name, t in timings.items()},
        "ratios": {name: each.summary() for name, each in ratios.items()},
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| threads | N | ours compiled, ms | plain compiled / ours compiled | ours eager / ours compiled | "
        "plain eager / ours eager |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        ours, ratios = row["times"]["ours compiled"], row["ratios"]
        lines.append(
            f"| {row['threads']} | {row['points']} | {1e3 * ours['median']:.3g} | "
            f"{ratio(ratios['compiled'])} | {ratio(ratios['compiling'])} | {ratio(ratios['eager'])} |"
        )
    what = results["machine"]
    lines += [
        "",
        f"A MAML gradient of {STEPS} inner steps: N points, width {WIDTH}, {HEADS} heads, float32. Ratios of "
        "rounds in turn, calls of one in a row within each, median ± half the distance of their quartiles: "
        "above 1 the second is faster. "
        f"{what['cpu']}, load {what['load']:.1f} at the end, torch {what['versions']['torch']}, commit "
        f"{what['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--points", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--seconds", type=float, default=10.0, help="of timing for each row")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compiled-maml"))
    parser.add_argument("--page", type=Path, help="a Markdown file whose table is rewritten")
    args = parser.parse_args()
    rows = [measure(points, threads, args.seconds) for threads in args.threads for points in args.points]
    results = {"machine": machine(), "goals": GOALS, "rows": rows}
    publish(results, markdown(results), args.out, "compiled_maml", args.page, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
