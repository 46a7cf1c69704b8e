"""The command line: parsing, doctor on sound and broken installations, what bench measures and writes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch

import metattn
from metattn import backends
from metattn.backends import native
from metattn.cli import _cases, _measure, _report, bench, doctor, main

ROOT = Path(__file__).resolve().parents[1]
TINY = _cases.Case("tiny", 2, 4, 24, 8)


# ---- parsing


@pytest.fixture(autouse=True)
def no_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands look at the machine: what is emulated is no GPU's backend."""
    if emulation.installed():
        monkeypatch.setitem(backends._reasons, "cuda", "it is emulated")


def test_no_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert "demo|bench|doctor" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "bench", "doctor"])
def test_help_of_each_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: metattn {command}" in capsys.readouterr().out


def test_python_m_runs_the_same(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "metattn", "doctor", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert set(report["backends"]) == {"reference", "cpu", "cuda", "triton"}


def test_bad_value_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--seconds", "-1"]) == 2
    assert "metattn bench: --seconds: expected more than 0, got -1.0" in capsys.readouterr().err


# ---- doctor


def test_doctor_tells_backends_versions_and_machine(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["doctor"])
    said = capsys.readouterr().out
    assert code == (0 if metattn.available_backends()["cpu"] is None else 1)
    assert f"torch        {torch.__version__}" in said
    for name, reason in metattn.available_backends().items():
        assert f"  {name:12} {'yes' if reason is None else 'no'}" in said
    assert "triton       not installed" in said or "triton       3" in said


def test_doctor_names_the_isa_in_use() -> None:
    host = pytest.importorskip("metattn._host", reason="the host module is not built")
    report = doctor.examine()
    assert report["isa"] == host.isa()
    assert report["isa"] in report["build"]["isas"]
    assert f"code used    {report['isa']}" in doctor.text(report)


def test_doctor_on_an_unloadable_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "libmetattn_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "LIBRARY", broken)
    monkeypatch.setattr("metattn.backends._reasons", {"triton": "absent", "cuda": "absent"})
    native.unavailable_reason.cache_clear()
    try:
        assert main(["doctor"]) == 1
        said = capsys.readouterr().out
        assert "libmetattn_cpu.so cannot be loaded into torch" in said
        assert "problem: no fused backend works here" in said
        assert "Traceback" not in said
        with pytest.raises(NotImplementedError, match="cannot be loaded"):
            metattn.attention(*[torch.ones(1, 1, 2, 2)] * 3, backend="cpu")
        metattn.attention(*[torch.ones(1, 1, 2, 2)] * 3)  # the automatic choice goes on
    finally:
        native.unavailable_reason.cache_clear()


def test_doctor_on_a_torch_too_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    assert main(["doctor"]) == 1
    assert "problem: torch 2.9.1+cpu is older than 2.10" in capsys.readouterr().out


def test_doctor_on_wrong_numbers_and_on_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def self_test(backend: str) -> float:
        if backend == "reference":
            return float("nan")
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(doctor, "self_test", self_test)
    monkeypatch.setattr(metattn, "available_backends", lambda: {"reference": None, "cpu": None})
    report = doctor.examine()
    assert not report["ok"]
    assert "backend reference gives wrong numbers: relative error nan" in report["problems"]
    assert "backend cpu fails: RuntimeError: illegal instruction" in report["problems"]
    assert "cpu          fails, see below" in doctor.text(report)


def test_doctor_without_the_host_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metattn._host", None)
    report = doctor.examine()
    assert report["build"] is None
    assert "not here: import of metattn._host halted" in doctor.text(report)


# ---- measuring


def test_interleave_takes_turns_and_keeps_every_sample() -> None:
    called: list[str] = []

    def named(name: str) -> Any:
        return lambda: called.append(name)

    timings = _measure.interleave({"a": named("a"), "b": named("b")}, seconds=0.0, least=3, warmup=1)
    assert called == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert [len(timing.samples) for timing in timings.values()] == [3, 3]


def test_timing_median_and_quartiles() -> None:
    timing = _measure.Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert timing.quartiles == (2.0, 4.0)
    assert _measure.Timing((7.0,)).quartiles == (7.0, 7.0)


def test_interleave_refuses_impossible_counts() -> None:
    with pytest.raises(ValueError, match="expected 1 <= least <= most, got 0 and 5"):
        _measure.interleave({}, least=0, most=5)


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told by /proc")
def test_peak_memory_sees_a_buffer_that_is_freed_again() -> None:
    def step() -> torch.Tensor:
        torch.ones(64 * _MIB, dtype=torch.uint8)
        return torch.ones(16 * _MIB, dtype=torch.uint8)

    peak = _measure.peak_memory(step)
    assert peak is not None
    assert 60 * _MIB < peak < 84 * _MIB


_MIB = 2**20


def test_child_that_fails_is_told() -> None:
    with pytest.raises(_measure.ChildError, match=r"No module named metattn\.nothing"):
        _measure.in_fresh_process("metattn.nothing", {})


def test_machine_names_what_a_figure_depends_on() -> None:
    about = json.loads(json.dumps(_measure.machine()))
    assert about["threads"] == torch.get_num_threads()
    assert about["versions"]["torch"] == torch.__version__
    assert about["cpu"]


# ---- bench: cases and contestants


@pytest.mark.parametrize(
    "case",
    [
        TINY,
        _cases.Case("causal", 2, 4, 24, 8, causal=True),
        _cases.Case("grouped", 2, 4, 24, 8, kv_heads=2, causal=True),
        _cases.Case("bias", 2, 4, 24, 8, bias=True),
        _cases.Case("double", 2, 4, 24, 8, dtype="float64"),
    ],
    ids=lambda case: case.name,
)
def test_every_contestant_agrees_with_float64_in_every_step(
    case: _cases.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cases, "SCORES_AT_ONCE", 7 * 24 * 2)  # pieces of rows and of heads, uneven ones too
    inputs = _cases.make_inputs(case)
    answer = _cases.exact(case, inputs)
    compared = set()
    for contestant in _cases.contestants():
        for step in _cases.PRODUCTS:
            if contestant.can(case, step):
                outputs = _cases.make_step(contestant, case, step, inputs)()
                found = _cases.errors(case, step, outputs, answer)
                assert max(found.values()) < (1e-12 if case.dtype == "float64" else 3e-6), (contestant, step)
                compared.add((contestant.name, step))
    assert {(_cases.MATH, "second-order step"), (_cases.CHECKPOINTED, "second-order step")} <= compared


def test_operations_are_counted_by_products() -> None:
    assert TINY.operations("double backward") == 15 * 2 * 2 * 4 * 24 * 24 * 8
    assert _cases.Case("", 2, 4, 24, 8, causal=True).operations("vjp") == 5 * 2 * 4 * 24 * 24 * 8


def test_cases_that_the_targets_are_stated_for_are_there() -> None:
    shapes = {(case.shape, case.dtype) for case in _cases.CASES}
    assert {
        ("B1 H8 N2048 d64", "float32"),
        ("B32 H8 N64 d32", "float32"),
        ("B1 H8 N2048 d64", "bfloat16"),
    } <= shapes
    assert [case.length for case in _cases.MEMORY_CASES] == [4096, 8192, 16384]


# ---- bench: rows


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    memory = _cases.Case("memory", 1, 2, 512, 32, steps=("second-order step",))
    found = bench.measure([TINY], [memory], seconds=0.01, least=2, progress=False)
    return json.loads(json.dumps(found))  # as it comes back from the file


def test_rows_hold_timing_rate_and_errors(results: dict[str, Any]) -> None:
    row = next(
        r for r in results["rows"] if r["contestant"] == _cases.MATH and r["step"] == "double backward"
    )
    assert row["wrong"] is None
    assert row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
    assert row["gflops"] == pytest.approx(row["operations"] / row["median"] * 1e-9)
    assert set(row["errors"]) == {"dqt", "dkt", "dvt", "ot"}
    assert results["machine"]["versions"]["torch"] == torch.__version__


def test_memory_rows_come_from_fresh_processes(results: dict[str, Any]) -> None:
    rows = {row["contestant"]: row for row in results["memory"]}
    math = rows[_cases.MATH]
    assert math["wrong"] is None
    assert math["qkv_bytes"] == 3 * 2 * 512 * 32 * 4
    assert math["bytes"] > 2 * 512 * 512 * 4  # at least one matrix of scores
    if "metattn cpu" in rows:
        assert rows["metattn cpu"]["bytes"] < math["bytes"]


def test_wrong_numbers_disqualify(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = metattn.attention
    monkeypatch.setattr(metattn, "attention", lambda *args, **options: attention(*args, **options) * 1.001)
    case = _cases.Case("tiny", 1, 1, 8, 4, steps=("forward",))
    found = bench.measure([case], [], seconds=0.0, least=1, progress=False)
    ours = [row for row in found["rows"] if row["contestant"].startswith("metattn")]
    assert all("o is off by 1.0e-03, allowed" in row["wrong"] for row in ours)
    assert not any("median" in row for row in ours)
    math = next(row for row in found["rows"] if row["contestant"] == _cases.MATH)
    assert math["wrong"] is None
    assert "median" in math
    assert "| wrong |" in _report.markdown(found)


def test_nan_is_wrong() -> None:
    assert bench.complaint({"o": float("nan")}, {None: 1.0}) == "o is off by nan, allowed 1.0e+00"
    assert bench.complaint({"o": 1e-7}, {None: 5e-6}) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is on the address space")
def test_what_does_not_fit_is_found_by_trying(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import sys; from metattn.cli import _peak; _peak.available_memory = lambda: 64 * 2**20; _peak.main()"
    )
    case = _cases.Case("memory", 1, 2, 4096, 16, steps=("second-order step",))
    request = {
        "case": case.asdict(),
        "contestant": _cases.MATH,
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


# ---- bench: what it writes


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

    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{_report.BLOCK[0]}\nold\n{_report.BLOCK[1]}\nbelow\n")
    again = ["bench", "--render", str(tmp_path / "first/bench.json"), "--out", str(tmp_path / "second")]
    assert main([*again, "--readme", str(readme)]) == 0
    assert (tmp_path / "second/bench.md").read_text() == (tmp_path / "first/bench.md").read_text()
    assert (tmp_path / "second/bench.png").stat().st_size > 5000
    text = readme.read_text()
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert "(second/bench.png)" in text
    assert main([*again, "--readme", str(readme)]) == 0
    assert readme.read_text() == text


def test_readme_without_the_block_is_refused(results: dict[str, Any], tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    with pytest.raises(ValueError, match="expected the marks"):
        _report.rewrite_block(readme, results, tmp_path)


def test_total_time_is_said_beforehand(capsys: pytest.CaptureFixture[str]) -> None:
    with _report.progress(95.0, shown=True) as advance:
        assert "about 2 minutes" in capsys.readouterr().out
        advance(95.0, "working")
    assert _report.duration(30.2) == "30 seconds"


def test_expected_time_is_of_the_right_size() -> None:
    case = _cases.Case("small", 2, 4, 256, 32)
    found = _cases.contestants()
    expected = bench.expected_seconds(case, found, bench.matrix_product_rate(), 0.01, 2)
    start = time.perf_counter()
    bench.timed_rows(case, found, 0.01, 2, lambda part, doing: None)
    assert 0.05 < expected / (time.perf_counter() - start) < 20
