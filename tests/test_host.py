"""metattn.host by both of its ways: the pybind11 module, and ctypes where that is another Python's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import metattn
from metattn import backends, host
from metattn.backends import cpu

if backends.unavailable_reason("cpu") is not None:
    pytest.skip(f"backend cpu: {backends.unavailable_reason('cpu')}", allow_module_level=True)

WAYS = {"pybind11": "", "ctypes": "import sys; sys.modules['metattn._host'] = None; "}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "pybind11":
        pytest.importorskip("metattn._host", reason="another Python built it")
    else:
        monkeypatch.setitem(sys.modules, "metattn._host", None)
    host._source.cache_clear()
    before = host.isa()
    assert isinstance(host._source(), host._Library) == (request.param == "ctypes")
    yield request.param
    host.set_isa(before)
    host._source.cache_clear()


def told_by_a_process(way: str, expression: str, isa: str) -> str:
    code = f"{WAYS[way]}import metattn; from metattn import host; print({expression})"
    environment = {**os.environ, "METATTN_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_facts(way: str) -> None:
    info = host.build_info()
    assert set(info) == {"compiler", "torch_target", "cuda", "isas"}
    assert info["compiler"].startswith(("gcc ", "clang "))
    assert info["torch_target"] == "2.10"
    assert info["cuda"] is None or float(info["cuda"]) >= 12
    usable = host.usable_isas()
    assert usable == [isa for isa in info["isas"] if isa in usable]  # in the same order, the least last
    assert usable[-1] == "baseline"
    assert ("avx2" in host.cpu_features()) >= ("avx2" in usable)
    assert host.isa() in usable


def test_both_ways_tell_the_same() -> None:
    module = pytest.importorskip("metattn._host", reason="another Python built it")
    library = host._Library()
    for fact in ("build_info", "cpu_features", "usable_isas", "isa"):
        assert getattr(module, fact)() == getattr(library, fact)()
    said = []
    for source in (module, library):
        with pytest.raises(ValueError, match="expected one of") as refusal:
            source.set_isa("mmx")
        said.append(str(refusal.value))
    assert said[0] == said[1]


def test_set_isa(way: str) -> None:
    """The kernels go by it: float32 rounds otherwise, the last bits differ."""
    usable = host.usable_isas()
    q = torch.randn(1, 2, 40, 24, generator=torch.Generator().manual_seed(0))
    results = {}
    for isa in usable:
        host.set_isa(isa)
        assert host.isa() == isa
        results[isa] = metattn.attention(q, q, q, backend="cpu")
    if "avx2" in usable:
        assert not torch.equal(results["avx2"], results["baseline"])
    host.set_isa("")
    assert host.isa() == usable[0]
    with pytest.raises(ValueError, match=f"expected one of {','.join(usable)} or '' for the best, got 'mmx'"):
        host.set_isa("mmx")
    with pytest.raises(TypeError, match="name: expected a str, got int"):
        host.set_isa(2)  # type: ignore[arg-type]
    assert host.isa() == usable[0]


def test_environment_names_the_isa(way: str) -> None:
    for name in host.usable_isas()[-2:]:
        assert told_by_a_process(way, "host.isa()", name) == name
    chosen = "(host.set_isa('baseline'), metattn.available_backends()['cpu'], host.isa())"
    assert told_by_a_process(way, chosen, host.usable_isas()[0]) == "(None, None, 'baseline')"
    reason = told_by_a_process(way, "metattn.available_backends()['cpu']", "mmx")
    assert reason == "METATTN_ISA=mmx names no instruction set that was built and that this CPU has"
    assert told_by_a_process(way, "host.isa()", "mmx") == host.usable_isas()[0]


def test_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metattn._host", None)
    monkeypatch.setitem(backends._reasons, "cpu", "the extension was not built: of no reason")
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "libmetattn_cpu.so")
    host._source.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="the extension was not built: of no reason"):
            host.build_info()
    finally:
        host._source.cache_clear()
