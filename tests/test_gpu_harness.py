"""What `make gpu` runs on a GPU, on small cases on the CPU: its numbers, its report, its refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import metattn
from benchmarks import gpu, gpu_cases

CASES = (
    gpu_cases.Case("plain", 2, 4, 9, 8, dtype="float32"),
    gpu_cases.Case("grouped", 1, 4, 17, 8, kv_heads=2, dtype="float32", causal="top-left", published=1.5),
    gpu_cases.Case("window", 1, 2, 9, 8, m=20, dtype="float32", causal="bottom-right", window=(5, -1)),
    gpu_cases.Case("bias", 2, 2, 9, 8, dtype="float32", bias=True),
)


Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setattr(gpu_cases, "CASES", CASES)
    monkeypatch.setattr(gpu_cases, "MEMORY_CASES", (gpu_cases.Case("memory", 1, 1, 64, 8, dtype="float32"),))
    monkeypatch.setattr(
        metattn, "available_backends", lambda: {"cpu": None, "cuda": "absent", "triton": "absent"}
    )

    def call(*more: str) -> tuple[int, dict[str, Any], str]:
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


def test_measures_and_reports(run: Run) -> None:
    code, results, report = run()
    assert code == 0
    ours = [row for row in results["rows"] if row["contestant"] == "metattn cpu"]
    assert [row["case"]["name"] for row in ours] == [case.name for case in CASES for _ in gpu_cases.STEPS]
    for row in ours:
        assert max(row["errors"].values()) < 5e-6
        assert row["median"] > 0
        assert row["tflops"] > 0
    math = [row for row in results["rows"] if row["contestant"] == "torch math"]
    assert all("median" in row for row in math)
    assert "| grouped | second-order step |" in report
    assert "| 1.5 |" in report
    assert results["memory"][0]["case"]["name"] == "memory"


def test_wrong_numbers_are_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_cases.ours
    monkeypatch.setattr(gpu_cases, "ours", lambda *arguments: right(*arguments) * 1.01)
    code, results, report = run("--cases", "plain")
    assert code == 1
    ours = [row for row in results["rows"] if row["contestant"] == "metattn cpu"]
    assert all("wrong" in row and "median" not in row for row in ours)
    assert "wrong" in report


def test_out_of_time_is_said(run: Run) -> None:
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
            expected = int(gpu_cases.position_mask(case, torch.device("cpu")).sum())
        assert case.pairs() == expected
