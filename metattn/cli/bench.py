"""`metattn bench`: the four maps and the whole second-order step against torch, on this machine."""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metattn.cli import _report
from metattn.cli._cases import (
    CASES,
    CHECKPOINTED,
    FLASH,
    MATH,
    MEMORY_CASES,
    PRODUCTS,
    QUICK_MEMORY_CASES,
    TOLERANCES,
    Case,
    Contestant,
    Inputs,
    contestants,
    errors,
    exact,
    make_inputs,
    make_step,
)
from metattn.cli._measure import ChildError, in_fresh_process, interleave, machine

Advance = Callable[[float, str], None]

# Only the announced duration rests on these guesses: each contestant's share of the matrix product's rate.
ASSUMED_SHARE = {MATH: 0.2, CHECKPOINTED: 0.15, FLASH: 0.5, "metattn cpu": 0.5, "metattn reference": 0.1}
LONGEST_PEER = 8192  # N to which torch's memory is measured: 11 GiB there, and four times that at the next
CHILD_START = 6.0  # seconds to start a process that imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = sorted({case.name for case in (*CASES, *MEMORY_CASES)})
    parser.add_argument("--quick", action="store_true", help="the small cases only, about half a minute")
    parser.add_argument("--cases", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument(
        "--seconds", type=float, help="time for each step of a case (default 2, with --quick 0.3)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("metattn-bench"),
        help="folder for bench.json, bench.md and bench.png",
    )
    parser.add_argument("--readme", type=Path, help="rewrite the benchmark block of this Markdown file too")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="measure nothing, show an earlier bench.json"
    )


def run(args: argparse.Namespace) -> int:
    for needed in ("rich", "matplotlib"):  # missing ones are told now, not after minutes of measuring
        importlib.import_module(needed)
    if args.render is not None:
        results = json.loads(args.render.read_text())
    else:
        if args.seconds is None:
            args.seconds = 0.3 if args.quick else 2.0
        if args.seconds <= 0:
            raise ValueError(f"--seconds: expected more than 0, got {args.seconds}")
        results = measure(*chosen(args.cases, args.quick), seconds=args.seconds, least=3 if args.quick else 5)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.render is None:
        (args.out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "bench.md").write_text(_report.markdown(results))
    _report.picture(results, args.out / "bench.png")
    if args.readme is not None:
        _report.rewrite_block(args.readme, results, args.out)
    _report.show(results)
    print(f"written to {args.out}")
    wrong = [row for row in (*results["rows"], *results["memory"]) if row.get("wrong")]
    return 1 if any(row["contestant"].startswith("metattn") for row in wrong) else 0  # a peer's is told above


def chosen(names: list[str] | None, quick: bool) -> tuple[list[Case], list[Case]]:
    """The cases to time and the cases whose memory to measure."""
    memory_cases = QUICK_MEMORY_CASES if quick else MEMORY_CASES
    timed = [case for case in CASES if (case.quick or not quick) and (names is None or case.name in names)]
    return timed, [case for case in memory_cases if names is None or case.name in names]


