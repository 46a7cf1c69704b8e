"""Timing and peak memory of the GPU benchmark's contestants, and the state of the GPU."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import cases
from benchmarks.gpu.peers import contestants, refusal
from metattn.bench.answers import Inputs, Outputs, make_inputs, written_out
from metattn.bench.cases import WHOLE, Case
from metattn.bench.peers import Contestant
from metattn.bench.steps import Step
from metattn.measure import interleave, once

GRAPH = ", CUDA graph"
PEERS_SLACK = 4.0  # a peer may be off by this many times what we may: less exact ones are timed too
SMI = (
    "name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
    "temperature.gpu", "utilization.gpu",
)  # fmt: skip
Row = dict[str, Any]


class DeviceLostError(RuntimeError):
    """The GPU's context does not work any more: only a new process can measure on."""


# Timing.


def once_on_gpu(call: Callable[[], object]) -> float:
    """Seconds of one call by events; the time in which the host falls behind counts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


@dataclass(frozen=True)
class Run:
    """A started step with the clock that sees it."""

    call: Callable[[], object]
    clock: Callable[[Callable[[], object]], float]

    def __call__(self) -> object:
        return self.call()


def by_its_clock(run: Callable[[], object]) -> float:
    assert isinstance(run, Run)
    return run.clock(run.call)


def in_graph(start: Callable[[str, Inputs], Step], step: str, inputs: Inputs) -> Step:
    """A step captured once as a CUDA graph, and replayed."""
    run = start(step, inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def with_graphs(found: list[Contestant], device: torch.device) -> list[Contestant]:
    """On a GPU, our whole step as a CUDA graph too."""
    graphed = [
        Contestant(one.name + GRAPH, (WHOLE,), partial(in_graph, one.start))
        for one in found
        if device.type == "cuda" and one.name == "metattn triton" and WHOLE in one.steps
    ]
    return found + graphed


@dataclass(frozen=True)
class Prepared:
    """A case's inputs, their float64 answer, and what each output may be off by."""

    inputs: Inputs
    truth: tuple[Outputs, Outputs]
    limits: dict[str, float]


def prepare(case: Case, device: torch.device) -> Prepared:
    inputs = make_inputs(case, device)
    truth = cases.answers(case, inputs, written_out, torch.float64)
    return Prepared(inputs, truth, cases.allowed(case, inputs, truth))


def measure_case(case: Case, device: torch.device, seconds: float, end: float, rows: list[Row]) -> list[str]:
    """Adds the rows of a case, each step by each contestant, to `rows`; the steps there was no time for."""
    prepared = prepare(case, device)
    found = with_graphs(contestants(case), device)
    for index, step in enumerate(case.steps):
        if time.time() > end:
            return list(case.steps[index:])
        right: dict[str, Run] = {}
        these: dict[str, Row] = {}
        for contestant in found:
            if step not in contestant.steps:
                continue
            row: Row = {"case": asdict(case), "step": step, "contestant": contestant.name}
            rows.append(row)
            these[contestant.name] = row
            run = checked(contestant, case, step, prepared, row)
            if run is not None:
                events = device.type == "cuda" and not contestant.own_clock
                right[contestant.name] = Run(run, once_on_gpu if events else once)
        for name, timing in interleave(right, seconds=seconds, least=7, once=by_its_clock).items():
            these[name] |= {
                "samples": timing.samples,
                "median": timing.median,
                "quartiles": timing.quartiles,
                "tflops": case.operations(step) / timing.median * 1e-12,
            }
    return []


def checked(
    contestant: Contestant,
    case: Case,
    step: str,
    prepared: Prepared,
    row: Row,
) -> Callable[[], Any] | None:
    """The started step if its numbers are right; else None, and the row says why."""
    inputs, device = prepared.inputs, prepared.inputs.do.device
    slack = 1.0 if contestant.name.startswith("metattn") else PEERS_SLACK
    refused = refusal(contestant, step, device)
    if refused is not None:
        row["cannot"] = refused
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of every path that it cannot take
            run = contestant.start(step, inputs)
            row["errors"] = cases.errors(case, step, contestant.tensors(run()), prepared.truth)
    except Exception as error:  # a peer that lacks it, or memory: told, and the others go on
        row["cannot"] = first_line(error)
        recover(device)
        return None
    past = {name: e for name, e in row["errors"].items() if not e <= slack * prepared.limits[name]}
    if past:
        row["wrong"] = ", ".join(f"{name} is off by {e:.1e}" for name, e in past.items())
        return None
    return run


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def recover(device: torch.device) -> None:
    """Frees what a failed step left; raises where the GPU is lost to this process."""
    if device.type != "cuda":
        return
    gc.collect()
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLostError(first_line(error)) from error


def measure_memory(case: Case, device: torch.device, rows: list[Row]) -> None:
    """Adds the peak bytes of each contestant's second-order step over the inputs."""
    inputs = make_inputs(case, device)
    for contestant in contestants(case):
        if WHOLE not in contestant.steps or contestant.own_clock:  # another allocator's memory is not seen
            continue
        row: Row = {"case": asdict(case), "contestant": contestant.name, "input_bytes": inputs.nbytes()}
        rows.append(row)
        refused = refusal(contestant, WHOLE, device)
        if refused is not None:
            row["cannot"] = refused
            continue
        try:
            run = contestant.start(WHOLE, inputs)
            if device.type == "cuda":
                recover(device)
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                run()
                row["bytes"] = torch.cuda.max_memory_allocated(device) - before
        except Exception as error:
            row["cannot"] = first_line(error)
            recover(device)


# What the figures depend on.


def gpu_state() -> list[dict[str, str]]:
    """Driver, clocks, power and temperature of each GPU by nvidia-smi; empty without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        dict(zip(SMI, map(str.strip, line), strict=False)) for line in csv.reader(done.stdout.splitlines())
    ]


def versions() -> dict[str, str | None]:
    """What `machine()` does not tell: CUDA, cuDNN, and the peers."""
    found: dict[str, str | None] = {"CUDA": torch.version.cuda, "cuDNN": None}
    if torch.backends.cudnn.is_available():
        found["cuDNN"] = str(torch.backends.cudnn.version())
    for name in ("jax", "jaxlib", "jvp_flash_attention"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def target(device: torch.device) -> str:
    """The GPU's name in `make aot`'s table."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def predicted(case: Case, target: str, path: Path) -> float | None:
    """TFLOP/s of the forward kernel that `make aot` bounds, None where its table has no such row."""
    try:
        rows = json.loads(path.read_text())["rows"]
        wanted = {"target": target, "dtype": case.dtype, "features": case.d, "kernel": "forward_rows"}
        able = [
            row
            for row in rows
            if all(row.get(key) == value for key, value in wanted.items()) and row.get("tflops")
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    by_variant = {row.get("variant"): float(row["tflops"]) for row in able}
    named = by_variant.get("causal") if case.causal else None
    return named or by_variant.get("plain")
