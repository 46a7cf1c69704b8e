"""bench's pictures: speed-up bars, shares of the matrix product's rate, time and memory against N."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from metattn.bench.cases import WHOLE
from metattn.bench.peers import CHECKPOINTED, COMPILED, FLASH, FULL, JAX, MATH
from metattn.bench.tables import Results, cases, extra, names, needed, ours, row_of

STEPS = ("forward", "vjp", "double backward", WHOLE)
TITLES = {
    "speedup.png": "Speed-up",
    "share.png": "Share of the matrix product's rate",
    "length.png": "Time and memory against N",
}
COLOURS = {
    "metattn cpu": "#1b6ca8",
    "metattn reference": "#8fb8d8",
    "metattn cpu" + FULL: "#5d7f99",
    FLASH: "#6a9a3b",
    MATH: "#b04a3a",
    COMPILED: "#7d4fa0",
    CHECKPOINTED: "#d99a5b",
    JAX: "#444444",
}
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "font.size": 9.5,
}


def draw(results: Results, folder: Path) -> None:
    """All pictures, under their names in TITLES."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    for name, fill in zip(TITLES, (speedup, share, length), strict=True):
        with mpl.rc_context(STYLE):
            figure = fill(results)
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)


def speedup(results: Results) -> Any:
    """Peers' time over ours, each step a panel."""
    mine = ours(results)
    peers = [n for n in names(results["rows"]) if not n.startswith("metattn") or n.endswith(FULL)]

    def ratios(case: str, step: str, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = row_of(results, case, step, mine).get("ratios", {}).get(name)
        return found

    figure = bars(results, peers, STEPS, ratios, logarithmic=True)
    figure.suptitle(f"a peer's time / {mine}'s: right of the line {mine} is faster")
    return figure


def share(results: Results) -> Any:
    """Of the product's rate by the count of products, forward and double backward."""

    def shares(case: str, step: str, name: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = row_of(results, case, step, name).get("share_of_product")
        return found

    known = [name for name in names(results["rows"]) if not name.endswith(FULL)]
    figure = bars(results, known, ("forward", "double backward"), shares, logarithmic=False)
    figure.suptitle("rate as a share of torch's 2048³ product in the same dtype")
    return figure


def bars(
    results: Results,
    known: list[str],
    steps: tuple[str, ...],
    figure_of: Callable[[str, str, str], dict[str, Any] | None],
    *,
    logarithmic: bool,
) -> Any:
    """A panel for each step, a group of bars for each case, with the quartiles as whiskers."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter, StrMethodFormatter

    labels = list(cases(results))
    tall = 1.6 + 0.55 * max(1, len(labels))
    figure, panels = plt.subplots(
        1,
        len(steps),
        figsize=(3.4 * len(steps) + 1.6, tall),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    legend: dict[str, Any] = {}
    for panel, step in zip(panels[0], steps, strict=True):
        here = [name for name in known if any(figure_of(case, step, name) for case in labels)]
        thick = 0.8 / max(1, len(here))
        for index, name in enumerate(here):
            found = [(place, figure_of(case, step, name)) for place, case in enumerate(labels)]
            shown = [(place, summary) for place, summary in found if summary is not None]
            middle = [summary["median"] for _, summary in shown]
            low, high = zip(*(summary["quartiles"] for _, summary in shown), strict=True)
            spread = [
                [m - x for m, x in zip(middle, low, strict=True)],
                [x - m for m, x in zip(middle, high, strict=True)],
            ]
            places = [place + (index - (len(here) - 1) / 2) * thick for place, _ in shown]
            style = {"ecolor": "#222222", "error_kw": {"elinewidth": 0.8}}
            # on a logarithmic axis bars start at 1: to its right ours is faster
            start = [1.0] * len(middle) if logarithmic else [0.0] * len(middle)
            widths = [m - s for m, s in zip(middle, start, strict=True)]
            legend[name] = panel.barh(
                places, widths, thick, left=start, xerr=spread, color=COLOURS[name], **style
            )
        panel.set_title(step)
        panel.set_yticks(range(len(labels)), labels)
        panel.set_ylim(len(labels) - 0.4, -0.6)
        panel.grid(axis="x", color="#e3e3e3", linewidth=0.7)
        panel.set_axisbelow(True)
        if logarithmic:
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter(StrMethodFormatter("{x:g}×"))
            panel.axvline(1.0, color="#222222", linewidth=0.9)
        else:
            panel.xaxis.set_major_formatter(PercentFormatter(1.0))
    if legend:
        order = [name for name in known if name in legend]
        figure.legend(
            [legend[name] for name in order],
            order,
            loc="outside lower center",
            ncols=2 * len(steps),
            frameon=False,
        )
    return figure


def length(results: Results) -> Any:
    """The second-order step's time and extra memory, log-log, from the memory rows' processes."""
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    rows = [row for row in results["memory"] if not row["wrong"]]
    measured = [row for row in rows if row["bytes"] is not None]
    lengths = sorted({row["case"]["n"] for row in rows})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for name in names(measured):
        mine = [row for row in measured if row["contestant"] == name]
        places = [row["case"]["n"] for row in mine]
        look = {"marker": "o", "label": name, "color": COLOURS[name]}
        right.plot(places, [extra(row) / 2**20 for row in mine], **look)
        timed = [(row["case"]["n"], row["seconds"]) for row in mine if "seconds" in row]
        if timed:
            left.plot(*zip(*timed, strict=True), **look)
    sizes = {row["case"]["n"]: needed(row) / 2**20 for row in rows}
    right.plot(sizes.keys(), sizes.values(), color="#222222", linestyle=":", label="inputs + outputs")
    for row in rows:
        if "does_not_fit_in" in row:
            mark = (row["case"]["n"], row["does_not_fit_in"] / 2**20)
            right.plot(*mark, marker="x", markersize=9, color=COLOURS[row["contestant"]])
            right.annotate(
                "does not fit", mark, (-8, -12), textcoords="offset points", ha="right", fontsize=8
            )
    left.set_title("time of one second-order step, seconds")
    right.set_title("extra memory of a second-order step, MiB")
    for panel in (left, right):
        panel.set_xlabel("N, queries and keys")
        panel.set_xscale("log", base=2)
        panel.set_xticks(lengths, [str(n) for n in lengths])
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
        panel.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        panel.minorticks_off()
        panel.grid(color="#e3e3e3", linewidth=0.7)
        if panel.lines:
            panel.legend(frameon=False)
    return figure
