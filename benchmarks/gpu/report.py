"""The GPU benchmark's results as Markdown: a summary with ratios and goals, and every contestant's times."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from benchmarks.gpu.cases import CASES, STEPS
from metattn.bench.cases import WHOLE
from metattn.bench.goals import Goal

Row = dict[str, Any]
Results = dict[str, Any]
BACKENDS = ("metattn triton", "metattn cuda", "metattn cpu")
GRAPH = ", CUDA graph"
MATH, CHECKPOINTED, FLASH, CUDNN = "torch math", "torch checkpointed", "torch flash", "torch cuDNN"


def is_ours(row: Row) -> bool:
    return row["contestant"] in BACKENDS


class Table:
    """The measured rows by (case, step, contestant)."""

    def __init__(self, results: Results) -> None:
        self.rows = results["rows"]
        self.memory = results["memory"]
        names = [row["contestant"] for row in (*self.rows, *self.memory)]
        self.mine = next((name for name in BACKENDS if name in names), BACKENDS[0])
        self.peers = [name for name in dict.fromkeys(names) if not name.startswith("metattn")]
        self.cases = {row["case"]["name"]: row["case"] for row in self.rows}
        self._by_key = {(row["case"]["name"], row["step"], row["contestant"]): row for row in self.rows}

    def row(self, case: str, step: str, name: str) -> Row:
        found: Row = self._by_key.get((case, step, name), {})
        return found

    def ms(self, case: str, step: str, name: str) -> float | None:
        median: float | None = self.row(case, step, name).get("median")
        return None if median is None else median * 1e3

    def ratio(self, case: str, step: str, name: str) -> float | None:
        """A peer's time over ours."""
        theirs, mine = self.ms(case, step, name), self.ms(case, step, self.mine)
        return None if theirs is None or mine is None else theirs / mine

    def best(self, case: str, step: str) -> tuple[str, float] | None:
        """The fastest right peer and its time over ours."""
        found = [(name, self.ratio(case, step, name)) for name in self.peers]
        right = [(name, ratio) for name, ratio in found if ratio is not None]
        return min(right, key=lambda pair: pair[1]) if right else None

    def compared(self, case: str, step: str) -> tuple[str, float] | None:
        """The peer that our step is put beside: torch's math for second order, else the fastest."""
        ratio = self.ratio(case, step, MATH) if step == WHOLE else None
        return self.best(case, step) if ratio is None else (MATH, ratio)

    def peak(self, case: str, name: str) -> float | None:
        found = [row for row in self.memory if (row["case"]["name"], row["contestant"]) == (case, name)]
        peak: float | None = found[0].get("bytes") if found else None
        return peak


# The goals.


HVP = ((512, 512, 18.3), (256, 1024, 27.2), (128, 2048, 44.8), (64, 4096, 80.2))


def goals(results: Results) -> list[Goal]:
    table = Table(results)
    timed = [case for case in CASES if "forward" in case.steps]
    fused = [case.name for case in timed if not (case.needs_mask or case.bias)]
    d128 = [case.name for case in timed if case.d == 128]
    at_4096 = [case.name for case in timed if case.n == 4096 and case.kv_heads is None]
    return [
        at_least(table, "forward", FLASH, 1.0, "everywhere", fused),
        at_least(table, "forward", CUDNN, 0.85, "at d 128", d128),
        at_least(table, "vjp", FLASH, 1.0, "everywhere", fused),
        at_least(table, WHOLE, MATH, 10.0, "at N = 4096", at_4096),
        at_least(table, WHOLE, MATH, 5.0, "in few-shot", ["few-shot"]),
        *(below(table, f"hvp {batch}×{n}", limit) for batch, n, limit in HVP),
        below(table, "hvp 512×512", 12.0),
        below(table, "hvp 64×4096", 60.0),
        below(table, "hvp 1×512", 0.15, GRAPH),
        linear(table, (16384, 32768, 65536)),
    ]


