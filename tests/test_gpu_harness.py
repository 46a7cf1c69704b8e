"""What `make gpu` runs on a GPU, on small cases on the CPU: its numbers, its report, its refusals."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

import metattn
from benchmarks.gpu import __main__ as gpu_main
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import peers as gpu_peers
from benchmarks.gpu import report as gpu_report
from benchmarks.gpu import run as gpu_run
from benchmarks.gpu.cases import FLEX, JAX, STEPS
from metattn.bench import answers, peers
from metattn.bench.cases import WHOLE, Case

CPU = torch.device("cpu")
PACKED = gpu_cases.packed("packed", 5, 2, 20, 3, 8, "float32")
CASES = (
    Case("plain", 2, 4, 9, 8, dtype="float32"),
    Case("grouped", 1, 4, 17, 8, kv_heads=2, dtype="float32", causal="top-left", published=1.5),
    Case(
        "window", 1, 2, 9, 16, m=20, dtype="float32", causal="bottom-right", window=(5, -1),
        compiled=(FLEX, JAX),
    ),
    Case("bias", 2, 2, 9, 8, dtype="float32", bias="own"),
    PACKED,
    Case("memory", 1, 1, 64, 8, dtype="float32", steps=(WHOLE,), memory=True),
)  # fmt: skip
TIMED = CASES[:-1]
Run = Callable[..., tuple[int, dict[str, Any], str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    torch.set_num_threads(1)  # these are too small to share
    monkeypatch.setattr(gpu_cases, "CASES", CASES)
    monkeypatch.setattr(gpu_cases, "SMOKE_CASES", (PACKED,))
    monkeypatch.setattr(gpu_peers, "compiled_flex", lambda: flex_attention)  # compiling takes ten seconds
    monkeypatch.setattr(
        metattn, "available_backends", lambda: {"cpu": None, "cuda": "absent", "triton": "absent"}
    )

    def call(*more: str, folder: str = "cpu") -> tuple[int, dict[str, Any], str]:
        stage = [] if "--smoke" in more else ["--stages", "benchmark", "--seconds", "0.01"]
        monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--out", str(tmp_path), *stage, *more])
        code = gpu_main.main()
        written = tmp_path / folder
        return code, json.loads((written / "gpu.json").read_text()), (written / "gpu.md").read_text()

    return call


def rows_of(results: dict[str, Any], contestant: str) -> list[dict[str, Any]]:
    return [row for row in results["rows"] if row["contestant"] == contestant]


def names(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(row["case"]["name"], row["step"]) for row in rows]


# Whole runs.


def test_measures_and_reports(run: Run) -> None:
    code, results, report = run()
    assert code == 0
    ours = rows_of(results, "metattn cpu")
    assert names(ours) == [(case.name, step) for case in TIMED for step in STEPS]
    math = rows_of(results, "torch math")
    assert names(math) == [(case.name, step) for case in TIMED for step in STEPS if step != "vjp_jvp"]
    checkpointed = rows_of(results, "torch checkpointed")
    assert names(checkpointed) == [(case.name, WHOLE) for case in TIMED if not case.lengths]
    flex = [row for row in rows_of(results, FLEX) if row["step"] == "forward"]
    assert names(flex) == [("window", "forward")]
    for row in (*ours, *math, *checkpointed, *flex):
        assert max(row["errors"].values()) < 5e-6, names([row])
        assert len(row["samples"]) >= 7, names([row])
        assert row["median"] > 0
        assert row["tflops"] > 0
    assert "does not support backward on CPU" in rows_of(results, FLEX)[1]["cannot"]
    assert {row["case"]["name"] for row in results["memory"]} == {"memory"}
    assert "| grouped | second-order step |" in report
    assert "| 1.5 ms |" in report
    assert "| hvp 512×512: below 12 ms | not measured | – |" in report
    assert results["versions"]["CUDA"] == torch.version.cuda


def test_every_output_is_checked(run: Run) -> None:
    _, results, _ = run("--cases", "bias")
    by_step = {row["step"]: set(row["errors"]) for row in rows_of(results, "metattn cpu")}
    first = {"dq", "dk", "dv", "dbias"}
    second = {f"{name}t" for name in first}
    assert by_step == {
        "forward": {"o"},
        "vjp": first,
        "jvp": {"o", "ot"},
        "vjp_jvp": second,
        "double backward": second | {"ot"},
        WHOLE: {"o", "ot"} | first | second,
    }


def test_jax(run: Run) -> None:
    _, results, _ = run("--cases", "window")
    rows = rows_of(results, JAX)
    assert [row["step"] for row in rows] == ["forward", "vjp", "jvp", WHOLE]
    if importlib.util.find_spec("jax") is None:
        assert {row["cannot"] for row in rows} == {"not installed"}
        pytest.skip("JAX is not installed")
    for row in rows:
        assert max(row["errors"].values()) < 5e-6
        assert row["median"] > 0


def test_wrong_numbers_are_not_timed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    right, raw = peers.our_function, peers.raw_vjp_jvp
    monkeypatch.setattr(peers, "our_function", lambda *arguments: right(*arguments) * 1.01)
    monkeypatch.setattr(peers, "raw_vjp_jvp", lambda *a: lambda: [t * 1.01 for t in raw(*a)()])
    code, results, report = run("--cases", "plain")
    assert code == 1
    ours = rows_of(results, "metattn cpu")
    assert [row["step"] for row in ours] == list(STEPS)
    assert all("wrong" in row and "median" not in row for row in ours)
    assert "| plain | wrong |" in report


def test_packed_sequences_do_not_see_each_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def one_sequence(case: Case, backend: str, *qkv: torch.Tensor) -> torch.Tensor:
        o = metattn.attention(*(t.transpose(0, 1)[None] for t in qkv), causal=True, backend=backend)
        assert isinstance(o, torch.Tensor)
        return o[0].transpose(0, 1)

    monkeypatch.setattr(peers, "our_function", one_sequence)
    code, results, _ = run("--cases", "packed")
    assert code == 1
    ours = [row for row in rows_of(results, "metattn cpu") if row["step"] != "vjp_jvp"]
    assert all("wrong" in row for row in ours)
    assert all("median" in row for row in rows_of(results, "torch math"))


def test_too_large_is_refused_untried(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(*arguments: Any) -> None:
        raise AssertionError("it was tried")

    monkeypatch.setattr(gpu_peers, "device_memory", lambda device: 3 * 2000.0)
    for module in (peers, gpu_peers):
        monkeypatch.setattr(module, "torch_path", tried)
    code, results, report = run("--cases", "window", "packed", "memory")
    assert code == 0
    refused = [row for name in ("torch math", "torch checkpointed") for row in rows_of(results, name)]
    assert refused
    assert {row["cannot"] for row in refused} == {"would need 0 GiB"}
    assert "would need 0 GiB" in report
    assert all("median" in row for row in rows_of(results, "metattn cpu"))
    memory = {row["contestant"]: row.get("cannot") for row in results["memory"]}
    assert memory["torch math"] == "would need 0 GiB"
    assert memory["metattn cpu"] is None


def test_missing_peers_are_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "installed", lambda module: False)
    code, results, report = run("--cases", "plain", "window", "packed")
    assert code == 0
    assert {row["cannot"] for row in rows_of(results, "jvp_flash_attention")} == {"not installed"}
    assert {row["cannot"] for row in rows_of(results, JAX)} == {"not installed"}
    packed = [row for row in rows_of(results, "torch flash") if row["case"]["name"] == "packed"]
    assert {row["cannot"] for row in packed} == {"this torch has no torch.nn.attention.varlen"}
    assert "* jvp_flash_attention: not installed (plain jvp" in report


def test_out_of_time_is_said(run: Run) -> None:
    _, results, report = run("--minutes", "0.1")
    assert results["not_measured"] == [case.name for case in CASES]
    assert "Not measured, for want of time: plain, grouped" in report


def test_out_of_time_within_a_case() -> None:
    rows: list[dict[str, Any]] = []
    assert gpu_measure.measure_case(CASES[0], CPU, 0.01, time.time() - 1, rows) == list(STEPS)
    assert rows == []


def test_smoke(run: Run) -> None:
    code, results, _ = run("--smoke", folder="cpu/smoke")
    assert code == 0
    assert names(rows_of(results, "metattn cpu")) == [("packed", step) for step in STEPS]


def test_unknown_case(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--cases", "plane"])
    assert gpu_main.main() == 2
    assert "there is no plane" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu_main.main() == 2
    assert "nothing was measured" in capsys.readouterr().err


# Cases and the answer.


def test_cases_are_those_of_the_docs() -> None:
    docs = (Path(gpu_run.ROOT) / "docs" / "gpu.md").read_text()
    every = [case.name.split()[0] for case in gpu_cases.CASES]
    assert [name for name in every if f"| {name}" not in docs] == []
    assert len({case.name for case in (*gpu_cases.CASES, *gpu_cases.SMOKE_CASES)}) == len(gpu_cases.CASES) + 3
    smoke = [case for case in gpu_cases.SMOKE_CASES if not case.memory]
    assert all(case.steps == STEPS for case in smoke)
    packed = next(case for case in gpu_cases.CASES if case.lengths)
    assert (len(packed.lengths), min(packed.lengths) >= 32, packed.n <= 2048) == (64, True, True)


def test_attended_pairs() -> None:
    for case in CASES:
        if case.lengths:
            assert case.pairs() == sum(n * (n + 1) // 2 for n in case.lengths)
            continue
        mask = case.mask(slice(0, case.n), slice(0, case.keys))
        assert case.pairs() == case.batch * (case.n * case.keys if mask is None else int(mask.sum()))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answer_by_pieces(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows at a time, with the keys that they attend to alone, give what all at once give."""
    case = dataclasses.replace(case, dtype="float64")
    inputs = answers.make_inputs(case)
    whole = gpu_cases.answers(case, inputs, answers.written_out, torch.float64)
    monkeypatch.setitem(answers.SCORES_AT_ONCE, "cpu", 3 * case.keys)
    pieces = gpu_cases.answers(case, inputs, answers.written_out, torch.float64)
    for a, b in zip(whole, pieces, strict=True):
        assert a.keys() == b.keys()
        for name, t in a.items():
            torch.testing.assert_close(b[name], t, rtol=1e-12, atol=1e-14)


