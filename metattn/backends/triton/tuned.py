"""The tiles that metattn.tune found to be faster on a GPU: their file, and whether it is in use.

A file counts for the GPU, the Triton and the kernels that it was measured with. Any other, and one that
cannot be read, is ignored with a warning: a tile from elsewhere may be slow, or not fit at all.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from metattn.kernels import configs
from metattn.kernels.configs import Config

SCHEMA = 1
VARIABLE = "METATTN_TUNED"


class Gpu(NamedTuple):
    """What a tile was measured on."""

    name: str
    architecture: str  # sm_90, gfx942, interpreter


class Winner(NamedTuple):
    """A tile that was faster than the shipped one; medians in seconds."""

    kernel: str
    width: int  # of configs.WIDTHS
    itemsize: int  # bytes: 2 or 4
    config: Config
    median: float
    shipped: Config
    shipped_median: float
    features: int  # what was measured
    dtype: str
    length: int
    causal: bool

    @property
    def slot(self) -> tuple[str, int, int]:
        return self.kernel, self.width, self.itemsize


@dataclass(frozen=True, eq=False)  # plans are kept by the table that they were made with
class Table:
    """The tuned tiles that are in use, and why there are none."""

    path: Path | None
    tiles: Mapping[tuple[str, int, int], Config]
    reason: str | None


@functools.cache
def table(gpu: Gpu) -> Table:
    """The tuned tiles for a GPU; read once in a process, until table.cache_clear()."""
    path = place(gpu)
    if path is None:
        return Table(None, {}, f"{VARIABLE} is 0")
    try:
        return Table(path, {winner.slot: winner.config for winner in read(path, gpu)}, None)
    except FileNotFoundError:
        reason, expected = f"there is no file {path}", bool(os.environ.get(VARIABLE))
    except (OSError, ValueError) as error:
        reason, expected = f"{path}: {error}", True
    if expected:
        warnings.warn(
            f"tuned tiles are not in use, the shipped ones are: {reason}", RuntimeWarning, stacklevel=2
        )
    return Table(path, {}, reason)


def place(gpu: Gpu) -> Path | None:
    """The file of a GPU's tuned tiles: $METATTN_TUNED, else one in the user's cache; None where that is 0."""
    named = os.environ.get(VARIABLE, "")
    if named:
        return None if named == "0" else Path(os.path.expanduser(named))
    cache = os.environ.get("XDG_CACHE_HOME", "")
    folder = cache if os.path.isabs(cache) else os.path.expanduser("~/.cache")
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
    return Path(folder) / "metattn" / f"tuned-{slug}.json"


def read(path: Path, gpu: Gpu) -> list[Winner]:
    """The tiles in a file. Raises OSError or ValueError, saying why it cannot be used on this GPU."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(held, dict):
        raise ValueError(f"expected a JSON object, got {type(held).__name__}")
    for name, here in _identity(gpu).items():
        if held.get(name) != here:
            raise ValueError(f"it was made for {name} {held.get(name)!r}, this is {here!r}")
    winners = held.get("winners")
    if not isinstance(winners, list):
        raise ValueError("it has no list of winners")
    return [_winner(entry) for entry in winners]


def _winner(entry: Any) -> Winner:
    try:
        tiles = {name: Config(**entry[name]) for name in ("config", "shipped")}
        winner = Winner(**{**entry, **tiles})
    except (TypeError, KeyError) as error:
        raise ValueError(f"a winner is not one: {entry!r}") from error
    known = isinstance(winner.kernel, str) and winner.width in configs.WIDTHS and winner.itemsize in (2, 4)
    if not known or not configs.is_tile(winner.config):
        raise ValueError(f"no kernel can have this tile: {entry!r}")
    return winner


def write(path: Path, gpu: Gpu, winners: Iterable[Winner]) -> None:
    """Puts a file in place whole, or leaves what was there."""
    entries = [
        {**winner._asdict(), "config": winner.config._asdict(), "shipped": winner.shipped._asdict()}
        for winner in sorted(winners)
    ]
    held = {
        **_identity(gpu),
        "metattn": _version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "winners": entries,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(held, indent=1) + "\n")
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _identity(gpu: Gpu) -> dict[str, object]:
    """What must be the same where a file is written and where it is read."""
    import triton

    return {
        "schema": SCHEMA,
        "gpu": gpu.name,
        "architecture": gpu.architecture,
        "triton": triton.__version__,
        "kernels": _fingerprint(),
    }


@functools.cache
def _fingerprint() -> str:
    """Of the kernels and their shipped table: a change in them makes measurements stale."""
    digest = hashlib.sha256()
    for source in sorted(Path(configs.__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _version() -> str:
    try:
        return metadata.version("metattn")
    except metadata.PackageNotFoundError:
        return "uninstalled checkout"