def at_least(table: Table, step: str, peer: str, least: float, where: str, cases: list[str]) -> Goal:
    """A peer's time over ours in the worst case that the peer takes; reached once all were measured."""
    what = f"{step}: {peer} / ours ≥ {least:g} {where}"
    lacking = [case for case in cases if broken(table.row(case, step, table.mine))]
    if lacking:
        return Goal(what, f"ours does not work in {', '.join(lacking)}", False)
    ratios = [(ratio, case) for case in cases if (ratio := table.ratio(case, step, peer)) is not None]
    if not ratios:
        return Goal(what)
    ratio, case = min(ratios)
    measured = f"{ratio:.2f}, the worst of {len(ratios)} ({case})"
    unknown = [case for case in cases if table.ms(case, step, table.mine) is None]
    if unknown and ratio >= least:
        return Goal(what, f"{measured}; not yet {', '.join(unknown)}")
    return Goal(what, measured, ratio >= least)


def broken(row: Row) -> bool:
    return "wrong" in row or "cannot" in row


def below(table: Table, case: str, limit: float, how: str = "") -> Goal:
    """Our whole second-order step in less than so many ms."""
    what = f"{case}{how}: below {limit:g} ms"
    row = table.row(case, WHOLE, table.mine + how)
    if broken(row):
        return Goal(what, "ours does not work", False)
    ms = table.ms(case, WHOLE, table.mine + how)
    return Goal(what) if ms is None else Goal(what, f"{ms:.3g} ms", ms < limit)


def linear(table: Table, lengths: tuple[int, ...]) -> Goal:
    """Peak memory at most 5 % more than doubles when N doubles."""
    what = f"N = {lengths[-1]:,} runs, its memory linear in N"
    rows = [row for row in table.memory if row["contestant"] == table.mine]
    if any("cannot" in row for row in rows if row["case"]["n"] in lengths):
        return Goal(what, "ours does not run", False)
    found = [table.peak(f"memory {n}", table.mine) for n in lengths]
    peaks = [peak for peak in found if peak]
    if len(peaks) < len(lengths):
        return Goal(what)
    growth = [longer / shorter for shorter, longer in pairwise(peaks)]
    measured = ", ".join(f"{ratio:.2f}×" for ratio in growth) + " for twice the length"
    return Goal(what, measured, max(growth) <= 2.1)


# The summary: last on the screen, first in the file.


def summary(results: Results) -> str:
    table = Table(results)
    lines = [f"# {results['gpu']}", "", *header(results), ""]
    lines += [f"* {name}: {said}" for name, said in results["stages"].items()]
    lines += ["", *markdown_table(["goal", "", "measured"], [goal.cells() for goal in goals(results)], "---")]
    if table.memory:
        lines += ["", *memory_table(table)]
    if table.rows:
        lines += ["", *summary_table(table)]
        lines += [
            "",
            "Each cell: ms of ours, TFLOP/s of ours, the time of the fastest right peer over ours (of",
        ]
        lines += ["torch's math for the second-order step, where it fits). Predicted: `make aot`'s bound."]
    lines += ["", *(f"* Failed: {said}" for said in results["failed"])]
    if results["not_measured"]:
        lines += ["", "Not measured, for want of time: " + ", ".join(results["not_measured"]) + "."]
    return "\n".join(lines) + "\n"


def header(results: Results) -> list[str]:
    known = {**results["machine"]["versions"], **results["versions"]}
    named = ", ".join(
        f"{name} {known[name]}" for name in ("torch", "triton", "CUDA", "cuDNN", "jax") if known.get(name)
    )
    lines = [f"{named}, commit {results['machine']['commit']}, {results['started']}."]
    for when in ("before", "after"):
        for state in results["state"].get(when, []):
            lines.append(
                f"GPU {when}: " + ", ".join(f"{name} {value}" for name, value in state.items()) + "."
            )
    return lines  # fmt: skip


def markdown_table(head: list[str], rows: list[list[str]], others: str = "---:") -> list[str]:
    rule = "|---" + f"|{others}" * (len(head) - 1) + "|"
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)]


