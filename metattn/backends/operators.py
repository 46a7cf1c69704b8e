"""The maps as operators: their schemas, shapes (fakes), costs, and derivatives, wherever torch meets them.

The compiled operators torch.ops.metattn.* (csrc/ops.cpp), the Triton backend's torch.ops.metattn_triton.* and
the reference's torch.ops.metattn_reference.* take the same; the compiled ones a keyword `tf32` besides.

An operator is differentiable by itself: it carries a kernel for autograd (reverse and forward mode, on every
level of torch.func), one for torch.func.vmap and one for the older vmap of is_grads_batched. Those make the
nodes of metattn.autodiff, which stands above the backends and says so by `backends.differentiate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from metattn import backends
from metattn import torch_internals as internals
from metattn.backends import inductor, plain, reference
from metattn.backends.batching import Fold
from metattn.backends.maps import Maps
from metattn.layout import MAPS, Arguments, Layout, Needs
from metattn.problem import Primals, Problem, problem_of

ROUNDED = (torch.bfloat16, torch.float16)  # dtypes of results that are computed in a wider one
CAUSAL = (None, "top-left", "bottom-right")
SETTINGS = (
    "int max_q, int max_k, float scale, float softcap, int causal, int window_left, int window_right, "
    "float dropout_p"
)
GROUPS = {
    "primals": "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? slopes",
    "constants": "Tensor? mask, Tensor? rng, Tensor? cu_q, Tensor? cu_k",
    "results": "Tensor o, Tensor lse, Tensor? o_lo",
    "cotangents": "Tensor? do_, Tensor? dlse",
    "tangents": "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias, Tensor? tsinks, Tensor? tslopes",
    "results_t": "Tensor ot, Tensor lt, Tensor? ot_lo",
}
FIRST = 10  # primals and constants come first, then the settings
CALL = FIRST + SETTINGS.count(",") + 1


def schema(layout: Layout) -> str:
    """A map's arguments and results, as torch writes them."""
    arguments = [
        GROUPS["primals"],
        GROUPS["constants"],
        SETTINGS,
        *(GROUPS[group] for group in layout.groups[2:]),
    ]
    if layout.gives_gradients:
        arguments.append("int needs")
    return f"({', '.join(arguments)}) -> ({', '.join(['Tensor'] * layout.size_given)})"


def number_of(needs: Needs) -> int:
    """Needs as operators take them."""
    return sum([1 << index for index, need in enumerate(needs) if need])


def arguments_of(layout: Layout, problem: Problem, given: Arguments, needs: Needs | None) -> tuple[Any, ...]:
    """What a map's operator takes."""
    tensors = layout.join(given)
    settings = (
        problem.max_q,
        problem.max_k,
        problem.scale,
        0.0 if problem.softcap is None else problem.softcap,
        CAUSAL.index(problem.causal),
        *problem.window,
        problem.dropout_p,
    )
    last = () if needs is None else (number_of(needs),)
    return (*tensors[:FIRST], *settings, *tensors[FIRST:], *last)


def parsed(
    layout: Layout, backend: str, arguments: Sequence[Any]
) -> tuple[Problem, tuple[Any, ...], Needs | None]:
    """The inverse; the tensors flat."""
    max_q, max_k, scale, softcap, causal, left, right, dropout_p = arguments[FIRST:CALL]
    problem = problem_of(
        scale, softcap or None, CAUSAL[causal], (left, right), dropout_p, max_q, max_k, backend
    )
    needs = None
    end = layout.size + CALL - FIRST
    if layout.gives_gradients:
        needs = tuple([bool(arguments[end] >> index & 1) for index in range(len(Primals._fields))])
    return problem, (*arguments[:FIRST], *arguments[CALL:end]), needs  # type: ignore[return-value]


def shortened(layout: Layout, arguments: Sequence[Any]) -> tuple[Any, ...] | None:
    """The same as the map's plain operator takes it; None where the call has options."""
    _, _, scale, softcap, causal, left, right, dropout_p = arguments[FIRST:CALL]
    if (softcap, left, right, dropout_p) != (0.0, -1, -1, 0.0):
        return None
    end = layout.size + CALL - FIRST
    needs = arguments[end] if layout.gives_gradients else None
    tensors = (*arguments[:FIRST], *arguments[CALL:end])
    return plain.arguments_of(layout, tensors, scale, causal, needs)


