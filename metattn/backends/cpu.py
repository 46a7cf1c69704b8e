"""The compiled backend: the operators torch.ops.metattn.* (csrc/), on the CPU.

The library is loaded when this module is first asked, never at `import metattn`. What an operator's arguments
mean is in csrc/ops.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch

from metattn import installation
from metattn.backends import IMPORTING_PROCESS, operators
from metattn.problem import Constants, Primals, Problem

LIBRARY = Path(__file__).resolve().parents[1] / "libmetattn_cpu.so"


@functools.cache
def unavailable_reason() -> str | None:
    """Load the operators; why they cannot be had, or None."""
    if not LIBRARY.exists():
        why = installation.why_not_built()
        return f"the extension was not built: {why} (`python -m metattn doctor` says what helps)"
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} cannot be loaded into torch {torch.__version__}: {error}"
    library = ctypes.CDLL(str(LIBRARY))
    if os.getpid() != IMPORTING_PROCESS:
        library.metattn_work_alone()
    asked = os.environ.get("METATTN_ISA", "")
    if asked and library.metattn_set_isa(asked.encode()) != 0:
        return f"METATTN_ISA={asked} names no instruction set that was built and that this CPU has"
    operators.describe("metattn", lambda q: "cpu" if q.device.type == "cpu" else "cuda")
    return None


def unsupported(problem: Problem, primals: Primals, constants: Constants) -> str | None:
    """Why these operators cannot serve a call, or None."""
    if primals.q.device.type != "cpu":
        return f"it works on CPU tensors, these are on {primals.q.device}"
    return None


OPERATORS = operators.Operators("metattn")
forward, vjp, jvp, vjp_jvp = OPERATORS.forward, OPERATORS.vjp, OPERATORS.jvp, OPERATORS.vjp_jvp
double_backward = OPERATORS.double_backward
reuses_dq = None
run_plain = operators.run_plain
