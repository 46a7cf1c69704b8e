"""metattn.tune in Triton's interpreter, where warps, stages and clocks mean nothing: timers are made up."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import metattn
from metattn import backends
from metattn.backends import triton
from metattn.backends.triton import tuned
from metattn.backends.triton.plans import Launch
from metattn.measure import Timing

if backends.unavailable_reason("triton") is not None:
    pytest.skip(f"backend triton: {backends.unavailable_reason('triton')}", allow_module_level=True)


from metattn.kernels.configs import Config
from triton.runtime.errors import OutOfResources
from tuning_cases import (
    HERE,
    QUICK,
    SHIPPED,
    call,
    few,
    few_rows_win,
    fewer_rows,
    file,
    gpu,
    interpreter,
    launched,
    timer,
)

from metattn import tuning
from metattn.kernels import configs

ROOT = Path(__file__).resolve().parents[1]


def spoil(monkeypatch: pytest.MonkeyPatch, how: Callable[[Any, int], bool]) -> None:
    """how(call, rows) may raise, and tells whether a kernel shall be launched at all."""
    start = triton.run

    def run(launch: Launch, of: Any, *rest: Any) -> None:
        if how(of, launch.constants["ROWS"]):
            start(launch, of, *rest)

    monkeypatch.setattr(triton, "run", run)


def trial_of(report: tuning.Report, config: Config) -> tuning.Trial:
    return next(trial for trial in report.searches[0].trials if trial.config == config)


# ---- the search


def test_it_times_what_the_interpreter_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SECONDS", 0.0)
    monkeypatch.setattr(tuning, "ROUNDS", 2)
    report = metattn.tune(**{**QUICK, "candidates": 1}, save=False)
    (search,) = report.searches
    (trial,) = search.trials
    assert (search.kernel, search.shipped, report.path) == ("forward_rows", SHIPPED, None)
    assert trial.own is not None
    assert trial.shipped is not None
    assert len(trial.own.samples) == len(trial.shipped.samples) == 2
    assert min(trial.own.samples + trial.shipped.samples) > 0.0


def test_a_search_on_a_gpu(gpu: None) -> None:
    report = metattn.tune(features=(64,), maps=("forward", "jvp"), candidates=2, length=512, save=False)
    assert [search.kernel for search in report.searches] == ["forward_rows", "jvp_rows"]
    timed = [trial.shipped for search in report.searches for trial in search.trials if trial.shipped]
    assert timed
    assert all(1e-6 < timing.median < 1.0 for timing in timed)


def test_a_gpus_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("record")

        def synchronize(self) -> None:
            happened.append("synchronize")

        def elapsed_time(self, end: Event) -> float:
            return 2.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert tuning._once_on_gpu(lambda: happened.append("call")) == 2e-3
    assert happened == ["call", "record", "call", "record", "synchronize"]


def test_every_kernel_of_every_map_is_found() -> None:
    steps = tuning.Workload(8, torch.float32, 256, causal=True).record(tuning.MAPS)
    of_map = {name: {step.kernel for step in steps if step.map == name} for name in tuning.MAPS}
    assert of_map["forward"] == {"forward_rows"}
    assert of_map["vjp"] == {"vjp_rows", "vjp_keys"}
    assert of_map["jvp"] == {"jvp_rows"}
    assert of_map["vjp_jvp"] >= {"vjp_jvp_rows", "vjp_jvp_keys"}
    # the sums for a bias that is broadcast have no map of their own
    assert {step.kernel for step in steps} == set(configs.TABLE["interpreter"]) - {"bias_sums"}
    assert all(step.outputs for step in steps)


def test_the_winner_is_kept_and_used(
    monkeypatch: pytest.MonkeyPatch, file: Path, launched: list[tuple[str, Config]]
) -> None:
    monkeypatch.setattr(tuning, "timed", timer(fewer_rows))
    with pytest.warns(RuntimeWarning, match="there is no file"):
        expected = call()
    assert launched[-1] == ("forward_rows", SHIPPED)
    report = metattn.tune(**{**QUICK, "candidates": 5})
    best = Config(32, 64, 1, 1)
    assert report.path == file
    assert report.searches[0].winner == trial_of(report, best)
    held = json.loads(file.read_text())
    (winner,) = held["winners"]
    assert (held["schema"], held["gpu"], held["architecture"]) == (1, "interpreter", "interpreter")
    assert held.keys() >= {"triton", "metattn", "date"}
    assert (winner["kernel"], winner["width"], winner["itemsize"]) == ("forward_rows", 32, 4)
    assert (Config(**winner["config"]), Config(**winner["shipped"])) == (best, SHIPPED)
    assert (winner["median"], winner["shipped_median"]) == (0.5, 1.0)
    torch.testing.assert_close(call(), expected)
    assert launched[-1] == ("forward_rows", best)
    call(length=20)
    assert launched[-1] == ("forward_rows", Config(32, 32, 1, 1))  # a tile still shrinks to what is there
    file.unlink()
    tuned.table.cache_clear()
    with pytest.warns(RuntimeWarning, match="there is no file"):
        call()
    assert launched[-1] == ("forward_rows", SHIPPED)


def test_only_its_slot_is_changed(few_rows_win: None, launched: list[tuple[str, Config]]) -> None:
    metattn.tune(**QUICK)
    q = torch.ones(1, 1, 70, 40)  # another width
    metattn.attention(q, q, q, backend="triton")
    assert launched[-1] == ("forward_rows", SHIPPED)
    q = torch.ones(1, 1, 70, 8, dtype=torch.bfloat16)
    metattn.attention(q, q, q, backend="triton")
    assert launched[-1] == ("forward_rows", SHIPPED)


def test_a_second_derivative_with_tuned_tiles(
    monkeypatch: pytest.MonkeyPatch, few_rows_win: None, launched: list[tuple[str, Config]]
) -> None:
    """All kernels of the four maps are searched, and what they give together is still right."""
    best = Config(32, 32, 1, 1)
    monkeypatch.setattr(tuning, "neighbours", lambda shipped, most: [best])
    report = metattn.tune(**{**QUICK, "maps": tuning.MAPS})
    assert [search.kernel for search in report.searches if search.winner is None] == []
    launched.clear()
    x = torch.randn(1, 1, 70, 8)

    def second(backend: str) -> torch.Tensor:
        q = x.clone().requires_grad_()
        o = metattn.attention(q, q, q, causal=True, backend=backend)
        (g,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        return torch.autograd.grad(g.square().sum(), q)[0]

    torch.testing.assert_close(second("triton"), second("reference"), rtol=1e-3, atol=1e-4)
    assert {config for _, config in launched} == {best}


def test_nothing_wins_nothing_is_saved(few: None, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr(tuning, "timed", timer(lambda config: 1.0))
    report = metattn.tune(**QUICK)
    assert report.path is None
    assert not file.parent.exists()
    assert {trial.objection for trial in report.searches[0].trials} == {"not faster"}
    assert "0 of 1 shipped tiles beaten" in str(report)
    assert str(report).endswith("nothing saved")


def test_of_several_the_fastest_wins(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "timed", timer(lambda config: 1.0 + config.rows / 16))
    report = metattn.tune(**QUICK, save=False)
    assert report.searches[0].winner == trial_of(report, Config(128, 64, 1, 1))
    assert trial_of(report, Config(32, 64, 1, 1)).objection == "another is faster"


@pytest.mark.parametrize(
    ("own", "wins"),
    [
        ((0.90, 0.91, 0.92), True),
        ((0.98, 0.98, 0.98), False),  # less than 3 %
        ((0.50, 0.90, 1.30), False),  # no more than its spread
        ((1.10, 1.10, 1.10), False),
    ],
)
def test_a_winner_saves_more_than_the_spread(own: tuple[float, ...], wins: bool) -> None:
    assert tuning.faster(Timing(own), Timing((0.99, 1.0, 1.01))) == wins


def test_neighbours() -> None:
    shipped = Config(128, 16, 4, 2)
    found = tuning.neighbours(shipped, 1000)
    assert found == tuning.neighbours(shipped, 1000)
    assert len(found) == len(set(found)) == 3 * 2 * 2 * 4 - 1
    assert shipped not in found
    assert all(configs.is_tile(config) for config in found)
    assert {config.rows for config in found} == {64, 128, 256}
    assert {config.keys for config in found} == {16, 32}
    first = tuning.neighbours(shipped, 7)
    assert first == found[:7]
    assert all(sum(a != b for a, b in zip(config, shipped, strict=True)) == 1 for config in first)


def test_a_workload_is_freed_when_it_is_done_with() -> None:
    gc.disable()
    try:
        steps = tuning.Workload(8, torch.float32, 256, causal=True).record(tuning.MAPS)
        outputs = [weakref.ref(output) for step in steps for output in step.outputs.values()]
        del steps
        assert not any(reference() is not None for reference in outputs)
    finally:
        gc.enable()


# ---- candidates that must not win


def test_wrong_results_never_win(monkeypatch: pytest.MonkeyPatch, few_rows_win: None, file: Path) -> None:
    start = triton.run

    def run(launch: Launch, of: Any, given: Any, wanted: Any, *rest: Any) -> None:
        start(launch, of, given, wanted, *rest)
        if launch.constants["ROWS"] == 32:
            wanted.o.ptr[0, 0, -1] += 0.1  # the last query alone

    monkeypatch.setattr(triton, "run", run)
    report = metattn.tune(**QUICK)
    assert report.searches[0].winner is None
    assert not file.exists()
    assert str(trial_of(report, Config(32, 64, 1, 1)).objection).startswith("wrong: o is off by ")


def test_what_is_not_written_never_wins(monkeypatch: pytest.MonkeyPatch, few_rows_win: None) -> None:
    spoil(monkeypatch, lambda of, rows: rows != 32)
    report = metattn.tune(**QUICK, save=False)
    assert trial_of(report, Config(32, 64, 1, 1)).objection == "wrong: o is off by inf"
    assert report.searches[0].winner is None


def test_what_is_wrong_with_other_options_never_wins(
    monkeypatch: pytest.MonkeyPatch, few_rows_win: None
) -> None:
    spoil(monkeypatch, lambda of, rows: rows != 32 or of.mask is None)
    report = metattn.tune(**QUICK, save=False)
    objection = trial_of(report, Config(32, 64, 1, 1)).objection
    assert objection == "with every option, wrong: o is off by inf"


def test_out_of_resources_is_skipped(few: None, monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    def how(of: Any, rows: int) -> bool:
        if rows == 32:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return True

    spoil(monkeypatch, how)
    monkeypatch.setattr(tuning, "timed", timer(lambda config: 2.0 if config.rows == 128 else 1.0))
    report = metattn.tune(**QUICK)
    failed = trial_of(report, Config(32, 64, 1, 1))
    assert str(failed.objection).startswith(
        "OutOfResources: out of resource: shared memory, Required: 300000"
    )
    assert failed.own is None
    assert "3 of 3, 1 unusable" in str(report)
    assert report.searches[0].winner == trial_of(report, Config(128, 64, 1, 1))
    assert file.exists()


# ---- several searches


def test_searches_add_up(monkeypatch: pytest.MonkeyPatch, few_rows_win: None, file: Path) -> None:
    def kept() -> list[str]:
        return sorted(winner.kernel for winner in tuned.read(file, HERE))

    metattn.tune(**QUICK)
    metattn.tune(**{**QUICK, "maps": ("vjp",)})
    assert kept() == ["forward_rows", "vjp_keys", "vjp_rows"]
    monkeypatch.setattr(tuning, "timed", timer(lambda config: 1.0))
    out_of_time = metattn.tune(**QUICK, seconds=1e-9)
    assert out_of_time.searches[0].trials == ()
    assert "0 of 3" in str(out_of_time)
    assert kept() == ["forward_rows", "vjp_keys", "vjp_rows"]
    metattn.tune(**QUICK)  # it is not faster any more
    assert kept() == ["vjp_keys", "vjp_rows"]


def test_an_interruption_keeps_what_was_found(
    monkeypatch: pytest.MonkeyPatch, few_rows_win: None, file: Path
) -> None:
    def timed(step: tuning.Step, config: Config) -> tuple[Timing, Timing]:
        if step.kernel != "forward_rows":
            raise KeyboardInterrupt
        return timer(fewer_rows)(step, config)

    monkeypatch.setattr(tuning, "timed", timed)
    with pytest.raises(KeyboardInterrupt):
        metattn.tune(**{**QUICK, "maps": ("forward", "vjp")})
    assert [winner.kernel for winner in tuned.read(file, HERE)] == ["forward_rows"]


def test_the_total_is_known_beforehand(monkeypatch: pytest.MonkeyPatch, few_rows_win: None) -> None:
    told: dict[str, int] = {"total": 0, "done": 0}

    class Bar(tuning.contextlib.nullcontext):  # type: ignore[name-defined, misc]
        def __init__(self, total: int, shown: bool) -> None:
            super().__init__(lambda doing, done: told.update(done=told["done"] + done))
            assert shown
            told["total"] = total

    monkeypatch.setattr(tuning, "_bar", Bar)
    metattn.tune(**{**QUICK, "dtypes": (torch.float32, torch.bfloat16), "progress": True}, save=False)
    assert told == {"total": 6, "done": 6}


def test_the_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def show() -> str:
        with tuning._bar(2, True) as advance:
            advance("forward_rows", 2)
        return capsys.readouterr().out

    pytest.importorskip("rich")
    assert "2/2" in show()
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
    assert show() == ""


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"features": 64}, TypeError, "features: expected a sequence of integers from 1 to 256, got 64"),
        ({"features": ()}, ValueError, "features: expected integers from 1 to 256, got none"),
        ({"features": (64.0,)}, TypeError, "features: expected integers from 1 to 256, got 64.0"),
        ({"features": (True,)}, TypeError, "features: expected integers from 1 to 256, got True"),
        ({"features": (257,)}, ValueError, "features: expected integers from 1 to 256, got 257"),
        ({"features": (0,)}, ValueError, "features: expected integers from 1 to 256, got 0"),
        ({"features": (80, 96)}, ValueError, r"features: expected one for each width .*, got \(80, 96\)"),
        ({"dtypes": (torch.float64,)}, ValueError, "dtypes: expected any of .*, got torch.float64"),
        ({"dtypes": ("bfloat16",)}, TypeError, "dtypes: expected torch dtypes, got 'bfloat16'"),
        (
            {"dtypes": torch.float32},
            TypeError,
            "dtypes: expected a sequence of torch dtypes, got torch.float32",
        ),
        ({"dtypes": (torch.bfloat16, torch.float16)}, ValueError, "dtypes: expected one of each size"),
        ({"maps": ("backward",)}, ValueError, "maps: expected any of forward, .*, got 'backward'"),
        ({"maps": "vjp"}, TypeError, "maps: expected a sequence of names of maps, got 'vjp'"),
        ({"length": 255}, ValueError, "length: expected at least 256, got 255"),
        ({"length": 4096.0}, TypeError, "length: expected an integer, got 4096.0"),
        ({"candidates": 0}, ValueError, "candidates: expected at least 1, got 0"),
        ({"seconds": 0}, ValueError, "seconds: expected more than 0, got 0"),
        ({"seconds": math.nan}, ValueError, "seconds: expected more than 0, got nan"),
        ({"seconds": "60"}, TypeError, "seconds: expected a number or None, got '60'"),
        ({"causal": "top-left"}, TypeError, "causal: expected True or False, got 'top-left'"),
        ({"save": None}, TypeError, "save: expected True or False, got None"),
        ({"path": 3}, TypeError, "path: expected a file's path or None, got 3"),
        ({"path": "x.json", "save": False}, ValueError, "path: expected None with save=False, got 'x.json'"),
        ({"path": str(ROOT)}, ValueError, "path: expected a file's path, got the folder "),
        ({"path": f"{ROOT}/setup.py/x"}, ValueError, "path: expected one in a folder that can be written to"),
    ],
    ids=str,
)
def test_refusals(
    arguments: dict[str, Any], error: type[Exception], said: str, launched: list[tuple[str, Config]]
) -> None:
    with pytest.raises(error, match=said):
        metattn.tune(**{**QUICK, **arguments})
    assert launched == []


def test_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._reasons, "triton", "no GPU that torch can use")
    with pytest.raises(NotImplementedError, match=r"backend triton, .*: no GPU that torch can use"):
        metattn.tune()


def test_importing_leaves_triton_and_rich_alone() -> None:
    code = (
        "import sys, metattn; print('tune' in metattn.__all__, "
        "[name for name in ('triton', 'rich', 'metattn.tuning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True []"