def found_by(
    layout: Layout, q: Tensor, needs: Needs | None, tensors: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """What an operator returned, with None for the empty tensors that stand for nothing.

    Where o is not rounded there is no o_lo; gradients that are not needed are not there.
    """
    found: list[Tensor | None] = list(tensors)
    if layout.gives_results and q.dtype not in ROUNDED:
        found[2] = None
    if needs is not None:
        for index, need in enumerate(needs, len(found) - len(needs)):
            if not need:
                found[index] = None
    return tuple(found)


def run_plain(
    layout: Layout, problem: Problem, needs: Needs | None, tensors: Sequence[Any]
) -> tuple[Any, ...] | None:
    """What the map gives, flat, without derivatives, by its plain operator; None where that does not serve.

    Who watches the operators that are called sees the full ones.
    """
    if not problem.is_plain or tensors[0].dtype not in plain.DTYPES or internals.watched(tensors):
        return None
    number = None if needs is None else number_of(needs)
    causal = CAUSAL.index(problem.causal)
    arguments = plain.arguments_of(layout, tensors, problem.scale, causal, number)
    if arguments is None:
        return None
    found = plain.spread(layout, _plain_operator(layout.name)(*arguments))
    return found if number in (None, plain.NEEDS - 1) else found_by(layout, tensors[0], needs, found)


@functools.cache
def _plain_operator(name: str) -> Any:
    return getattr(getattr(torch.ops, inductor.bare(plain.NAMESPACE)), plain.PREFIX + name).default


def allows_tf32() -> bool:
    """Whether torch may take float32 products of GPUs in TF32."""
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


# Dynamo cannot trace how torch answers. Its guards know the answer: where that changes, it compiles again.
allows_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Operators(Maps):
    """A namespace's operators; as a backend's functions they have no derivatives of their own."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace

    def keywords(self) -> dict[str, Any]:
        """What the operators take besides."""
        return {}

    def call(
        self, layout: Layout, problem: Problem, given: Arguments, needs: Needs | None = None
    ) -> tuple[Any, ...]:
        """What the map gives, flat, by its operator, which carries the derivatives."""
        operator = getattr(getattr(torch.ops, self.namespace), layout.name).default
        tensors = operator(*arguments_of(layout, problem, given, needs), **self.keywords())
        return found_by(layout, given.primals.q, needs, tensors)

    def run(
        self,
        layout: Layout,
        problem: Problem,
        given: Arguments,
        needs: Needs | None,
        dq: Tensor | None = None,
    ) -> tuple[Any, ...]:
        with internals.below_autograd():
            return self.call(layout, problem, given, needs)


# Operators written in Python.


def define(namespace: str, backend: str, maps: Any) -> None:
    """Operators of a backend's functions (maps.forward, …), for every device, and their bare twins."""
    for layout in MAPS.values():
        kernel = _kernel(layout, backend, maps)
        for each in (namespace, inductor.bare(namespace)):
            _library(each).define(layout.name + schema(layout))
            _library(each).impl(layout.name, kernel, "CompositeExplicitAutograd")


def _kernel(layout: Layout, backend: str, maps: Any) -> Callable[..., tuple[Tensor, ...]]:
    def kernel(*arguments: Any) -> tuple[Tensor, ...]:
        problem, tensors, needs = parsed(layout, backend, arguments)
        found = layout.run(maps, problem, layout.split(tensors), needs)
        return _tensors(found, arguments[0])

    return kernel


@functools.cache
def of_reference() -> Operators:
    """The reference's, for whom its functions are not enough: transforms of torch.func, recordings."""
    define("metattn_reference", "reference", reference)
    describe("metattn_reference", lambda q: "reference")
    return Operators("metattn_reference")


def _tensors(found: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: empty ones for what there is not."""
    return tuple([like.new_empty(0) if t is None else t for t in found])


# Shapes.


def _fake_results(layout: Layout, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, v = arguments[0], arguments[2]
    width = v.shape[3]
    o = torch.empty_like(q) if width == q.shape[3] else q.new_empty(*q.shape[:3], width)
    o_lo = q.new_empty(o.shape, dtype=torch.bfloat16) if q.dtype in ROUNDED else q.new_empty(0)
    parts = () if layout.gives_tangents else (2,)
    return o, q.new_empty((*q.shape[:3], *parts), dtype=torch.float64), o_lo


def _fake_gradients(*arguments: Any, **_: Any) -> tuple[Tensor, ...]:
    needs = arguments[-1]
    primals = Primals(*arguments[: len(Primals._fields)])

    def gradient(index: int, primal: Tensor, contiguous: bool) -> Tensor:
        if not needs >> index & 1:
            return primals.q.new_empty(0)
        return primal.new_empty(primal.shape) if contiguous else torch.empty_like(primal)

    return tuple(gradient(index, primal, index > 2) for index, primal in enumerate(primals))  # type: ignore[arg-type]


def _fake(namespace: str, layout: Layout) -> Callable[..., tuple[Tensor, ...]]:
    def fake(*arguments: Any, **_: Any) -> tuple[Tensor, ...]:
        inductor.prepare(namespace, shortened)
        results = _fake_results(layout, *arguments) if layout.gives_results else ()
        return (*results, *(_fake_gradients(*arguments) if layout.gives_gradients else ()))

    return fake


# Costs.


def _flops(layout: Layout) -> Callable[..., int]:
    """FLOP of products with the N×M matrix: 2·B·H·N·M times the width, masked entries counted too."""

    def count(*arguments: Any, **_: Any) -> int:  # shapes stand for tensors in flop formulas
        problem, tensors, needs = parsed(layout, "", arguments)
        given: Any = layout.split(tensors)
        (batch, heads, rows, d), keys, dv = given.primals.q, given.primals.k[2], given.primals.v[3]
        if given.constants.cu_q is not None:  # packed: every sequence at most max_q × max_k
            batch, rows, keys = given.constants.cu_q[0] - 1, problem.max_q, problem.max_k
        of_d, of_dv = 0, 0
        if layout.name == "forward":
            of_d, of_dv = 1, 1
        if layout.name == "vjp":
            of_d, of_dv = _products_of_vjp(given, needs)
        if layout.name in ("jvp", "double_backward"):
            of_d, of_dv = _products_of_jvp(given)
        if layout.name in ("vjp_jvp", "double_backward"):  # however many products are shared
            more_d, more_dv = _products_of_vjp_jvp(given, needs)
            of_d, of_dv = of_d + more_d, of_dv + more_dv
        return int(2 * batch * heads * rows * keys * (of_d * d + of_dv * dv))

    return count


def _products_of_vjp(given: Arguments, needs: Any) -> tuple[int, int]:
    """S; dP where there is a dO; then one product a gradient."""
    has_do = given.cotangents.do is not None
    return 1 + needs[0] + needs[1], has_do + (has_do and needs[2])


def _products_of_jvp(given: Arguments) -> tuple[int, int]:
    there = Primals(*(tangent is not None for tangent in given.tangents))  # type: ignore[arg-type]
    moves_scores = there.q or there.k or there.bias or there.slopes
    return 1 + there.q + there.k, moves_scores + there.v  # type: ignore[operator, return-value]


def _products_of_vjp_jvp(given: Arguments, needs: Any) -> tuple[int, int]:
    has_do = given.cotangents.do is not None
    has_q, has_k, has_v = (tangent is not None for tangent in given.tangents[:3])
    of_d = 1 + has_q + has_k + needs[0] * (1 + has_k) + needs[1] * (1 + has_q)
    return of_d, has_do * (1 + has_v + needs[2])


# Derivatives.

_LIBRARIES: dict[str, torch.library.Library] = {}  # what a Library registers ends with it


def _library(namespace: str) -> torch.library.Library:
    if namespace not in _LIBRARIES:
        _LIBRARIES[namespace] = torch.library.Library(namespace, "FRAGMENT")
    return _LIBRARIES[namespace]


def _register_derivatives(namespace: str, layout: Layout, backend_of: Callable[[Tensor], str]) -> None:
    operator = getattr(getattr(torch.ops, namespace), layout.name).default

    def autograd(*arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        """A node where a derivative is asked for, on the level of torch.func that is at work."""
        if not internals.recording(arguments):
            with internals.below_autograd():
                return operator(*arguments, **more)  # type: ignore[no-any-return]
        problem, tensors, needs = parsed(layout, backend_of(arguments[0]), arguments)
        found = backends.differentiate(layout, problem, needs, tensors)
        return _tensors(found, arguments[0])

    def called(problem: Problem, tensors: Sequence[Any], needs: Needs | None, more: dict[str, Any]) -> Any:
        return operator(*arguments_of(layout, problem, layout.split(tensors), needs), **more)

    def vmap(*arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        """torch.func.vmap's batching rule."""
        problem, tensors, needs = parsed(layout, "", arguments)
        bare, dims, level = internals.unbatched(tensors)
        # nobody further out asks for a derivative
        alone = level == 1 and not internals.recording(bare)
        plainly = alone and namespace == plain.NAMESPACE and bare[0].device.type == "cpu"

        def of_folded(tensors: Sequence[Any]) -> tuple[Tensor, ...]:
            found = run_plain(layout, problem, needs, tensors) if plainly else None
            return called(problem, tensors, needs, more) if found is None else _tensors(found, tensors[0])

        with internals.beyond_vmap():
            found, places = _folded(layout, bare, dims, needs, of_folded)
        return tuple(map(internals.batched, found, places, [level] * len(found)))

    def legacy_vmap(*arguments: Any, **more: Any) -> tuple[Tensor, ...]:
        """The same for is_grads_batched, whose levels an operator meets all at once."""
        problem, tensors, needs = parsed(layout, "", arguments)

        def of_levels(level: int, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
            if level == 0:
                return called(problem, tensors, needs, more)  # type: ignore[no-any-return]
            bare, dims = _legacy_unbatched(tensors, level)
            found, places = _folded(layout, bare, dims, needs, lambda x: of_levels(level - 1, x))
            return tuple(
                # in front in memory too: forward mode writes to a tangent through strides
                x if place is None else internals.legacy_batched(x.movedim(place, 0).contiguous(), level)
                for x, place in zip(found, places, strict=True)
            )

        depth = internals.legacy_depth()
        if depth == 0:
            raise NotImplementedError(
                "is_grads_batched: expected a batched backward pass outside of torch.func's transforms, got "
                "what one left within, which torch cannot read itself; use torch.func.vmap there"
            )
        return of_levels(depth, tensors)

    library = _library(namespace)
    library.impl(layout.name, autograd, "Autograd")
    library.impl(layout.name, vmap, "FuncTorchBatched")
    library.impl(layout.name, legacy_vmap, "Batched")


def _folded(
    layout: Layout,
    bare: Sequence[Any],
    dims: Sequence[int | None],
    needs: Needs | None,
    call: Callable[[Sequence[Any]], Sequence[Tensor]],
) -> tuple[Sequence[Tensor], Sequence[int | None]]:
    """What a map gives for tensors of which some are mapped over, and where that dimension is."""
    sizes: list[int] = [x.shape[dim] for x, dim in zip(bare, dims, strict=True) if dim is not None]
    if not sizes:
        found = call(bare)
        return found, [None] * len(found)
    fold = Fold(layout, sizes[0], bare, dims, needs)
    return fold.unfold(call(layout.join(fold.given)))


def _legacy_unbatched(tensors: Sequence[Any], level: int) -> tuple[list[Any], list[int | None]]:
    """Tensors without a level's dimension, and where it was.

    A tensor with that dimension of size 1 is taken for one without: what comes of it is the same.
    """
    bare: list[Any] = []
    dims: list[int | None] = []
    for x in tensors:
        mapped = internals.legacy_unbatched(x, level) if internals.batched_in_backward([x]) else None
        is_mapped = mapped is not None and mapped.shape[0] != 1
        bare.append(mapped if is_mapped else x if mapped is None else mapped[0])
        dims.append(0 if is_mapped else None)
    return bare, dims


def describe(namespace: str, backend_of: Callable[[Tensor], str]) -> None:
    """Tells torch the shapes, costs and derivatives of a namespace's operators; the shapes of their twins."""
    twins = inductor.bare(namespace)
    for layout in MAPS.values():
        fake = _fake(namespace, layout)
        for each in (namespace, twins):
            torch.library.register_fake(f"{each}::{layout.name}", fake)
        _library(twins).impl(layout.name, torch.library.fallthrough_kernel, "Autograd")
        if namespace == plain.NAMESPACE:
            short = plain.PREFIX + layout.name
            torch.library.register_fake(f"{twins}::{short}", plain.fake(layout, fake))
            _library(twins).impl(short, torch.library.fallthrough_kernel, "Autograd")
        register_flop_formula(getattr(getattr(torch.ops, namespace), layout.name))(_flops(layout))
        _register_derivatives(namespace, layout, backend_of)
