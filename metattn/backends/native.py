"""The compiled backend: the operators torch.ops.metattn.{forward, vjp, jvp, vjp_jvp} (csrc/), on the CPU.

The library is loaded when this module is first asked, never at `import metattn`. What an operator's arguments
mean is in csrc/ops.cpp.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import torch
from torch import Tensor

from metattn.backends import IMPORTING_PROCESS, operators
from metattn.backends.operators import Needs
from metattn.problem import Constants, Primals, Problem, Results

LIBRARY = Path(__file__).resolve().parents[1] / "libmetattn_cpu.so"


@functools.cache
def unavailable_reason() -> str | None:
    """Load the operators; why they cannot be had, or None."""
    if not LIBRARY.exists():
        return f"the extension was not built: {LIBRARY.name} is not there (see `python -m metattn doctor`)"
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
    operators.describe("metattn")
    operators.describe_double_backward("metattn")
    return None


def unsupported(problem: Problem, primals: Primals, constants: Constants) -> str | None:
    """Why these operators cannot serve a call, or None."""
    if primals.q.device.type != "cpu":
        return f"it works on CPU tensors, these are on {primals.q.device}"
    return None


class Operators(operators.Operators):
    """The four maps, and two of them at once."""

    def double_backward(
        self,
        problem: Problem,
        primals: Primals,
        constants: Constants,
        results: Results,
        do: Tensor | None,
        dlse: Tensor | None,
        tangents: Primals,
        needs: Needs,
        dq: Tensor | None = None,
    ) -> tuple[Results, Primals]:
        """jvp and vjp_jvp; dq, the gradient that vjp gave for q, helps nothing here."""
        call = operators.flatten(problem, primals, constants)
        arguments = (*call, *results, do, dlse, *tangents, operators.wanted(needs))
        o_t, lse_t, o_t_lo, *found = self._run("double_backward", *arguments)
        return operators.results_of(primals, o_t, lse_t, o_t_lo), operators.gradients(needs, tuple(found))


_OPERATORS = Operators("metattn")
forward, vjp, jvp, vjp_jvp = _OPERATORS.forward, _OPERATORS.vjp, _OPERATORS.jvp, _OPERATORS.vjp_jvp
double_backward = _OPERATORS.double_backward
