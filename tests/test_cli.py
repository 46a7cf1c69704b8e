"""The command line: parsing, doctor on sound and broken installations."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import emulation
import pytest
import torch

import metattn
from metattn import backends, host, installation
from metattn.backends import cpu
from metattn.cli import doctor, main

ROOT = Path(__file__).resolve().parents[1]


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


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """The package's, which is the one that pyproject.toml declares."""
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"metattn {metattn.__version__}\n"
    assert f'version = "{metattn.__version__}"' in (ROOT / "pyproject.toml").read_text()


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
    if metattn.available_backends()["cpu"] is not None:
        pytest.skip("the extension is not built")
    report = doctor.examine()
    assert report["isa"] == host.isa()
    assert report["isa"] in report["build"]["isas"]
    assert f"code used    {report['isa']}" in doctor.text(report)


def test_doctor_on_an_unloadable_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "libmetattn_cpu.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(cpu, "LIBRARY", broken)
    monkeypatch.setattr("metattn.backends._reasons", {"triton": "absent", "cuda": "absent"})
    cpu.unavailable_reason.cache_clear()
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
        cpu.unavailable_reason.cache_clear()


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where nothing was built, and nobody was told."""
    monkeypatch.setattr(backends, "_reasons", {"cpu": "not built: why", "cuda": "absent", "triton": "absent"})
    monkeypatch.setattr(backends, "_told", False)


@pytest.mark.usefixtures("unbuilt")
def test_a_large_call_that_the_reference_serves_is_told_once() -> None:
    """Where no other backend is there and none was asked for; where it was called, modules' calls too."""
    small, long = torch.randn(1, 1, 999, 2), torch.randn(1, 1, 1000, 2)
    packed, starts = torch.randn(1000, 1, 2), torch.tensor([0, 1000], dtype=torch.int32)
    module = metattn.nn.MultiheadAttention(2, 1, batch_first=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metattn.attention(long, small, small)
        metattn.attention(long, long, long, backend="reference")
        with metattn.use_backend("reference"):
            metattn.attention(long, long, long)
        assert metattn.explain(long, long, long).backend == "reference"
        halves = torch.tensor([0, 500, 1000], dtype=torch.int32)
        metattn.varlen_attention(packed, packed, packed, halves, halves, 500, 500)
    calls = {
        "attention": lambda: metattn.attention(long, long, long),
        "packed": lambda: metattn.varlen_attention(packed, packed, packed, starts, starts, 1000, 1000),
        "module": lambda: module(long[0], long[0], long[0], need_weights=False),
        "transformed": lambda: torch.func.grad(lambda x: metattn.attention(x, x, x).sum())(long),
        "torch's": lambda: metattn.scaled_dot_product_attention(long, long, long),
    }
    said = r"1000×1000 scores .* cpu tensors \(cpu: not built: why\)"
    for call in calls.values():
        backends._told = False
        with pytest.warns(UserWarning, match=said) as caught:  # noqa: PT031
            call()
            call()
        assert [warning.filename for warning in caught] == [__file__]


def test_a_large_call_where_something_was_built_is_not_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is there and does not take a call has its reason in explain."""
    monkeypatch.setattr(backends, "_reasons", {"cpu": None, "cuda": "absent", "triton": "absent"})
    monkeypatch.setattr(cpu, "unsupported", lambda *_: "a call of another kind")
    long = torch.randn(1, 1, 1000, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metattn.attention(long, long, long)


@pytest.mark.usefixtures("unbuilt")
def test_doctor_where_nothing_was_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause that the build has left, or what can be said without."""
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "libmetattn_cpu.so")
    monkeypatch.setattr(installation, "FOLDER", tmp_path)
    assert doctor.examine()["not_built"] == f"nothing in {tmp_path} says why"
    for text, why, first in (
        ('{"cause": "a cause", "mend": "do this"}', "a cause", ["do this"]),
        ('{"cause": null, "cuda": "none"}', f"it was, and is no longer in {tmp_path}", []),
        ("[]", f"nothing in {tmp_path} says why", []),
        ("no JSON", f"nothing in {tmp_path} says why", []),
    ):
        (tmp_path / "_build.json").write_text(text)
        report = doctor.examine()
        assert report["not_built"] == why
        assert report["mend"][:-1] == first
        install = f"METATTN_BUILD_EXT=1 {sys.executable} -m pip install"
        assert report["mend"][-1].startswith(f"cd FOLDER_OF_THE_SOURCES && {install}")  # a mere copy
        assert f"  not built: {why}\n  to have it: " in doctor.text(report)


@pytest.mark.usefixtures("unbuilt")
@pytest.mark.parametrize(
    ("noted", "last"),
    [
        ({"url": "file:///a/clone", "dir_info": {}}, "/a/clone"),
        ({"url": "file:///dist/metattn-0.1.0-py3-none-any.whl", "archive_info": {}}, "."),
        (
            {
                "url": "https://host/a.git",
                "subdirectory": "b",
                "vcs_info": {"vcs": "git", "commit_id": "c0ffee"},
            },
            "'git+https://host/a.git@c0ffee#subdirectory=b'",
        ),
        ({}, "metattn"),
    ],
    ids=["folder", "wheel", "git", "by name, from an index"],
)
def test_doctors_command_takes_what_was_installed(
    noted: dict[str, object], last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Installed:
        def read_text(self, name: str) -> str:
            return json.dumps(noted)

    monkeypatch.setattr(installation, "FOLDER", tmp_path)
    monkeypatch.setattr(installation, "distribution", Installed)
    command = installation.how_to_mend()[-1]
    assert command.split(" -m pip install ")[1].split()[-1] == last
    assert command.startswith("cd FOLDER_OF_THE_SOURCES && ") == (last == ".")


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


def test_doctor_where_the_extension_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def tells_nothing() -> None:
        raise RuntimeError("libmetattn_cpu.so: no such file")

    monkeypatch.setattr(host, "build_info", tells_nothing)
    report = doctor.examine()
    assert report["build"] is None
    assert "extension\n  libmetattn_cpu.so: no such file\n" in doctor.text(report)
