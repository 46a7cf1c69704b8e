"""Importing is free, and nearly so is what comes before the maps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import timeit

import pytest
import torch
from small_tensors import K, Q, V

import metattn
from metattn import functional


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


class TestImport:
    def test_imports_neither_triton_nor_a_compiler_nor_the_extension(self) -> None:
        code = (
            "import sys, torch; before = set(sys.modules); import metattn; "
            "new = set(sys.modules) - before; "
            "print(sorted(m for m in new if m.split('.')[0] != 'metattn'), "
            "[m for m in sys.modules if m.startswith(('triton', 'metattn.nn', 'metattn.meta'))], "
            "'metattn.backends.cpu' in sys.modules)"
        )
        third_party = python(code)
        assert third_party.endswith("[] False"), third_party
        assert not re.search(r"'(torch\._dynamo|torch\._inductor|numpy|sympy)", third_party), third_party

    def test_takes_under_0_3_seconds_on_top_of_torch(self) -> None:
        code = "import time, torch; t = time.perf_counter(); import metattn; print(time.perf_counter() - t)"
        assert min(float(python(code)) for _ in range(3)) < 0.3

    def test_submodules_come_when_asked_for(self) -> None:
        code = "import metattn as m; print(m.nn.__name__, m.meta.__name__, m.replace_attention.__name__)"
        assert python(code) == "metattn.nn metattn.meta replace_attention"
        assert set(dir(metattn)) == set(metattn.__all__)
        assert all(hasattr(metattn, name) for name in metattn.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = metattn.nothing


def test_dispatch_takes_under_30_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and choice, without the maps; the fastest of many repeats, as machines are busy."""
    o = torch.zeros(2, 3, 4, 6)
    monkeypatch.setattr(functional, "attend", lambda problem, primals, constants: (o, o))
    seconds = min(timeit.repeat(lambda: metattn.attention(Q, K, V), number=50, repeat=400)) / 50
    assert seconds < 30e-6
