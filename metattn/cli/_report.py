"""What bench shows: a bar while it runs, a table, Markdown, a picture, the block of the README."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metattn.cli._cases import CHECKPOINTED, FLASH, MATH, PRODUCTS

BLOCK = ("<!-- bench:begin (written by `make bench`) -->", "<!-- bench:end -->")
# The steps a README has room for.
SHORT = ("forward", "double backward", "second-order step")
COLOURS = {"metattn cpu": "#1b6ca8", "metattn reference": "#8fb8d8", MATH: "#b04a3a", CHECKPOINTED: "#d99a5b"}


@contextlib.contextmanager
def progress(expected: float, shown: bool) -> Iterator[Callable[[float, str], None]]:
    """Says how long it will take; yields a function that moves the bar by some of those seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if not shown:
        yield lambda seconds, doing: None
        return
    console = Console()
    console.print(f"This takes about {duration(expected)} on this machine.")
    columns = (BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=expected)

        def advance(seconds: float, doing: str) -> None:
            bar.update(task, advance=seconds, description=doing)

        yield advance
        bar.update(task, completed=expected, description="done")


def duration(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _time(row: dict[str, Any] | None) -> str:
    """Median and spread in milliseconds."""
    if row is None:
        return "–"
    if row["wrong"]:
        return "wrong"
    low, high = row["quartiles"]
    median = row["median"] * 1e3
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} ±{(high - low) / 2 * 1e3:.{digits}f}"


