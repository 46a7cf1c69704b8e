"""The compiled backend: the operators torch.ops.metattn.{forward, vjp, jvp, vjp_jvp} (csrc/), on the CPU.

The library is loaded when this module is first asked, never at `import metattn`. What an operator's arguments
mean is in csrc/ops.cpp; here a call is flattened into them, and torch is told their shapes (fakes) and costs.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from metattn.backends import IMPORTING_PROCESS
from metattn.problem import Constants, Primals, Problem, Results

Needs = tuple[bool, bool, bool, bool, bool]
LIBRARY = Path(__file__).resolve().parents[1] / "libmetattn_cpu.so"
ROUNDED = (torch.bfloat16, torch.float16)  # dtypes of results that are computed in a wider one
CAUSAL = {None: 0, "top-left": 1, "bottom-right": 2}


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
    _describe_operators()
    return None


def unsupported(problem: Problem, primals: Primals, constants: Constants) -> str | None:
    """Why these operators cannot serve a call, or None."""
    if primals.q.device.type != "cpu":
        return f"it works on CPU tensors, these are on {primals.q.device}"
    return None


def _call(problem: Problem, primals: Primals, constants: Constants) -> tuple[Any, ...]:
    """What every operator takes first."""
    return (
        *primals,
        *constants,
        problem.max_q,
        problem.max_k,
        problem.scale,
        0.0 if problem.softcap is None else problem.softcap,
        CAUSAL[problem.causal],
        *problem.window,
        problem.dropout_p,
    )


def _wanted(needs: Needs) -> int:
    return sum(1 << index for index, need in enumerate(needs) if need)


def _gradients(needs: Needs, results: tuple[Tensor, ...]) -> Primals:
    return Primals(*[result if need else None for need, result in zip(needs, results, strict=True)])  # type: ignore[arg-type]


def _results(primals: Primals, o: Tensor, lse: Tensor, o_lo: Tensor) -> Results:
    """Where o is not rounded there is no o_lo; the operator, bound to return a tensor, gives an empty one."""
    return Results(o, lse, o_lo if primals.q.dtype in ROUNDED else None)


def forward(problem: Problem, primals: Primals, constants: Constants) -> Results:
    """o, lse, and what rounding o lost."""
    return _results(primals, *torch.ops.metattn.forward(*_call(problem, primals, constants)))


def vjp(
    problem: Problem,
    primals: Primals,
    constants: Constants,
    results: Results,
    do: Tensor | None,
    dlse: Tensor | None,
    needs: Needs,
) -> Primals:
    """The gradients of ⟨dO, O⟩ + ⟨dL, L⟩ for those primals that `needs` names, None for the others."""
    call = _call(problem, primals, constants)
    return _gradients(needs, torch.ops.metattn.vjp(*call, *results, do, dlse, _wanted(needs)))


def jvp(
    problem: Problem, primals: Primals, constants: Constants, results: Results, tangents: Primals
) -> Results:
    """The tangents of what forward gives."""
    call = _call(problem, primals, constants)
    return _results(primals, *torch.ops.metattn.jvp(*call, *results, *tangents))


def vjp_jvp(
    problem: Problem,
    primals: Primals,
    constants: Constants,
    results: Results,
    do: Tensor | None,
    dlse: Tensor | None,
    tangents: Primals,
    results_t: Results,
    needs: Needs,
) -> Primals:
    """The tangents of vjp's gradients along `tangents`, dO and dL held fixed; None where not needed."""
    call = _call(problem, primals, constants)
    arguments = (*call, *results, do, dlse, *tangents, *results_t, _wanted(needs))
    return _gradients(needs, torch.ops.metattn.vjp_jvp(*arguments))


# Shapes, for FakeTensor and torch.compile; costs, for torch.utils.flop_counter.

PRIMALS = 5  # q, k, v, bias, sinks come first in every operator's arguments


def _fake_results(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v = arguments[0], arguments[2]
    width = v.shape[3]
    o = torch.empty_like(q) if width == q.shape[3] else q.new_empty(*q.shape[:3], width)
    o_lo = q.new_empty(o.shape, dtype=torch.bfloat16) if q.dtype in ROUNDED else q.new_empty(0)
    return o, q.new_empty(q.shape[:3], dtype=torch.float64), o_lo


def _fake_gradients(*arguments: Any) -> tuple[Tensor, ...]:
    needs = arguments[-1]
    q, k, v, bias, sinks = arguments[:PRIMALS]

    def gradient(index: int, primal: Tensor, contiguous: bool) -> Tensor:
        if not needs >> index & 1:
            return q.new_empty(0)  # type: ignore[no-any-return]
        return primal.new_empty(primal.shape) if contiguous else torch.empty_like(primal)

    return (
        gradient(0, q, False),
        gradient(1, k, False),
        gradient(2, v, False),
        gradient(3, bias, True),
        gradient(4, sinks, True),
    )


def _products(
    arguments: tuple[Any, ...], of_width_d: int, of_width_dv: int
) -> int:  # shapes stand for tensors in flop formulas
    """FLOP of products with the N×M matrix: 2·B·H·N·M times the width, masked entries counted too."""
    q, k, v = arguments[:3]
    batch, heads, rows, d = q
    keys, dv = k[2], v[3]
    if arguments[8] is not None:  # packed: every sequence at most max_q × max_k
        batch, rows, keys = arguments[8][0] - 1, arguments[10], arguments[11]
    return int(2 * batch * heads * rows * keys * (of_width_d * d + of_width_dv * dv))


def _flop_forward(*arguments: Any, **_: Any) -> int:
    return _products(arguments, 1, 1)


def _flop_vjp(*arguments: Any, **_: Any) -> int:
    """S; dP where there is a dO; then one product a gradient."""
    has_do, needs = arguments[21] is not None, arguments[23]
    return _products(arguments, 1 + (needs & 1) + (needs >> 1 & 1), has_do + (has_do and needs >> 2 & 1))


def _flop_jvp(*arguments: Any, **_: Any) -> int:
    tangent_q, tangent_k, tangent_v, tangent_bias = (x is not None for x in arguments[21:25])
    scores = tangent_q or tangent_k or tangent_bias
    return _products(arguments, 1 + tangent_q + tangent_k, scores + tangent_v)


def _flop_vjp_jvp(*arguments: Any, **_: Any) -> int:
    has_do = arguments[21] is not None
    tangent_q, tangent_k, tangent_v = (x is not None for x in arguments[23:26])
    need_q, need_k, need_v = (arguments[31] >> index & 1 for index in range(3))
    of_d = 1 + tangent_q + tangent_k + need_q * (1 + tangent_k) + need_k * (1 + tangent_q)
    return _products(arguments, of_d, has_do * (1 + tangent_v + need_v))


def _describe_operators() -> None:
    for name, fake, flop in (
        ("forward", _fake_results, _flop_forward),
        ("jvp", _fake_results, _flop_jvp),
        ("vjp", _fake_gradients, _flop_vjp),
        ("vjp_jvp", _fake_gradients, _flop_vjp_jvp),
    ):
        torch.library.register_fake(f"metattn::{name}", fake)
        register_flop_formula(getattr(torch.ops.metattn, name))(flop)
