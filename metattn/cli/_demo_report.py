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
    "characters": "meta-learning characters",
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
    waves, read = results["sinusoids"], results["characters"]
    table(
        f"Mean squared error on {waves['tasks']} new sinusoids, 10 points each",
        header,
        [
            ["meta-learned", *(f"{waves['trained'][step]:.3f}" for step in steps)],
            ["the same network, untrained", *(f"{waves['untrained'][step]:.3f}" for step in steps)],
        ],
    )
    ways = len(read["shown"]["support"])
    table(
        f"Accuracy on {read['tasks']} tasks: {ways} characters, one image of each",
        header,
        [
            line
            for name, title in (("digits", "handwritten digits"), ("scribbles", "new scribbles"))
            for line in (
                [f"[bold]{title}[/bold]", "", "", "", ""],
                *(
                    [f"  {label}", *(f"{read[name][key][step]:.1%}" for step in steps)]
                    for key, label in (
                        ("trained", "meta-learned on scribbles alone"),
                        ("untrained", "the same network, untrained"),
                    )
                ),
                ["  nearest image, pixel by pixel (no steps)", f"{read[name]['nearest']:.1%}", "", "", ""],
            )
        ]
        + [["chance", f"{1 / ways:.1%}", "", "", ""]],
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
    """Above, new sinusoids and what the characters were learned from; below, digits, time and memory."""
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
        figure, axes = plt.subplots(2, 4, figsize=(15.5, 7.2), layout="constrained")
        for index, (axis, curve) in enumerate(zip(axes[0][:3], results["sinusoids"]["curves"], strict=True)):
            _sinusoid(axis, curve, f"new sinusoid {index + 1}")
        axes[0][0].set_ylabel("y")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False)
        characters = results["characters"]
        _scribbles(axes[0][3], characters["shown"])
        _task(axes[1][0], characters["shown"])
        _accuracy(axes[1][1], characters)
        _against_length(axes[1][2], results, "seconds", 1e3, "time of a second-order step, ms")
        _against_length(axes[1][3], results, "bytes", 2**-20, "peak memory of a second-order step, MiB")
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


def _image(axis: Any, image: list[list[float]], column: float, row: int) -> None:
    """An 8×8 image in a cell of a grid whose cells are 10 wide."""
    left, top = 10 * column, 10 * row
    axis.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=(left, left + 8, top + 8, top))


def _grid(axis: Any, columns: float, rows: int, title: str) -> None:
    axis.set_xlim(-1, 10 * columns)
    axis.set_ylim(10 * rows, -3)
    axis.set_axis_off()
    axis.set_title(title)


def _scribbles(axis: Any, shown: dict[str, Any]) -> None:
    for row, images in enumerate(shown["scribbles"]):
        for column, image in enumerate(images):
            _image(axis, image, column, row)
    _grid(
        axis, len(shown["scribbles"][0]), len(shown["scribbles"]), "learned from scribbles (a row, a class)"
    )


def _task(axis: Any, shown: dict[str, Any]) -> None:
    from matplotlib.patches import Rectangle

    gap = 1.6  # between the image that is given and those that are asked
    for row, image in enumerate(shown["support"]):
        _image(axis, image, 0, row)
        for column, (asked, right) in enumerate(zip(shown["query"][row], shown["right"][row], strict=True)):
            _image(axis, asked, column + gap, row)
            if not right:
                left, top = 10 * (column + gap), 10 * row
                axis.add_patch(
                    Rectangle((left - 0.5, top - 0.5), 9, 9, fill=False, edgecolor=THEIRS, linewidth=2)
                )
    axis.text(4, -1, "given", ha="center", color=TRUTH)
    axis.text(10 * gap, -1, "asked (framed: answered wrong)", color=TRUTH)
    _grid(axis, gap + len(shown["query"][0]), len(shown["support"]), "a new task: digits, one image each")


def _accuracy(axis: Any, characters: dict[str, Any]) -> None:
    digits, ways = characters["digits"], len(characters["shown"]["support"])
    steps = range(len(digits["trained"]))
    for key, label, color, width in (
        ("trained", "meta-learned on scribbles", OURS, 2.0),
        ("untrained", "the same network, untrained", PALE, 1.5),
    ):
        axis.plot(steps, digits[key], color=color, linewidth=width, marker="o", markersize=4, label=label)
    axis.axhline(
        digits["nearest"], color=THEIRS, linewidth=1.2, linestyle="--", label="nearest image by pixels"
    )
    axis.axhline(1 / ways, color=TRUTH, linewidth=1, linestyle=":", label="chance")
    axis.set_ylim(0.15, 1.0)
    axis.legend(loc="center right", frameon=False)
    axis.set_title(f"handwritten digits: {ways} classes, one image each")
    axis.set_xlabel("gradient steps on the new task")
    axis.set_ylabel("accuracy")


def _against_length(axis: Any, results: dict[str, Any], key: str, factor: float, label: str) -> None:
    from matplotlib.ticker import LogLocator

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
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # powers of ten may be too few to read
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.legend(loc="upper left", frameon=False)
    axis.margins(y=0.12)
    axis.set_title(label)
    axis.set_xlabel("N, queries and keys")
    axis.grid(axis="y", color="#e3e3e3", linewidth=0.7)
