"""The CUDA kernels on CPU tensors: the same sources, compiled for the CPU, a thread standing for a warp.

`make build` builds them; install() makes them the backend "cuda" of this process, where there is no GPU.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from metattn.backends import cuda, operators
from metattn.layout import MAPS
from metattn.problem import Constants, Primals, Problem

LIBRARY = Path(__file__).resolve().parents[1] / "build" / "libmetattn_emulated.so"
SHARED_MEMORY = 99 * 1024  # of the smallest of GPUs from compute capability 8.0 on


def installed() -> bool:
    """Whether backend "cuda" is emulated in this process."""
    return not torch.cuda.is_available() and LIBRARY.exists()


def library() -> ctypes.CDLL:
    found = cuda.declared(ctypes.CDLL(str(LIBRARY)))
    found.metattn_emulate_shared_memory.argtypes = [ctypes.c_int64]
    found.metattn_emulate_from_80.argtypes = [ctypes.c_int]
    return found


def unsupported(problem: Problem, primals: Primals, constants: Constants) -> str | None:
    q, v = primals.q, primals.v
    if q.device.type != "cpu":
        return f"emulated, it works on cpu tensors, these are on {q.device}"
    return objection(q.dtype, int(q.shape[3]), int(v.shape[3]))


def objection(dtype: torch.dtype, d: int, dv: int) -> str | None:
    return cuda.too_large(dtype, d, dv, SHARED_MEMORY)


objection._dynamo_marked_constant = True  # type: ignore[attr-defined]


def install() -> None:
    """To be called before a backend is asked for."""
    torch.ops.load_library(LIBRARY)
    operators.describe("metattn_emulated", lambda q: "cuda")
    cuda.OPERATORS = cuda.CudaOperators("metattn_emulated")
    for name in MAPS:
        setattr(cuda, name, getattr(cuda.OPERATORS, name))
    cuda.library = library  # type: ignore[assignment]
    cuda.unsupported = unsupported
    cuda.unavailable_reason = lambda: None  # type: ignore[assignment]
