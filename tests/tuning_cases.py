"""What tests of tuning share: a file of their own, made-up clocks and few candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from metattn.kernels.configs import Config

import metattn
from metattn import tuning
from metattn.backends import triton
from metattn.backends.triton import devices, tuned
from metattn.backends.triton.plans import Launch
from metattn.measure import Timing

HERE = tuned.Gpu("interpreter", "interpreter")
SHIPPED = Config(64, 64, 1, 1)
QUICK: dict[str, Any] = dict(
    features=(8,), dtypes=(torch.float32,), maps=("forward",), length=256, candidates=3, progress=False
)
CANDIDATES = [Config(64, 64, 8, 1), Config(32, 64, 1, 1), Config(128, 64, 1, 1)]
Timer = Callable[[tuning.Step, Config], tuple[Timing, Timing]]


@pytest.fixture
def gpu() -> None:
    if devices.interpreted():
        pytest.skip("no GPU")


@pytest.fixture(autouse=True)
def interpreter(request: pytest.FixtureRequest) -> None:
    if not devices.interpreted() and "gpu" not in request.fixturenames:
        pytest.skip("it goes by the interpreter's tiles")


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this test's tiles are kept."""
    place = tmp_path / "kept" / "tuned.json"
    monkeypatch.setenv("METATTN_TUNED", str(place))
    tuned.table.cache_clear()
    yield place
    tuned.table.cache_clear()


def timer(speed: Callable[[Config], float]) -> Timer:
    """A clock for which a configuration is so many times as fast as the shipped one."""

    def timed(step: tuning.Step, config: Config) -> tuple[Timing, Timing]:
        return Timing((1.0, 1.0, 1.0)), Timing((1.0 / speed(config),) * 3)

    return timed


def fewer_rows(config: Config) -> float:
    return 2.0 if config.rows == 32 else 1.0


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "neighbours", lambda shipped, most: CANDIDATES[:most])


@pytest.fixture
def few_rows_win(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "timed", timer(fewer_rows))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Config]]:
    """Kernels and configurations in the order in which they are launched."""
    found: list[tuple[str, Config]] = []
    start = triton.run

    def run(launch: Launch, *arguments: Any) -> None:
        tile = [launch.constants.get(name) for name in ("ROWS", "KEYS", "num_warps", "num_stages")]
        found.append((launch.kernel.__name__, Config(*tile)))
        start(launch, *arguments)

    monkeypatch.setattr(triton, "run", run)
    return found


def call(length: int = 70) -> torch.Tensor:
    q = torch.ones(1, 1, length, 8)
    o: torch.Tensor = metattn.attention(q, q, torch.full_like(q, 3.0), backend="triton")
    return o