def _memory(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    if row["wrong"]:
        return "wrong"
    if row["bytes"] is not None:
        return f"{row['bytes'] / 2**20:,.0f} MiB ({row['bytes'] / row['qkv_bytes']:.1f}×)"
    if "does_not_fit_in" in row:
        return f"does not fit in {row['does_not_fit_in'] / 2**30:.0f} GiB"
    return "not measured"


def _names(rows: list[dict[str, Any]]) -> list[str]:
    present = {row["contestant"] for row in rows}
    return [
        name for name in ("metattn cpu", "metattn reference", MATH, CHECKPOINTED, FLASH) if name in present
    ]


def _ours(names: list[str]) -> str:
    return next(name for name in names if name.startswith("metattn"))


def timing_table(results: dict[str, Any], steps: tuple[str, ...]) -> tuple[list[str], list[list[str]]]:
    """Header and lines: a line for each case and step, a column of milliseconds for each contestant."""
    rows = results["rows"]
    names = _names(rows)
    ours = _ours(names)
    lines = []
    for case, shape, options in dict.fromkeys((r["case"]["name"], r["shape"], r["options"]) for r in rows):
        for step in steps:
            found = {r["contestant"]: r for r in rows if r["case"]["name"] == case and r["step"] == step}
            if ours not in found:
                continue
            mine, math = found[ours], found.get(MATH)
            rate = f"{mine['gflops']:.1f}" if "gflops" in mine else "–"
            ratio = "–"
            if math is not None and "median" in mine and "median" in math:
                ratio = f"{math['median'] / mine['median']:.2f}×"
            lines.append(
                [f"{case}: {shape}, {options}", step, *(_time(found.get(n)) for n in names), ratio, rate]
            )
    header = ["case", "step", *names, "math / ours", "ours, GFLOP/s"]
    return header, lines


def memory_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = results["memory"]
    names = _names(rows)
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        found = {row["contestant"]: row for row in rows if row["shape"] == shape}
        lines.append([shape, *(_memory(found.get(name)) for name in names)])
    return ["second-order step, float32", *names], lines


def show(results: dict[str, Any]) -> None:
    """Prints the tables, and what was wrong."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    tables = []
    if results["rows"]:
        (_, *header), lines = timing_table(results, tuple(PRODUCTS))
        for case in dict.fromkeys(line[0] for line in lines):
            tables.append((f"{case}: times in ms", header, [line[1:] for line in lines if line[0] == case]))
    if results["memory"]:
        title = "peak memory with all inputs (times the bytes of q, k and v)"
        tables.append((title, *memory_table(results)))
    for title, header, lines in tables:
        table = Table(title=title, title_justify="left")
        for index, name in enumerate(header):
            table.add_column(name, justify="right" if index else "left", no_wrap=not index)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for row in (*results["rows"], *results["memory"]):
        if row["wrong"]:
            console.print(f"wrong: {row['case']['name']}, {row['step']}, {row['contestant']}: {row['wrong']}")


def _machine_line(results: dict[str, Any]) -> str:
    machine = results["machine"]
    version = machine["versions"]
    load = machine.get("load")
    busy = "" if load is None else f"load {load:.1f} at the start, "
    return (
        f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores used, {busy}"
        f"torch {version['torch']}, Python {version['python']}, "
        f"commit {machine['commit'] or 'unknown'}, {results['started'][:10]}"
    )


def _markdown_table(header: list[str], lines: list[list[str]], left: int) -> str:
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def markdown(results: dict[str, Any], steps: tuple[str, ...] = tuple(PRODUCTS)) -> str:
    """The tables in Markdown, with the machine below."""
    parts = []
    if results["rows"]:
        parts.append(_markdown_table(*timing_table(results, steps), left=2))
    if results["memory"]:
        parts.append(_markdown_table(*memory_table(results), left=1))
    parts.append(
        "Times in ms: median ± half the distance between the quartiles. Contestants take turns; outputs are "
        "compared with float64 before anything is timed. Memory: the highest resident memory of a fresh "
        "process over its start, inputs included; in brackets as a multiple of the bytes of q, k and v.\n\n"
        f"{_machine_line(results)}.\n"
    )
    return "\n".join(parts)


def rewrite_block(readme: Path, results: dict[str, Any], folder: Path) -> None:
    """Replaces what stands between the two marks of a Markdown file."""
    text = readme.read_text()
    begin, end = (text.find(mark) for mark in BLOCK)
    if begin < 0 or end < begin:
        raise ValueError(f"--readme: expected the marks {BLOCK[0]} and {BLOCK[1]} in {readme}, found none")
    readme.write_text(text[: begin + len(BLOCK[0])] + "\n" + block(results, readme, folder) + text[end:])


def block(results: dict[str, Any], readme: Path, folder: Path) -> str:
    """The README's share: the picture and the short tables."""
    picture_path = Path(os.path.relpath(folder / "bench.png", readme.parent)).as_posix()
    return f"\n![time and memory of a second-order step]({picture_path})\n\n{markdown(results, SHORT)}\n"


def picture(results: dict[str, Any], path: Path) -> None:
    """Left, the second-order step's time as a share of the math path's; right, its peak memory against N."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    step = "second-order step"
    rows = [row for row in results["rows"] if row["step"] == step and "median" in row]
    cases = list(dict.fromkeys(row["case"]["name"] for row in rows))
    names = [name for name in _names(rows) if name != "metattn reference"]
    height = 0.8 / max(1, len(names))
    for index, name in enumerate(names):
        places, lengths = [], []
        for place, case in enumerate(cases):
            here = {row["contestant"]: row["median"] for row in rows if row["case"]["name"] == case}
            if name in here and MATH in here:
                places.append(place + (index - (len(names) - 1) / 2) * height)
                lengths.append(here[name] / here[MATH])
        left.barh(places, lengths, height, label=name, color=COLOURS[name])
    left.set_yticks(range(len(cases)), cases)
    left.invert_yaxis()
    left.set_xlabel("time of a second-order step, torch math = 1")
    if rows:
        left.legend(fontsize=8)

    for name in _names(results["memory"]):
        points = [
            (row["case"]["length"], row["bytes"] / 2**20)
            for row in results["memory"]
            if row["contestant"] == name and row["bytes"] is not None and not row["wrong"]
        ]
        if points:
            right.plot(*zip(*points, strict=True), marker="o", label=name, color=COLOURS[name])
    for row in results["memory"]:
        if "does_not_fit_in" in row:
            mark = (row["case"]["length"], row["does_not_fit_in"] / 2**20)
            right.plot(*mark, marker="x", markersize=9, color=COLOURS[row["contestant"]])
            right.annotate(
                "does not fit", mark, (-8, -12), textcoords="offset points", ha="right", fontsize=8
            )
    if results["memory"]:
        right.set_xscale("log", base=2)
        right.set_yscale("log")
        right.legend(fontsize=8)
    right.set_xlabel("N")
    right.set_ylabel("peak memory of a second-order step, MiB")
    figure.savefig(path, dpi=110)
    plt.close(figure)
