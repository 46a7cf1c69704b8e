"""What the benchmark is to show, and whether it did: a table made of bench.json."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from metattn.cli._contestants import CHECKPOINTED, FLASH, FULL, MATH
from metattn.cli._tables import Results, Table, extra, needed, ours, ratio, row_of

WHOLE = "second-order step"
STEPS = ("forward", "vjp", "double backward", WHOLE)
LONG = ("long", "long d128", "long bf16", "long d128 bf16")
FEW_SHOT = ("few-shot", "few-shot bf16")


@dataclass(frozen=True)
class Goal:
    """What is aimed at, what was measured, and whether it is reached: None where it is not known."""

    what: str
    measured: str = "–"
    reached: bool | None = None
    aimed: bool = True  # whether there is anything to reach

    def cells(self) -> list[str]:
        verdict = {None: "not all measured", True: "reached", False: "not reached"}[self.reached]
        return [self.what, verdict if self.aimed else "–", self.measured]


def goals(results: Results) -> list[Goal]:
    return [
        faster(results, "forward", FLASH, LONG + FEW_SHOT),
        faster(results, "vjp", FLASH, LONG + FEW_SHOT),
        faster(results, "double backward", MATH, LONG + FEW_SHOT),
        faster(results, WHOLE, CHECKPOINTED, LONG),
        faster(results, WHOLE, MATH, FEW_SHOT),
        share_of_product(results, "forward"),
        share_of_product(results, "double backward"),
        over_full(results, "long causal", 1.7, "causal at least 1.7 times as fast as full"),
        over_full(results, "window", 10.0, "window 256 at N=8192 in at most 10 % of full"),
        peak(results, 8192, 1.5),
        linear(results, (4096, 8192, 16384, 32768)),
    ]


def table(results: Results) -> Table:
    return ["goal", "", "measured"], [goal.cells() for goal in goals(results)]


def judged(results: Results, what: str, rows: list[tuple[str, str, str]], other: str, least: float) -> Goal:
    """other / ours at least so much in all of (label, case, step) that the other can do."""
    mine = ours(results)
    said, ratios, open_rows = [], [], False
    for label, case, step in rows:
        row = row_of(results, case, step, mine)
        if not row:
            open_rows = True
            continue
        if row["wrong"]:
            return Goal(what, f"ours is wrong in {label}", False)
        found: dict[str, Any] | None = row.get("ratios", {}).get(other)
        if found is None:
            said.append(f"{label}: no right {other}")
        else:
            ratios.append(found["median"])
            said.append(f"{label} {ratio(found)}")
    if not ratios:
        return Goal(what, "; ".join(said) or "–")
    reached = min(ratios) >= least
    return Goal(what, ", ".join(said), None if open_rows and reached else reached)


def faster(results: Results, step: str, other: str, cases: tuple[str, ...]) -> Goal:
    rows = [(case, case, step) for case in cases]
    return judged(results, f"{step}: {other} / ours ≥ 1", rows, other, 1.0)


def over_full(results: Results, case: str, least: float, what: str) -> Goal:
    rows = [(step, case, step) for step in STEPS]
    return judged(results, f"{what}: full / ours ≥ {least:g}", rows, ours(results) + FULL, least)


def share_of_product(results: Results, step: str) -> Goal:
    """No goal in itself: how much of the machine is used."""
    said = []
    for case in LONG + FEW_SHOT:
        row = row_of(results, case, step, ours(results))
        if "share_of_product" in row:
            said.append(f"{case} {row['share_of_product']['median']:.0%}")
    return Goal(f"{step}: share of the 2048³ product's rate", ", ".join(said) or "–", aimed=False)


def peaks(results: Results) -> dict[int, dict[str, Any]]:
    rows = [row for row in results["memory"] if row["contestant"] == ours(results)]
    return {row["case"]["length"]: row for row in rows if row["bytes"] is not None or row["wrong"]}


def peak(results: Results, length: int, most: float) -> Goal:
    what = f"extra memory of the {WHOLE} at N={length} ≤ {most:g} × (inputs + outputs)"
    row = peaks(results).get(length)
    if row is None:
        return Goal(what)
    if row["wrong"]:
        return Goal(what, "ours is wrong", False)
    ratios = extra(row) / needed(row), row["bytes"] / needed(row)
    said = f"{extra(row) / 2**20:,.0f} MiB, inputs + outputs {needed(row) / 2**20:,.0f} MiB"
    return Goal(what, f"{said}: {ratios[0]:.2f}× ({ratios[1]:.2f}× with the inputs)", ratios[0] <= most)


def linear(results: Results, lengths: tuple[int, ...]) -> Goal:
    """Extra memory at most 5 % more than doubles when N doubles."""
    what = f"extra memory linear in N to {lengths[-1]}: ≤ 2.1× for twice the length"
    rows = [found for length in lengths if (found := peaks(results).get(length)) is not None]
    if any(row["wrong"] for row in rows):
        return Goal(what, "ours is wrong", False)
    growth = [extra(longer) / extra(shorter) for shorter, longer in pairwise(rows)]
    if not growth:
        return Goal(what)
    said = ", ".join(f"N={row['case']['length']} {g:.2f}×" for row, g in zip(rows[1:], growth, strict=True))
    reached = max(growth) <= 2.1
    return Goal(what, said, None if len(rows) < len(lengths) and reached else reached)
