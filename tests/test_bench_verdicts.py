"""bench: goals, and what changed between two runs, judged by figures that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from metattn import measure
from metattn.bench import cases, compare, goals
from metattn.bench.peers import CHECKPOINTED, FLASH, FULL, MATH
from metattn.cli import bench, main

WHOLE = "second-order step"


# Goals.


def row(case: cases.Case, step: str, contestant: str, median: float, **more: Any) -> dict[str, Any]:
    about = {"case": case.asdict(), "shape": case.shape, "options": case.options, "step": step}
    timing = {"median": median, "quartiles": [median * 0.99, median * 1.01], "wrong": None}
    return {**about, "contestant": contestant, **timing, "gflops": 1.0, **more}


def made_up(*rows: dict[str, Any], memory: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    about = {**measure.machine(), "cpu": "made up"}
    return {"machine": about, "started": "2026", "absent": {}, "rows": list(rows), "memory": list(memory)}


def times(ratio: float) -> dict[str, Any]:
    return {"median": ratio, "quartiles": [ratio - 0.1, ratio + 0.1]}


def verdicts(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    found = [goal.cells() for goal in goals.goals(results)]
    return {what: (verdict, measured) for what, verdict, measured in found}


CASES = {case.name: case for case in cases.CASES}
OURS = "metattn cpu"


def flash_goal(*ratios: float) -> tuple[str, str]:
    rows = [
        row(CASES[name], "forward", OURS, 1.0, ratios={FLASH: times(ratio)})
        for name, ratio in zip(goals.LONG["float32"], ratios, strict=False)
    ]
    return verdicts(made_up(*rows))["forward, float32: torch flash / ours ≥ 1.1"]


def test_goals_are_judged_by_the_worst_case() -> None:
    assert flash_goal(1.3, 1.1) == ("reached", "long 1.30× ±0.10, long d128 1.10× ±0.10")
    assert flash_goal(1.3, 1.09)[0] == "not reached"
    assert flash_goal(1.1) == ("not all measured", "long 1.10× ±0.10")
    assert flash_goal(0.9)[0] == "not reached"
    assert flash_goal() == ("not measured", "–")


def test_goals_of_the_dtypes_are_their_own() -> None:
    rows = [
        row(CASES[name], "double backward", OURS, 1.0, ratios={MATH: times(4.0)})
        for names in goals.LONG.values()
        for name in names
    ]
    found = verdicts(made_up(*rows))
    assert found["double backward, float32: torch math / ours ≥ 3.3"][0] == "reached"
    assert found["double backward, bfloat16: torch math / ours ≥ 10"][0] == "not reached"


def test_goal_where_ours_is_wrong_or_the_peer_is() -> None:
    found = made_up(
        row(CASES["long"], "forward", OURS, 1.0, wrong="o is off"),
        row(CASES["long d128"], WHOLE, OURS, 1.0, ratios={CHECKPOINTED: times(5.0)}),
        row(CASES["long"], WHOLE, OURS, 1.0, ratios={}),
    )
    forward = verdicts(found)["forward, float32: torch flash / ours ≥ 1.1"]
    assert forward == ("not reached", "ours is wrong in long")
    whole = verdicts(found)["second-order step, float32: torch checkpointed / ours ≥ 4"]
    assert whole == ("reached", "long: no right torch checkpointed, long d128 5.00× ±0.10")


@pytest.mark.parametrize(("ratio", "verdict"), [(1.7, "reached"), (1.6, "not reached")])
def test_goal_of_causal_masks(ratio: float, verdict: str) -> None:
    rows = [
        row(CASES["long causal"], step, OURS, 1.0, ratios={OURS + FULL: times(ratio)}) for step in goals.STEPS
    ]
    found = verdicts(made_up(*rows))
    assert found["causal at least 1.7 times as fast as full: full / ours ≥ 1.7"][0] == verdict


@pytest.mark.parametrize(("share", "verdict"), [(0.856, "reached"), (0.84, "not reached")])
def test_goal_of_the_share_of_the_product(share: float, verdict: str) -> None:
    rows = [
        row(CASES[name], "forward", OURS, 1.0, share_of_product=times(share))
        for name in goals.LONG["float32"]
    ]
    found = verdicts(made_up(*rows))["forward, float32: at least 85% of the 2048³ product's rate"]
    assert found == (verdict, f"long {share:.0%}, long d128 {share:.0%}")


@pytest.mark.parametrize(
    ("peaks", "fits", "grows"),
    [
        ((50, 100, 200, 400), "reached", "reached"),
        ((50, 200, 400, 800), "not reached", "not reached"),
        ((50, 100), "reached", "not all measured"),
    ],
)
def test_goals_of_memory(peaks: tuple[int, ...], fits: str, grows: str) -> None:
    memory = tuple(
        row(
            case, WHOLE, OURS, 0.0, bytes=(peak + 35) * 2**20, input_bytes=35 * 2**20, output_bytes=40 * 2**20
        )
        for case, peak in zip(cases.MEMORY_CASES, peaks, strict=False)
    )
    found = verdicts(made_up(memory=memory))
    verdict, said = found["extra memory of the second-order step at N=8192 ≤ 1.5 × (inputs + outputs)"]
    assert verdict == fits
    assert said.startswith(f"{peaks[1]} MiB, inputs + outputs 75 MiB: {peaks[1] / 75:.2f}×")
    assert found["extra memory linear in N to 32768: ≤ 2.1× for twice the length"][0] == grows


# Comparing.


def test_compare_says_what_changed_beyond_the_spread(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long, sized = CASES["long"], {"input_bytes": 0, "output_bytes": 1}
    before = made_up(
        row(long, "forward", OURS, 1.0),
        row(long, "vjp", OURS, 2.0),
        row(long, WHOLE, OURS, 3.0),
        row(long, "jvp", OURS, 1.0),
        memory=(row(long, WHOLE, OURS, 0.0, bytes=2**20, **sized),),
    )
    after = made_up(
        row(long, "forward", OURS, 1.019),  # each is off by a hundredth
        row(long, "vjp", OURS, 1.0),
        row(long, WHOLE, OURS, 4.5),
        row(long, "jvp", MATH, 1.0),
        memory=(row(long, WHOLE, OURS, 0.0, bytes=2**21, **sized),),
    )
    after["machine"]["cpu"] = "another"
    for name, results in (("a", before), ("b", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    assert main(["bench", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    case = "long (B1 H8 N2048 d64, float32)"
    assert capsys.readouterr().out.splitlines() == [
        "warning: cpu differs: made up, then another",
        f"1.50× slower: {case}, second-order step, metattn cpu: 3000 ±30 → 4500 ±45 ms",
        f"2.00× faster: {case}, vjp, metattn cpu: 2000 ±20 → 1000 ±10 ms",
        "times: 2 of 3 differ by more than both spreads",
        f"only in the first: {case}, jvp, metattn cpu",
        f"only in the second: {case}, jvp, torch math",
        f"2.00× the memory: {case}, second-order step, metattn cpu: 1 → 2 MiB",
        "peaks of memory: 1 of 1 differ by more than 2%",
    ]


@pytest.mark.parametrize("option", ["--compare", "--render"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"rows": []}'], ids=str)
def test_what_is_no_bench_json(
    option: str, content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    files = [str(path)] * (2 if option == "--compare" else 1)
    assert main(["bench", option, *files, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"metattn bench: {option}: expected a bench.json, got {path}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_what_cannot_be_written_is_told_before_anything_is_measured(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in the folder's place, and one on its way: root may write to any folder."""
    monkeypatch.setattr(bench, "measure", None)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "folder"):
        assert main([command, "--quick", "--out", str(out)]) == 2
        assert capsys.readouterr().err.startswith(
            f"metattn {command}: --out: expected a folder to write to, got {out}"
        )
    if command == "bench":
        assert main(["bench", "--out", str(tmp_path), "--page", str(tmp_path / "none.md")]) == 2
        assert "--page: expected a Markdown file" in capsys.readouterr().err


def test_quick_takes_as_long_as_is_said() -> None:
    """On two cores of 100 GFLOP/s, by the guess that a run announces."""
    timed, memory = bench.chosen(None, True)
    work = [bench.expected_seconds(case, bench.COMPILES, 1e11, 0.3, 3) for case in timed]
    work += [bench.expected_seconds_for_memory(case, 1e11) for case in memory]
    assert 40 <= sum(work) <= 80, "--quick says that it takes about a minute"


def test_compare_tells_rows_that_became_wrong() -> None:
    right = made_up(row(CASES["long"], "forward", OURS, 1.0))
    wrong = made_up(row(CASES["long"], "forward", OURS, 1.0, wrong="o is off"))
    said = compare.text(right, wrong)
    assert "wrong now: long (B1 H8 N2048 d64, float32), forward, metattn cpu: o is off" in said
    assert "right now: long" in compare.text(wrong, right)
    assert "0 of 1 differ" in compare.text(wrong, wrong)
