"""The GPU benchmark, in a process of its own: measures cases and saves after each.

    python -m benchmarks.gpu.run --folder FOLDER --device cuda --seconds 0.3 --end TIME --cases NAME …
    python -m benchmarks.gpu.run --compile-only --cases NAME …

Reads FOLDER/gpu.json, adds to it, and keeps in it which case is being measured: a process that dies, or
loses the GPU (exit 3), is followed by another for the cases that are left. See supervise.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cases, peers, report
from benchmarks.gpu.measure import (
    DeviceLostError,
    first_line,
    measure_case,
    measure_memory,
    predicted,
    recover,
)
from metattn.bench.answers import make_inputs
from metattn.bench.cases import Case
from metattn.bench.files import json_text
from metattn.bench.peers import ends, whole_mask

ROOT = Path(__file__).resolve().parents[2]
LOST = 3  # the exit status of a process that lost its GPU
MARGIN = 15.0  # seconds before the end in which no step is begun


def named(name: str) -> Case:
    return next(case for case in (*cases.CASES, *cases.SMOKE_CASES) if case.name == name)


def save(folder: Path, results: dict[str, Any]) -> None:
    """Replaces gpu.json and gpu.md, each at once: a process that is killed leaves whole files."""
    for name, text in (
        ("gpu.json", json_text(results)),
        ("gpu.md", report.summary(results) + report.details(results)),
    ):
        new = folder / f".{name}"
        new.write_text(text)
        new.replace(folder / name)


def load(folder: Path) -> dict[str, Any]:
    results = json.loads((folder / "gpu.json").read_text())
    assert isinstance(results, dict)
    return results


def benchmark(
    folder: Path, results: dict[str, Any], names: list[str], device: torch.device, seconds: float, end: float
) -> bool:
    """Measures the cases in turn; False where the GPU was lost in one, the rest unmeasured."""
    for name in names:
        if time.time() > end - MARGIN:
            results["not_measured"].append(name)
            continue
        began = time.time()
        results["current"] = name
        save(folder, results)
        try:
            measure(named(name), device, seconds, end - MARGIN, results)
        except DeviceLostError as error:
            results["failed"].append(f"{name}: the GPU was lost: {error}")
            save(folder, results)
            return False
        print(f"{name}: {time.time() - began:.1f} s", file=sys.stderr, flush=True)
    results.pop("current", None)
    save(folder, results)
    return True


def measure(case: Case, device: torch.device, seconds: float, end: float, results: dict[str, Any]) -> None:
    """Adds a case to the results; an error in it is told there."""
    try:
        if case.memory:
            measure_memory(case, device, results["memory"])
        else:
            left = measure_case(case, device, seconds, end, results["rows"])
            results["not_measured"] += [f"{case.name}: {step}" for step in left]
            add_predictions(results, case)
    except DeviceLostError:
        raise
    except Exception as error:  # the cases that were measured stay
        results["failed"].append(f"{case.name}: {first_line(error)}")
    finally:
        whole_mask.cache_clear()
        ends.cache_clear()
    recover(device)


def compile_ours(names: list[str], device: torch.device) -> None:
    """Runs each step of ours once: Triton keeps what it compiles, for the process that measures."""
    for case in map(named, names):
        if case.memory:
            continue
        inputs = make_inputs(case, device)
        for contestant in peers.contestants(case):
            for step in contestant.steps if contestant.name.startswith("metattn") else ():
                try:
                    contestant.start(step, inputs)()
                except Exception as error:  # the benchmark will tell
                    print(f"{case.name}, {step}: {first_line(error)}", file=sys.stderr)
                    recover(device)


def add_predictions(results: dict[str, Any], case: Case) -> None:
    for row in results["rows"]:
        if (row["case"]["name"], row["step"]) == (case.name, "forward") and report.is_ours(row):
            path = ROOT / "benchmarks" / "results" / "aot.json"
            row["predicted_tflops"] = predicted(case, results["target"], path)


# The process, and who watches it.


def supervise(
    folder: Path, command: Callable[[list[str]], list[str]], names: list[str], log: Path, end: float
) -> None:
    """Runs `command(names)` until each case had its turn; one in which the process dies is told and left."""
    while names:
        if time.time() > end - MARGIN:
            results = load(folder)
            results["not_measured"] += names
            save(folder, results)
            return
        ended = run_to(log, command(names), max(1.0, end - time.time()))
        results = load(folder)
        current = results.pop("current", None)
        if ended == "exit 0":
            return
        if not (ended == f"exit {LOST}" and results["failed"]):
            results["failed"].append(f"{current or 'the benchmark'}: its process: {ended}; see {log.name}")
        if current not in names:  # it did not even begin
            results["not_measured"] += names
            names = []
        else:
            names = names[names.index(current) + 1 :]
        save(folder, results)


def run_to(log: Path, command: list[str], seconds: float, environment: dict[str, str] | None = None) -> str:
    """Runs a command with its output added to a file; how it ended. Its children end with it."""
    return wait_for(start_to(log, command, environment), seconds)


def start_to(
    log: Path, command: list[str], environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    with log.open("ab") as handle:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=handle,
            stderr=subprocess.STDOUT,
            env=os.environ | (environment or {}),
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen[bytes], seconds: float) -> str:
    try:
        return f"exit {process.wait(seconds)}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what a sanitizer or a compiler started, too
        process.wait()
        return "stopped: out of time"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--compile-only", action="store_true", help="measure nothing, run each step of ours")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each step of a case")
    parser.add_argument("--end", type=float, default=math.inf, help="the time, as time.time() tells it")
    parser.add_argument("--cases", nargs="+", required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if args.compile_only:
        compile_ours(args.cases, device)
        return 0
    whole = benchmark(args.folder, load(args.folder), args.cases, device, args.seconds, args.end)
    return 0 if whole else LOST


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