def measure(
    timed: list[Case], memory: list[Case], *, seconds: float, least: int = 5, progress: bool = True
) -> dict[str, Any]:
    """All rows of the given cases, with the machine they were measured on."""
    started = time.time()
    found = contestants()
    rate = matrix_product_rate()
    work = [expected_seconds(case, found, rate, seconds, least) for case in timed]
    work += [expected_seconds_for_memory(case, found, rate) for case in memory]
    results: dict[str, Any] = {
        "machine": machine(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds_per_step": seconds,
        "rows": [],
        "memory": [],
    }
    with _report.progress(sum(work), progress) as advance:
        for case, weight in zip([*timed, *memory], work, strict=True):
            share = partial(_share, advance, weight)
            if case in memory:
                results["memory"] += memory_rows(case, found, share)
            else:
                results["rows"] += timed_rows(case, found, seconds, least, share)
    results["seconds"] = round(time.time() - started, 1)
    return results


def _share(advance: Advance, weight: float, part: float, doing: str) -> None:
    advance(weight * part, doing)


def timed_rows(
    case: Case, found: list[Contestant], seconds: float, least: int, advance: Advance
) -> list[dict[str, Any]]:
    """Times every step of a case: checked against float64 first, then all contestants in turn."""
    advance(0.0, f"{case.name}: float64 answer")
    inputs = make_inputs(case)
    answer = exact(case, inputs)
    math = next(contestant for contestant in found if contestant.name == MATH)
    whole = "second-order step"
    allowed = allowed_errors(case, errors(case, whole, make_step(math, case, whole, inputs)(), answer))
    rows: list[dict[str, Any]] = []
    for step in case.steps:
        advance(1 / (len(case.steps) + 1), f"{case.name}: {step}")
        right = {}
        for contestant in found:
            if not contestant.can(case, step):
                continue
            run_step = make_step(contestant, case, step, inputs)
            row: dict[str, Any] = {
                "case": case.asdict(),
                "shape": case.shape,
                "options": case.options,
                "step": step,
                "contestant": contestant.name,
                "operations": case.operations(step),
                "errors": errors(case, step, run_step(), answer),
            }
            row["wrong"] = complaint(row["errors"], allowed)
            rows.append(row)
            if row["wrong"] is None:
                right[contestant.name] = run_step
        timings = interleave(right, seconds=seconds, least=least)
        for row in rows:
            if row["step"] == step and row["contestant"] in timings:
                timing = timings[row["contestant"]]
                row["median"] = timing.median
                row["quartiles"] = timing.quartiles
                row["gflops"] = row["operations"] / timing.median * 1e-9
                row["samples"] = timing.samples
    advance(1 / (len(case.steps) + 1), case.name)
    return rows


def memory_rows(case: Case, found: list[Contestant], advance: Advance) -> list[dict[str, Any]]:
    """Measures the peak of the second-order step, each contestant in a process of its own."""
    step = "second-order step"
    able = measured_for_memory(case, found)
    advance(0.0, f"memory at N={case.length}: float64 answer of one head")
    one_head = replace(case, heads=1)
    inputs = make_inputs(case)
    first = Inputs(
        tuple(p.detach()[:, :1] for p in inputs.primals),
        inputs.do.detach()[:, :1],
        tuple(t[:, :1] for t in inputs.tangents),
    )
    input_bytes = inputs.nbytes()
    qkv_bytes = sum(p.nbytes for p in inputs.primals[:3])
    del inputs
    rows = []
    # the floor alone is the stricter rule, and saves a run of the math path for its own error
    allowed = allowed_errors(case, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.pt"
        torch.save(exact(one_head, first), path)
        for contestant in able:
            advance(1 / (len(able) + 1), f"memory at N={case.length}: {contestant.name}")
            row: dict[str, Any] = {
                "case": case.asdict(),
                "shape": case.shape,
                "step": step,
                "contestant": contestant.name,
                "input_bytes": input_bytes,
                "qkv_bytes": qkv_bytes,
                "wrong": None,
            }
            try:
                row |= in_fresh_process(
                    "metattn.cli._peak",
                    {
                        "case": case.asdict(),
                        "contestant": contestant.name,
                        "step": step,
                        "threads": torch.get_num_threads(),
                        "answer": str(path),
                    },
                )
            except ChildError as error:
                row |= {"bytes": None, "wrong": str(error)}
            if "errors" in row:
                row["wrong"] = complaint(row["errors"], allowed)
            rows.append(row)
    advance(1 / (len(able) + 1), f"memory at N={case.length}")
    return rows


def measured_for_memory(case: Case, found: list[Contestant]) -> list[Contestant]:
    """The contestants of a memory case: torch's paths up to LONGEST_PEER alone."""
    able = [contestant for contestant in found if contestant.can(case, "second-order step")]
    return [contestant for contestant in able if contestant.backend or case.length <= LONGEST_PEER]


def allowed_errors(case: Case, math_errors: dict[str, float]) -> dict[str | None, float]:
    """What each output may be off by: a factor times the math path's own error, or the floor (key None)."""
    factor, floor = TOLERANCES[case.torch_dtype]
    return {None: floor, **{name: max(factor * error, floor) for name, error in math_errors.items()}}


def complaint(found: dict[str, float], allowed: dict[str | None, float]) -> str | None:
    """The worst output past its tolerance, None where all are within (a NaN is not)."""
    past = {name: error for name, error in found.items() if not error <= allowed.get(name, allowed[None])}
    if not past:
        return None
    name = max(past, key=lambda key: past[key] / allowed.get(key, allowed[None]))
    return f"{name} is off by {past[name]:.1e}, allowed {allowed.get(name, allowed[None]):.1e}"


def matrix_product_rate() -> float:
    """FLOP/s of torch's float32 matrix product here."""
    a = torch.randn(512, 512)
    timing = interleave({"product": lambda: a @ a}, seconds=0.1, least=5, most=50)["product"]
    return 2 * 512**3 / timing.median


def expected_seconds(case: Case, found: list[Contestant], rate: float, seconds: float, least: int) -> float:
    """A guess for all steps of a case, for the announcement and the bar."""
    if case.dtype != "float32":
        rate /= 3
    total = case.operations("second-order step") / (0.08 * rate)
    for step in case.steps:
        calls = [
            case.operations(step) / (ASSUMED_SHARE[contestant.name] * rate)
            for contestant in found
            if contestant.can(case, step)
        ]
        # the check, two warm-ups and a graph to start from, then the timed rounds
        total += 4 * sum(calls) + max(seconds, least * sum(calls))
    return total


def expected_seconds_for_memory(case: Case, found: list[Contestant], rate: float) -> float:
    operations = case.operations("second-order step")
    able = measured_for_memory(case, found)
    runs = sum(CHILD_START + operations / (ASSUMED_SHARE[contestant.name] * rate) for contestant in able)
    return runs + operations / case.heads / (0.08 * rate)


__all__ = ["CASES", "PRODUCTS", "add_arguments", "measure", "run"]
