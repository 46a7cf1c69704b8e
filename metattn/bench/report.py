"""What bench says: a bar while it runs, tables in the terminal and in Markdown, the block of a page."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

from metattn.bench import goals, pictures, tables
from metattn.bench.cases import PRODUCTS

BLOCK = ("<!-- bench:begin (written by `make bench`) -->", "<!-- bench:end -->")
STEPS = tuple(PRODUCTS)
# The steps a page has room for.
SHORT = ("forward", "double backward", "second-order step")


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


def sections(results: tables.Results, steps: tuple[str, ...]) -> list[tuple[str, tables.Table, int]]:
    """Title, table and the number of its columns of words, of all that was measured."""
    found = [("goals", goals.table(results), 3)]
    if results["rows"]:
        found.append(("ratios", tables.ratio_table(results, steps), 2))
        found.append(("times in ms", tables.timing_table(results, steps), 2))
    if results["memory"]:
        found.append(("peak memory", tables.memory_table(results), 1))
    return found


def show(results: tables.Results) -> None:
    """Prints the goals, a table of ratios for each case, memory, and what was wrong."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def show_table(title: str, header: list[str], lines: list[list[str]], words: int) -> None:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, name in enumerate(header):
            side: Literal["left", "right"] = "left" if index < words else "right"
            table.add_column(name, justify=side, overflow="fold", min_width=None if index else 8)
        for line in lines:
            table.add_row(*line)
        console.print(table)

    for goal in goals.goals(results):
        what, verdict, measured = goal.cells()
        console.print(f"{what}: [bold]{verdict}[/bold]; {measured}", highlight=False)
    if results["rows"]:
        (_, *header), lines = tables.ratio_table(results, STEPS)
        for case in dict.fromkeys(line[0] for line in lines):
            here = [line[1:] for line in lines if line[0] == case]
            used = [i for i in range(len(header)) if any(line[i] != "–" for line in here)]
            show_table(case, [header[i] for i in used], [[line[i] for i in used] for line in here], 1)
    if results["memory"]:
        show_table("peak memory", *tables.memory_table(results), 1)
    for said in tables.wrong(results):
        console.print(f"wrong: {said}", highlight=False)
    for said in tables.notes(results):
        console.print(said, highlight=False)


def _markdown_table(content: tables.Table, words: int) -> str:
    header, lines = content
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *lines)) + "\n"


def markdown(results: tables.Results) -> str:
    """Every table, and how it was measured."""
    parts = [_markdown_table(content, words) for _, content, words in sections(results, STEPS)]
    return "\n".join([*parts, *(f"* {said}" for said in tables.notes(results))]) + "\n"


def rewrite_block(page: Path, results: tables.Results, folder: Path) -> None:
    """Replaces a page's share of the results."""
    rewrite(page, BLOCK, block(results, page, folder))


def rewrite(page: Path, marks: tuple[str, str], text: str) -> None:
    """Replaces what stands between two marks of a Markdown file."""
    before = page.read_text()
    begin, end = (before.find(mark) for mark in marks)
    if begin < 0 or end < begin:
        raise ValueError(f"expected the marks {marks[0]} and {marks[1]} in {page}, found none")
    page.write_text(before[: begin + len(marks[0])] + "\n" + text + before[end:])


def block(results: tables.Results, page: Path, folder: Path) -> str:
    """A page's share: two pictures and the short tables."""
    at = Path(os.path.relpath(folder, page.parent))
    drawn = [
        f"![{pictures.TITLES[name]}]({(at / name).as_posix()})" for name in ("speedup.png", "length.png")
    ]
    shown = [
        _markdown_table(content, words)
        for title, content, words in sections(results, SHORT)
        if title != "times in ms"
    ]
    said = [f"* {said}" for said in tables.notes(results)]
    return "\n" + "\n\n".join(drawn) + "\n\n" + "\n".join([*shown, *said]) + "\n\n"
