"""metattn.tune: searches tiles, warps and stages for the GPU at hand, and saves what beats the shipped table.

A kernel is searched by itself: what the maps launch is recorded, and replayed with other configurations. A
candidate must give what the shipped configuration gives, be faster by more than the spread of both, and give
the same with every option at once too, where a kernel needs more registers and shared memory.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metattn import backends
from metattn.backends.triton import devices, tuned
from metattn.kernels import configs
from metattn.kernels.configs import Config
from metattn.measure import Timing, interleave
from metattn.tuning_workload import TOLERANCE, Step, Workload

MAPS = ("forward", "vjp", "jvp", "vjp_jvp")
WARPS = (4, 8)
STAGES = tuple(range(1, configs.MOST_STAGES + 1))
GAIN = 0.03  # of the shipped median: what a winner must save at least
SECONDS, ROUNDS = 0.3, 11  # a candidate is timed for so long, and in so many turns at least

Advance = Callable[[str, int], None]


@dataclass(frozen=True)
class Trial:
    """A candidate beside the shipped configuration. objection: why it is not the winner, None: it is."""

    config: Config
    objection: str | None
    shipped: Timing | None = None  # None: it was not timed
    own: Timing | None = None

    @property
    def ratio(self) -> float:
        """Own median / shipped median."""
        return self.own.median / self.shipped.median if self.own and self.shipped else math.inf


@dataclass(frozen=True)
class Search:
    """What was tried for one kernel, head dimension and dtype."""

    kernel: str
    features: int
    dtype: torch.dtype
    shipped: Config
    candidates: int
    trials: tuple[Trial, ...]  # fewer than candidates where time ran out

    @property
    def slot(self) -> tuple[str, int, int]:
        slot: tuple[str, int, int] = configs.slot(self.kernel, self.features, self.dtype.itemsize)
        return slot

    @property
    def winner(self) -> Trial | None:
        return next((trial for trial in self.trials if trial.objection is None), None)


@dataclass(frozen=True)
class Report:
    """What metattn.tune found; str() is a table for people."""

    gpu: tuned.Gpu
    length: int
    causal: bool
    searches: tuple[Search, ...]
    path: Path | None  # where it was saved
    seconds: float  # that it took

    def __str__(self) -> str:
        titles = ("kernel", "features", "dtype", "shipped", "ms", "tuned", "ms", "tried")
        rows = [titles, *map(_row, self.searches)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        won = sum(search.winner is not None for search in self.searches)
        where = "nothing saved" if self.path is None else f"saved to {self.path}"
        calls = f"N = M = {self.length}, {'causal' if self.causal else 'not causal'}"
        first = f"{self.gpu.name}, {self.gpu.architecture}, {calls}"
        last = f"{won} of {len(self.searches)} shipped tiles beaten, in {self.seconds:.0f} s; {where}"
        return "\n".join([first, *lines, last])


def _row(search: Search) -> tuple[str, ...]:
    best = search.winner
    shipped = [trial.shipped.median for trial in search.trials if trial.shipped]
    dtype = str(search.dtype).removeprefix("torch.")
    old = _milliseconds(statistics.median(shipped)) if shipped else "–"
    new = ("stays", "–")
    if best is not None and best.own is not None:
        new = (_short(best.config), _milliseconds(best.own.median))
    tried = f"{len(search.trials)} of {search.candidates}"
    untimed = sum(trial.own is None for trial in search.trials)
    tried += f", {untimed} unusable" if untimed else ""
    return search.kernel, str(search.features), dtype, _short(search.shipped), old, *new, tried


def _short(config: Config) -> str:
    return f"{config.rows}×{config.keys} w{config.warps} s{config.stages}"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def tune(
    *,
    features: Sequence[int] = (64, 128),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    maps: Sequence[str] = MAPS,
    length: int = 4096,
    causal: bool = True,
    candidates: int = 16,
    seconds: float | None = None,
    save: bool = True,
    path: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Report:
    """Searches configurations of the Triton kernels for the current GPU, and saves those that win.

    Arguments:
        features: head dimensions, 1 to 256, one for each width that has tiles: 32, 64, 96, 128 and 256.
        dtypes: torch.bfloat16 or torch.float16, which share their tiles, and torch.float32.
        maps: of "forward", "vjp", "jvp", "vjp_jvp"; the last has all of a double backward but jvp.
        length: queries, and keys, of the calls that are measured; at least 256.
        causal: whether those calls are causal.
        candidates: how many are tried for each kernel, those nearest to the shipped configuration first.
        seconds: after so many no further candidate is begun; None: all are tried.
        save: whether to keep what won, for this process and later ones. Winners of earlier searches stay,
            but for those of kernels that are searched again.
        path: the file; None: $METATTN_TUNED, or else metattn/tuned-<GPU>.json in the user's cache folder.
            Deleting it undoes everything.
        progress: whether to show a bar, if rich is installed.

    Returns a Report. Where nothing wins, nothing is saved. Raises TypeError and ValueError for arguments that
    are wrong, and NotImplementedError where the Triton backend is unavailable, before anything runs; OSError
    if the file cannot be written.
    """
    started = time.monotonic()
    _check_choices(features, dtypes, maps)
    _check_numbers(length, candidates, seconds)
    _check_flags(causal=causal, save=save, progress=progress)
    gpu = _gpu()
    file = _file(gpu, save, path)
    work = [Workload(d, dtype, length, causal) for d in features for dtype in dtypes]
    total = sum(len(neighbours(s.shipped, candidates)) for w in work for s in w.record(maps) if s.map in maps)
    deadline = math.inf if seconds is None else started + seconds
    searches: list[Search] = []
    saved = False
    with _bar(total, progress) as advance:
        for search in (s for w in work for s in _searches(w, maps, candidates, deadline, advance)):
            searches.append(search)
            if file is not None:
                saved |= _save(file, gpu, search, length, causal)  # at once: what follows may be interrupted
    seconds = time.monotonic() - started
    return Report(gpu, length, causal, tuple(searches), file if saved else None, seconds)


# What tune is told.


def _check_choices(features: Sequence[int], dtypes: Sequence[torch.dtype], maps: Sequence[str]) -> None:
    for d in _elements("features", features, int, "integers from 1 to 256"):
        if not 1 <= d <= configs.MOST_FEATURES:
            raise ValueError(f"features: expected integers from 1 to {configs.MOST_FEATURES}, got {d}")
    for dtype in _elements("dtypes", dtypes, torch.dtype, "torch dtypes"):
        if dtype not in TOLERANCE:
            raise ValueError(f"dtypes: expected any of {', '.join(map(str, TOLERANCE))}, got {dtype}")
    for name in _elements("maps", maps, str, "names of maps"):
        if name not in MAPS:
            raise ValueError(f"maps: expected any of {', '.join(MAPS)}, got {name!r}")
    widths = [configs.slot("", d, 2)[1] for d in features]
    if len(set(widths)) < len(widths):
        raise ValueError(f"features: expected one for each width of {configs.WIDTHS}, got {features}")
    sizes = [dtype.itemsize for dtype in dtypes]
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"dtypes: expected one of each size, for they share their tiles, got {dtypes}")


def _elements(name: str, values: object, kind: type, expected: str) -> Sequence[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of {expected}, got {values!r}")
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name}: expected {expected}, got {value!r}")
    if not values:
        raise ValueError(f"{name}: expected {expected}, got none")
    return values


def _check_numbers(length: int, candidates: int, seconds: float | None) -> None:
    for name, value, least in (("length", length, configs.LARGEST), ("candidates", candidates, 1)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}: expected an integer, got {value!r}")
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if seconds is None:
        return
    if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
        raise TypeError(f"seconds: expected a number or None, got {seconds!r}")
    if not seconds > 0:
        raise ValueError(f"seconds: expected more than 0, got {seconds}")


def _check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {value!r}")


def _gpu() -> tuned.Gpu:
    reason = backends.unavailable_reason("triton")
    if reason is None and devices.architecture(devices.device_at_hand()) is None:
        reason = "the GPU's compute capability is below 8.0"
    if reason is not None:
        raise NotImplementedError(
            f"tune: it searches for the backend triton, which cannot run here: {reason}"
        )
    return devices.gpu(devices.device_at_hand())


def _file(gpu: tuned.Gpu, save: bool, path: str | os.PathLike[str] | None) -> Path | None:
    """Where to save; None: nowhere."""
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a file's path or None, got {path!r}")
    if not save:
        if path is not None:
            raise ValueError(f"path: expected None with save=False, got {path!r}")
        return None
    file = tuned.place(gpu) if path is None else Path(path)
    if file is None:
        raise ValueError(f"save: expected False or a path, for {tuned.VARIABLE} is 0, got True")
    if file.is_dir():
        raise ValueError(f"path: expected a file's path, got the folder {file}")
    folder = next(parent for parent in file.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"path: expected one in a folder that can be written to, got {file}")
    return file


# The search.


def neighbours(shipped: Config, most: int) -> list[Config]:
    """Candidates: sides halved or doubled, other warps and stages; those with the fewest changes first, and
    changes of stages last.
    """
    sides = [
        [side, *(x for x in (side // 2, side * 2) if configs.SMALLEST <= x <= configs.LARGEST)]
        for side in (shipped.rows, shipped.keys)
    ]
    numbers = (shipped.warps, *WARPS), (shipped.stages, *STAGES)
    every = dict.fromkeys(Config(*choice) for choice in itertools.product(*sides, *numbers))

    def distance(config: Config) -> tuple[int, bool]:
        changes = sum(new != old for new, old in zip(config, shipped, strict=True))
        return changes, config.stages != shipped.stages

    return sorted((config for config in every if config != shipped), key=distance)[:most]


def _searches(
    work: Workload, maps: Sequence[str], most: int, deadline: float, advance: Advance
) -> Iterator[Search]:
    """A search for each kernel that the maps launch, in the order of their launches."""

    @functools.cache
    def demanding() -> dict[str, Step]:
        steps = work.at_its_most().record(maps)
        for step in steps:
            step.settle()
        return {step.kernel: step for step in steps}

    def objection(kernel: str, config: Config) -> str | None:
        return demanding()[kernel].objection(config)

    for step in work.record(maps):
        step.settle()
        if step.map in maps:
            candidates = neighbours(step.shipped, most)
            trials = _trials(step, candidates, deadline, advance)
            judged = _crown(trials, functools.partial(objection, step.kernel))
            yield Search(step.kernel, work.features, work.dtype, step.shipped, len(candidates), judged)


def _trials(step: Step, candidates: list[Config], deadline: float, advance: Advance) -> list[Trial]:
    """Each candidate by itself: right or not, and timed; all that are faster are without objection."""
    trials = []
    for config in candidates:
        if time.monotonic() >= deadline:
            break
        doing = f"{step.kernel} {_short(config)}"
        advance(doing, 0)
        trials.append(_trial(step, config))
        advance(doing, 1)
    return trials


def _trial(step: Step, config: Config) -> Trial:
    objection = step.objection(config)
    if objection is not None:
        return Trial(config, objection)
    shipped, own = timed(step, config)
    return Trial(config, None if faster(own, shipped) else "not faster", shipped, own)


def _crown(trials: list[Trial], objection: Callable[[Config], str | None]) -> tuple[Trial, ...]:
    """The same trials, without objection to one at most: the fastest that is right with every option."""
    judged = {trial.config: trial for trial in trials}
    won = False
    for trial in sorted(trials, key=lambda trial: trial.ratio):
        if trial.objection is not None:
            continue
        reason = "another is faster" if won else objection(trial.config)
        if reason is not None and not won:
            reason = f"with every option, {reason}"
        won = won or reason is None
        judged[trial.config] = replace(trial, objection=reason)
    return tuple(judged.values())


def timed(step: Step, config: Config) -> tuple[Timing, Timing]:
    """Seconds of the shipped configuration and of a candidate, in turns."""
    calls = {
        "shipped": functools.partial(step.launch, step.shipped),
        "own": functools.partial(step.launch, config),
    }
    if devices.interpreted():
        found = interleave(calls, seconds=SECONDS, least=ROUNDS)
    else:
        found = interleave(calls, seconds=SECONDS, least=ROUNDS, once=_once_on_gpu)
    return found["shipped"], found["own"]


def _once_on_gpu(call: Callable[[], object]) -> float:
    """Seconds of one call, by events; the one before keeps the GPU busy while the host prepares it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def faster(own: Timing, shipped: Timing) -> bool:
    """By GAIN at least, and by more than the spread: the quartiles do not overlap."""
    return own.quartiles[1] < shipped.quartiles[0] and own.median <= (1.0 - GAIN) * shipped.median


