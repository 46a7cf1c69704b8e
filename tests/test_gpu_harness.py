"""What `make gpu` runs on a GPU, on small cases on the CPU: its numbers, its report, its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import metattn
from benchmarks import gpu

CASES = (
    gpu.Case("plain", 2, 4, 9, 8, dtype="float32"),
    gpu.Case("grouped", 1, 4, 17, 8, kv_heads=2, dtype="float32", causal="top-left", published=1.5),
    gpu.Case("window", 1, 2, 9, 8, m=20, dtype="float32", causal="bottom-right", window=(5, -1)),
    gpu.Case("bias", 2, 2, 9, 8, dtype="float32", bias=True),
)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    monkeypatch.setattr(gpu, "CASES", CASES)
    monkeypatch.setattr(gpu, "MEMORY_CASES", (gpu.Case("memory", 1, 1, 64, 8, dtype="float32"),))
    monkeypatch.setattr(
        metattn, "available_backends", lambda: {"cpu": None, "cuda": "absent", "triton": "absent"}
    )

    def call(*more: str) -> tuple[int, dict[str, object], str]:
        arguments = [
            "--device",
            "cpu",
            "--stages",
            "benchmark",
            "--seconds",
            "0.01",
            "--out",
            str(tmp_path),
            *more,
        ]
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        code = gpu.main()
        return (
            code,
            json.loads((tmp_path / "cpu" / "gpu.json").read_text()),
            (tmp_path / "cpu" / "gpu.md").read_text(),
        )

    return call


def test_measures_and_reports(run) -> None:  # type: ignore[no-untyped-def]
    code, results, report = run()
    assert code == 0
    ours = [row for row in results["rows"] if row["contestant"] == "metattn cpu"]
    assert [row["case"]["name"] for row in ours] == [case.name for case in CASES for _ in gpu.STEPS]
    for row in ours:
        assert max(row["errors"].values()) < 5e-6
        assert row["median"] > 0
        assert row["tflops"] > 0
    math = [row for row in results["rows"] if row["contestant"] == "torch math"]
    assert all("median" in row for row in math)
    assert "| grouped | second-order step |" in report
    assert "| 1.5 |" in report
    assert results["memory"][0]["case"]["name"] == "memory"


def test_wrong_numbers_are_not_timed(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    right = gpu.ours
    monkeypatch.setattr(gpu, "ours", lambda *arguments: right(*arguments) * 1.01)
    code, results, report = run("--cases", "plain")
    assert code == 1
    ours = [row for row in results["rows"] if row["contestant"] == "metattn cpu"]
    assert all("wrong" in row and "median" not in row for row in ours)
    assert "wrong" in report


def test_out_of_time_is_said(run) -> None:  # type: ignore[no-untyped-def]
    _, results, report = run("--minutes", "0.1")
    assert results["not_measured"] == [*(case.name for case in CASES), "memory"]
    assert "Not measured, for want of time: plain, grouped" in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 2
    assert "nothing was measured" in capsys.readouterr().err


def test_attended_pairs() -> None:
    for case in CASES:
        expected = case.n * case.keys
        if case.causal or case.window:
            expected = int(gpu.position_mask(case, torch.device("cpu")).sum())
        assert case.pairs() == expected
