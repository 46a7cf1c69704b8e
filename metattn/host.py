"""What was built, what this processor can do, and which instruction set the CPU's kernels use.

The operators' library tells (csrc/facts.h). The pybind11 module `metattn._host` reads it for the Python that
built the extension; under any other Python ctypes does. Where no library loads, each function raises
RuntimeError.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
from typing import Any

from metattn import backends
from metattn.backends import cpu


def build_info() -> dict[str, Any]:
    """compiler, torch_target (the oldest torch served), cuda (its version, or None), isas (those built)."""
    return dict(_source().build_info())


def cpu_features() -> list[str]:
    """The instruction sets of this processor that matter here."""
    return list(_source().cpu_features())


def usable_isas() -> list[str]:
    """The instruction sets that were built and run here, best first."""
    return list(_source().usable_isas())


def isa() -> str:
    """The instruction set in use: METATTN_ISA's, or the best, or what set_isa chose."""
    return str(_source().isa())


def set_isa(name: str) -> None:
    """Use an instruction set by name, '' for the best. Raises ValueError for one that cannot run here."""
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    _source().set_isa(name)


@functools.cache
def _source() -> Any:
    reason = backends.unavailable_reason("cpu")  # loads the library, and sets what METATTN_ISA names
    try:
        return importlib.import_module("metattn._host")
    except ImportError:  # of another Python, or no library
        pass
    try:
        return _Library()
    except OSError as error:
        raise RuntimeError(reason or str(error)) from error


class _Library:
    """The functions of `metattn._host`, without it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(cpu.LIBRARY))

    def build_info(self) -> dict[str, Any]:
        facts = {name: self._text(name) for name in ("compiler", "torch_target", "cuda")}
        return {**facts, "isas": self._list("isas")}

    def cpu_features(self) -> list[str]:
        return self._list("cpu_features")

    def usable_isas(self) -> list[str]:
        return self._list("usable_isas")

    def isa(self) -> str | None:
        return self._text("isa")

    def set_isa(self, name: str) -> None:
        if self._library.metattn_set_isa(name.encode()) != 0:
            usable = self._text("usable_isas")
            raise ValueError(f"isa: expected one of {usable} or '' for the best, got '{name}'")

    def _text(self, fact: str) -> str | None:
        function = getattr(self._library, f"metattn_{fact}")
        function.restype = ctypes.c_char_p
        told: bytes | None = function()
        return None if told is None else told.decode()

    def _list(self, fact: str) -> list[str]:
        told = self._text(fact)
        return told.split(",") if told else []
