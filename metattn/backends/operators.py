"""What torch is told of the four maps as operators: their arguments, shapes (fakes) and costs.

The compiled operators torch.ops.metattn.* (csrc/ops.cpp) and the Triton backend's
torch.ops.metattn_triton.* take the same, the compiled ones a keyword `tf32` besides: here a call is flattened
into their arguments, and put together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from metattn import backends
from metattn.problem import Constants, Primals, Problem, Results

Needs = tuple[bool, bool, bool, bool, bool]
MAPS = ("forward", "vjp", "jvp", "vjp_jvp")
ROUNDED = (torch.bfloat16, torch.float16)  # dtypes of results that are computed in a wider one
CAUSAL = (None, "top-left", "bottom-right")
PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? slopes, Tensor? rng, "
    "Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, float scale, float softcap, int causal, "
    "int window_left, int window_right, float dropout_p"
)
RESULTS = "Tensor o, Tensor lse, Tensor? o_lo"
COTANGENTS = "Tensor? do_, Tensor? dlse"
TANGENTS = "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias, Tensor? tsinks"
SCHEMAS = {
    "forward": f"({PROBLEM}) -> (Tensor, Tensor, Tensor)",
    "vjp": f"({PROBLEM}, {RESULTS}, {COTANGENTS}, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "jvp": f"({PROBLEM}, {RESULTS}, {TANGENTS}) -> (Tensor, Tensor, Tensor)",
    "vjp_jvp": f"({PROBLEM}, {RESULTS}, {COTANGENTS}, {TANGENTS}, Tensor ot, Tensor lt, Tensor? ot_lo, "
    "int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
}
PRIMALS = 5  # q, k, v, bias, sinks come first in every operator's arguments
CALL = 18  # and so many describe the problem


def flatten(problem: Problem, primals: Primals, constants: Constants) -> tuple[Any, ...]:
    """What every operator takes first."""
    return (
        *primals,
        *constants,
        problem.max_q,
        problem.max_k,
        problem.scale,
        0.0 if problem.softcap is None else problem.softcap,
        CAUSAL.index(problem.causal),
        *problem.window,
        problem.dropout_p,
    )


def unflatten(backend: str, arguments: tuple[Any, ...]) -> tuple[Problem, Primals, Constants]:
    """The inverse of flatten."""
    max_q, max_k, scale, softcap, causal, left, right, dropout_p = arguments[10:CALL]
    problem = Problem(scale, softcap or None, CAUSAL[causal], (left, right), dropout_p, max_q, max_k, backend)
    return problem, Primals(*arguments[:PRIMALS]), Constants(*arguments[PRIMALS:10])


def wanted(needs: Needs) -> int:
    """The gradients that are needed, a bit each."""
    return sum(1 << index for index, need in enumerate(needs) if need)


def gradients(needs: Needs, results: tuple[Tensor, ...]) -> Primals:
    """An operator's gradients; bound to return tensors, it gives empty ones for what is not needed."""
    return Primals(*[result if need else None for need, result in zip(needs, results, strict=True)])  # type: ignore[arg-type]


def results_of(primals: Primals, o: Tensor, lse: Tensor, o_lo: Tensor) -> Results:
    """Where o is not rounded there is no o_lo; the operator gives an empty one."""
    return Results(o, lse, o_lo if primals.q.dtype in ROUNDED else None)