# What a row and a report are made of.


def results_with(*rows: tuple[str, str, str, float]) -> dict[str, Any]:
    """Results of (case, step, contestant, ms)."""
    every = {case.name: dataclasses.asdict(case) for case in gpu_cases.CASES}
    return {
        "gpu": "a GPU",
        "machine": {"versions": {"torch": "1", "triton": "2"}, "commit": "abc"},
        "versions": {"CUDA": "13"},
        "state": {"before": [{"clocks.sm": "1980 MHz"}]},
        "started": "now",
        "stages": {},
        "not_measured": [],
        "failed": [],
        "memory": [],
        "rows": [
            {
                "case": every[case], "step": step, "contestant": name, "tflops": 100.0,
                "median": ms * 1e-3, "samples": [ms * 1e-3], "quartiles": [ms * 1e-3, ms * 1e-3],
            }
            for case, step, name, ms in rows
        ],
    }  # fmt: skip


def verdicts(results: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {what: (verdict, said) for what, verdict, said in (g.cells() for g in gpu_report.goals(results))}


OURS = "metattn triton"


def test_goals() -> None:
    found = verdicts(
        results_with(
            ("hvp 512×512", WHOLE, OURS, 15.0),
            ("hvp 64×4096", WHOLE, OURS, 90.0),
            ("hvp 1×512", WHOLE, OURS, 0.4),
            ("hvp 1×512", WHOLE, OURS + ", CUDA graph", 0.14),
            ("few-shot", WHOLE, OURS, 1.0),
            ("few-shot", WHOLE, "torch math", 4.0),
            ("few-shot", "forward", OURS, 1.0),
            ("few-shot", "forward", "torch flash", 1.2),
            ("long d128", "forward", OURS, 1.0),
            ("long d128", "forward", "torch cuDNN", 0.8),
        )
    )
    assert found["hvp 512×512: below 18.3 ms"] == ("reached", "15 ms")
    assert found["hvp 512×512: below 12 ms"] == ("not reached", "15 ms")
    assert found["hvp 64×4096: below 80.2 ms"][0] == "not reached"
    assert found["hvp 256×1024: below 27.2 ms"] == ("not measured", "–")
    assert found["hvp 1×512, CUDA graph: below 0.15 ms"] == ("reached", "0.14 ms")
    few_shot = found["second-order step: torch math / ours ≥ 5 in few-shot"]
    assert few_shot == ("not reached", "4.00, the worst of 1 (few-shot)")
    assert found["forward: torch cuDNN / ours ≥ 0.85 at d 128"][0] == "not reached"
    forward = found["forward: torch flash / ours ≥ 1 everywhere"]  # of which the rest is open
    assert forward[0] == "not all measured"
    assert forward[1].startswith("1.20, the worst of 1 (few-shot); not yet")
    assert found["second-order step: torch math / ours ≥ 10 at N = 4096"] == ("not measured", "–")


def test_goal_with_every_case_measured() -> None:
    long = ("long", "long causal", "long d128", "long causal d128")
    rows = [(case, WHOLE, OURS, 1.0) for case in long]
    rows += [(case, WHOLE, "torch math", 11.0 + i) for i, case in enumerate(long)]
    found = verdicts(results_with(*rows))
    goal = "second-order step: torch math / ours ≥ 10 at N = 4096"
    assert found[goal] == ("reached", "11.00, the worst of 4 (long)")
    broken = results_with(*rows)
    del broken["rows"][0]["median"]
    broken["rows"][0]["wrong"] = "dq is off"
    assert verdicts(broken)[goal] == ("not reached", "ours does not work in long")


@pytest.mark.parametrize(
    ("last", "verdict"), [(410, "reached"), (700, "not reached"), (None, "not measured")]
)
def test_memory_goal(last: int | None, verdict: str) -> None:
    results = results_with()
    for n, mib in ((16384, 100), (32768, 200), (65536, last)):
        case = next(case for case in gpu_cases.CASES if case.name == f"memory {n}")
        row: dict[str, Any] = {"case": dataclasses.asdict(case), "contestant": OURS, "input_bytes": 1}
        results["memory"].append(row if mib is None else row | {"bytes": mib * 2**20})
    assert verdicts(results)["N = 65,536 runs, its memory linear in N"][0] == verdict


def test_summary() -> None:
    results = results_with(
        ("hvp 512×512", WHOLE, OURS, 9.15),
        ("long", "forward", OURS, 1.0),
        ("long", "forward", "torch flash", 1.5),
        ("long", "forward", "torch cuDNN", 1.1),
        ("long", WHOLE, OURS, 1.0),
        ("long", WHOLE, "torch math", 20.0),
        ("long", WHOLE, "torch checkpointed", 9.0),
    )
    results["rows"][1]["predicted_tflops"] = 690.2
    text = gpu_report.summary(results)
    row = next(line for line in text.splitlines() if line.startswith("| long |"))
    assert row.startswith("| long | 1 ms, 100 T, cuDNN 1.10× |")
    assert "| 1 ms, 100 T, math 20.00× |" in row
    assert "| 690 TFLOP/s |" in row
    assert "| 18.3 ms | 2.00× |" in text
    assert "clocks.sm 1980 MHz" in text


def test_predictions(tmp_path: Path) -> None:
    case, path = gpu_cases.CASES[0], tmp_path / "aot.json"
    assert gpu_measure.predicted(case, "sm_90", path) is None
    row = {
        "target": "sm_90",
        "dtype": "bfloat16",
        "features": case.d,
        "kernel": "forward_rows",
        "variant": "plain",
    }
    path.write_text(
        json.dumps({"rows": [row | {"tflops": 383.0}, row | {"target": "sm_80", "tflops": None}]})
    )
    assert gpu_measure.predicted(case, "sm_90", path) == 383.0
    assert gpu_measure.predicted(case, "sm_80", path) is None
    path.write_text("{}")
    assert gpu_measure.predicted(case, "sm_90", path) is None


def test_gpu_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_measure.gpu_state() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'NVIDIA H200, 580.1, 1980 MHz, 1980 MHz, 3201 MHz, 120.1 W, 700 W, 40, 0 %'\n"
    )
    tool.chmod(0o755)
    (state,) = gpu_measure.gpu_state()
    assert (state["driver_version"], state["clocks.sm"], state["power.limit"]) == (
        "580.1",
        "1980 MHz",
        "700 W",
    )
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_measure.gpu_state() == []


