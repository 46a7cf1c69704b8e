"""What the scenarios share: their options, a live bar, and how results are written down."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a plain checkout need not be installed

import torch

from metattn.measure import machine

OURS, THEIRS, TRUTH, PALE, THIRD = "#1b6ca8", "#b04a3a", "#444444", "#9aa5ad", "#6a9a3b"
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "font.size": 9.5,
}
FORMS = ("tiny", "short", "full")

Report = Callable[[float, str], None]  # (share of the whole done, remark)


@dataclass(frozen=True)
class Row:
    """A figure of ours beside the published one."""

    quantity: str
    ours: float
    error: float | None = None  # half a 95 % confidence interval over what `of` says
    of: str = ""  # what the figure is the mean of
    published: str = ""  # as in the source
    source: str = ""
    better: str = "lower"  # or higher


@dataclass
class Results:
    """Of one scenario in one form: a JSON file, of which the results page is made."""

    scenario: str
    form: str
    protocol: str  # of this form, in a sentence or two
    differs: str  # from the source's protocol, "" where it does not
    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)  # whatever the picture needs
    seconds: float = 0.0
    processor_seconds: float = 0.0  # of all threads, which other work on the machine does not lengthen


def parse(document: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """--full, --tiny, --seed and --out; the first line of `document` is the description."""
    parser = argparse.ArgumentParser(description=document.partition("\n")[0])
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--full",
        dest="form",
        action="store_const",
        const="full",
        help="as large as the source, where there is one",
    )
    form.add_argument("--tiny", dest="form", action="store_const", const="tiny", help="seconds: does it run?")
    parser.set_defaults(form="short")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("metattn-examples"), help="folder for the figures and the picture"
    )
    return parser.parse_args(arguments)


@contextlib.contextmanager
def progress(title: str) -> Iterator[Report]:
    """A live bar with the time that is left; yields the function that moves it."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, refresh_per_second=5) as bars:
        task = bars.add_task(title, total=1.0, remark="")

        def report(done: float, remark: str) -> None:
            bars.update(task, completed=done, remark=remark)

        yield report
        bars.update(task, completed=1.0)


def mean_row(quantity: str, values: Sequence[float], of: str, **published: str) -> Row:
    """The mean of values and its 95 % confidence interval; none where they are alike, which says nothing."""
    error = half_interval(values) if len(set(values)) > 1 else None
    return Row(quantity, statistics.fmean(values), error, of, **published)


def half_interval(values: Sequence[float]) -> float:
    """Half a 95 % confidence interval of the mean by Student's distribution: of few seeds it is wide."""
    from scipy import stats

    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def finish(
    results: Results, arguments: argparse.Namespace, draw: Callable[[Results], Any], start: float
) -> None:
    """Writes NAME-FORM.json and NAME-FORM.png into the folder, and prints the rows."""
    import matplotlib as mpl
    from rich.console import Console
    from rich.table import Table

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    results.seconds, results.processor_seconds = time.perf_counter() - start, time.process_time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"{results.scenario}-{results.form}"
    written = {
        **asdict(results),
        "seed": arguments.seed,
        "threads": torch.get_num_threads(),
        "machine": machine(),
    }
    stem.with_suffix(".json").write_text(json.dumps(written, indent=1) + "\n")
    with mpl.rc_context(STYLE):
        figure = draw(results)
        figure.savefig(stem.with_suffix(".png"), dpi=110)
        plt.close(figure)
    table = Table(title=f"{results.scenario}, {results.form} form, {results.seconds:.0f} s")
    for name in ("", "ours", "published", "source"):
        table.add_column(name, justify="right" if name == "ours" else "left")
    for row in results.rows:
        table.add_row(row.quantity, figure_of(row), row.published, row.source)
    console = Console()
    console.print(table)
    console.print(f"written to {stem}.json and .png")


def figure_of(row: Row) -> str:
    """ours, with its error to as many digits as that is known to."""
    if row.error is None or not math.isfinite(row.error):
        return f"{row.ours:.4g}"
    digits = max(0, 2 - len(str(int(abs(row.error)))) + (1 if abs(row.error) < 1 else 0))
    while digits < 6 and row.error > 0 and round(row.error, digits) == 0:
        digits += 1
    return f"{row.ours:.{digits}f} ± {row.error:.{digits}f}"
