"""The maps as autograd Functions; each one's derivative is made of others.

    Function                            backward               jvp
    Forward(p) = (o, lse)               Vjp                    Jvp
    Vjp(p, do, dlse) = dp               DoubleBackward         VjpJvp, Vjp of the cotangents' tangents
    Jvp(p, t) = (ot, lt)                VjpJvp, Vjp            the reference, Jvp of t's tangents
    VjpJvp(p, do, dlse, t) = dpt        the reference, VjpJvp  the reference, VjpJvp of all but p's tangents
    DoubleBackward = (Jvp, VjpJvp)      as those               as those

Whatever a map needs again (o, lse, o_lo and their tangents) is an output of one Function and an input of the
next, never a hidden intermediate. As an input it takes no gradient: the maps' formulas are total derivatives,
the gradients of the primals hold its share. Its tangent is what Jvp gave: Vjp's jvp need not compute it.

lse is two numbers a row: a reference score and the log of the sum of exponentials counted from it. To every
derivative the reference is a constant, and the log moves by all that the log-sum-exp does. So dlse and lt are
one number a row, the log's.

The Functions are the operators' derivatives too (metattn.backends.operators), on every level of torch.func.
In plain eager code they are called directly, which spares the operator's dispatch. Wherever torch looks from
below (a transform, a compiler, a recording, a batched backward pass) the operator is called, and calls them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metattn import backends
from metattn import torch_internals as internals
from metattn.backends import load, operators_of, reference
from metattn.higher_order import by_reference, reference_jvp, warn
from metattn.layout import (
    DOUBLE_BACKWARD,
    FORWARD,
    JVP,
    NO_COTANGENTS,
    NO_PRIMALS,
    NO_RESULTS,
    VJP,
    VJP_JVP,
    Arguments,
    Cotangents,
    Layout,
    Needs,
)
from metattn.problem import Constants, Primals, Problem, Results

Tensors = Sequence[Tensor | None]


def attend(problem: Problem, primals: Primals, constants: Constants) -> tuple[Tensor, Tensor]:
    """(o, lse) of a validated call; differentiable to any order, reverse and forward, and under vmap.

    lse [B, Hq, N, 2] is in two parts, whose sum it is (problem.Results).
    """
    o, lse, _ = call_map(FORWARD, problem, Arguments(primals, constants))
    return o, lse


def call_map(layout: Layout, problem: Problem, given: Arguments, needs: Needs | None = None) -> Any:
    """A map of tensors that may be differentiated, recorded or compiled."""
    if torch.compiler.is_compiling():
        # another thread may be the one that compiles
        if torch.compiler.is_dynamo_compiling() and internals.duals_from_outside():
            _refuse_duals()
        if problem.backend == "reference":  # differentiable by itself, and what it does can be compiled
            return layout.run(reference, problem, given, needs)
        return operators_of(problem.backend).call(layout, problem, given, needs)
    tensors = internals.alive(layout.join(given))
    if internals.transformed() or internals.recorded_below() or internals.batched_in_backward(tensors):
        return operators_of(problem.backend).call(layout, problem, layout.split(tensors), needs)
    if not internals.recording(tensors):
        return _compute(layout, problem, needs, tensors)
    return internals.apply_function(FUNCTIONS[layout.name], problem, needs, *tensors)


def _compute(layout: Layout, problem: Problem, needs: Needs | None, tensors: Tensors) -> tuple[Any, ...]:
    """A map on the backend, flat; nothing is differentiated here."""
    found = _plainly(layout, problem, needs, tensors)
    if found is None:
        found = layout.run(load(problem.backend), problem, layout.split(tensors), needs)
    return found


def _plainly(
    layout: Layout, problem: Problem, needs: Needs | None, tensors: Tensors
) -> tuple[Any, ...] | None:
    """The same by an operator of fewer arguments, None where the backend or the call has none."""
    run_plain = load(problem.backend).run_plain
    return None if run_plain is None else run_plain(layout, problem, needs, tensors)


def _refuse_duals() -> None:
    raise NotImplementedError(
        "metattn: dual numbers are given to a compiled function, whose code may lose their tangents; take "
        "torch.func.jvp inside of it, or leave it uncompiled"
    )


# Called while Dynamo traces, which works around what it cannot trace, but not around an error there.
_refuse_duals._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _differentiate(
    layout: Layout, problem: Problem, needs: Needs | None, tensors: Tensors
) -> tuple[Tensor | None, ...]:
    """An operator's results as a function of its tensors."""
    found: tuple[Tensor | None, ...] = internals.apply_function(
        FUNCTIONS[layout.name], problem, needs, *internals.alive(tensors)
    )
    return found