def _save(file: Path, gpu: tuned.Gpu, search: Search, length: int, causal: bool) -> bool:
    """Puts a winner in its place, or empties that if all candidates lost; whether anything was written."""
    try:
        old = tuned.read(file, gpu)
    except (OSError, ValueError):
        old = []
    new = [] if search.winner is None else [_winner(search, length, causal)]
    if not new and len(search.trials) < search.candidates:
        return False
    kept = [winner for winner in old if winner.slot != search.slot]
    if not new and kept == old:
        return False
    tuned.write(file, gpu, [*kept, *new])
    tuned.table.cache_clear()
    return True


def _winner(search: Search, length: int, causal: bool) -> tuned.Winner:
    best = search.winner
    assert best is not None
    assert best.own is not None
    assert best.shipped is not None
    medians = best.own.median, best.shipped.median
    dtype = str(search.dtype).removeprefix("torch.")
    return tuned.Winner(
        *search.slot, best.config, medians[0], search.shipped, medians[1],
        search.features, dtype, length, causal,
    )  # fmt: skip


@contextlib.contextmanager
def _bar(total: int, shown: bool) -> Iterator[Advance]:
    """Yields a function that says what is being done and moves a bar by so many; without rich, in silence."""
    if not shown or importlib.util.find_spec("rich") is None:
        yield lambda doing, done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    with Progress(*columns) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda doing, done: bar.update(task, description=doing, advance=done)
