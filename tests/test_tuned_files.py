"""The file of tuned tiles: where it lies, what makes it unusable, and who is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import metattn
from metattn import backends
from metattn.backends.triton import tuned
from metattn.cli import doctor

if backends.unavailable_reason("triton") is not None:
    pytest.skip(f"backend triton: {backends.unavailable_reason('triton')}", allow_module_level=True)


from metattn.kernels.configs import Config
from tuning_cases import HERE, QUICK, SHIPPED, call, few, few_rows_win, file, interpreter, launched

ROOT = Path(__file__).resolve().parents[1]


def damage(**changes: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def damage_winner(**changes: Any) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        held = json.loads(file.read_text())
        held["winners"][0] |= changes
        file.write_text(json.dumps(held))

    return change


def as_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


TILE = {"rows": 32, "keys": 64, "warps": 1, "stages": 1}
UNUSABLE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda file: file.write_text(""), "it is not JSON"),
    "cut-off": (lambda file: file.write_text(file.read_text()[:-20]), "it is not JSON"),
    "binary": (lambda file: file.write_bytes(b"\xff\x00\x80"), "it is not JSON"),
    "a-list": (lambda file: file.write_text("[]"), "expected a JSON object, got list"),
    "deep": (lambda file: file.write_text("[" * 100_000), "it is not JSON"),
    "a-folder": (as_folder, "Is a directory"),
    "other-schema": (damage(schema=2), "it was made for schema 2, this is 1"),
    "other-gpu": (damage(gpu="NVIDIA H100"), "it was made for gpu 'NVIDIA H100', this is 'interpreter'"),
    "other-architecture": (damage(architecture="sm_90"), "it was made for architecture 'sm_90'"),
    "other-triton": (damage(triton="3.0.0"), "it was made for triton '3.0.0'"),
    "other-kernels": (damage(kernels="0" * 16), "it was made for kernels '0000000000000000'"),
    "no-winners": (damage(winners=None), "it has no list of winners"),
    "no-winner": (damage(winners=[3]), "a winner is not one: 3"),
    "other-fields": (damage_winner(colour="red"), "a winner is not one: "),
    "no-tile": (damage_winner(config=dict(TILE, rows=48)), "no kernel can have this tile: "),
    "half-a-tile": (damage_winner(config={"rows": 32}), "a winner is not one: "),
    "huge-tile": (damage_winner(config=dict(TILE, keys=512)), "no kernel can have this tile: "),
    "no-integer": (damage_winner(config=dict(TILE, warps="4")), "no kernel can have this tile: "),
    "other-width": (damage_winner(width=48), "no kernel can have this tile: "),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_files_are_ignored_with_one_warning(
    name: str, file: Path, launched: list[tuple[str, Config]]
) -> None:
    change, reason = UNUSABLE[name]
    best = Config(**TILE)
    tuned.write(
        file, HERE, [tuned.Winner("forward_rows", 32, 4, best, 1.0, SHIPPED, 2.0, 8, "float32", 256, True)]
    )
    call()
    assert launched[-1] == ("forward_rows", best)
    change(file)
    tuned.table.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(call(), torch.full((1, 1, 70, 8), 3.0))
    assert launched[-1] == ("forward_rows", SHIPPED)
    (warning,) = (each for each in caught if "tuned tiles" in str(each.message))
    assert warning.category is RuntimeWarning
    assert str(file) in str(warning.message)
    assert reason in str(warning.message)


@pytest.mark.parametrize("value", ["", None])
def test_the_default_place(value: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("METATTN_TUNED")
    else:
        monkeypatch.setenv("METATTN_TUNED", value)
    monkeypatch.setenv("HOME", str(tmp_path))
    gpu = tuned.Gpu("NVIDIA H100 80GB HBM3", "sm_90")
    for cache in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
        assert tuned.place(gpu) == tmp_path / ".cache/metattn/tuned-nvidia-h100-80gb-hbm3.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuned.place(gpu) == tmp_path / "cache/metattn/tuned-nvidia-h100-80gb-hbm3.json"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.table(gpu).tiles == {}  # nobody has tuned, and nothing is said


def test_turned_off(
    monkeypatch: pytest.MonkeyPatch, few_rows_win: None, launched: list[tuple[str, Config]], tmp_path: Path
) -> None:
    monkeypatch.setenv("METATTN_TUNED", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    metattn.tune(**QUICK)
    call()
    assert launched[-1] == ("forward_rows", Config(**TILE))
    monkeypatch.setenv("METATTN_TUNED", "0")
    tuned.table.cache_clear()
    call()
    assert launched[-1] == ("forward_rows", SHIPPED)
    with pytest.raises(ValueError, match="save: expected False or a path, for METATTN_TUNED is 0, got True"):
        metattn.tune(**QUICK)
    assert metattn.tune(**QUICK, path=tmp_path / "elsewhere.json").path == tmp_path / "elsewhere.json"
    call()
    assert launched[-1] == ("forward_rows", SHIPPED)


def test_a_failed_write_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned.write(file, HERE, [])
    before = file.read_text()
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        tuned.write(file, HERE, [])
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_text() == before


# ---- doctor


def test_doctor_tells(few_rows_win: None, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def line() -> str:
        tuned.table.cache_clear()
        monkeypatch.setattr(doctor, "self_test", lambda name: 0.0)
        text = doctor.text(doctor.examine())
        return next(line.split(maxsplit=1)[1] for line in text.splitlines() if line.startswith("  tiles "))

    with pytest.warns(RuntimeWarning):
        assert line() == f"shipped: there is no file {file}"
    metattn.tune(**QUICK)
    assert line() == f"1 tuned ones, from {file}"
    file.write_text("{}")
    with pytest.warns(RuntimeWarning):
        assert line() == f"shipped: {file}: it was made for schema None, this is 1"
    monkeypatch.setenv("METATTN_TUNED", "0")
    assert line() == "shipped: METATTN_TUNED is 0"
    monkeypatch.setitem(backends._reasons, "triton", "absent")
    assert line() == "shipped: backend triton is unavailable"


def test_a_later_process_uses_it(few_rows_win: None) -> None:
    metattn.tune(**QUICK)
    code = (
        "import torch\nimport metattn\nfrom metattn.backends import triton\nstart = triton.run\n"
        "def run(launch, *arguments):\n"
        "    print(launch.constants['ROWS'], launch.constants['KEYS'])\n    start(launch, *arguments)\n"
        "triton.run = run\nq = torch.ones(1, 1, 70, 8)\nmetattn.attention(q, q, q, backend='triton')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "32 64", done.stderr