backends.differentiate = _differentiate


def _run(layout: Layout, problem: Problem, needs: Needs | None, tensors: Tensors) -> tuple[Any, ...]:
    """A map on the backend, from within a Function's forward."""
    if not internals.transformed():
        return _compute(layout, problem, needs, tensors)
    found: tuple[Any, ...] | None = None
    if internals.outermost_of_derivatives(tensors):
        with internals.below_autograd():
            found = _plainly(layout, problem, needs, tensors)
    if found is None:
        with internals.outer_levels(), internals.below_autograd():
            found = operators_of(problem.backend).call(layout, problem, layout.split(tensors), needs)
    return found


def _keep(ctx: Any, problem: Problem, needs: Needs | None, tensors: Tensors, more: Tensors = ()) -> None:
    """What both modes need again; `more` for a backward alone."""
    ctx.problem, ctx.needs = problem, needs
    ctx.set_materialize_grads(False)
    kept = internals.countable(tensors)
    ctx.save_for_backward(*kept, *more)
    ctx.save_for_forward(*kept)


def _wanted(layout: Layout, ctx: Any) -> Any:
    """Which gradients are asked for, by group: bools in the tensors' places."""
    return layout.split(ctx.needs_input_grad[2:])


def _of_tensors(gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a backward returns: nothing for the problem and the needs."""
    return (None, None, *gradients)


class Forward(internals.SingleLevelFunction):
    """o, lse, o_lo."""

    @staticmethod
    def forward(problem: Problem, needs: None, *tensors: Any) -> tuple[Any, ...]:
        return _run(FORWARD, problem, needs, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        problem, needs, *tensors = inputs
        _keep(ctx, problem, needs, (*tensors, *output))

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        if do is None and dlse is None:
            return _of_tensors(FORWARD.gradients())
        needs = _wanted(FORWARD, ctx).primals
        given = VJP.split((*ctx.saved_tensors, do, _of_log(dlse)))  # what it was given, and gave
        return _of_tensors(FORWARD.gradients(primals=call_map(VJP, ctx.problem, given, needs)))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Any) -> Any:
        with internals.forward_mode():
            given = _still(_with_results(ctx))
            given_t = given._replace(tangents=FORWARD.split(tangents).primals)
            ot, lt, ot_lo = call_map(JVP, ctx.problem, given_t)
            return _lying_as(given.results, (ot, torch.nn.functional.pad(lt.unsqueeze(-1), (1, 0)), ot_lo))


def _of_log(parts: Tensor | None) -> Tensor | None:
    """The part of a cotangent or tangent of lse that counts: its reference is a constant."""
    return None if parts is None else parts[..., 1]


def _with_results(ctx: Any) -> Arguments:
    """What Forward was given, and gave."""
    *tensors, o, lse, o_lo = ctx.saved_tensors
    return FORWARD.split(tensors)._replace(results=Results(o, lse, o_lo))


class Vjp(internals.SingleLevelFunction):
    """The gradients of the primals, None where not needed."""

    @staticmethod
    def forward(problem: Problem, needs: Needs, *tensors: Any) -> tuple[Any, ...]:
        return _run(VJP, problem, needs, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        problem, needs, *tensors = inputs
        _keep(ctx, problem, needs, tensors, (_own_dq(problem, needs, tensors, output[0]),))

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        *tensors, dq = ctx.saved_tensors
        given = VJP.split(tensors)._replace(tangents=Primals(*tangents))  # type: ignore[arg-type]
        wanted = _wanted(VJP, ctx)
        if not _any(tangents):
            return _of_tensors(VJP.gradients())
        if any(wanted.primals):
            found = _double_backward(ctx.problem, given, wanted.primals, dq)
            results_t, gradients = found[:3], found[3:]
        else:
            results_t, gradients = call_map(JVP, ctx.problem, given), NO_PRIMALS
        return _of_tensors(
            VJP.gradients(
                primals=gradients, cotangents=_along(wanted.cotangents, given.cotangents, results_t)
            )
        )

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *moves: Any) -> Any:
        problem, needs, move = ctx.problem, ctx.needs, VJP.split(moves)
        with internals.forward_mode():
            given = _still(VJP.split(ctx.saved_tensors))
            found: Tensors = NO_PRIMALS
            if _any(move.primals):
                moved = move.results._replace(lse=_of_log(move.results.lse))  # type: ignore[arg-type]
                given_t = given._replace(tangents=move.primals, results_t=moved)
                if move.results.o is None or move.results.lse is None:
                    given_t = given_t._replace(results_t=Results(*call_map(JVP, problem, given_t)))
                found = call_map(VJP_JVP, problem, given_t, needs)
            if _any(move.cotangents):
                along = call_map(VJP, problem, given._replace(cotangents=move.cotangents), needs)
                found = _sum(found, along)
            return _lying_as(_gradients_lie_as(given.primals), found)


class Jvp(internals.SingleLevelFunction):
    """The tangents of o, lse and o_lo."""

    @staticmethod
    def forward(problem: Problem, needs: None, *tensors: Any) -> tuple[Any, ...]:
        return _run(JVP, problem, needs, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        problem, needs, *tensors = inputs
        _keep(ctx, problem, needs, (*tensors, *output))

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        *tensors, o, lse, o_lo = ctx.saved_tensors
        given = JVP.split(tensors)._replace(results_t=Results(o, lse, o_lo))
        return _of_tensors(_of_jvp(JVP, ctx, given, Cotangents(do, dlse)))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *moves: Any) -> Any:
        with internals.forward_mode():
            given = _still(JVP.split(ctx.saved_tensors[: JVP.size]))
            return _lying_as(
                _tangents_lie_as(given.results), _moved_jvp(ctx.problem, given, JVP.split(moves))
            )


class VjpJvp(internals.SingleLevelFunction):
    """The tangents of Vjp's gradients."""

    @staticmethod
    def forward(problem: Problem, needs: Needs, *tensors: Any) -> tuple[Any, ...]:
        return _run(VJP_JVP, problem, needs, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        problem, needs, *tensors = inputs
        _keep(ctx, problem, needs, tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        given = VJP_JVP.split(ctx.saved_tensors)
        return _of_tensors(_of_vjp_jvp(VJP_JVP, ctx, given, Primals(*cotangents)))  # type: ignore[arg-type]

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *moves: Any) -> Any:
        with internals.forward_mode():
            given = _still(VJP_JVP.split(ctx.saved_tensors))
            found = _moved_vjp_jvp(ctx.problem, ctx.needs, given, VJP_JVP.split(moves))
            return _lying_as(_gradients_lie_as(given.primals), found)


class DoubleBackward(internals.SingleLevelFunction):
    """Jvp's results, then VjpJvp's."""

    @staticmethod
    def forward(problem: Problem, needs: Needs, *tensors: Any) -> tuple[Any, ...]:
        return _run(DOUBLE_BACKWARD, problem, needs, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        problem, needs, *tensors = inputs
        # not what it gave: gradients of do and dlse are their owner's, who may change them
        _keep(ctx, problem, needs, tensors)

    @staticmethod
    def backward(
        ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None, *cotangents: Any
    ) -> tuple[Any, ...]:  # type: ignore[override]
        given = DOUBLE_BACKWARD.split(ctx.saved_tensors)
        of_jvp = _of_jvp(DOUBLE_BACKWARD, ctx, given, Cotangents(do, dlse))
        of_vjp_jvp = _of_vjp_jvp(DOUBLE_BACKWARD, ctx, given, Primals(*cotangents))
        return _of_tensors(_sum(of_jvp, of_vjp_jvp))

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *moves: Any) -> Any:
        with internals.forward_mode():
            given, move = _still(DOUBLE_BACKWARD.split(ctx.saved_tensors)), DOUBLE_BACKWARD.split(moves)
            results = _moved_jvp(ctx.problem, given, move)
            move = move._replace(results_t=Results(*results))  # type: ignore[arg-type]
            gradients = _moved_vjp_jvp(ctx.problem, ctx.needs, given, move)
            likes = (*_tangents_lie_as(given.results), *_gradients_lie_as(given.primals))
            return _lying_as(likes, (*results, *gradients))


def _with_results_t(problem: Problem, given: Arguments) -> Arguments:
    """With the results' tangents, found again where they are not among what is given."""
    if given.results_t.o is not None:
        return given
    return given._replace(results_t=Results(*call_map(JVP, problem, given)))


FUNCTIONS: dict[str, Any] = {
    layout.name: function
    for layout, function in (
        (FORWARD, Forward),
        (VJP, Vjp),
        (JVP, Jvp),
        (VJP_JVP, VjpJvp),
        (DOUBLE_BACKWARD, DoubleBackward),
    )
}


# Derivatives that two Functions share.


def _of_jvp(layout: Layout, ctx: Any, given: Arguments, cotangents: Cotangents) -> tuple[Any, ...]:
    """The gradients of ⟨cotangents, Jvp(p, t)⟩: its tangents enter linearly."""
    wanted = _wanted(layout, ctx)
    gradients: Tensors = NO_PRIMALS
    tangent_gradients: Tensors = NO_PRIMALS
    if _any(cotangents):
        given = given._replace(cotangents=cotangents)
        if any(wanted.primals):
            given = _with_results_t(ctx.problem, given)
            gradients = call_map(VJP_JVP, ctx.problem, given, wanted.primals)
        if any(wanted.tangents):
            tangent_gradients = call_map(VJP, ctx.problem, given, wanted.tangents)
    return layout.gradients(primals=gradients, tangents=tangent_gradients)


def _of_vjp_jvp(layout: Layout, ctx: Any, given: Arguments, cotangents: Primals) -> tuple[Any, ...]:
    """The gradients of ⟨cotangents, VjpJvp(p, do, dlse, t)⟩.

    In its tangents VjpJvp is its own transpose (a Hessian is symmetric); else they are the reference's.
    """
    if not _any(cotangents):
        return layout.gradients()
    problem: Problem = ctx.problem
    wanted = _wanted(layout, ctx)
    if any(wanted.primals) or any(wanted.cotangents):  # dear: only what the backward pass goes on to
        wanted = layout.split(internals.demanded(ctx, layout.join(given), ctx.needs_input_grad[2:]))
    tangent_gradients: Tensors = NO_PRIMALS
    if any(wanted.tangents):
        along = given._replace(tangents=cotangents)
        along = along._replace(results_t=Results(*call_map(JVP, problem, along)))
        tangent_gradients = call_map(VJP_JVP, problem, along, wanted.tangents)
    gradients, cotangent_gradients = by_reference(problem, given, cotangents, wanted)
    return layout.gradients(primals=gradients, cotangents=cotangent_gradients, tangents=tangent_gradients)


def _moved_jvp(problem: Problem, given: Arguments, move: Arguments) -> Tensors:
    """Jvp's tangents: along the tangents it is linear; along the primals they are the reference's."""
    found: Tensors = NO_RESULTS
    if _any(move.primals):
        warn("the forward-mode derivative of a forward-mode derivative")
        # the reference computes its own results
        still = move._replace(results=NO_RESULTS, tangents=NO_PRIMALS)
        found = reference_jvp(JVP, problem, None, given, still)
    if _any(move.tangents):
        found = _sum(found, call_map(JVP, problem, given._replace(tangents=move.tangents)))
    return found


def _moved_vjp_jvp(problem: Problem, needs: Needs, given: Arguments, move: Arguments) -> Tensors:
    """VjpJvp's tangents: linear in cotangents and tangents; along the primals the reference's."""
    found: Tensors = NO_PRIMALS
    if _any(move.primals):
        warn("a third derivative")
        # the reference computes its own results
        still = move._replace(
            results=NO_RESULTS, cotangents=NO_COTANGENTS, tangents=NO_PRIMALS, results_t=NO_RESULTS
        )
        found = reference_jvp(VJP_JVP, problem, needs, given, still)
    if _any(move.cotangents):
        along = _with_results_t(problem, given)._replace(cotangents=move.cotangents)
        found = _sum(found, call_map(VJP_JVP, problem, along, needs))
    if _any(move.tangents):
        along = given._replace(tangents=move.tangents)
        # the tangents' results moved along the primals too, where those moved
        along = along._replace(results_t=Results(*call_map(JVP, problem, along)))
        found = _sum(found, call_map(VJP_JVP, problem, along, needs))
    return tuple(found)


def _along(wanted: Any, given: Cotangents, results_t: Sequence[Tensor | None]) -> Tensors:
    """Vjp is linear in its cotangents: their gradients are the results' tangents, where wanted."""
    return [
        tangent if want and cotangent is not None else None
        for want, cotangent, tangent in zip(wanted, given, results_t[:2], strict=True)
    ]


def _own_dq(problem: Problem, needs: Needs, tensors: Tensors, dq: Tensor | None) -> Tensor | None:
    """A copy of the gradient that Vjp gave for q, where a double backward has a use for it.

    The gradient itself is its owner's: clipping, .data, numpy and collectives may change it, counted or not.
    """
    reuses = load(problem.backend).reuses_dq
    # a transform's double backward is an operator, which takes none
    if dq is None or reuses is None or internals.transformed():
        return None
    given = VJP.split(tensors)
    if given.cotangents.do is None:  # of lse alone
        return None
    return dq.detach().clone() if reuses(problem, given.primals, given.constants, needs) else None


def _double_backward(problem: Problem, given: Arguments, needs: Needs, dq: Tensor | None) -> tuple[Any, ...]:
    """Jvp and VjpJvp of Vjp's inputs; with what Vjp gave for q, where no graph is asked for."""
    tensors = DOUBLE_BACKWARD.join(given)
    if dq is None or internals.recording(tensors) or internals.batched_in_backward(tensors):
        found: tuple[Any, ...] = call_map(DOUBLE_BACKWARD, problem, given, needs)
        return found
    results_t, gradients = load(problem.backend).double_backward(
        *(
            problem,
            given.primals,
            given.constants,
            given.results,
            *given.cotangents,
            given.tangents,
            needs,
            dq,
        )
    )
    return (*results_t, *gradients)


# Strides, saved tensors, sums.


def _lying_as(likes: Tensors, tangents: Tensors) -> tuple[Any, ...]:
    """A Function's outputs' tangents with the outputs' strides, those of `likes` (None: contiguous)."""
    pairs = zip(tangents, likes, strict=True)
    return tuple([x if x is None else internals.with_strides_of(x, like) for x, like in pairs])


def _tangents_lie_as(results: Results) -> Results:
    """The tangent of lse is contiguous."""
    return results._replace(lse=None)  # type: ignore[arg-type]


def _gradients_lie_as(primals: Primals) -> Primals:
    """The gradients of bias, sinks and slopes are contiguous."""
    return primals._replace(bias=None, sinks=None, slopes=None)


def _still(given: Arguments) -> Arguments:
    """The saved tensors of a Function whose jvp is taken, without the tangents that are being propagated."""
    return Arguments(
        *(
            type(group)(*(x if x is None else internals.without_tangent(x) for x in group))  # type: ignore[arg-type]
            for group in given
        )
    )


def _any(tensors: Tensors) -> bool:
    return any(tensor is not None for tensor in tensors)


def _sum(xs: Tensors, ys: Tensors) -> tuple[Tensor | None, ...]:
    return tuple([y if x is None else x if y is None else x + y for x, y in zip(xs, ys, strict=True)])
