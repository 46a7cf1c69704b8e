"""The CUDA C++ backend: torch.ops.metattn.* on NVIDIA GPUs (csrc/cuda/).

It serves where Triton cannot: it compiles nothing at run time, and runs on GPUs from compute capability 7.5
on, in float64 too. Its library is loaded when this module is first asked.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch

from metattn import installation
from metattn.backends import cpu, operators
from metattn.problem import Constants, Primals, Problem

LIBRARY = Path(__file__).resolve().parents[1] / "libmetattn_cuda.so"
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as csrc/params.h numbers them
LOWEST = (7, 5)
NO_KERNELS = "has no kernels for this GPU, or the GPU's driver is older than the CUDA that it was built with"


@functools.cache
def unavailable_reason() -> str | None:
    """Load the operators; why they cannot be had, or None."""
    if os.environ.get("METATTN_DISABLE_CUDA", "") not in ("", "0"):
        return "METATTN_DISABLE_CUDA is set"
    if not LIBRARY.exists():
        if not cpu.LIBRARY.exists():
            return cpu.unavailable_reason()
        why = installation.record().get("cuda") or f"{LIBRARY.name} is not there"
        return f"the extension was built without CUDA: {why}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    schemas = cpu.unavailable_reason()  # the library of the CPU's operators defines them
    if schemas is not None:
        return schemas
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} cannot be loaded into torch {torch.__version__}: {error}"
    if shared_memory(torch.cuda.current_device()) == 0:
        return f"{LIBRARY.name} {NO_KERNELS}"
    return None


def unsupported(problem: Problem, primals: Primals, constants: Constants) -> str | None:
    """Why these operators cannot serve a call, or None."""
    q, v = primals.q, primals.v
    if q.device.type != "cuda":
        return f"it works on cuda tensors, these are on {q.device}"
    return objection(q.dtype, int(q.shape[3]), int(v.shape[3]), q.device.index)


def objection(dtype: torch.dtype, d: int, dv: int, device: int) -> str | None:
    """Why a GPU cannot take heads of these sizes, or None."""
    if torch.cuda.get_device_capability(device) < LOWEST:
        return "the GPU's compute capability is below 7.5"
    shared = shared_memory(device)
    return too_large(dtype, d, dv, shared) if shared else f"{LIBRARY.name} {NO_KERNELS}"


# A constant of the process for Dynamo too, which traces no library's functions.
objection._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(LIBRARY))
    found.metattn_cuda_shared_memory.restype = ctypes.c_int64
    return declared(found)


def declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """A library with csrc/cuda/ops.cpp in it, its functions' types declared."""
    found.metattn_cuda_objection.argtypes = [ctypes.c_int, *[ctypes.c_int64] * 3]
    found.metattn_cuda_objection.restype = ctypes.c_char_p
    return found


@functools.cache
def shared_memory(device: int) -> int:
    """Bytes that a block may have; 0 where the library cannot use the GPU."""
    return int(library().metattn_cuda_shared_memory(device))


@functools.cache
def too_large(dtype: torch.dtype, d: int, dv: int, shared: int) -> str | None:
    """Why heads of these sizes do not fit so much shared memory, or None."""
    reason = library().metattn_cuda_objection(DTYPES.index(dtype), d, dv, shared)
    return None if reason is None else f"{reason.decode()} (d = {d}, dv = {dv}, {dtype})"


class Operators(operators.Operators):
    """The maps as these operators take them: with what torch allows at the time."""

    def keywords(self) -> dict[str, Any]:
        return {"tf32": operators.allows_tf32()}


OPERATORS = Operators("metattn")
forward, vjp, jvp, vjp_jvp = OPERATORS.forward, OPERATORS.vjp, OPERATORS.jvp, OPERATORS.vjp_jvp
double_backward = OPERATORS.double_backward
reuses_dq = run_plain = None
