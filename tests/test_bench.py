"""bench: what it measures, for whom, whether it is right, and what it writes."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

import metattn
from metattn import measure
from metattn.bench import answers, cases, goals, html_page, peers, pictures, report, rows, tables
from metattn.bench.peers import CHECKPOINTED, COMPILED, FLASH, FULL, JAX, MATH
from metattn.cli import bench, main

ROOT = Path(__file__).resolve().parents[1]
TINY = cases.Case("tiny", 2, 4, 24, 8)
MASKED = cases.Case("masked", 1, 2, 24, 8, window=(5, 0), steps=("forward", "second-order step"))
FUSED = metattn.available_backends()["cpu"] is None
WHOLE = "second-order step"


# Measuring.


def test_interleave_takes_turns_and_keeps_every_sample() -> None:
    called: list[str] = []

    def named(name: str) -> Any:
        return lambda: called.append(name)

    timings = measure.interleave({"a": named("a"), "b": named("b")}, seconds=0.0, least=3, warmup=1)
    assert called == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [len(timing.samples) for timing in timings.values()] == [3, 3]


def test_timing_median_and_quartiles() -> None:
    timing = measure.Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert measure.Timing((7.0,)).quartiles == (7.0, 7.0)


def test_interleave_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="expected 1 <= least <= most, got 0 and 5"):
        measure.interleave({}, least=0, most=5)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told by /proc")
def test_peak_memory_sees_a_buffer_that_is_freed_again() -> None:
    def step() -> torch.Tensor:
        torch.ones(64 * _MIB, dtype=torch.uint8)
        return torch.ones(16 * _MIB, dtype=torch.uint8)

    peak = measure.peak_memory(step)
    assert peak is not None
    assert 60 * _MIB < peak < 84 * _MIB


_MIB = 2**20


def test_child_that_fails_is_told() -> None:
    with pytest.raises(measure.ChildError, match=r"No module named metattn\.nothing"):
        measure.in_fresh_process("metattn.nothing", {})


def test_machine_names_what_a_figure_depends_on() -> None:
    about = json.loads(json.dumps(measure.machine()))
    if (ROOT / ".git").exists():
        described = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
        head = subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
        assert about["commit"].removesuffix("-dirty") == head
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"] == torch.__version__
    assert about["cpu"]


# Cases and contestants.


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        cases.Case("causal", 2, 4, 24, 8, causal="top-left"),
        cases.Case("grouped", 2, 4, 24, 8, kv_heads=2, causal="top-left"),
        cases.Case("window", 2, 4, 24, 8, window=(5, 2)),
        cases.Case("causal window", 2, 4, 24, 8, causal="top-left", window=(5, 2)),
        cases.Case("bias", 2, 4, 24, 8, bias="shared"),
        cases.Case("double", 2, 4, 24, 8, dtype="float64"),
    ],
    ids=lambda case: case.name,
)
def test_every_contestant_agrees_with_float64_in_every_step(
    case: cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(answers.SCORES_AT_ONCE, "cpu", 7 * 24 * 2)  # pieces of rows, uneven ones too
    found = peers.contestants(case, (COMPILED, JAX))
    prepared = rows.prepare(case, found)
    compared = set()
    for contestant in found:
        for step in cases.PRODUCTS:
            if step in contestant.steps:
                errors = prepared.checked(contestant, step)[1]
                assert set(errors) == set(answers.outputs_of(case, step))
                assert max(errors.values()) < (1e-12 if case.dtype == "float64" else 3e-6), (contestant, step)
                compared.add((contestant.name, step))
    assert {(MATH, WHOLE), (CHECKPOINTED, WHOLE)} <= compared
    assert (("metattn cpu" + FULL, WHOLE) in compared) == (FUSED and case.masked and case.kv_heads is None)


@pytest.mark.skipif(JAX in peers.absent(), reason="JAX is not installed")
@pytest.mark.parametrize(
    "case",
    [
        cases.Case("grouped window", 2, 4, 24, 8, kv_heads=2, causal="top-left", window=(5, 2)),
        cases.Case("bias", 2, 4, 24, 8, bias="shared"),
    ],
    ids=lambda case: case.name,
)
def test_jax_agrees_with_float64(case: cases.Case) -> None:
    contestant = peers.contestant(case, JAX)
    prepared = rows.prepare(case, [contestant])
    steps = contestant.steps
    assert steps == ["forward", "vjp", "jvp", "double backward", WHOLE]
    for step in steps:
        assert max(prepared.checked(contestant, step)[1].values()) < 3e-6, step


@pytest.mark.skipif(COMPILED in peers.absent(), reason="no C++ compiler")
def test_compiled_math_agrees_with_float64() -> None:
    compiled = peers.contestant(TINY, COMPILED)
    prepared = rows.prepare(TINY, [compiled])
    for step in ("forward", "vjp"):
        run, errors, complaint = prepared.checked(compiled, step)
        assert complaint is None
        assert max(errors.values()) < 3e-6
        run()  # its graph may be used again


@pytest.mark.parametrize("name", [COMPILED, JAX])
def test_who_is_not_there_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.shutil, "which", lambda program: None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda module: None)
    assert name in peers.absent()
    assert name not in {contestant.name for contestant in peers.contestants(TINY)}


@pytest.mark.parametrize("window", [(5, 2), (3, 0)])
@pytest.mark.parametrize("causal", ["top-left", None])
def test_a_mask_is_what_its_operations_count(window: tuple[int, int], causal: Any) -> None:
    case = cases.Case("", 1, 1, 24, 8, causal=causal, window=window)
    mask = case.mask(slice(0, 24), slice(0, 24))
    assert mask is not None
    assert case.operations("forward") == 2 * 2 * 8 * int(mask.sum())
    rows = slice(7, 12)
    columns = case.attended(rows)
    assert int(mask[rows].sum()) == int(mask[rows, columns].sum())


def test_answer_of_the_last_queries_is_the_whole_ones() -> None:
    inputs = answers.make_inputs(TINY)
    whole, last = answers.exact(TINY, inputs), answers.exact(TINY, inputs, last=5)
    assert set(last) == {"o", "dq", "dqt", "ot"}
    for name, part in last.items():
        torch.testing.assert_close(part, whole[name][:, :, -5:], rtol=1e-12, atol=1e-12)
    outputs = tuple(whole[name].clone() for name in answers.outputs_of(TINY))
    assert max(answers.errors(TINY, WHOLE, outputs, last).values()) < 1e-12
    outputs[0][:, :, -1] += 1
    assert answers.errors(TINY, WHOLE, outputs, last)["o"] > 0.1


def test_operations_are_counted_by_products() -> None:
    assert TINY.operations("double backward") == 15 * 2 * 2 * 4 * 24 * 24 * 8
    assert cases.Case("", 2, 4, 24, 8, causal="top-left").operations("vjp") == 5 * 2 * 2 * 4 * 8 * (
        24 * 25 // 2
    )


def test_cases_that_the_goals_are_stated_for_are_there() -> None:
    named = {case.name: case for case in cases.CASES}
    assert {(case.shape, case.dtype) for case in named.values()} >= {
        (shape, dtype)
        for shape in ("B1 H8 N2048 d64", "B1 H8 N2048 d128", "B32 H8 N64 d32")
        for dtype in ("float32", "bfloat16")
    }
    for dtype in ("float32", "bfloat16"):
        for name in (*goals.LONG[dtype], *goals.FEW_SHOT[dtype]):
            assert named[name].dtype == dtype
    assert {"long causal", "window"} <= set(named)
    assert (named["window"].n, named["window"].window) == (8192, (256, 0))
    assert named["long causal"].n == 2048
    assert [case.n for case in cases.MEMORY_CASES] == [4096, 8192, 16384, 32768]


# Rows.


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    memory = cases.Case("memory", 1, 2, 512, 32, steps=("second-order step",))
    found = bench.measure([TINY, MASKED], [memory], seconds=0.01, least=2, progress=False, quick=True)
    return json.loads(json.dumps(found))  # as it comes back from the file


def test_rows_hold_timing_rate_and_errors(results: dict[str, Any]) -> None:
    row = next(r for r in results["rows"] if r["contestant"] == MATH and r["step"] == "double backward")
    assert row["wrong"] is None
    assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
    assert row["gflops"] == pytest.approx(row["operations"] / row["median"] * 1e-9)
    assert set(row["errors"]) == {"dqt", "dkt", "dvt", "ot"}
    assert results["machine"]["versions"]["torch"] == torch.__version__


def test_ratios_and_shares_are_those_of_the_rounds(results: dict[str, Any]) -> None:
    rows = [row for row in results["rows"] if row["case"]["name"] == "masked" and row["step"] == WHOLE]
    by_name = {row["contestant"]: row for row in rows}
    mine, math = by_name[tables.ours(results)], by_name[MATH]
    of_each = [theirs / ours for theirs, ours in zip(math["samples"], mine["samples"], strict=True)]
    assert mine["ratios"][MATH]["median"] == pytest.approx(measure.Timing(tuple(of_each)).median)
    assert set(mine["ratios"]) == set(by_name) - {mine["contestant"]}
    assert "ratios" not in math
    if FUSED:
        assert "metattn cpu" + FULL in mine["ratios"]
        full = by_name["metattn cpu" + FULL]
        assert full["operations"] > 2 * mine["operations"]
    low, high = mine["share_of_product"]["quartiles"]
    assert 0 < low <= mine["share_of_product"]["median"] <= high
    products = [p for p in results["products"] if p["step"] == WHOLE and p["case"]["name"] == "masked"]
    assert products[0]["size"] == 2048
    assert len(products[0]["samples"]) >= 1


def test_a_ratio_of_medians_may_be_another() -> None:
    assert measure.per_round([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]).samples == (2.0, 3.0, 4.0)


def test_product_takes_a_sixth_of_the_time_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "SIZE", 64)
    clock = iter([0.0, 1.0, 1.0, 5.9, 6.0, 6.0, 8.0, 8.0])  # start, end, then: now?, now? start, end
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    product = measure.Product(torch.float32)
    for _ in range(3):
        product()
    assert product.samples == [1.0, 2.0]
    assert product.rates == [2 * 64**3, 2 * 64**3, 64**3]


def test_a_peer_that_fails_is_told_and_the_rest_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    torch_path = peers.torch_path

    def failing(case: cases.Case, kernel: SDPBackend, *rest: Any) -> Any:
        if kernel == SDPBackend.FLASH_ATTENTION:
            raise RuntimeError("no such kernel\nmore")
        return torch_path(case, kernel, *rest)

    monkeypatch.setattr(peers, "torch_path", failing)
    case = cases.Case("tiny", 1, 1, 8, 4, steps=("forward",))
    found = bench.measure([case], [], seconds=0.0, least=1, progress=False, quick=True)
    wrong = {row["contestant"]: row["wrong"] for row in found["rows"] if row["wrong"]}
    assert wrong == {FLASH: "failed: RuntimeError: no such kernel"}


def test_memory_rows_come_from_fresh_processes(results: dict[str, Any]) -> None:
    rows = {row["contestant"]: row for row in results["memory"]}
    math = rows[MATH]
    assert math["wrong"] is None
    one = 2 * 512 * 32 * 4
    assert (math["input_bytes"], math["output_bytes"]) == (7 * one, 8 * one)
    assert math["seconds"] > 0
    assert math["bytes"] > 2 * 512 * 512 * 4  # at least one matrix of scores
    if "metattn cpu" in rows:
        assert rows["metattn cpu"]["bytes"] < math["bytes"]


def test_wrong_numbers_disqualify(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = metattn.attention
    monkeypatch.setattr(metattn, "attention", lambda *args, **options: attention(*args, **options) * 1.001)
    case = cases.Case("tiny", 1, 1, 8, 4, steps=("forward",))
    found = bench.measure([case], [], seconds=0.0, least=1, progress=False, quick=True)
    ours = [row for row in found["rows"] if row["contestant"].startswith("metattn")]
    assert all("o is off by 1.0e-03, allowed" in row["wrong"] for row in ours)
    assert not any("median" in row for row in ours)
    math = next(row for row in found["rows"] if row["contestant"] == MATH)
    assert math["wrong"] is None
    assert "median" in math
    assert "| wrong |" in report.markdown(found)


def test_nan_is_wrong() -> None:
    assert rows.complaint({"o": float("nan")}, {None: 1.0}) == "o is off by nan, allowed 1.0e+00"
    assert rows.complaint({"o": 1e-7}, {None: 5e-6}) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is on the address space")
def test_what_does_not_fit_is_found_by_trying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "from metattn.bench import peak; peak.available_memory = lambda: 64 * 2**20; peak.main()"
    case = cases.Case("memory", 1, 2, 4096, 16, steps=("second-order step",))
    request = {
        "case": case.asdict(),
        "contestant": MATH,
        "step": "second-order step",
        "threads": 1,
        "answer": None,
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert json.loads(done.stdout) == {"bytes": None, "does_not_fit_in": int(0.9 * 64 * 2**20)}, done.stderr


# What it writes.


def test_bench_command_writes_and_renders(
    results: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *args, **options: results)
    assert main(["bench", "--quick", "--out", str(tmp_path / "first")]) == 0
    assert "second-order step" in capsys.readouterr().out
    kept = json.loads((tmp_path / "first/bench.json").read_text())
    assert kept == results

    page = tmp_path / "page.md"
    page.write_text(f"above\n{report.BLOCK[0]}\nold\n{report.BLOCK[1]}\nbelow\n")
    again = ["bench", "--render", str(tmp_path / "first/bench.json"), "--out", str(tmp_path / "second")]
    assert main([*again, "--page", str(page)]) == 0
    assert (tmp_path / "second/bench.md").read_text() == (tmp_path / "first/bench.md").read_text()
    assert (tmp_path / "second/bench.html").read_text() == (tmp_path / "first/bench.html").read_text()
    for name in pictures.TITLES:
        assert (tmp_path / "second" / name).stat().st_size > 5000
    text = page.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert "(second/speedup.png)" in text
    assert "| goal |" in text
    assert main([*again, "--page", str(page)]) == 0
    assert page.read_text() == text


def test_a_page_without_the_block_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(ValueError, match="expected the marks"):
        report.rewrite_block(page, results, tmp_path)


def test_total_time_is_said_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    with report.progress(95.0, shown=True) as advance:
        assert "about 2 minutes" in capsys.readouterr().out
        advance(95.0, "working")
    assert report.duration(30.2) == "30 seconds"


def test_expected_time_is_of_the_right_size() -> None:
    case = cases.Case("small", 2, 4, 256, 32)
    found = peers.contestants(case, (COMPILED, JAX))
    expected = bench.expected_seconds(case, (COMPILED, JAX), bench.matrix_product_rate(), 0.01, 2)
    start = time.perf_counter()
    rows.timed_rows(case, found, 0.01, 2, lambda part, doing: None)
    assert 0.05 < expected / (time.perf_counter() - start) < 20


def test_html_stands_alone(results: dict[str, Any], tmp_path: Path) -> None:
    broken = copy.deepcopy(results)
    broken["rows"][0]["wrong"] = "<b> & co"
    pictures.draw(broken, tmp_path)
    page = html_page.page(broken, tmp_path)
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == len(pictures.TITLES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "&lt;b&gt; &amp; co" in page
    assert results["machine"]["cpu"] in page
    assert "not in a quick run" in page
