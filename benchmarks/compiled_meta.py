"""MAML's loss and its gradient, compiled: time beside eager PyTorch's, time of compiling, peak memory.

    python -m benchmarks.compiled_meta [--ways whole steps checkpoint] [--steps 1 5 10] [--cpp-wrapper]
        [--peaks 2 20] [--out benchmarks/results/compiled-meta]

An AttentionMetaLearner, 8 tasks of 10 points, inner SGD, reverse mode, one thread. Three ways: the whole
loss in torch.compile, and `Compiled()` and `Compiled(checkpoint=True)`, whose steps are compiled once. Every
compilation has a fresh process and an empty cache. Both meta-gradients are compared with float64's before
they are timed in turn, in rounds. Beside the seconds of compiling stands the processors' time, compilers'
included. Memory is the peak of a fresh process for one meta-gradient with sets of 256 points, after one of
a single step.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from benchmarks.publish import publish
from metattn.bench.tables import ratio
from metattn.measure import in_fresh_process, interleave, machine, peak_memory, per_round
from metattn.meta import SGD, AttentionMetaLearner, Compiled, maml_loss

TASKS, POINTS, PEAK_POINTS, HIDDEN = 8, 10, 256, 32
FACTOR, FLOOR = (
    4.0,
    5e-6,
)  # a float32 meta-gradient's error, beside eager's own: steps enlarge what rounding does
EAGER = ("reverse", "checkpointed")
WAYS = ("whole", "steps", "checkpoint")


class Task:
    def __init__(self, layers: int, points: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self.model = AttentionMetaLearner(2, HIDDEN, 1, layers=layers)
        self.params = dict(self.model.named_parameters())
        self.samples = [
            (torch.randn(TASKS, 1, points, 2), torch.randn(TASKS, 1, points, 1)) for _ in ("support", "query")
        ]

    def exact(self, steps: int) -> tuple[Tensor, ...]:
        wide = {name: value.detach().double().requires_grad_() for name, value in self.params.items()}
        samples = [(x.double(), y.double()) for x, y in self.samples]
        return torch.autograd.grad(self._loss(wide, samples, steps, "reverse"), list(wide.values()))

    def gradient(self, way: str, cpp_wrapper: bool = False) -> Callable[[int], tuple[Tensor, ...]]:
        options = {"cpp_wrapper": True} if cpp_wrapper else None
        loss: Callable[..., Tensor] = self._loss
        meta_gradient: Any = way if way in EAGER else "reverse"
        if way == "whole":
            loss = torch.compile(self._loss, fullgraph=True, options=options)
        elif way in WAYS:
            meta_gradient = Compiled(way == "checkpoint", options=options)

        def gradient(steps: int) -> tuple[Tensor, ...]:
            value = loss(self.params, self.samples, steps, meta_gradient)
            return torch.autograd.grad(value, list(self.params.values()))

        return gradient

    def _loss(self, params: dict[str, Tensor], samples: Any, steps: int, meta_gradient: Any) -> Tensor:
        return maml_loss(
            *(self.model, params, mse_loss, *samples),
            optimizer=SGD(0.01),
            steps=steps,
            meta_gradient=meta_gradient,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--cpp-wrapper", action="store_true", help="Inductor's option")
    parser.add_argument("--peaks", type=int, nargs="*", default=[], help="numbers of steps to take memory of")
    parser.add_argument("--rounds", type=int, default=15, help="of timing, at least")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compiled-meta"))
    args = parser.parse_args()
    common = {"layers": args.layers, "cpp_wrapper": args.cpp_wrapper}
    rows, peaks = [], []
    for way in args.ways:
        for counts in [[steps] for steps in args.steps] if way == "whole" else [args.steps]:
            with tempfile.TemporaryDirectory() as cache:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
                request = {"what": "times", "way": way, "counts": counts, "rounds": args.rounds, **common}
                rows += in_fresh_process("benchmarks.compiled_meta_once", request)["rows"]  # type: ignore[operator]
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # memory that is freed is handed back
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for way in (*EAGER, *(way for way in args.ways if way != "whole")):
            for steps in args.peaks:
                request = {"what": "peak", "way": way, "steps": steps, **common}
                peaks.append(in_fresh_process("benchmarks.compiled_meta_once", request))
    results = {"machine": machine(), **common, "rows": rows, "peaks": peaks}
    publish(results, markdown(results), args.out, "compiled_meta")
    return 0


def measure(way: str, counts: list[int], layers: int, cpp_wrapper: bool, rounds: int) -> list[dict[str, Any]]:
    task = Task(layers, POINTS)
    eager, compiled = task.gradient("reverse"), task.gradient(way, cpp_wrapper)
    eager(1)
    start, processors = time.perf_counter(), _processor_seconds()
    compiled(counts[0])
    seconds, processors = time.perf_counter() - start, _processor_seconds() - processors
    rows = []
    for steps in counts:
        exact = task.exact(steps)
        eager_error, error = (relative_error(function(steps), exact) for function in (eager, compiled))
        if error > max(FACTOR * eager_error, FLOOR):
            raise AssertionError(
                f"{way}, {steps} steps: the meta-gradient is off by {error:.1e}, the eager one by "
                f"{eager_error:.1e}"
            )
        timings = interleave(
            {"eager": lambda steps=steps: eager(steps), "compiled": lambda steps=steps: compiled(steps)},
            seconds=10,
            least=rounds,
            most=60,
            warmup=2,
        )
        rows.append(
            {
                "way": way,
                "steps": steps,
                "compile_seconds": seconds,
                "compile_processor_seconds": processors,
                "error": error,
                "eager_error": eager_error,
                **{name: {"samples": timing.samples, **timing.summary()} for name, timing in timings.items()},
                "faster": per_round(timings["eager"].samples, timings["compiled"].samples).summary(),
            }
        )
    return rows


def peak(way: str, steps: int, layers: int, cpp_wrapper: bool) -> dict[str, Any]:
    gradient = Task(layers, PEAK_POINTS).gradient(way, cpp_wrapper)
    gradient(1)  # code, threads and small buffers exist afterwards
    return {"way": way, "steps": steps, "bytes": peak_memory(lambda: gradient(steps))}


def _processor_seconds() -> float:
    """Of this process and of its children that ended."""
    return sum(os.times()[:4])


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    whole, exact = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (found, expected))
    return float((whole - exact).norm() / exact.norm())


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| compiled | inner steps | eager, ms | compiled, ms | eager / compiled | compiling, s "
        "| processor time, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        times = (f"{1e3 * row[name]['median']:.3g}" for name in ("eager", "compiled"))
        compiling = (f"{row[name]:.0f}" for name in ("compile_seconds", "compile_processor_seconds"))
        cells = (row["way"], str(row["steps"]), *times, ratio(row["faster"]), *compiling)
        lines.append(f"| {' | '.join(cells)} |")
    if results["peaks"]:
        counts = sorted({each["steps"] for each in results["peaks"]})
        found = {(each["way"], each["steps"]): each["bytes"] for each in results["peaks"]}
        lines += ["", f"| {' | '.join(['peak, MiB', *(f'{steps} steps' for steps in counts)])} |"]
        lines.append(f"| --- |{' ---: |' * len(counts)}")
        for way in dict.fromkeys(each["way"] for each in results["peaks"]):
            name = f"eager, {way}" if way in EAGER else way
            sizes = (found[way, steps] for steps in counts)
            cells = (name, *("?" if size is None else f"{size / 2**20:.0f}" for size in sizes))
            lines.append(f"| {' | '.join(cells)} |")
    what, wrapper = results["machine"], "with" if results["cpp_wrapper"] else "without"
    lines += [
        "",
        f"* maml_loss and its gradient: {TASKS} tasks of {POINTS} points ({PEAK_POINTS} for memory), an "
        f"AttentionMetaLearner of width {HIDDEN} with {results['layers']} layers, inner SGD, float32, one "
        f"thread, Inductor {wrapper} cpp_wrapper.",
        "* whole: all in one torch.compile; steps: Compiled(); checkpoint: Compiled(checkpoint=True). Eager "
        'times are those of "reverse".',
        "* Medians of rounds in turn, and of the ratios in each round, ± half the distance of their "
        "quartiles. Compiled from an empty cache; steps and checkpoint once for all rows.",
        f"* {what['cpu']}, load {what['load']:.1f} at the end, torch {what['versions']['torch']}, commit "
        f"{what['commit']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
