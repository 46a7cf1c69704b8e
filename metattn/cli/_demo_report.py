"""What the demo shows: live bars, tables, a picture."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from metattn.bench.peers import MATH

OURS, THEIRS, TRUTH, PALE = "#1b6ca8", "#b04a3a", "#444444", "#9aa5ad"
STAGES = {
    "sinusoids": "meta-learning sinusoids",
    "digits": "meta-learning digits",
    "second-order step": "measuring second order",
}


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, float, str], None]]:
    """Live bars; yields a function (stage, share of it done, remark) that moves them."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, refresh_per_second=5) as bars:
        tasks = {
            stage: bars.add_task(description, total=1.0, start=False, remark="")
            for stage, description in STAGES.items()
        }

        def advance(stage: str, done: float, remark: str) -> None:
            bars.start_task(tasks[stage])
            bars.update(tasks[stage], completed=done, remark=remark)

        yield advance


def show(results: dict[str, Any]) -> None:
    """The figures, as tables."""
    from rich.console import Console
    from rich.table import Table

    console = Console()

    def table(title: str, header: list[str], lines: list[list[str]]) -> None:
        console.print(f"\n[bold]{title}[/bold]", highlight=False)
        drawn = Table()
        for index, name in enumerate(header):
            drawn.add_column(name, justify="right" if index else "left")
        for line in lines:
            drawn.add_row(*line)
        console.print(drawn)

    steps = (0, 1, 5, 10)
    header = ["gradient steps on the new task", *(str(step) for step in steps)]
    waves, digits = results["sinusoids"], results["digits"]
    table(
        f"Mean squared error on {waves['tasks']} new sinusoids, 10 points each",
        header,
        [
            ["meta-learned", *(f"{waves['trained'][step]:.3f}" for step in steps)],
            ["the same network, untrained", *(f"{waves['untrained'][step]:.3f}" for step in steps)],
        ],
    )
    table(
        f"Accuracy on {digits['tasks']} tasks of three of the digits 6-9, never seen before, 5 images each",
        header,
        [
            ["meta-learned on 0-5", *(f"{digits['trained'][step]:.1%}" for step in steps)],
            ["the same network, untrained", *(f"{digits['untrained'][step]:.1%}" for step in steps)],
            ["nearest centroid of pixels (no steps)", f"{digits['centroid']:.1%}", "", "", ""],
            ["chance", "33.3%", "", "", ""],
        ],
    )
    errors = results["agreement"]
    console.print(
        "\n[bold]Meta-gradient (float32), relative distance from float64 by torch's math attention[/bold]\n"
        f"  metattn {errors['metattn']:.1e}, torch math {errors[MATH]:.1e}",
        highlight=False,
    )
    table(
        "A second-order step (o, its gradient, the gradient of that), 2 heads of 64, float32",
        ["", *(f"N = {length}" for length in lengths(results))],
        [
            [f"{name}: {label}", *(render(row[key]) for row in of(results, name))]
            for label, key, render in (
                ("time", "seconds", _milliseconds),
                ("peak memory", "bytes", _mebibytes),
            )
            for name in names(results)
        ],
    )


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:,.0f} ms"


def _mebibytes(size: float | None) -> str:
    return "not measured" if size is None else f"{size / 2**20:,.1f} MiB"


def names(results: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["contestant"] for row in results["steps"]))


def lengths(results: dict[str, Any]) -> list[int]:
    return list(dict.fromkeys(row["length"] for row in results["steps"]))


def of(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The rows of one contestant, by length."""
    return [row for row in results["steps"] if row["contestant"] == name]


def picture(results: dict[str, Any], path: Path) -> None:
    """Above, three new sinusoids before and after adaptation; below, digits, time and memory."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    style: dict[Any, Any] = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10.5,
        "font.size": 9.5,
    }
    with mpl.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(12, 7), layout="constrained")
        for index, (axis, curve) in enumerate(zip(axes[0], results["sinusoids"]["curves"], strict=True)):
            _sinusoid(axis, curve, f"new sinusoid {index + 1}")
        axes[0][0].set_ylabel("y")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        _digits(axes[1][0], results["digits"])
        _against_length(axes[1][1], results, "seconds", 1e3, "time of a second-order step, ms")
        _against_length(axes[1][2], results, "bytes", 2**-20, "peak memory of a second-order step, MiB")
        figure.savefig(path, dpi=120)
        plt.close(figure)


def _sinusoid(axis: Any, curve: dict[str, list[float]], title: str) -> None:
    axis.plot(curve["x"], curve["truth"], color=TRUTH, linewidth=1, linestyle=":", label="the task")
    axis.plot(curve["x"], curve["before"], color=PALE, linewidth=1.5, label="before adaptation")
    axis.plot(curve["x"], curve["after"], color=OURS, linewidth=2, label="after 10 gradient steps")
    axis.plot(
        curve["support_x"], curve["support_y"], "o", color=THEIRS, markersize=5, label="the 10 points it saw"
    )
    axis.set_title(title)
    axis.set_xlabel("x")


def _digits(axis: Any, digits: dict[str, Any]) -> None:
    steps = range(len(digits["trained"]))
    axis.axhline(
        digits["centroid"], color=THEIRS, linewidth=1.2, linestyle="--", label="nearest centroid of pixels"
    )
    axis.plot(
        steps, digits["trained"], color=OURS, linewidth=2, marker="o", markersize=4, label="meta-learned"
    )
    axis.plot(
        steps,
        digits["untrained"],
        color=PALE,
        linewidth=1.5,
        marker="o",
        markersize=3,
        label="the same network, untrained",
    )
    axis.axhline(1 / 3, color=TRUTH, linewidth=1, linestyle=":", label="chance")
    axis.set_ylim(0.25, 1.0)
    axis.legend(loc="lower right", bbox_to_anchor=(1.0, 0.13), frameon=False)
    axis.set_title("unseen digits 6-9, 3 classes of 5 images")
    axis.set_xlabel("gradient steps on the new task")
    axis.set_ylabel("accuracy")


def _against_length(axis: Any, results: dict[str, Any], key: str, factor: float, label: str) -> None:
    for name in names(results):
        points = [(row["length"], row[key] * factor) for row in of(results, name) if row[key] is not None]
        if points:
            color = THEIRS if name == MATH else OURS
            axis.plot(
                *zip(*points, strict=True), color=color, linewidth=2, marker="o", markersize=4, label=name
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths(results), [str(length) for length in lengths(results)])
    axis.minorticks_off()
    axis.legend(loc="upper left", frameon=False)
    axis.margins(y=0.12)
    axis.set_title(label)
    axis.set_xlabel("N, queries and keys")
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.7)
