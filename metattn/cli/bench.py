"""`metattn bench`: the four maps and the whole second-order step against torch, on this machine."""

from __future__ import annotations

import argparse
import datetime
import importlib
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import torch

from metattn.bench import compare, files, html_page, pictures, report
from metattn.bench.cases import CASES, MEMORY_CASES, PRODUCTS, QUICK_MEMORY_CASES, Case
from metattn.bench.peers import (
    CHECKPOINTED,
    COMPILED,
    FLASH,
    FULL,
    JAX,
    MATH,
    absent,
    contestants,
)
from metattn.bench.rows import LAST, LONGEST_CHECKED, Advance, measured_for_memory, memory_rows, timed_rows
from metattn.measure import SIZE, interleave, machine

# Only the announced duration rests on these guesses: each contestant's share of the matrix product's rate,
ASSUMED_SHARE = {
    "metattn cpu": 0.9,
    "metattn cpu" + FULL: 0.9,
    "metattn reference": 0.1,
    FLASH: 0.7,
    MATH: 0.4,
    COMPILED: 0.4,
    CHECKPOINTED: 0.4,
    JAX: 0.15,
}
EXACT_SHARE = 0.15  # of the float64 answer
COMPILES = {COMPILED: 4.0, JAX: 1.0}  # and the seconds to compile a step
CHILD_START = 5.0  # seconds to start a process that imports torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = sorted({case.name for case in (*CASES, *MEMORY_CASES)})
    parser.add_argument(
        "--quick",
        action="store_true",
        help="the small cases only, without what compiles: about a minute",
    )
    parser.add_argument("--cases", nargs="+", choices=names, metavar="NAME", help=f"of: {', '.join(names)}")
    parser.add_argument(
        "--seconds", type=float, help="time for each step of a case (default 1.5, with --quick 0.3)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("metattn-bench"),
        help="folder for bench.json, bench.md, bench.html and the pictures",
    )
    parser.add_argument("--page", type=Path, help="rewrite the benchmark block of this Markdown file too")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="measure nothing, show an earlier bench.json"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("A.json", "B.json"),
        help="measure nothing, say what B does faster or slower than A, beyond the spread",
    )


def run(args: argparse.Namespace) -> int:
    if args.compare is not None:
        before, after = (files.results_of("--compare", path) for path in args.compare)
        print(compare.text(before, after))
        return 0
    for needed in ("rich", "matplotlib"):  # missing ones are told now, not after minutes of measuring
        importlib.import_module(needed)
    earlier = None if args.render is None else files.results_of("--render", args.render)
    if args.page is not None:
        files.page("--page", args.page)
    files.writable("--out", args.out)
    if earlier is not None:
        results = earlier
    else:
        if args.seconds is None:
            args.seconds = 0.3 if args.quick else 1.5
        if args.seconds <= 0:
            raise ValueError(f"--seconds: expected more than 0, got {args.seconds}")
        timed, memory = chosen(args.cases, args.quick)
        least = 3 if args.quick else 4
        results = measure(timed, memory, seconds=args.seconds, least=least, quick=args.quick)
    if args.render is None:
        (args.out / "bench.json").write_text(files.json_text(results))
    (args.out / "bench.md").write_text(report.markdown(results))
    pictures.draw(results, args.out)
    (args.out / "bench.html").write_text(html_page.page(results, args.out))
    if args.page is not None:
        report.rewrite_block(args.page, results, args.out)
    report.show(results)
    print(f"written to {args.out}")
    wrong = [row for row in (*results["rows"], *results["memory"]) if row.get("wrong")]
    return 1 if any(row["contestant"].startswith("metattn") for row in wrong) else 0  # a peer's is told above


def chosen(names: list[str] | None, quick: bool) -> tuple[list[Case], list[Case]]:
    """The cases to time and the cases whose memory to measure."""
    memory_cases = QUICK_MEMORY_CASES if quick else MEMORY_CASES
    timed = [case for case in CASES if (case.quick or not quick) and (names is None or case.name in names)]
    return timed, [case for case in memory_cases if names is None or case.name in names]


def measure(
    timed: list[Case],
    memory: list[Case],
    *,
    seconds: float,
    least: int = 4,
    progress: bool = True,
    quick: bool = False,
) -> dict[str, Any]:
    """All rows of the given cases, with the machine they were measured on."""
    started = time.time()
    missing = absent() | (dict.fromkeys(COMPILES, "not in a quick run") if quick else {})
    rate = matrix_product_rate()
    work = [expected_seconds(case, missing, rate, seconds, least) for case in timed]
    work += [expected_seconds_for_memory(case, rate) for case in memory]
    results: dict[str, Any] = {
        "machine": machine(),
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "expected_seconds": round(sum(work), 1),
        "seconds_per_step": seconds,
        "absent": missing,
        "rows": [],
        "products": [],
        "memory": [],
    }
    with report.progress(sum(work), progress) as advance:
        for case, weight in zip([*timed, *memory], work, strict=True):
            share = partial(_share, advance, weight)
            if case in memory:
                results["memory"] += memory_rows(case, share)
            else:
                rows, products = timed_rows(case, contestants(case, missing), seconds, least, share)
                results["rows"] += rows
                results["products"] += products
    results["seconds"] = round(time.time() - started, 1)
    return results


def _share(advance: Advance, weight: float, part: float, doing: str) -> None:
    advance(weight * part, doing)


def matrix_product_rate() -> float:
    """FLOP/s of torch's float32 matrix product here."""
    left, right = (torch.randn(SIZE, SIZE) for _ in range(2))
    return 2 * SIZE**3 / interleave({"product": lambda: left @ right}, seconds=0.0, least=3)["product"].median


def expected_seconds(case: Case, without: Collection[str], rate: float, seconds: float, least: int) -> float:
    """A guess for all steps of a case, for the announcement and the bar."""
    found = contestants(case, without)
    total = case.operations("second-order step") / (EXACT_SHARE * rate)
    if any(contestant.full for contestant in found):
        total += case.full().operations("second-order step") / case.heads / (EXACT_SHARE * rate)
    for step in case.steps:
        able = [contestant for contestant in found if step in contestant.steps]
        # a window saves torch nothing
        calls = [
            (case if contestant.backend and not contestant.full else case.full()).operations(step)
            / (ASSUMED_SHARE[contestant.name] * rate)
            for contestant in able
        ]
        calls.append(2 * SIZE**3 / rate)
        # the check and a graph to start from, then the timed rounds
        total += 2 * sum(calls) + max(seconds, least * sum(calls))
        total += sum(COMPILES.get(contestant.name, 0.0) for contestant in able)
    return total


def expected_seconds_for_memory(case: Case, rate: float) -> float:
    operations = case.operations("second-order step")
    able = measured_for_memory(case)
    runs = sum(CHILD_START + operations / (ASSUMED_SHARE[contestant.name] * rate) for contestant in able)
    checked = min(1.0, LAST / case.n) if case.n > LONGEST_CHECKED else 1.0
    return runs + checked * operations / case.heads / (EXACT_SHARE * rate)


__all__ = ["CASES", "PRODUCTS", "add_arguments", "measure", "run"]
