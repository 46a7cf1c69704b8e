"""The four maps as autograd Functions: Forward, Vjp, Jvp, VjpJvp; each one's derivative is made of others.

    Function                       backward               jvp
    Forward(p) = (o, lse)          Vjp                    Jvp
    Vjp(p, do, dlse) = dp          Jvp, VjpJvp            VjpJvp, Vjp of the cotangents' tangents
    Jvp(p, t) = (ot, lt)           VjpJvp, Vjp            the reference, Jvp of t's tangents
    VjpJvp(p, do, dlse, t) = dpt   the reference, VjpJvp  the reference

Whatever a map needs again (o, lse, o_lo and their tangents) is an output of one Function and an input of the
next, never a hidden intermediate. As an input it takes no gradient: the maps' formulas are total derivatives,
the gradients of the primals hold its share. Its tangent is what Jvp gave: Vjp's jvp need not compute it.

Every Function's vmap folds the mapped dimension into the batch (of packed sequences: into the tokens).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from metattn import backends
from metattn.backends import load, reference
from metattn.problem import Constants, Primals, Problem, Results

Tensors = Sequence[Tensor | None]
_NONE5 = (None,) * 5
_bare_apply = torch._C._FunctionBase.__dict__["apply"]
_unwrap_if_dead = torch._C._functorch.unwrap_if_dead


class HigherOrderWarning(UserWarning):
    """A derivative is taken for which there is no fused map: it costs the reference's time and N×M memory."""


def attend(problem: Problem, primals: Primals, constants: Constants) -> tuple[Tensor, Tensor]:
    """(o, lse) of a validated call; differentiable to any order, reverse and forward, and under vmap."""
    if not torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        o, lse, _ = Forward.apply(problem, *primals, *constants)
    elif torch.compiler.is_exporting():  # an exported program is differentiated where it runs
        o, lse, _ = load(problem.backend).forward(problem, primals, constants)
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in primals):
        o, lse, _ = CompiledForward.apply(problem, *_distinct(primals), *_distinct(constants))
    else:
        o, lse, _ = load(problem.backend).forward(problem, primals, constants)
    return o, lse


def _of_operator(backend: str, arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """A forward operator's results, differentiable as attention's: in a program that was exported."""
    from metattn.backends import operators  # slow to import, and there where operators are

    problem, primals, constants = operators.unflatten(backend, arguments)
    o, lse, o_lo = Forward.apply(problem, *primals, *constants)
    return o, lse, primals.q.new_empty(0) if o_lo is None else o_lo


backends.differentiable = _of_operator


def _distinct(tensors: Tensors) -> Tensors:
    """The tensors, with views for repeats: torch.compile refuses one twice, as in attention(x, x, x)."""
    return [
        t.view_as(t) if t is not None and any(t is before for before in tensors[:index]) else t
        for index, t in enumerate(tensors)
    ]


class _Map(Function):
    """A Function whose apply skips torch's binding of default arguments: 70 µs a call, for none."""

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        # what is saved in a torch.func transform may be used after its end
        alive = [x if x is None or not isinstance(x, Tensor) else _unwrap_if_dead(x) for x in arguments]
        return _bare_apply(cls, *alive)


class Forward(_Map):
    """(problem, 5 primals, 5 constants) → o, lse, o_lo."""

    @staticmethod
    def forward(problem: Problem, *tensors: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        primals, constants = Primals(*tensors[:5]), Constants(*tensors[5:])
        results: Results = load(problem.backend).forward(problem, primals, constants)
        return results.o, results.lse, results.o_lo

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.problem = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        if do is None and dlse is None:
            return (None,) * 11
        gradients = Vjp.apply(ctx.problem, ctx.needs_input_grad[1:6], *ctx.saved_tensors, do, dlse)
        return (None, *gradients, *_NONE5)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Any) -> Any:
        return Jvp.apply(ctx.problem, *ctx.saved_tensors, *tangents[:5])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], problem: Problem, *tensors: Any) -> Any:  # type: ignore[override]
        fold = _Fold(info.batch_size, tensors, in_dims[1:])
        results = Forward.apply(problem, *fold.primals_and_constants())
        return fold.unfold(results), fold.results_axes(results)