def allows_tf32() -> bool:
    """Whether torch may take float32 products of GPUs in TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# Dynamo cannot trace how torch answers. Its guards know the answer: where that changes, it compiles again.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Operators:
    """The four maps through a namespace's operators, as a backend offers them."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def _run(self, map_: str, *arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        operator = getattr(getattr(torch.ops, self.namespace), map_)
        if torch.compiler.is_compiling():
            return operator(*arguments, **more)  # type: ignore[no-any-return]
        with torch._C._AutoDispatchBelowAutograd():  # the Functions that call it are its derivatives already
            return operator(*arguments, **more)  # type: ignore[no-any-return]

    def forward(self, problem: Problem, primals: Primals, constants: Constants) -> Results:
        """o, lse, and what rounding o lost."""
        return results_of(primals, *self._run("forward", *flatten(problem, primals, constants)))

    def vjp(
        self,
        problem: Problem,
        primals: Primals,
        constants: Constants,
        results: Results,
        do: Tensor | None,
        dlse: Tensor | None,
        needs: Needs,
    ) -> Primals:
        """The gradients of ⟨dO, O⟩ + ⟨dL, L⟩ for those primals that `needs` names, None for the others."""
        call = flatten(problem, primals, constants)
        return gradients(needs, self._run("vjp", *call, *results, do, dlse, wanted(needs)))

    def jvp(
        self, problem: Problem, primals: Primals, constants: Constants, results: Results, tangents: Primals
    ) -> Results:
        """The tangents of what forward gives."""
        call = flatten(problem, primals, constants)
        return results_of(primals, *self._run("jvp", *call, *results, *tangents))

    def vjp_jvp(
        self,
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
        call = flatten(problem, primals, constants)
        arguments = (*call, *results, do, dlse, *tangents, *results_t, wanted(needs))
        return gradients(needs, self._run("vjp_jvp", *arguments))


def fake_results(*arguments: Any, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v = arguments[0], arguments[2]
    width = v.shape[3]
    o = torch.empty_like(q) if width == q.shape[3] else q.new_empty(*q.shape[:3], width)
    o_lo = q.new_empty(o.shape, dtype=torch.bfloat16) if q.dtype in ROUNDED else q.new_empty(0)
    return o, q.new_empty(q.shape[:3], dtype=torch.float64), o_lo


def fake_gradients(*arguments: Any, **_: Any) -> tuple[Tensor, ...]:
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


def fake_double_backward(*arguments: Any) -> tuple[Tensor, ...]:
    return *fake_results(*arguments), *fake_gradients(*arguments)


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


def _flop_double_backward(*arguments: Any, **rest: Any) -> int:
    """As jvp and vjp_jvp are counted, however many products are shared."""
    *given, needs = arguments
    results_t = (None, None, None)
    jvp_arguments = (*given[:21], *given[23:28])
    return _flop_jvp(*jvp_arguments, **rest) + _flop_vjp_jvp(*given, *results_t, needs, **rest)


_DERIVATIVES: dict[str, torch.library.Library] = {}  # what a Library registers ends with it


def _register_derivatives(namespace: str, name: str) -> None:
    """What an operator is to autograd and torch.func where it is called by itself, as exported programs do.

    Left alone, torch would warn and hand on no gradient.
    """
    operator = getattr(getattr(torch.ops, namespace), name).default

    def with_graph(*arguments: Any, **_: Any) -> tuple[Tensor, ...]:
        if name != "forward" or backends.differentiable is None:
            raise NotImplementedError(
                f"{namespace}::{name} has no derivative as an operator: differentiate metattn's functions"
            )
        compiled = "cpu" if arguments[0].device.type == "cpu" else "cuda"
        return backends.differentiable("triton" if namespace == "metattn_triton" else compiled, arguments)

    def autograd(keys: Any, *arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        tensors = [x for x in arguments if isinstance(x, Tensor)]
        needed = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if needed or any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            return with_graph(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments, **more)  # type: ignore[no-any-return]

    library = _DERIVATIVES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    library.impl(name, autograd, "Autograd", with_keyset=True)
    library.impl(name, with_graph, "FuncTorchDynamicLayerFrontMode")


def describe(namespace: str) -> None:
    """Tells torch the shapes, costs and derivatives of a namespace's four operators."""
    for name, fake, flop in (
        ("forward", fake_results, _flop_forward),
        ("jvp", fake_results, _flop_jvp),
        ("vjp", fake_gradients, _flop_vjp),
        ("vjp_jvp", fake_gradients, _flop_vjp_jvp),
    ):
        torch.library.register_fake(f"{namespace}::{name}", fake)
        register_flop_formula(getattr(getattr(torch.ops, namespace), name))(flop)
        _register_derivatives(namespace, name)


def describe_double_backward(namespace: str) -> None:
    """The same for an operator that does the work of jvp and vjp_jvp."""
    torch.library.register_fake(f"{namespace}::double_backward", fake_double_backward)
    register_flop_formula(getattr(torch.ops, namespace).double_backward)(_flop_double_backward)
    _register_derivatives(namespace, "double_backward")
