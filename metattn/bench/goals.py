"""What the benchmark is to show, and whether it did: a table made of bench.json."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from metattn.bench.cases import WHOLE
from metattn.bench.peers import CHECKPOINTED, FLASH, FULL, MATH
from metattn.bench.tables import Results, Table, extra, needed, ours, ratio, row_of

STEPS = ("forward", "vjp", "double backward", WHOLE)
LONG = {"float32": ("long", "long d128"), "bfloat16": ("long bf16", "long d128 bf16")}
FEW_SHOT = {"float32": ("few-shot",), "bfloat16": ("few-shot bf16",)}
# step, peer, cases → at least so many times as fast, in each dtype
SPEEDS = (
    ("forward", FLASH, LONG, {"float32": 1.1, "bfloat16": 1.2}),
    ("vjp", FLASH, LONG, {"float32": 1.2, "bfloat16": 1.8}),
    ("double backward", MATH, LONG, {"float32": 3.3, "bfloat16": 10.0}),
    (WHOLE, CHECKPOINTED, LONG, {"float32": 4.0, "bfloat16": 10.0}),
    (WHOLE, MATH, FEW_SHOT, {"float32": 2.0, "bfloat16": 4.0}),
)
# step → at least this share of the rate of the 2048³ product
SHARES = (
    ("forward", {"float32": 0.85, "bfloat16": 0.45}),
    ("double backward", {"float32": 0.70, "bfloat16": 0.35}),
)


@dataclass(frozen=True)
class Goal:
    """What is aimed at, what was measured, and whether it is reached: None where it is not known."""

    what: str
    measured: str = "–"
    reached: bool | None = None

    def cells(self) -> list[str]:
        unknown = "not measured" if self.measured == "–" else "not all measured"
        verdict = {None: unknown, True: "reached", False: "not reached"}[self.reached]
        return [self.what, verdict, self.measured]


def goals(results: Results) -> list[Goal]:
    return [
        *(
            faster(results, step, other, dtype, cases[dtype], least[dtype])
            for step, other, cases, least in SPEEDS
            for dtype in least
        ),
        *(share_of_product(results, step, dtype, least[dtype]) for step, least in SHARES for dtype in least),
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


def faster(results: Results, step: str, other: str, dtype: str, cases: tuple[str, ...], least: float) -> Goal:
    rows = [(case, case, step) for case in cases]
    return judged(results, f"{step}, {dtype}: {other} / ours ≥ {least:g}", rows, other, least)


def over_full(results: Results, case: str, least: float, what: str) -> Goal:
    rows = [(step, case, step) for step in STEPS]
    return judged(results, f"{what}: full / ours ≥ {least:g}", rows, ours(results) + FULL, least)


def share_of_product(results: Results, step: str, dtype: str, least: float) -> Goal:
    what = f"{step}, {dtype}: at least {least:.0%} of the 2048³ product's rate"
    said, shares = [], []
    for case in LONG[dtype]:
        row = row_of(results, case, step, ours(results))
        if "share_of_product" in row:
            shares.append(row["share_of_product"]["median"])
            said.append(f"{case} {shares[-1]:.0%}")
    if not shares:
        return Goal(what)
    reached = min(shares) >= least
    return Goal(what, ", ".join(said), None if reached and len(shares) < len(LONG[dtype]) else reached)


def peaks(results: Results) -> dict[int, dict[str, Any]]:
    rows = [row for row in results["memory"] if row["contestant"] == ours(results)]
    return {row["case"]["n"]: row for row in rows if row["bytes"] is not None or row["wrong"]}


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
    said = ", ".join(f"N={row['case']['n']} {g:.2f}×" for row, g in zip(rows[1:], growth, strict=True))
    reached = max(growth) <= 2.1
    return Goal(what, said, None if len(rows) < len(lengths) and reached else reached)
