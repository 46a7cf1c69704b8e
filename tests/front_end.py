"""Triton's front end reads kernels for an H100, without one and without the interpreter.

test_triton.py runs it, and `make check-triton` with other versions of Triton. What the interpreter lets pass,
such as a None in a loop's state, is refused here. Prints one line a failure.
"""

from __future__ import annotations

import sys
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend

from metattn.backends import triton as backend
from metattn.backends.triton import devices
from metattn.backends.triton.plans import Launch
from metattn.problem import Constants, Primals, Problem, Results

GPU = GPUTarget("cuda", 90, 32)
ALL = (True,) * len(Primals._fields)


class Driver:
    """Stands for the driver of a machine with that GPU."""

    def get_current_target(self) -> GPUTarget:
        return GPU

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class ReadError(Exception):
    """The front end has done its part."""


def stop(*_: Any) -> None:
    raise ReadError


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def call(
    n: int,
    m: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool | tuple[int, ...] = False,
    sinks: bool = False,
    tangents: tuple[bool, ...] = ALL,
    needs: tuple[bool, ...] = ALL,
    do: bool = True,
    dlse: bool = False,
    everything: bool = False,
    slopes: bool = False,
    packed: bool = False,
    causal: bool = False,
    maps: tuple[str, ...] = ("forward", "vjp", "second"),
) -> None:
    """Maps of one call, on tensors without data; "second" is jvp and vjp_jvp, or both in one launch."""
    batch, heads, d = 2, 4, 64
    leading = 1 if packed else batch
    q, k = empty(leading, heads, n, d, dtype=dtype), empty(leading, 2, m, d, dtype=dtype)
    shape = (batch, heads, n, m) if bias is True else bias
    biases = empty(*shape, dtype=torch.float32) if shape else None
    per_head = empty(1, heads, dtype=torch.float32)
    primals = Primals(
        q, k, k, biases, per_head if sinks else None, per_head if everything or slopes else None
    )
    cu = empty(batch + 1, dtype=torch.int32) if packed else None
    constants = Constants(None, None, cu, cu)
    if everything:
        mask = empty(batch, 1, n, m, dtype=torch.bool)
        constants = Constants(mask, empty(batch, 2, dtype=torch.int64), cu, cu)
    problem = Problem(
        scale=1.0,
        softcap=3.0 if everything else None,
        causal="bottom-right" if everything or causal else None,
        window=(7, -1) if everything else (-1, -1),
        dropout_p=0.1 if everything else 0.0,
        max_q=n if packed else 0,
        max_k=m if packed else 0,
        backend="triton",
    )
    statistic = empty(leading, heads, n, dtype=torch.float64)
    results = Results(q, statistic, empty(*q.shape) if dtype in backend.ROUNDED else None)
    there = [p is not None for p in primals]
    moves = Primals(*(p if p is not None and t else None for p, t in zip(primals, tangents, strict=True)))
    needed: Any = tuple(has and need for has, need in zip(there, needs, strict=True))
    cotangents = q if do else None, statistic if dlse else None
    launches = backend.Launches()  # without the question whether a tensor can be launched: these have no data
    if "forward" in maps:
        launches.forward(problem, primals, constants)
    if "vjp" in maps:
        launches.vjp(problem, primals, constants, results, *cotangents, needed)
    if "second" in maps:
        for dq in (q, None):  # with a row pass in one sweep, where that serves, and without
            given = (problem, primals, constants, results, *cotangents, moves, needed, dq)
            launches.double_backward(*given)


def one(index: int) -> tuple[bool, ...]:
    return tuple(i == index for i in range(len(Primals._fields)))


def main() -> int:
    cases: dict[str, dict[str, Any]] = {"plain": {}, "causal": {"causal": True}, "dlse": {"dlse": True}}
    cases |= {"everything": {"everything": True, "bias": True, "sinks": True, "dlse": True}}
    still = tuple(name != "slopes" for name in Primals._fields)  # so that one sweep serves
    cases |= {"slopes held": cases["everything"] | {"needs": still}}
    cases |= {"packed": cases["everything"] | {"packed": True}, "float32": {"dtype": torch.float32}}
    cases |= {"lse alone": {"do": False, "dlse": True, "sinks": True}}
    for index, name in enumerate(Primals._fields):
        own = {"bias": True, "sinks": name == "sinks", "slopes": name == "slopes"}
        cases[f"tangent of {name}"] = {**own, "tangents": one(index), "maps": ("second",)}
        cases[f"gradient of {name}"] = {**own, "needs": one(index), "maps": ("vjp", "second")}
    failed, label = 0, ""
    begun: set[tuple[str, str]] = set()

    def begun_before(*, fn: Any, key: str, **_: Any) -> bool:
        """Many launches differ in nothing that is compiled: one of them is read."""
        known = (fn.name, key) in begun
        begun.add((fn.name, key))
        return known

    def run(launch: Launch, *arguments: Any) -> None:
        nonlocal failed
        launch.kernel.device_caches.clear()
        try:
            launch.kernel.warmup(*arguments, grid=(launch.programs,), **launch.constants)
        except ReadError:
            pass
        except Exception as error:
            while error.__cause__ is not None:
                error = error.__cause__  # type: ignore[assignment]
            failed += 1
            print(f"{label}: {launch.kernel.fn.__name__}: {error}")

    triton.runtime.driver.set_active(Driver())
    with (
        mock.patch.object(CUDABackend, "make_ttgir", stop),
        mock.patch.object(triton.knobs.runtime, "jit_cache_hook", begun_before),
        mock.patch.object(backend, "run", run),
        mock.patch.object(devices, "architecture", return_value="sm90"),
        mock.patch.dict("os.environ", {"TRITON_ALWAYS_COMPILE": "1"}),
    ):
        for name, options in cases.items():
            for n, m in ((300, 200), (30, 20)):
                label = f"{name}, {n}×{m}"
                call(n, m, **options)
        for shape in ((1, 1, 1, 1), (2, 1, 1, 200), (1, 4, 300, 1)):
            label = f"bias {shape}"
            call(300, 200, bias=shape, maps=("vjp", "second"))
        label = "so long that sums are put aside"
        call(70000, 70000)
        label = "all sizes 1"
        call(1, 1, bias=True, everything=True)
    print(f"Triton {triton.__version__}: {len(begun)} kernels read, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
