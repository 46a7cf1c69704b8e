"""bench's results as tables: a header and lines of cells, for the terminal, Markdown and HTML alike."""

from __future__ import annotations

from typing import Any

from metattn.bench.peers import NAMES

Table = tuple[list[str], list[list[str]]]
Results = dict[str, Any]


def names(rows: list[dict[str, Any]]) -> list[str]:
    """The contestants of these rows, in their usual order."""
    present = {row["contestant"] for row in rows}
    return [name for name in NAMES if name in present]


def ours(results: Results) -> str:
    """The backend of ours that the figures are about."""
    return next(
        (n for n in names([*results["rows"], *results["memory"]]) if n.startswith("metattn")), NAMES[0]
    )


def row_of(results: Results, case: str, step: str, name: str) -> dict[str, Any]:
    """A timed row, empty where there is none."""
    for row in results["rows"]:
        if (row["case"]["name"], row["step"], row["contestant"]) == (case, step, name):
            assert isinstance(row, dict)
            return row
    return {}


def cases(results: Results) -> dict[str, str]:
    """The timed cases: what each is, by its name."""
    rows = results["rows"]
    return {row["case"]["name"]: f"{row['case']['name']}: {row['shape']}, {row['options']}" for row in rows}


def milliseconds(row: dict[str, Any]) -> str:
    """Median and spread."""
    if not row:
        return "–"
    if row["wrong"]:
        return "wrong"
    low, high = row["quartiles"]
    median = row["median"] * 1e3
    digits = 0 if median >= 100 else 1 if median >= 10 else 2
    return f"{median:.{digits}f} ±{(high - low) / 2 * 1e3:.{digits}f}"


def ratio(summary: dict[str, Any] | None) -> str:
    """Median and spread of the rounds' ratios."""
    if summary is None:
        return "–"
    low, high = summary["quartiles"]
    return f"{summary['median']:.2f}× ±{(high - low) / 2:.2f}"


def share(row: dict[str, Any]) -> str:
    summary = row.get("share_of_product")
    return "–" if summary is None else f"{summary['median']:.0%}"


def timing_table(results: Results, steps: tuple[str, ...]) -> Table:
    """A line for each case and step, a column of milliseconds for each contestant."""
    found, mine = names(results["rows"]), ours(results)
    lines = []
    for case, said in cases(results).items():
        for step in steps:
            row = row_of(results, case, step, mine)
            if row:
                times = [milliseconds(row_of(results, case, step, name)) for name in found]
                rate = f"{row['gflops']:.1f}" if "gflops" in row else "–"
                lines.append([said, step, *times, rate])
    return ["case", "step", *found, "ours, GFLOP/s"], lines


def ratio_table(results: Results, steps: tuple[str, ...]) -> Table:
    """A line for each case and step, with our time and how many times as long the others take."""
    mine = ours(results)
    others = [name for name in names(results["rows"]) if name != mine]
    lines = []
    for case, said in cases(results).items():
        for step in steps:
            row = row_of(results, case, step, mine)
            if row:
                ratios = row.get("ratios", {})
                cells = [
                    "wrong" if row_of(results, case, step, name).get("wrong") else ratio(ratios.get(name))
                    for name in others
                ]
                lines.append([said, step, milliseconds(row), *cells, share(row)])
    return ["case", "step", f"{mine}, ms", *(f"{name} / ours" for name in others), "ours / product"], lines


def memory_table(results: Results) -> Table:
    rows = results["memory"]
    found = names(rows)
    lines = []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        here = {row["contestant"]: row for row in rows if row["shape"] == shape}
        row = next(iter(here.values()))
        sizes = needed(row), row["input_bytes"], row["output_bytes"]
        said = "{} ({} + {}) MiB".format(*(f"{size / 2**20:,.0f}" for size in sizes))
        lines.append([shape, said, *(_peak(here.get(name)) for name in found)])
    return ["second-order step, float32", "inputs + outputs", *found], lines


def _peak(row: dict[str, Any] | None) -> str:
    """The extra memory, also as a multiple of inputs and outputs."""
    if row is None:
        return "–"
    if row["wrong"]:
        return "wrong"
    if row["bytes"] is not None:
        return f"{extra(row) / 2**20:,.0f} MiB ({extra(row) / needed(row):.2f}×)"
    if "does_not_fit_in" in row:
        return f"does not fit in {row['does_not_fit_in'] / 2**30:.0f} GiB"
    return "not measured"


def extra(row: dict[str, Any]) -> int:
    """The peak beyond the inputs: outputs, and what exists on the way to them."""
    return int(row["bytes"] - row["input_bytes"])


def needed(row: dict[str, Any]) -> int:
    """Bytes of inputs and outputs."""
    return int(row["input_bytes"] + row["output_bytes"])


def wrong(results: Results) -> list[str]:
    """Every row that was disqualified, and why."""
    return [
        f"{row['case']['name']}, {row['step']}, {row['contestant']}: {row['wrong']}"
        for row in (*results["rows"], *results["memory"])
        if row["wrong"]
    ]


def machine_line(results: Results) -> str:
    about = results["machine"]
    version = about["versions"]
    load = about.get("load")
    busy = "" if load is None else f"load {load:.1f} at the start, "
    jax = f"JAX {version['jax']}, " if version.get("jax") else ""
    return (
        f"{about['cpu']}, {about['threads']} of {about['cores']} cores used, {busy}"
        f"torch {version['torch']}, {jax}Python {version['python']}, "
        f"commit {about['commit'] or 'unknown'}, {results['started'][:10]}"
    )


def notes(results: Results) -> list[str]:
    """What has to be known to read the tables."""
    said = [
        "Times in ms: median ± half the distance between the quartiles. Contestants take turns; outputs are "
        "compared with float64 first, and wrong ones are not timed. Ratios are taken in each round and their "
        "median is shown: above 1 ours is faster. Product: torch's 2048³ matrix product in the same dtype, "
        "timed in the same rounds.",
        "Memory: the peak of resident memory beyond the inputs, in a fresh process; in brackets as a "
        "multiple of inputs (q, k, v, do, tangents) and outputs (o, gradients, second gradients) together.",
    ]
    if any(row["contestant"] == "JAX" for row in results["rows"]):
        said.append("JAX has no setting for its number of CPU threads: it takes what it likes.")
    said += [f"{name} did not take part: {reason}." for name, reason in results["absent"].items()]
    return [*said, f"{machine_line(results)}."]