def summary_table(table: Table) -> list[str]:
    """One row a case."""
    head = ["case", *STEPS, "CUDA graph", "forward, predicted", "published", "published / ours"]
    return markdown_table(head, [summary_row(table, case) for case in table.cases])


def summary_row(table: Table, case: str) -> list[str]:
    cells = [case, *(summary_cell(table, case, step) for step in STEPS)]
    graph = table.ms(case, WHOLE, table.mine + GRAPH)
    cells.append(f"{graph:.3g} ms" if graph is not None else "–")
    bound = table.row(case, "forward", table.mine).get("predicted_tflops")
    cells.append(f"{bound:.0f} TFLOP/s" if bound else "–")
    published, mine = table.cases[case]["published"], table.ms(case, WHOLE, table.mine)
    cells.append(f"{published:g} ms" if published else "–")
    cells.append(f"{published / mine:.2f}×" if published and mine else "–")
    return cells


def summary_cell(table: Table, case: str, step: str) -> str:
    row = table.row(case, step, table.mine)
    if not row:
        return "–"
    if "median" not in row:
        return cell(row)
    tflops = f"{row['tflops']:.0f}" if row["tflops"] >= 10 else f"{row['tflops']:.2g}"
    shown = f"{row['median'] * 1e3:.3g} ms, {tflops} T"
    compared = table.compared(case, step)
    return shown if compared is None else f"{shown}, {short(compared[0])} {compared[1]:.2f}×"


def short(name: str) -> str:
    return name.removeprefix("torch ")


def memory_table(table: Table) -> list[str]:
    """Peak bytes of the second-order step over its inputs."""
    names = list(dict.fromkeys(row["contestant"] for row in table.memory))
    by_case: dict[str, dict[str, Row]] = {}
    for row in table.memory:
        by_case.setdefault(row["case"]["name"], {})[row["contestant"]] = row
    head = ["second-order step, peak MiB over inputs", "inputs", *names]
    rows = []
    for case, by_name in by_case.items():
        inputs = next(iter(by_name.values()))["input_bytes"]
        rows.append([case, f"{inputs / 2**20:.0f}", *(memory_cell(by_name.get(name)) for name in names)])
    return markdown_table(head, rows)


def memory_cell(row: Row | None) -> str:
    if row is None:
        return "–"
    if "bytes" in row:
        return f"{row['bytes'] / 2**20:.0f}"
    return cell(row) if "cannot" in row else "not measured"


# Every contestant.


def details(results: Results) -> str:
    """Every median with its spread, and why what is not there is not there."""
    table = Table(results)
    names = list(dict.fromkeys(row["contestant"] for row in table.rows))
    keys = dict.fromkeys((row["case"]["name"], row["step"]) for row in table.rows)
    if not keys:
        return ""
    rows = [[*key, *(cell(table.row(*key, name)) for name in names)] for key in keys]
    lines = [
        "",
        "## Every contestant",
        "",
        "Medians in ms; in brackets half the distance between the quartiles.",
    ]
    lines += ["JAX by the host's clock, its launches included; the others by events on the GPU.", ""]
    lines += markdown_table(["case", "step", *names], rows)
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        said = row.get("wrong") or row.get("cannot")
        if said:
            reasons.setdefault((row["contestant"], said), []).append(f"{row['case']['name']} {row['step']}")
    lines += ["", *(f"* {name}: {said} ({', '.join(where)})" for (name, said), where in reasons.items())]
    return "\n".join(lines) + "\n"


def cell(row: Row) -> str:
    if "median" in row:
        low, high = row["quartiles"]
        return f"{row['median'] * 1e3:.3g} (±{(high - low) * 5e2:.1g})"
    if "cannot" in row:
        told = row["cannot"].startswith("would need") or row["cannot"] == "not installed"
        return row["cannot"] if told else "cannot"
    return "wrong" if "wrong" in row else "–"
