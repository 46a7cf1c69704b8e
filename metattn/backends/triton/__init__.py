"""The Triton backend: launches the kernels of metattn.kernels on CUDA and ROCm devices.

Under TRITON_INTERPRET=1 the kernels run in Python on CPU tensors instead. No maths here: a call is turned
into a plan of allocations and launches, and the plan is run; the next call that is alike finds it made.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

from metattn.backends import operators
from metattn.backends.maps import Maps
from metattn.backends.operators import ROUNDED
from metattn.backends.triton import devices, interpreter
from metattn.backends.triton.devices import interpreted, on
from metattn.backends.triton.plans import Launch, likes
from metattn.kernels import configs
from metattn.layout import Given, Layout, Needs
from metattn.problem import Constants, Primals, Problem

try:
    import triton

    from metattn.backends.triton import planner

    IMPORT_ERROR: str | None = None
except ModuleNotFoundError as error:
    IMPORT_ERROR = f"{error.name} is not installed"
except Exception as error:  # a Triton that does not fit this torch or Python fails in many ways
    IMPORT_ERROR = f"triton cannot be imported: {error}"

OLDEST_COMPILER = (3, 6)  # comes with torch 2.10, the oldest that is supported

# Triton decides when a kernel is defined, which was now, whether it is interpreted.
UNMENDED = interpreter.mend() if IMPORT_ERROR is None and interpreted() else None


@functools.cache
def unavailable_reason() -> str | None:
    """Why no kernel can be launched on this machine, or None."""
    if os.environ.get("METATTN_DISABLE_TRITON", "") not in ("", "0"):
        return "METATTN_DISABLE_TRITON is set"
    if IMPORT_ERROR is not None:
        return IMPORT_ERROR
    if interpreted():
        return None
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST_COMPILER:
        return f"Triton {triton.__version__} is installed; the kernels need the compiler of 3.6 or later"
    if torch.cuda.is_available():
        return None
    return "no GPU that torch can use (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"


def unsupported(problem: Problem, primals: Primals, constants: Constants) -> str | None:
    """Why the kernels cannot serve a call, or None."""
    q, v = primals.q, primals.v
    expected = "cpu" if interpreted() else "cuda"
    if q.device.type != expected:
        return f"it works on {expected} tensors, these are on {q.device}"
    if q.dtype == torch.float64:
        return "it computes in float32, these tensors are float64"
    if UNMENDED is not None and q.dtype in ROUNDED:
        return UNMENDED
    row = devices.architecture(q.device)
    if row is None:
        return "the GPU has no tensor cores that Triton's kernels can use (compute capability 8.0 or later)"
    widest = configs.WIDEST[row][0 if q.dtype in ROUNDED else 1]
    if max(q.shape[3], v.shape[3]) > widest:
        here = "" if widest == configs.MOST_FEATURES else f" in {q.dtype} on this GPU"
        return f"a head dimension of at most {widest}{here}, got {max(q.shape[3], v.shape[3])}"
    return None


def run(launch: Launch, *arguments: Any) -> None:
    """Every launch goes through here."""
    launch(*arguments)


def _in_memory(t: Tensor) -> Tensor:
    """torch's own operators see to the negative bit, and to zeros without memory; a pointer does not."""
    return t.clone() if t._is_zerotensor() else t.resolve_neg()


class Launches(Maps):
    """The maps, launched."""

    def run(
        self,
        layout: Layout,
        problem: Problem,
        given: Given,
        needs: Needs | None,
        dq: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Plans a map's call, or finds the plan of one that was alike, and runs it."""
        constants = given.constants
        if constants.mask is not None:
            given = given._replace(constants=constants._replace(mask=constants.mask.view(torch.uint8)))
        tensors = [None if t is None else _in_memory(t) for t in (*layout.join(given), dq)]
        device = given.primals.q.device
        plan = planner.plan_of(layout.name, planner.setting(device), problem, needs, likes(tensors))
        with on(device):
            return plan.run(tensors, device, run)


def _traced(q: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(q) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
    )


class _Backend(Launches):
    """The same; by operators what cannot be launched: what is traced, a mode looks at, or has no data."""

    def reuses_dq(self, problem: Problem, primals: Primals, constants: Constants, needs: Needs) -> bool:
        if _traced(primals.q):  # operators take none
            return False
        of = likes((*primals, *constants))
        return planner.reuses_dq(planner.setting(primals.q.device), problem, needs, of)

    def run(
        self,
        layout: Layout,
        problem: Problem,
        given: Given,
        needs: Needs | None,
        dq: Tensor | None = None,
    ) -> tuple[Any, ...]:
        return (
            OPERATORS.run(layout, problem, given, needs)
            if _traced(given.primals.q)
            else super().run(layout, problem, given, needs, dq)
        )


OPERATORS = operators.Operators("metattn_triton")
operators.define("metattn_triton", "triton", Launches())
operators.describe("metattn_triton", lambda q: "triton")

_BACKEND = _Backend()
forward, vjp, jvp, vjp_jvp = _BACKEND.forward, _BACKEND.vjp, _BACKEND.jvp, _BACKEND.vjp_jvp
double_backward, reuses_dq = _BACKEND.double_backward, _BACKEND.reuses_dq
run_plain = None
