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
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from metattn.cli._cases import PRODUCTS, TOLERANCES
from metattn.cli._measure import machine

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tests", "sanitizer", "benchmark")
STEPS = ("forward", "vjp", "double backward", "second-order step")
Step = Callable[[], tuple[Tensor, ...]]
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A shape with its option."""

    name: str
    batch: int
    heads: int
    n: int
    d: int
    m: int | None = None
    kv_heads: int | None = None
    dtype: str = "bfloat16"
    causal: str | None = None
    window: tuple[int, int] | None = None
    bias: bool = False
    steps: tuple[str, ...] = STEPS
    published: float | None = None  # ms of the whole step by Flash Hog on an H200 (its README)

    @property
    def keys(self) -> int:
        return self.m or self.n

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    def pairs(self) -> int:
        """Attended (query, key) pairs of a head."""
        if self.causal is None and self.window is None:
            return self.n * self.keys
        offset = 0 if self.causal == "top-left" else self.keys - self.n
        first = torch.zeros(self.n, dtype=torch.int64)
        last = torch.full((self.n,), self.keys - 1)
        place = torch.arange(self.n) + offset
        if self.causal is not None:
            last = torch.minimum(last, place)
        if self.window is not None:
            left, right = self.window
            first = torch.maximum(first, place - left) if left >= 0 else first
            last = torch.minimum(last, place + right) if right >= 0 else last
        return int((last - first + 1).clamp_min(0).sum())

    def operations(self, step: str) -> float:
        return PRODUCTS[step] * 2.0 * self.batch * self.heads * self.pairs() * self.d


def hog(batch: int, n: int, published: float) -> Case:
    return Case(
        f"hvp {batch}×{n}",
        batch,
        12,
        n,
        64,
        causal="top-left",
        steps=("second-order step",),
        published=published,
    )


CASES = (
    Case("few-shot", 512, 8, 64, 32),
    Case("few-shot float32", 512, 8, 64, 32, dtype="float32"),
    hog(1, 512, 0.22),
    hog(512, 512, 18.3),
    hog(256, 1024, 27.2),
    hog(128, 2048, 44.8),
    hog(64, 4096, 80.2),
    hog(32, 8192, 150.8),
    Case("small", 64, 8, 256, 64),
    Case("small causal", 64, 8, 256, 64, causal="top-left"),
    Case("small float32", 64, 8, 256, 64, dtype="float32"),
    Case("mid", 8, 16, 1024, 64),
    Case("mid causal", 8, 16, 1024, 64, causal="top-left"),
    Case("long", 2, 16, 4096, 64),
    Case("long causal", 2, 16, 4096, 64, causal="top-left"),
    Case("long d128", 2, 16, 4096, 128),
    Case("long causal d128", 2, 16, 4096, 128, causal="top-left"),
    Case("grouped", 2, 32, 4096, 128, kv_heads=8, causal="top-left"),
    Case("test-time training", 1, 32, 1024, 80, m=9216, causal="bottom-right", window=(8192, -1)),
    Case("molecule", 64, 8, 200, 64, bias=True),
    Case("longer", 1, 16, 16384, 128, causal="top-left"),
)
# Memory alone: one second-order step, its peak over the inputs.
MEMORY_CASES = (
    Case("longest", 1, 8, 65536, 64, causal="top-left", window=(4096, -1)),
    Case("half of it", 1, 8, 32768, 64, causal="top-left", window=(4096, -1)),
)


# Contestants: a name, what they can do, and attention as a function of (q, k, v[, bias]).


@dataclass(frozen=True)
class Contestant:
    name: str
    steps: tuple[str, ...]
    attend: Callable[..., Tensor]


def contestants(case: Case) -> list[Contestant]:
    """Ours by backend, and torch's paths that take the case."""
    found = [
        Contestant(f"metattn {name}", case.steps, partial(ours, case, name))
        for name, reason in metattn.available_backends().items()
        if reason is None and name != "reference"
    ]
    found.append(Contestant("torch math", case.steps, partial(torch_path, case, SDPBackend.MATH)))
    if case.window is None and (case.causal is None or case.keys == case.n):
        first = tuple(step for step in case.steps if step in ("forward", "vjp"))
        for name, kernel in (
            ("torch flash", SDPBackend.FLASH_ATTENTION),
            ("torch memory-efficient", SDPBackend.EFFICIENT_ATTENTION),
            ("torch cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            found.append(Contestant(name, first, partial(torch_path, case, kernel)))
    return found


def ours(case: Case, backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    options: dict[str, Any] = {"causal": case.causal or False, "window": case.window, "bias": bias}
    o = metattn.attention(q, k, v, backend=backend, **options)
    assert isinstance(o, Tensor)
    return o


def torch_path(
    case: Case, kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    mask, causal = bias, case.causal == "top-left" and case.window is None
    if (case.causal is not None and not causal) or case.window is not None:
        mask = position_mask(case, q.device)
    with sdpa_kernel(kernel):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=case.kv_heads is not None
        )


def position_mask(case: Case, device: torch.device) -> Tensor:
    """Causal and window as a mask [N, M]."""
    offset = 0 if case.causal == "top-left" else case.keys - case.n
    distance = torch.arange(case.keys, device=device) - torch.arange(case.n, device=device)[:, None] - offset
    mask = torch.ones_like(distance, dtype=torch.bool)
    if case.causal is not None:
        mask &= distance <= 0
    if case.window is not None:
        left, right = case.window
        mask &= (distance >= -left) if left >= 0 else mask
        mask &= (distance <= right) if right >= 0 else mask
    return mask


# Inputs, steps, and the float64 answer of one head.


@dataclass(frozen=True)
class Inputs:
    primals: tuple[Tensor, ...]
    do: Tensor
    tangents: tuple[Tensor, ...]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

    kv = (case.batch, case.kv_heads or case.heads, case.keys, case.d)
    rows = (case.batch, case.heads, case.n, case.d)
    shapes = [rows, kv, kv]
    if case.bias:
        shapes.append((case.batch, case.heads, case.n, case.keys))
    primals = tuple(normal(*shape).requires_grad_() for shape in shapes)
    return Inputs(primals, normal(*rows).requires_grad_(), tuple(normal(*shape) for shape in shapes))


def make_step(attend: Callable[..., Tensor], step: str, inputs: Inputs) -> Step:
    """The step as a call without arguments; graphs that it starts from are built here."""
    primals, do, tangents = inputs.primals, inputs.do, inputs.tangents
    if step == "forward":
        plain = [p.detach() for p in primals]
        return lambda: (attend(*plain),)
    if step == "vjp":
        o = attend(*primals)
        return lambda: torch.autograd.grad(o, primals, do.detach(), retain_graph=True)
    if step == "double backward":
        first = torch.autograd.grad(attend(*primals), primals, do, create_graph=True)
        return lambda: torch.autograd.grad(first, (*primals, do), tangents, retain_graph=True)

    def whole() -> tuple[Tensor, ...]:
        first = torch.autograd.grad(attend(*primals), primals, do, create_graph=True)
        return torch.autograd.grad(first, (*primals, do), tangents)

    return whole


OUTPUTS = {
    "forward": ("o",),
    "vjp": ("dq", "dk", "dv", "dbias"),
    "double backward": ("dqt", "dkt", "dvt", "dbiast", "ot"),
    "second-order step": ("dqt", "dkt", "dvt", "dbiast", "ot"),
}


def slices(case: Case, t: Tensor) -> tuple[Tensor, ...]:
    """What belongs to the first, and to the last, (batch, key head)."""
    group = case.heads // (case.kv_heads or case.heads)
    heads = group if t.shape[1] == case.heads else 1
    return t[:1, :heads], t[-1:, -heads:]


def answers(case: Case, inputs: Inputs, attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Outputs]:
    """Every output for the first and the last (batch, key head), by `attend` on its slice of the inputs."""
    found: list[Outputs] = []
    for index in range(2):

        def of(t: Tensor, index: int = index) -> Tensor:
            return slices(case, t.detach())[index].to(dtype)

        leaves = [of(p).requires_grad_() for p in inputs.primals]
        do = of(inputs.do).requires_grad_()
        o = attend(*leaves)
        first = torch.autograd.grad(o, leaves, do, create_graph=True)
        second = torch.autograd.grad(first, (*leaves, do), [of(t) for t in inputs.tangents])
        names = ["dq", "dk", "dv", "dbias"][: len(leaves)]
        outputs = {"o": o, **dict(zip(names, first, strict=True))}
        outputs |= dict(zip([*(f"{name}t" for name in names), "ot"], second, strict=True))
        found.append({name: t.detach() for name, t in outputs.items()})
    return found


def plain_math(case: Case, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√d)V written out."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * case.d**-0.5
    if bias is not None:
        scores = scores + bias
    if case.causal is not None or case.window is not None:
        scores = scores.masked_fill(~position_mask(case, q.device), -torch.inf)
    return scores.softmax(-1) @ v


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def allowed(case: Case, inputs: Inputs, truth: list[Outputs]) -> dict[str, float]:
    """What each output may be off by: a factor times the formula's own error in its dtype, or a floor."""
    factor, floor = TOLERANCES[case.torch_dtype]
    rounded = answers(case, inputs, partial(plain_math, case), case.torch_dtype)
    pairs = zip(rounded, truth, strict=True)
    by_slice = [{name: relative(x[name], exact[name]) for name in exact} for x, exact in pairs]
    return {name: max(floor, *(factor * e[name] for e in by_slice)) for name in truth[0]}


def errors(case: Case, step: str, outputs: tuple[Tensor, ...], truth: list[Outputs]) -> dict[str, float]:
    """Relative error of each output, for the worse of the first and the last (batch, key head)."""
    names = [name for name in OUTPUTS[step] if name in truth[0]]
    found = {}
    for name, output in zip(names, outputs, strict=True):
        both = zip(slices(case, output.detach()), truth, strict=True)
        each = [relative(mine, exact[name]) for mine, exact in both]
        found[name] = max(each) if not any(map(math.isnan, each)) else math.nan
    return found


# Timing.


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def once(step: Step, device: torch.device) -> float:
    """Seconds of one call, by events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def interleaved(
    steps: dict[str, Step], device: torch.device, seconds: float, least: int = 7
) -> dict[str, list[float]]:
    """Every contestant once a round, after two warm-ups, for so many seconds."""
    for step in steps.values():
        for _ in range(2):
            step()
    synchronize(device)
    samples: dict[str, list[float]] = {name: [] for name in steps}
    names, end, index = list(steps), time.perf_counter() + seconds, 0
    while index < least or (time.perf_counter() < end and index < 200):
        for offset in range(len(names)):
            name = names[(index + offset) % len(names)]
            samples[name].append(once(steps[name], device))
        index += 1
    return samples


def in_graph(step: Step) -> Step:
    """The step captured once as a CUDA graph, and replayed."""
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


def in_graph_of(make: Callable[[], Step]) -> Step:
    return in_graph(make())


def measure_case(case: Case, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """The rows of a case: each step, each contestant."""
    inputs = make_inputs(case, device)
    truth = answers(case, inputs, partial(plain_math, case), torch.float64)
    limits = allowed(case, inputs, truth)
    rows: list[dict[str, Any]] = []
    for step in case.steps:
        right: dict[str, Step] = {}
        for contestant in contestants(case):
            if step not in contestant.steps:
                continue
            make = partial(make_step, contestant.attend, step, inputs)
            runs = {contestant.name: make}
            if step == "second-order step" and device.type == "cuda" and contestant.name == "metattn triton":
                runs["metattn triton, CUDA graph"] = partial(in_graph_of, make)
            for name, start in runs.items():
                row: dict[str, Any] = {"case": asdict(case), "step": step, "contestant": name}
                rows.append(row)
                try:
                    run = start()
                    row["errors"] = errors(case, step, run(), truth)
                except Exception as error:  # a peer that lacks it, or memory: told, and the others go on
                    row["cannot"] = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                    continue
                past = {name: e for name, e in row["errors"].items() if not e <= limits[name]}
                if past:
                    row["wrong"] = ", ".join(f"{name} is off by {e:.1e}" for name, e in past.items())
                else:
                    right[name] = run
        for name, samples in interleaved(right, device, seconds).items():
            row = next(r for r in rows if (r["step"], r["contestant"]) == (step, name))
            row["samples"] = samples
            row["median"] = statistics.median(samples)
            row["quartiles"] = statistics.quantiles(samples, n=4)[::2]
            row["tflops"] = case.operations(step) / row["median"] * 1e-12
    return rows


def measure_memory(case: Case, device: torch.device) -> dict[str, Any]:
    """Peak bytes of our second-order step over its inputs."""
    inputs = make_inputs(case, device)
    backend = next(name for name in ("triton", "cuda", "cpu") if metattn.available_backends()[name] is None)
    row: dict[str, Any] = {"case": asdict(case), "contestant": f"metattn {backend}"}
    step = make_step(partial(ours, case, backend), "second-order step", inputs)
    row["input_bytes"] = sum(t.nbytes for t in (*inputs.primals, inputs.do, *inputs.tangents))
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
    cases = [case for case in (*CASES, *MEMORY_CASES) if args.cases is None or case.name in args.cases]
    longest = 0.0
    for case in cases:
        if time.time() + longest > end - 10:
            results["not_measured"].append(case.name)
            continue
        start = time.time()
        try:
            if case in MEMORY_CASES:
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
