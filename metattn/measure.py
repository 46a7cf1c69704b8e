"""Time, peak memory and the machine they were measured on: what bench, demo and doctor share."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from metattn import __version__, installation


@dataclass(frozen=True)
class Timing:
    """A figure of every round, in their order: seconds of a call, or a ratio of two figures."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) == 1:
            return self.samples[0], self.samples[0]
        lower, _, upper = statistics.quantiles(self.samples, n=4, method="inclusive")
        return lower, upper

    def summary(self) -> dict[str, object]:
        return {"median": self.median, "quartiles": self.quartiles}


def per_round(over: Sequence[float], under: Sequence[float]) -> Timing:
    """The ratio in each round: what slows the machine for a while is in both, and cancels."""
    return Timing(tuple(a / b for a, b in zip(over, under, strict=True)))


def once(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - start
    del result  # freed outside the timed region, and before the next candidate needs the memory
    return seconds


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    least: int = 5,
    most: int = 200,
    warmup: int = 2,
    once: Callable[[Callable[[], object]], float] = once,
    each_round: Callable[[], object] | None = None,
) -> dict[str, Timing]:
    """Times candidates in turn, so that a machine that slows down slows all of them alike.

    Each round calls every candidate once, starting one further each time (whoever follows a memory-hungry
    neighbour finds cold caches). Rounds go on for `seconds`, but at least `least` and at most `most` of them.
    `once` times a call; `each_round` is called before each round, and not timed.
    """
    if least < 1 or most < least:
        raise ValueError(f"least and most: expected 1 <= least <= most, got {least} and {most}")
    names = list(candidates)
    for name in names:
        for _ in range(warmup):
            candidates[name]()
    samples: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for round_index in range(most):
        if round_index >= least and time.perf_counter() > end:
            break
        if each_round is not None:
            each_round()
        for offset in range(len(names)):
            name = names[(round_index + offset) % len(names)]
            samples[name].append(once(candidates[name]))
    return {name: Timing(tuple(times)) for name, times in samples.items()}


SIZE = 2048  # of the matrix product that rates are put beside


class Product:
    """torch's product of two square matrices, timed beside others: call it before each round.

    It is taken again once five times its own time has passed, so that a sixth of the time goes to it at most.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.samples: list[float] = []
        self.rates: list[float] = []  # FLOP/s for each round, the latest
        self._left, self._right = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        self._ended = 0.0
        self._left @ self._right  # warm

    def __call__(self) -> None:
        if not self.samples or time.perf_counter() - self._ended >= 5 * self.samples[-1]:
            self.samples.append(once(lambda: self._left @ self._right))
            self._ended = time.perf_counter()
        self.rates.append(2 * SIZE**3 / self.samples[-1])


def _status_bytes(field: str) -> int | None:
    """A size from /proc/self/status, None where the system has no such file."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return None


def peak_memory(step: Callable[[], object]) -> int | None:
    """Bytes by which `step` raises this process's high-water mark of resident memory; None where untold.

    Linux only. To be called in a fresh process after a small warm-up of the same step: memory that an
    earlier, larger call left in the allocator would be used again unseen.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
    try:
        Path("/proc/self/clear_refs").write_text(
            "5"
        )  # the high-water mark starts again from what is resident now
    except OSError:
        return None
    before = _status_bytes("VmHWM")
    result = step()
    after = _status_bytes("VmHWM")
    del result
    if before is None or after is None:
        return None
    return after - before


class ChildError(RuntimeError):
    """A measuring process failed; the message is the end of what it wrote."""


def in_fresh_process(module: str, request: Mapping[str, object]) -> dict[str, object]:
    """Runs `python -m module` with `request` as JSON on its input; returns the JSON of its last line."""
    environment = dict(os.environ)
    # a plain checkout is importable from its folder alone
    source = str(Path(__file__).resolve().parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [source, environment.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", module],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        tail = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise ChildError(f"{module} ended with {done.returncode}: {tail or 'no output'}")
    answer = json.loads(lines[-1])
    assert isinstance(answer, dict)
    return answer


def available_memory() -> int | None:
    """Bytes a new process can still use without swapping, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith(("model name", "cpu model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout imported from (marked -dirty with changes), None outside one."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def versions() -> dict[str, str | None]:
    """Versions that a figure depends on; read from their metadata, so that nothing is imported for it."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "numpy", "jax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    installed = installation.distribution()
    checkout = f"{__version__}, uninstalled checkout {commit() or ''}".rstrip()
    return {"metattn": installed.version if installed else checkout, **found}


def machine() -> dict[str, object]:
    """What a measurement is worth nothing without: the machine, its threads, the versions and the commit."""
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        # over the last minute: above the number of threads in use, others were running too
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
        "commit": commit(),
    }


def chunks(length: int, size: int) -> Iterator[slice]:
    """The slices of at most `size` that cover range(length)."""
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