class CompiledForward(Function):
    """Forward for torch.compile, whose tracer refuses a Function with a jvp; differentiable once.

    Under torch.func's transforms the tracer meets Forward instead, and leaves the call to eager PyTorch.
    """

    forward = Forward.forward

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.problem = inputs[0]
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, do: Tensor, dlse: Tensor, _: Any) -> tuple[Any, ...]:  # type: ignore[override]
        gradients = Vjp.forward(ctx.problem, ctx.needs_input_grad[1:6], *ctx.saved_tensors, do, dlse)
        return (None, *gradients, *_NONE5)


class Vjp(_Map):
    """(problem, needs, 5 primals, 5 constants, 3 results, do, dlse) → 5 gradients, None where not needed."""

    @staticmethod
    def forward(problem: Problem, needs: reference.Needs, *tensors: Any) -> Primals:
        primals, constants = Primals(*tensors[:5]), Constants(*tensors[5:10])
        results = Results(*tensors[10:13])
        gradients: Primals = load(problem.backend).vjp(
            problem, primals, constants, results, *tensors[13:], needs
        )
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Primals) -> None:
        ctx.problem, ctx.needs = inputs[:2]
        # within torch.func's transforms a double backward is made of Jvp and VjpJvp: it needs none
        alone = not torch._C._are_functorch_transforms_active()
        reuses = getattr(load(ctx.problem.backend), "REUSES_DQ", False)
        ctx.dq = _Kept(output[0]) if alone and reuses else None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad[2:7]
        if all(tangent is None for tangent in tangents) or not any(ctx.needs_input_grad):
            return (None,) * 17
        saved = ctx.saved_tensors
        do, dlse = saved[13:]
        results_t: Any
        if any(needs):
            results_t, gradients = _double_backward(ctx.problem, needs, saved, tangents, ctx.dq)
        else:
            results_t, gradients = Jvp.apply(ctx.problem, *saved[:13], *tangents), _NONE5
        return (
            *(None, None, *gradients, *_NONE5, None, None, None),
            results_t[0] if do is not None and ctx.needs_input_grad[15] else None,
            results_t[1] if dlse is not None and ctx.needs_input_grad[16] else None,
        )

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Any) -> Any:
        problem, needs, saved = ctx.problem, ctx.needs, ctx.saved_tensors
        primals, results_t, (do, dlse) = tangents[:5], tangents[10:13], tangents[13:]
        along_primals = along_cotangents = _NONE5
        if _any(primals):
            if results_t[0] is None or results_t[1] is None:
                results_t = Jvp.apply(problem, *saved[:13], *primals)
            along_primals = VjpJvp.apply(problem, needs, *saved, *primals, *results_t)
        if do is not None or dlse is not None:
            along_cotangents = Vjp.apply(problem, needs, *saved[:13], do, dlse)
        return _sum(along_primals, along_cotangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: Problem, needs: reference.Needs, *tensors: Any
    ) -> Any:  # type: ignore[override]
        fold = _Fold(info.batch_size, tensors, in_dims[2:], needs=needs)
        gradients = Vjp.apply(problem, needs, *fold.primals_and_constants(), *fold.rows(10, 15))
        return fold.unfold_gradients(gradients), (fold.axis, fold.axis, fold.axis, 0, 0)


