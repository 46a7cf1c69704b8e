"""MAML's loss and its gradient: eager beside compiled, and what compiling takes by the number of inner steps.

    python -m benchmarks.compiled_meta [--steps 2 5 10 20] [--out benchmarks/results/compiled-meta]

An AttentionMetaLearner, 8 tasks of 10 points, inner SGD, reverse mode, one thread. Every number of steps has
a fresh process and an empty cache. Both meta-gradients are compared with float64's before they are timed in
turn, in rounds. Beside the seconds of compiling stands the processors' time, compilers' included.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from metattn.cli._measure import in_fresh_process, interleave, machine, per_round
from metattn.cli._tables import ratio
from metattn.meta import SGD, AttentionMetaLearner, maml_loss

TASKS, POINTS, HIDDEN = 8, 10, 32
FACTOR, FLOOR = (
    4.0,
    5e-6,
)  # a float32 meta-gradient's error, beside eager's own: steps enlarge what rounding does


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[2, 5, 10, 20])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15, help="of timing, at least")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/compiled-meta"))
    args = parser.parse_args()
    rows = []
    for steps in args.steps:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            request = {"steps": steps, "layers": args.layers, "rounds": args.rounds}
            rows.append(in_fresh_process("benchmarks.compiled_meta_once", request))
    results = {"machine": machine(), "layers": args.layers, "rows": rows}
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "compiled_meta.json").write_text(json.dumps(results, indent=1) + "\n")
    table = markdown(results)
    (args.out / "compiled_meta.md").write_text(table)
    print(table)
    return 0


def measure(steps: int, layers: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = AttentionMetaLearner(2, HIDDEN, 1, layers=layers)
    params = dict(model.named_parameters())
    support, query = (
        (torch.randn(TASKS, 1, POINTS, 2), torch.randn(TASKS, 1, POINTS, 1)) for _ in ("support", "query")
    )

    def loss(params: dict[str, Tensor], *samples: tuple[Tensor, Tensor]) -> Tensor:
        return maml_loss(model, params, mse_loss, *samples, optimizer=SGD(0.01), steps=steps)

    def gradient(function: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(params, support, query), list(params.values()))

    wide = {name: value.detach().double().requires_grad_() for name, value in params.items()}
    samples = [tuple(x.double() for x in pair) for pair in (support, query)]
    exact = torch.autograd.grad(loss(wide, *samples), list(wide.values()))  # type: ignore[arg-type]
    compiled = torch.compile(loss, fullgraph=True)
    eager_error = relative_error(gradient(loss), exact)
    start, processors = time.perf_counter(), _processor_seconds()
    found = gradient(compiled)
    seconds, processors = time.perf_counter() - start, _processor_seconds() - processors
    error = relative_error(found, exact)
    if error > max(FACTOR * eager_error, FLOOR):
        raise AssertionError(
            f"{steps} steps: the meta-gradient is off by {error:.1e}, the eager one by {eager_error:.1e}"
        )
    timings = interleave(
        {"eager": lambda: gradient(loss), "compiled": lambda: gradient(compiled)},
        seconds=10,
        least=rounds,
        most=60,
        warmup=2,
    )
    return {
        "steps": steps,
        "compile_seconds": seconds,
        "compile_processor_seconds": processors,
        "error": error,
        "eager_error": eager_error,
        **{name: {"samples": timing.samples, **timing.summary()} for name, timing in timings.items()},
        "faster": per_round(timings["eager"].samples, timings["compiled"].samples).summary(),
    }


def _processor_seconds() -> float:
    """Of this process and of its children that ended."""
    return sum(os.times()[:4])


def relative_error(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    whole, exact = (torch.cat([x.flatten().double() for x in tensors]) for tensors in (found, expected))
    return float((whole - exact).norm() / exact.norm())


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| inner steps | eager, ms | compiled, ms | eager / compiled | compiling, s | processor time, s |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        times = (f"{1e3 * row[name]['median']:.3g}" for name in ("eager", "compiled"))
        compiling = (f"{row[name]:.0f}" for name in ("compile_seconds", "compile_processor_seconds"))
        lines.append(f"| {row['steps']} | {' | '.join((*times, ratio(row['faster']), *compiling))} |")
    what = results["machine"]
    lines += [
        "",
        f"* maml_loss and its gradient: {TASKS} tasks of {POINTS} points, an AttentionMetaLearner of width "
        f"{HIDDEN} with {results['layers']} layers, inner SGD, float32, one thread. Medians of rounds in "
        "turn, and of the ratios in each round, ± half the distance of their quartiles; compiled from an "
        "empty cache.",
        f"* {what['cpu']}, load {what['load']:.1f} at the end, torch {what['versions']['torch']}, commit "
        f"{what['commit']}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
