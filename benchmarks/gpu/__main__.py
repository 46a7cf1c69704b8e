"""Tests, sanitizes and measures the GPU backends on this machine's GPU: what `make gpu` runs.

    python -m benchmarks.gpu [--minutes 8.5] [--stages tests sanitizer benchmark] [--cases NAME …]
        [--smoke] [--out FOLDER]

Installs nothing. Everything measured goes to FOLDER/<gpu>/: the logs of tests and sanitizer, gpu.json with
every sample, gpu.md made of it. Contestants take turns; each output is compared with float64 before it is
timed, and what is wrong is not timed. Ends inside the given minutes: what there was no time for is named,
never estimated.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import cases, report
from benchmarks.gpu.measure import gpu_state, target, versions
from benchmarks.gpu.run import ROOT, benchmark, load, save, start_to, supervise, wait_for
from metattn.measure import machine

STAGES = ("tests", "sanitizer", "benchmark")
TESTS = (
    *("test_triton", "test_cuda", "test_precision"),
    *(f"test_faults_{theme}" for theme in ("masks", "layouts", "derivatives", "processes")),
)
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
COMPILERS = 4  # processes that compile the benchmark's kernels while tests run
CHECKS_SHARE = 0.4  # of the time, for tests, sanitizers and compiling together
NO_SANITIZER = "compute-sanitizer is not on the PATH: not run"
# The allocator's own reuse would hide from the sanitizer what lies outside of a tensor, or is unwritten.
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def checks(stages: tuple[str, ...], sanitizer: str | None) -> dict[str, list[str]]:
    """The commands of the tests, a process for each file, and of the sanitizers."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    commands: dict[str, list[str]] = {}
    if "tests" in stages:
        commands |= {name: [*pytest, f"tests/{name}.py", "-k", "triton or cuda"] for name in TESTS}
    if "sanitizer" in stages and sanitizer is not None:
        short = [*pytest, "tests/test_triton.py", "tests/test_cuda.py", "-k", "short"]
        for tool in SANITIZERS:
            commands[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "9", *short]
    return commands


def compiling(names: list[str], device: str) -> dict[str, list[str]]:
    """The commands that compile our kernels for the cases, which are dealt out to a few processes."""
    how = [sys.executable, "-m", "benchmarks.gpu.run", "--compile-only", "--device", device, "--cases"]
    shares = [names[first::COMPILERS] for first in range(COMPILERS)]
    return {f"compile {i}": [*how, *share] for i, share in enumerate(shares, 1) if share}


def run_checks(commands: dict[str, list[str]], folder: Path, end: float) -> dict[str, str]:
    """Runs them at once, for each is one thread that mostly compiles; how each ended, and its last line."""
    started = {}
    for name, command in commands.items():
        log = folder / f"{name.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        started[name] = log, start_to(log, command, UNCACHED if name in SANITIZERS else None)
    said = {}
    for name, (log, process) in started.items():
        ended = wait_for(process, max(1.0, end - time.time()))
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said[name] = f"{ended}: {lines[-1].strip('= ')[:200]}" if lines else ended
    return said


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--cases", nargs="+", help="names of cases; all unless given")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each step of a case")
    parser.add_argument("--smoke", action="store_true", help="each step once, tiny, in a minute")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    if args.smoke:
        args.minutes, args.stages, args.seconds = min(args.minutes, 1.0), ("benchmark",), 0.01
    return args


def main() -> int:
    args = arguments()
    end = time.time() + 60 * args.minutes
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was measured", file=sys.stderr)
        return 2
    every = cases.SMOKE_CASES if args.smoke else cases.CASES
    unknown = set(args.cases or ()) - {case.name for case in every}
    if unknown:
        print(f"--cases: there is no {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    names = [case.name for case in every if args.cases is None or case.name in args.cases]
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    folder = args.out / re.sub(r"\W+", "-", gpu).strip("-").lower()
    folder = folder / "smoke" if args.smoke else folder
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "gpu": gpu,
        "target": target(device),
        "machine": machine(),
        "versions": versions(),
        "state": {"before": gpu_state()},
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "stages": {},
        "rows": [],
        "memory": [],
        "not_measured": [],
        "failed": [],
    }
    sanitizer = shutil.which("compute-sanitizer")
    if "sanitizer" in args.stages and sanitizer is None:
        results["stages"]["sanitizer"] = NO_SANITIZER
    commands = checks(tuple(args.stages), sanitizer)
    if commands and "benchmark" in args.stages and device.type == "cuda":
        commands |= compiling(names, args.device)
    results["stages"] |= run_checks(commands, folder, time.time() + CHECKS_SHARE * (end - time.time()))
    save(folder, results)
    if "benchmark" in args.stages:
        measure_all(args, device, folder, names, end)
    results = load(folder)
    results["state"]["after"] = gpu_state()
    save(folder, results)
    print(report.summary(results))
    return 1 if failed(results) else 0


def measure_all(
    args: argparse.Namespace, device: torch.device, folder: Path, names: list[str], end: float
) -> None:
    """The benchmark: on a GPU in a process of its own, which may die without taking the report with it."""
    if device.type != "cuda":
        benchmark(folder, load(folder), names, device, args.seconds, end)
        return
    log = folder / "benchmark.log"
    log.unlink(missing_ok=True)
    how = [
        "--folder",
        str(folder),
        "--device",
        args.device,
        "--seconds",
        str(args.seconds),
        "--end",
        str(end),
    ]
    command = [sys.executable, "-m", "benchmarks.gpu.run", *how, "--cases"]
    supervise(folder, lambda left: [*command, *left], names, log, end)


def failed(results: dict[str, Any]) -> bool:
    """Whether a check failed, a case broke off, or a backend of ours is wrong or cannot take a case."""
    checked = {name: said for name, said in results["stages"].items() if not name.startswith("compile")}
    stages = any(not said.startswith(("exit 0", NO_SANITIZER)) for said in checked.values())
    ours = [row for row in (*results["rows"], *results["memory"]) if row["contestant"].startswith("metattn")]
    return stages or bool(results["failed"]) or any("wrong" in row or "cannot" in row for row in ours)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["METATTN_TUNED"] = "0"  # the shipped tiles are measured
    sys.exit(main())