class Jvp(_Map):
    """(problem, 5 primals, 5 constants, 3 results, 5 tangents) → ot, lt, ot_lo."""

    @staticmethod
    def forward(problem: Problem, *tensors: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        primals, constants = Primals(*tensors[:5]), Constants(*tensors[5:10])
        results, tangents = Results(*tensors[10:13]), Primals(*tensors[13:])
        results_t: Results = load(problem.backend).jvp(problem, primals, constants, results, tangents)
        return results_t.o, results_t.lse, results_t.o_lo

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.problem = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[1:], *output)
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dlse: Tensor | None, _: None) -> tuple[Any, ...]:  # type: ignore[override]
        needs, tangent_needs = ctx.needs_input_grad[1:6], ctx.needs_input_grad[14:]
        if do is None and dlse is None:
            return (None,) * 19
        problem, saved = ctx.problem, ctx.saved_tensors
        gradients = tangent_gradients = _NONE5
        if any(needs):
            gradients = VjpJvp.apply(problem, needs, *saved[:13], do, dlse, *saved[13:])
        if any(tangent_needs):
            tangent_gradients = Vjp.apply(problem, tangent_needs, *saved[:13], do, dlse)
        return (None, *gradients, *_NONE5, None, None, None, *tangent_gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, *moves: Any) -> Any:
        """Along the tangents Jvp is linear; along the primals it is the reference's."""
        problem, saved = ctx.problem, ctx.saved_tensors
        along_primals: Tensors = (None, None, None)
        along_tangents: Tensors = (None, None, None)
        if _any(moves[:5]):
            _warn("the forward-mode derivative of a forward-mode derivative")

            def function(*x: Any) -> tuple[Tensor, ...]:
                primals, constants, tangents = Primals(*x[:5]), Constants(*x[5:10]), Primals(*x[13:])
                return reference.jvp(problem, primals, constants, Results(*x[10:13]), tangents)[:2]

            along_primals = (*_reference_jvp(function, saved, (*moves[:5], *(None,) * 13)), None)
        if _any(moves[13:]):
            along_tangents = Jvp.apply(problem, *saved[:13], *moves[13:])
        return _sum(along_primals, along_tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], problem: Problem, *tensors: Any) -> Any:  # type: ignore[override]
        fold = _Fold(info.batch_size, tensors, in_dims[1:], tangents=13)
        tangents = fold.primals(13)
        results_t = Jvp.apply(problem, *fold.primals_and_constants(), *fold.rows(10, 13), *tangents)
        return fold.unfold(results_t), fold.results_axes(results_t)


class VjpJvp(_Map):
    """(problem, needs, 5 primals, 5 constants, 3 results, do, dlse, 5 tangents, their 3) → Vjp's tangents."""

    @staticmethod
    def forward(problem: Problem, needs: reference.Needs, *tensors: Any) -> Primals:
        primals, constants = Primals(*tensors[:5]), Constants(*tensors[5:10])
        results, tangents = Results(*tensors[10:13]), Primals(*tensors[15:20])
        gradients: Primals = load(problem.backend).vjp_jvp(
            *(problem, primals, constants, results, *tensors[13:15], tangents, Results(*tensors[20:]), needs)
        )
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Primals) -> None:
        ctx.problem, ctx.needs = inputs[:2]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        """In its tangents VjpJvp is its own transpose (a Hessian is symmetric); else the reference's."""
        problem, saved, needed = ctx.problem, ctx.saved_tensors, ctx.needs_input_grad[2:]
        if not _any(cotangents):
            return (None,) * 25
        gradients: list[Tensor | None] = [None] * 23
        if any(needed[15:20]):
            results_t = Jvp.apply(problem, *saved[:13], *cotangents)
            gradients[15:20] = VjpJvp.apply(problem, needed[15:20], *saved[:15], *cotangents, *results_t)
        wanted = [i for i in (0, 1, 2, 3, 4, 13, 14) if needed[i]]
        if wanted:
            _warn("a third derivative")
            function = _vjp_jvp(problem, tuple(c is not None for c in cotangents))
            _, pullback = _reference_vjp(function, saved, wanted)
            for i, gradient in zip(wanted, pullback([c for c in cotangents if c is not None]), strict=True):
                gradients[i] = gradient
        return (None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *moves: Any) -> Any:
        _warn("a third derivative")
        results = (10, 11, 12, 20, 21, 22)  # the reference computes its own
        moves = tuple(None if i in results else move for i, move in enumerate(moves))
        tangents = iter(_reference_jvp(_vjp_jvp(ctx.problem, ctx.needs), ctx.saved_tensors, moves))
        return tuple(next(tangents) if need else None for need in ctx.needs)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], problem: Problem, needs: reference.Needs, *tensors: Any
    ) -> Any:  # type: ignore[override]
        fold = _Fold(info.batch_size, tensors, in_dims[2:], needs=needs, tangents=15)
        gradients = VjpJvp.apply(
            problem,
            needs,
            *fold.primals_and_constants(),
            *fold.rows(10, 15),
            *fold.primals(15),
            *fold.rows(20, 23),
        )
        return fold.unfold_gradients(gradients), (fold.axis, fold.axis, fold.axis, 0, 0)


class _Kept:
    """An output that a backend may use again, while its owner has not changed it.

    It is no saved tensor: those that change are an error, and gradients often do, as when they are clipped.
    """

    def __init__(self, output: Tensor | None) -> None:
        self.tensor: Tensor | None = None
        # of an inference tensor nobody takes a derivative, and it counts no changes
        if output is not None and not output.is_inference():
            self.tensor, self.version = output.detach(), output._version

    def get(self) -> Tensor | None:
        return self.tensor if self.tensor is not None and self.tensor._version == self.version else None


