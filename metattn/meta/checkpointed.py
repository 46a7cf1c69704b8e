"""Exact meta-gradients with the memory of one inner step and the parameters' trajectory.

A step is θ' = U(θ, s, g), g = ∇θ L(θ, φ). Going back through it, the cotangent v of g becomes (∂g/∂θ)ᵀ v and
(∂g/∂φ)ᵀ v, by reverse mode over a gradient that is computed again. Nothing need be kept from the way there
but θ, s and g.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from metattn.meta.inner_loop import InnerLoop
from metattn.meta.optimizers import Params
from metattn.meta.recorded_call import RecordedCall


@dataclass(frozen=True)
class Checkpointed:
    """Exact: back through the steps one by one, each computed again, by reverse mode over reverse mode.

    Memory: parameters, gradients and the optimizer's state of every step, and what a single step needs. Time:
    a gradient more for each step than "reverse".

    Arguments: save_every, how many steps apart they are kept; those between are computed once more.
    ``math.isqrt(steps)`` needs the least memory, 1 (the default) the least time.

    Everything that is differentiated must be an argument of :func:`adapt`: ValueError for a loss or an
    optimizer that depends on another tensor that requires a gradient, and for an optimizer whose state is
    not made of floating-point tensors or changes its structure. torch's random numbers, autocast,
    ``use_backend``, ``sdpa_kernel``, torch's function modes and the modules' training flags are in the
    repetition as they were the first time; changing buffers or parameters in place before it raises
    autograd's error.
    """

    save_every: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.save_every, int) or self.save_every < 1:
            raise ValueError(f"save_every: expected an integer of 1 or more, got {self.save_every!r}")

    def adapted(self, loop: InnerLoop, params: Params, others: Any) -> Params:
        if not torch.is_grad_enabled():
            return loop.run(params, others)
        tensors: list[Tensor] = []
        call = _CheckpointedCall(loop, params, others, tensors, self.save_every)
        kept = call.constants(tensors)
        outputs = _Steps.apply(call, len(kept), *kept, *tensors)
        return dict(zip(params, outputs[: len(params)], strict=True))


class _CheckpointedCall(RecordedCall):
    """One call, and what is kept of it."""

    def __init__(
        self, loop: InnerLoop, params: Params, others: Any, tensors: list[Tensor], every: int
    ) -> None:
        super().__init__(loop, params, others, tensors)
        self.every = every
        self.moment: TreeSpec  # the structure of (θ, state)

    def constants(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The last parameters, then what is kept: each gradient (if every is 1), and moments on the way."""
        gradients: list[Tensor] = []
        moments: list[Tensor] = []
        last: Params = {}
        for index, (params, state, found) in enumerate(self.steps(tensors)):
            flat, moment = tree_flatten((params, state))
            self.moment = moment if index == 0 else self.moment
            if moment != self.moment or not all(
                isinstance(x, Tensor) and x.is_floating_point() for x in flat
            ):
                raise ValueError(
                    "optimizer: expected a state of floating-point tensors whose structure never changes, "
                    f'for "checkpointed"; it is {moment} before step {index}. "reverse" takes any'
                )
            if index == self.loop.steps:
                last = params
                break
            if index > 0 and index % self.every == 0:
                moments += flat
            if self.every == 1:
                gradients += found.values()
        return [*last.values(), *gradients, *moments]

    def backward(
        self,
        tensors: Sequence[Tensor],
        outputs: Sequence[Tensor],
        cotangents: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """The cotangents of the arguments that need one."""
        params, _, hyper = self.arguments(tensors)
        learned, tuned = self.learned(needed), self.tuned(needed)
        totals: dict[int, Tensor] = {}

        def add(places: Sequence[int], values: Sequence[Tensor]) -> None:
            for place, value in zip(places, values, strict=True):
                totals[place] = totals[place] + value if place in totals else value

        later = tree_map(torch.zeros_like, (params, self.loop.with_fields(hyper).init(params)))
        later = _plus(later, cotangents[: self.count])
        for index, moment, gradients, kept in self._backwards(tensors, outputs, cotangents):

            def update(moment: Any, gradients: Params, fields: list[Tensor], index: int = index) -> Any:
                return self.step(index, moment, gradients, self.replaced(tensors, tuned, fields)[2])

            pull = vjp(update, moment, gradients, [tensors[place] for place in tuned])[1]
            sooner, direction, of_fields = pull(later)
            add(tuned, of_fields)
            direction = _plus(direction, kept.gradients)
            through = self.pullback(tensors, learned, index, moment[0])
            # used once: its graph goes as it is passed
            curved, mixed = through(direction, retain_graph=torch.is_grad_enabled())
            add(learned, mixed)
            later = _plus(_plus(sooner, list(curved.values())), kept.moment)
        add(range(self.count), list(later[0].values()))
        return [totals.get(place) if needed[place] else None for place in range(len(tensors))]

    def _backwards(
        self, tensors: Sequence[Tensor], outputs: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> Iterator[tuple[int, Any, Params, _Cotangents]]:
        """(index, (θ, state), gradient) of the steps, the last first, with cotangents of what was kept."""
        params, others, hyper = self.arguments(tensors)
        names, count, steps = list(params), self.count, self.loop.steps
        size = self.moment.num_leaves
        first_moment = count + (count * steps if self.every == 1 else 0)

        def moment_at(start: int) -> tuple[Any, Sequence[Tensor | None]]:
            if start == 0:
                return (params, self.loop.with_fields(hyper).init(params)), ()
            place = first_moment + (start // self.every - 1) * size
            return tree_unflatten(outputs[place : place + size], self.moment), cotangents[
                place : place + size
            ]

        for start in reversed(range(0, steps, self.every)):
            moment, of_moment = moment_at(start)
            if self.every == 1:
                part = slice(count * (start + 1), count * (start + 2))
                gradients = dict(zip(names, outputs[part], strict=True))
                yield start, moment, gradients, _Cotangents(of_moment, cotangents[part])
                continue
            passed = []
            for index in range(start, min(start + self.every, steps)):
                with self.replay.again(("gradient", index)):
                    gradients = self.loop.gradient(moment[0], others, index)
                passed.append((index, moment, gradients))
                moment = self.step(index, moment, gradients, hyper)
            while passed:
                index, moment, gradients = passed.pop()
                yield index, moment, gradients, _Cotangents(of_moment if index == start else ())


@dataclass(frozen=True)
class _Cotangents:
    """Cotangents of what a step left among the outputs, in the order of leaves; empty where nothing."""

    moment: Sequence[Tensor | None] = ()
    gradients: Sequence[Tensor | None] = ()


class _Steps(torch.autograd.Function):
    """All steps. What is kept is an output, so that the backward can be differentiated like anything."""

    generate_vmap_rule = True

    @staticmethod
    def forward(call: _CheckpointedCall, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])  # others than the inputs, and the same memory

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.constants, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.constants :], *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        before: int = 2 + ctx.constants
        saved = ctx.saved_tensors
        count = len(saved) - ctx.constants
        needed = ctx.needs_input_grad[before:]
        found = ctx.call.backward(saved[:count], saved[count:], cotangents, needed)
        return (*(None for _ in range(before)), *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(
            'meta_gradient: "checkpointed" has no forward-mode derivative of its result; use "reverse" for '
            "jvp, jacfwd and hessian"
        )


def _plus(tree: Any, terms: Sequence[Tensor | None]) -> Any:
    """The tree with terms added to its first leaves; None adds nothing."""
    leaves, spec = tree_flatten(tree)
    for place, term in enumerate(terms):
        if term is not None:
            leaves[place] = leaves[place] + term
    return tree_unflatten(leaves, spec)
