"""Tests, sanitizes and measures the GPU backends on this machine's GPU: what `make gpu` runs.

    python -m benchmarks.gpu [--minutes 9] [--stages tests sanitizer benchmark] [--cases NAME …] [--out
    FOLDER]

Installs nothing. Everything measured goes to FOLDER/<gpu>/: the logs of tests and sanitizer, gpu.json with
every sample, gpu.md made of it. Contestants take turns; each output is compared with float64 before it is
timed, and what is wrong is not timed. Ends inside the given minutes: what there was no time for is named,
never estimated.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metattn
from benchmarks import gpu_cases
from benchmarks.gpu_cases import Case
from metattn.cli._cases import Step, step_of
from metattn.cli._measure import interleave, machine

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tests", "sanitizer", "benchmark")


# Timing.


def once_on_gpu(call: Callable[[], object]) -> float:
    """Seconds of one call by events; the time in which the host falls behind counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def in_graph(make: Callable[[], Step]) -> Step:
    """A step captured once as a CUDA graph, and replayed."""
    step = make()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def measure_case(case: Case, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """The rows of a case: each step, each contestant."""
    inputs = gpu_cases.make_inputs(case, device)
    truth = gpu_cases.answers(case, inputs, partial(gpu_cases.plain_math, case), torch.float64)
    limits = gpu_cases.allowed(case, inputs, truth)
    rows: list[dict[str, Any]] = []
    for step in case.steps:
        right: dict[str, Step] = {}
        for contestant in gpu_cases.contestants(case):
            if step not in contestant.steps:
                continue
            make = partial(step_of, contestant.attend, step, inputs)
            runs = {contestant.name: make}
            if step == "second-order step" and device.type == "cuda" and contestant.name == "metattn triton":
                runs["metattn triton, CUDA graph"] = partial(in_graph, make)
            for name, start in runs.items():
                row: dict[str, Any] = {"case": asdict(case), "step": step, "contestant": name}
                rows.append(row)
                try:
                    run = start()
                    row["errors"] = gpu_cases.errors(case, step, run(), truth)
                except Exception as error:  # a peer that lacks it, or memory: told, and the others go on
                    row["cannot"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                    continue
                past = {name: e for name, e in row["errors"].items() if not e <= limits[name]}
                if past:
                    row["wrong"] = ", ".join(f"{name} is off by {e:.1e}" for name, e in past.items())
                else:
                    right[name] = run
        how = {"once": once_on_gpu} if device.type == "cuda" else {}
        for name, timing in interleave(right, seconds=seconds, least=7, **how).items():
            row = next(r for r in rows if (r["step"], r["contestant"]) == (step, name))
            row |= {"samples": timing.samples, "median": timing.median, "quartiles": timing.quartiles}
            row["tflops"] = case.operations(step) / row["median"] * 1e-12
    return rows


def measure_memory(case: Case, device: torch.device) -> dict[str, Any]:
    """Peak bytes of our second-order step over its inputs."""
    inputs = gpu_cases.make_inputs(case, device)
    backend = next(name for name in ("triton", "cuda", "cpu") if metattn.available_backends()[name] is None)
    row: dict[str, Any] = {"case": asdict(case), "contestant": f"metattn {backend}"}
    step = step_of(partial(gpu_cases.ours, case, backend), "second-order step", inputs)
    row["input_bytes"] = inputs.nbytes()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        row["bytes"] = torch.cuda.max_memory_allocated(device) - before
    return row


# The report.


def markdown(results: dict[str, Any]) -> str:
    versions = results["machine"]["versions"]
    lines = [
        f"# {results['gpu']}",
        "",
        f"torch {versions['torch']}, triton {versions['triton']}, commit {results['machine']['commit']},",
        f"{results['started']}. Medians in ms; in brackets half the distance between the quartiles.",
        "",
    ]
    lines += [f"* {name}: {said}" for name, said in results["stages"].items()]
    names = list(dict.fromkeys(row["contestant"] for row in results["rows"]))
    if names:
        head = ["case", "step", *names, "ours, TFLOP/s", "published"]
        lines += ["", "| " + " | ".join(head) + " |", "|---|---" + "|---:" * (len(head) - 2) + "|"]
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        cells.setdefault((row["case"]["name"], row["step"]), {})[row["contestant"]] = row
    for (case, step), by_name in cells.items():
        shown = [cell(by_name.get(name)) for name in names]
        mine = by_name.get("metattn triton", {})
        tflops = f"{mine['tflops']:.0f}" if "tflops" in mine else "–"
        published = next(iter(by_name.values()))["case"]["published"]
        lines.append("| " + " | ".join([case, step, *shown, tflops, str(published or "–")]) + " |")
    if results["memory"]:
        lines += ["", "| memory | inputs, MiB | peak over them, MiB |", "|---|---:|---:|"]
    for row in results["memory"]:
        peak = f"{row['bytes'] / 2**20:.0f}" if "bytes" in row else "not measured"
        lines.append(f"| {row['case']['name']} | {row['input_bytes'] / 2**20:.0f} | {peak} |")
    lines += [f"Failed: {said}" for said in results["failed"]]
    if results["not_measured"]:
        lines += ["", "Not measured, for want of time: " + ", ".join(results["not_measured"]) + "."]
    return "\n".join(lines) + "\n"


def cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if "median" in row:
        low, high = row["quartiles"]
        return f"{row['median'] * 1e3:.3g} (±{(high - low) * 5e2:.1g})"
    return "wrong" if "wrong" in row else "cannot"


# The stages.


def run_to(log: Path, command: list[str], seconds: float) -> str:
    """Runs a command with its output in a file; how it ended, and its last telling line."""
    with log.open("w") as handle:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=handle, stderr=subprocess.STDOUT, timeout=seconds, check=False
            )
            ended = f"exit {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:.0f} s"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{ended}: {lines[-1].strip('= ') if lines else 'no output'}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--cases", nargs="+", help="names of cases; all unless given")
    parser.add_argument("--seconds", type=float, default=0.3, help="of timing for each step of a case")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    end = time.time() + 60 * args.minutes
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was measured", file=sys.stderr)
        return 2
    if device.type == "cuda":
        torch.cuda.set_device(device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    folder = args.out / re.sub(r"\W+", "-", gpu).strip("-").lower()
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "gpu": gpu,
        "machine": machine(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "stages": {},
        "rows": [],
        "memory": [],
        "not_measured": [],
        "failed": [],
    }
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if "tests" in args.stages:
        command = [
            *pytest,
            "tests/test_triton.py",
            "tests/test_faults.py",
            "tests/test_precision.py",
            "-k",
            "triton",
        ]
        results["stages"]["tests"] = run_to(
            folder / "tests.log", command, max(30, 0.45 * (end - time.time()))
        )
    if "sanitizer" in args.stages:
        tool = shutil.which("compute-sanitizer")
        for check in ("memcheck", "racecheck"):
            if tool is None:
                results["stages"][check] = "compute-sanitizer is not on the PATH: not run"
                continue
            command = [
                tool,
                "--tool",
                check,
                "--error-exitcode",
                "9",
                *pytest,
                "tests/test_triton.py",
                "-k",
                "short",
            ]
            said = run_to(folder / f"{check}.log", command, max(30, 0.2 * (end - time.time())))
            results["stages"][check] = said
    if "benchmark" in args.stages:
        benchmark(args, device, folder, results, end)
    write(folder, results)
    print(markdown(results))
    failed = any(
        not said.startswith(("exit 0", "compute-sanitizer is not")) for said in results["stages"].values()
    )
    ours = [row for row in results["rows"] if row["contestant"].startswith("metattn")]
    return 1 if failed or results["failed"] or any("wrong" in row or "cannot" in row for row in ours) else 0


def write(folder: Path, results: dict[str, Any]) -> None:
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "gpu.md").write_text(markdown(results))


def benchmark(
    args: argparse.Namespace, device: torch.device, folder: Path, results: dict[str, Any], end: float
) -> None:
    every = (*gpu_cases.CASES, *gpu_cases.MEMORY_CASES)
    cases = [case for case in every if args.cases is None or case.name in args.cases]
    longest = 0.0
    for case in cases:
        if time.time() + longest > end - 10:
            results["not_measured"].append(case.name)
            continue
        start = time.time()
        try:
            if case in gpu_cases.MEMORY_CASES:
                results["memory"].append(measure_memory(case, device))
            else:
                results["rows"] += measure_case(case, device, args.seconds)
        except Exception as error:  # the cases that were measured stay
            results["failed"].append(f"{case.name}: {str(error).strip()[:300]}")
        write(folder, results)
        longest = max(longest, time.time() - start)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