# Processes.


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_checks(tmp_path: Path) -> None:
    commands = gpu_main.checks(gpu_main.STAGES, "/bin/compute-sanitizer")
    assert list(commands) == [*gpu_main.TESTS, "memcheck", "racecheck", "initcheck", "synccheck"]
    assert commands["initcheck"][:3] == ["/bin/compute-sanitizer", "--tool", "initcheck"]
    assert list(gpu_main.checks(("sanitizer",), None)) == []
    say = "import os; print('cache', os.environ.get('PYTORCH_NO_CUDA_MEMORY_CACHING')); raise SystemExit({})"
    given = {
        "tests": python(say.format(0)),
        "memcheck": python(say.format(9)),
        "hangs": python("while 1: pass"),
    }
    said = gpu_main.run_checks(given, tmp_path, time.time() + 3)
    assert said["tests"] == "exit 0: cache None"
    assert said["memcheck"] == "exit 9: cache 1"
    assert said["hangs"].startswith("stopped: out of time")


def test_compiling() -> None:
    commands = gpu_main.compiling([f"case {i}" for i in range(6)], "cuda")
    shares = [command[command.index("--cases") + 1 :] for command in commands.values()]
    assert sorted(name for share in shares for name in share) == [f"case {i}" for i in range(6)]
    assert len(gpu_main.compiling(["one"], "cuda")) == 1