def _double_backward(
    problem: Problem, needs: reference.Needs, saved: Tensors, tangents: Tensors, dq: _Kept | None
) -> tuple[Any, Any]:
    """Jvp and VjpJvp of Vjp's inputs; in one go where no graph is asked for and the backend can."""
    together = getattr(load(problem.backend), "double_backward", None)
    plain = not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )
    if together is None or not plain:
        results_t = Jvp.apply(problem, *saved[:13], *tangents)
        return results_t, VjpJvp.apply(problem, needs, *saved, *tangents, *results_t)
    primals, constants, results = Primals(*saved[:5]), Constants(*saved[5:10]), Results(*saved[10:13])  # type: ignore[arg-type]
    kept = None if dq is None else dq.get()
    return together(problem, primals, constants, results, *saved[13:], Primals(*tangents), needs, kept)  # type: ignore[no-any-return, arg-type]


# Beyond the fused maps.


def _warn(what: str) -> None:
    warnings.warn(
        f"{what} of attention has no fused map: it goes through the reference, in eager PyTorch with N×M "
        "matrices in memory",
        HigherOrderWarning,
        stacklevel=3,
    )


def _vjp_jvp(problem: Problem, needs: Sequence[bool]) -> Callable[..., tuple[Tensor, ...]]:
    """The reference's vjp_jvp as a function of all of VjpJvp's tensors; the needed results only."""

    def function(*x: Any) -> tuple[Tensor, ...]:
        primals, constants, tangents = Primals(*x[:5]), Constants(*x[5:10]), Primals(*x[15:20])
        results, results_t = Results(*x[10:13]), Results(*x[20:])
        gradients = reference.vjp_jvp(
            *(problem, primals, constants, results, *x[13:15], tangents, results_t, tuple(needs))
        )
        return tuple(gradient for gradient in gradients if gradient is not None)

    return function


def _reference_vjp(
    function: Callable[..., tuple[Tensor, ...]], values: Tensors, wanted: Sequence[int]
) -> tuple[tuple[Tensor, ...], Callable[[Sequence[Tensor]], tuple[Tensor, ...]]]:
    """A function's results, and the map from their cotangents to the gradients of the wanted values."""

    def of_wanted(*x: Tensor) -> tuple[Tensor, ...]:
        arguments = list(values)
        for i, value in zip(wanted, x, strict=True):
            arguments[i] = value
        return function(*arguments)

    results, pullback = torch.func.vjp(of_wanted, *(values[i] for i in wanted))[:2]
    return results, lambda cotangents: pullback(tuple(cotangents))


def _reference_jvp(
    function: Callable[..., tuple[Tensor, ...]], values: Tensors, moves: Tensors
) -> tuple[Tensor, ...]:
    """A function's tangents, as the transpose of its transpose, inside a Function's jvp."""
    moving = [i for i, move in enumerate(moves) if move is not None]
    with _forward_mode():
        values = [x if x is None else forward_ad.unpack_dual(x).primal for x in values]
        results, pullback = _reference_vjp(function, values, moving)
        zeros = [torch.zeros_like(result) for result in results]
        _, pushforward = _reference_vjp(lambda *cotangents: pullback(cotangents), zeros, range(len(zeros)))
        return pushforward([move for move in moves if move is not None])


def _forward_mode() -> Any:
    """Inside a Function's jvp, forward mode is off: plain operations would lose the tangents of an outer jvp.

    With it on again, a saved tensor must lose its tangent of this level, the one that is being propagated.
    """
    return forward_ad._set_fwd_grad_enabled(True)


def _any(tensors: Tensors) -> bool:
    return any(tensor is not None for tensor in tensors)


def _sum(xs: Tensors, ys: Tensors) -> tuple[Tensor | None, ...]:
    with _forward_mode():
        return tuple(y if x is None else x if y is None else x + y for x, y in zip(xs, ys, strict=True))


# vmap.


class _Fold:
    """Folds a mapped dimension of size X into the batch dimension: [X, B, …] → [X·B, …].

    Packed sequences: [1, H, total, …] mapped → [1, H, X·total, …], and X times as many sequences.
    """

    def __init__(
        self,
        size: int,
        tensors: Sequence[Any],
        in_dims: Sequence[Any],
        needs: Sequence[bool] = (False,) * 5,
        tangents: int | None = None,
    ) -> None:
        self.size, self.tensors, self.in_dims = size, tensors, in_dims
        self.packed = tensors[8] is not None
        if in_dims[8] is not None or in_dims[9] is not None:
            raise NotImplementedError(
                "cu_seqlens: expected the same for every example of a vmap, got mapped ones"
            )
        self.axis = 2 if self.packed else 0
        self.batch = tensors[8].shape[0] - 1 if self.packed else self._example_shape(0)[0]
        # bias and sinks stay unexpanded where one serves all; a gradient or a tangent needs one for each
        self.expanded = [False] * 5
        for i in (3, 4):
            pair = [i] if tangents is None else [i, i + tangents]
            self.expanded[i] = needs[i] or any(
                tensors[j] is not None and (in_dims[j] is not None or tensors[j].shape[0] != 1) for j in pair
            )

    def _example_shape(self, i: int) -> list[int]:
        shape = list(self.tensors[i].shape)
        if self.in_dims[i] is not None:
            del shape[self.in_dims[i]]
        return shape

    def _row(self, i: int) -> Tensor | None:
        """q, k, v, o, lse and what is shaped like them."""
        x, dim = self.tensors[i], self.in_dims[i]
        if x is None:
            return None
        if dim is None:
            shape = x.shape
            x = x.unsqueeze(self.axis).expand(*shape[: self.axis], self.size, *shape[self.axis :])
        else:
            x = x.movedim(dim, self.axis)
        folded: Tensor = x.flatten(self.axis, self.axis + 1)
        return folded

    def _shared(self, i: int, expanded: bool) -> Tensor | None:
        """bias, sinks, mask, slopes, rng: the first dimension is the batch or 1."""
        x, dim = self.tensors[i], self.in_dims[i]
        if x is None or not expanded:
            return x  # type: ignore[no-any-return]
        x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
        if x.shape[0] == x.shape[1] == 1:  # one for all examples: no copy
            return x[0].expand(self.size * self.batch, *x.shape[2:])  # type: ignore[no-any-return]
        return x.expand(self.size, self.batch, *x.shape[2:]).flatten(0, 1)  # type: ignore[no-any-return]

    def _cu_seqlens(self, i: int, tokens: int) -> Tensor | None:
        cu = self.tensors[i]
        if cu is None:
            return None
        first = torch.arange(self.size, device=cu.device, dtype=cu.dtype) * tokens
        end = torch.full((1,), self.size * tokens, device=cu.device, dtype=cu.dtype)
        return torch.cat([(cu[:-1] + first.unsqueeze(1)).flatten(), end])

    def rows(self, start: int, end: int) -> list[Tensor | None]:
        return [self._row(i) for i in range(start, end)]

    def primals(self, start: int = 0) -> list[Tensor | None]:
        return [
            *self.rows(start, start + 3),
            self._shared(start + 3, self.expanded[3]),
            self._shared(start + 4, self.expanded[4]),
        ]

    def primals_and_constants(self) -> list[Tensor | None]:
        constants = []
        for i in (5, 6, 7):
            x = self.tensors[i]
            alone = x is None or (self.in_dims[i] is None and x.shape[0] == 1 and i != 7)
            constants.append(self._shared(i, not alone))
        tokens = [self._cu_seqlens(8 + i, self._example_shape(i)[2]) for i in (0, 1)]
        return [*self.primals(), *constants, *tokens]

    def unfold(self, results: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        return tuple(
            None
            if x is None
            else x.unflatten(self.axis, (self.size, x.shape[self.axis] // max(self.size, 1)))
            for x in results
        )

    def results_axes(self, results: Sequence[Tensor | None]) -> tuple[int | None, ...]:
        return tuple(None if x is None else self.axis for x in results)

    def unfold_gradients(self, gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        shared = []
        for i in (3, 4):
            x = gradients[i]
            if x is not None:
                x = x.unflatten(0, (self.size, self.batch))
                if self._example_shape(i)[0] == 1 and self.batch != 1:
                    x = x.sum(1, keepdim=True)
            shared.append(x)
        return (*self.unfold(gradients[:3]), *shared)