def test_compile_runs_each_step_of_ours(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def start(case: Case, backend: str, step: str, inputs: Any) -> Callable[[], None]:
        return lambda: ran.append(f"{case.name} {step}")

    monkeypatch.setattr(gpu_peers, "our_step", start)
    monkeypatch.setattr(
        sys, "argv", ["run", "--compile-only", "--device", "cpu", "--cases", "bias", "packed"]
    )
    assert gpu_run.main() == 0
    assert ran == [f"{name} {step}" for name in ("bias", "packed") for step in STEPS]


def test_a_process_that_dies_is_followed_by_another(tmp_path: Path) -> None:
    """The case in which it died is told, those before it stay, those after it are measured."""
    gpu_run.save(tmp_path, results_with())
    child = (
        "import json, os, sys; path, *names = sys.argv[1:]\n"
        "results = json.load(open(path))\n"
        "for name in names:\n"
        "    results['current'] = name; json.dump(results, open(path, 'w'))\n"
        "    if name == 'b': os.abort()\n"
        "    results['stages'][name] = 'measured'\n"
        "results.pop('current'); json.dump(results, open(path, 'w'))\n"
    )
    path = tmp_path / "gpu.json"
    gpu_run.supervise(
        tmp_path,
        lambda left: [*python(child), str(path), *left],
        ["a", "b", "c"],
        tmp_path / "log",
        time.time() + 60,
    )
    results = gpu_run.load(tmp_path)
    assert results["stages"] == {"a": "measured", "c": "measured"}
    assert results["failed"] == ["b: its process: exit -6; see log"]
    assert results["not_measured"] == []


def test_a_process_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_run, "MARGIN", 1.0)
    results = results_with() | {"current": "a"}
    gpu_run.save(tmp_path, results)
    command = python("while 1: pass")
    gpu_run.supervise(tmp_path, lambda left: command, ["a", "b"], tmp_path / "log", time.time() + 2)
    results = gpu_run.load(tmp_path)
    assert results["failed"] == ["a: its process: stopped: out of time; see log"]
    assert results["not_measured"] == ["b"]


def test_a_lost_gpu_ends_the_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(case: Case, *arguments: Any) -> list[str]:
        raise gpu_measure.DeviceLostError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_run, "measure_case", lost)
    code, results, _ = run("--cases", "plain", "grouped")
    assert code == 1
    assert results["failed"] == ["plain: the GPU was lost: an illegal memory access was encountered"]
    assert results["current"] == "plain"  # by which the next process knows where to go on
