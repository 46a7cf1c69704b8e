"""The implicit meta-gradient (iMAML): of the inner problem's solution, whatever path led to it.

The solution θ of min L(θ, φ) + λ/2·‖θ − θ_0‖² satisfies ∇θ L + λ(θ − θ_0) = 0. With H = ∂²L/∂θ² and the
cotangent v of θ, x solves (H + λ)x = v, and the cotangents of θ_0 and φ are λx and −(∂²L/∂θ∂φ)ᵀx (Rajeswaran
et al. 2019, arXiv 1909.04630, lemma 1). H is met in products with vectors alone, in
conjugate gradients: reverse mode over the inner gradient, which is computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metattn.meta.explicit import Call
from metattn.meta.inner import InnerLoop
from metattn.meta.optimizers import Params


@dataclass(frozen=True)
class Implicit:
    """Of the solution of the inner problem with a pull towards θ_0: its cost does not depend on the steps.

    The inner loss becomes loss + strength/2·‖θ − θ_0‖², and the derivative is that of its minimum, so it is
    as good as the steps came near that and as conjugate gradients solved (H + strength)·x = v.

    Arguments:
        strength: λ above 0; H + λ must be positive definite where the steps end, or directions of negative
            curvature end the conjugate gradients early.
        iterations: at most so many conjugate gradients, each a Hessian-vector product.
        tolerance: they end where the residual's norm is at most so many times that of v.

    Not differentiated in the optimizer's fields: the solution does not depend on them. Otherwise as for
    :class:`Checkpointed`.
    Errors: ValueError for a strength that is not above 0, for a number of iterations below 1, for an
    optimizer's field that requires a gradient, and for a support that differs from step to step.
    Source: Rajeswaran et al. 2019 (arXiv 1909.04630), algorithm 2.
    """

    strength: float = 1.0
    iterations: int = 10
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        if not self.strength > 0:
            raise ValueError(f"strength: expected a number above 0, got {self.strength}")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations: expected an integer of 1 or more, got {self.iterations!r}")

    def adapted(self, loop: InnerLoop, params: Params, others: Any) -> Params:
        if isinstance(others["support"], list):
            raise ValueError('support: expected one pair of inputs and targets for "implicit", got a list')
        call = Call(loop, params, others)
        tuned = call.tuned([x.requires_grad for x in call.tensors])
        if tuned:
            raise ValueError(
                "optimizer: expected no field that requires a gradient, for the implicit one does not depend "
                "on them"
            )
        outputs = _Solution.apply(call, self, *call.first.values(), *call.tensors)
        return dict(zip(params, outputs, strict=True))

    def steps(self, call: Call, first: Sequence[Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
        """The parameters after the steps on the inner loss with its pull towards θ_0."""
        begin, others, hyper = call.arguments(tensors)
        params = begin
        state = call.loop.with_fields(hyper).init(params)
        for index in range(call.loop.steps):
            if index == 0:
                found = dict(zip(params, first, strict=True))
            else:
                found = call.loop.gradient(params, others, index)
            found = {name: g + self.strength * (params[name] - begin[name]) for name, g in found.items()}
            params, state = call.loop.step(index, params, found, state, hyper)
        return list(params.values())

    def cotangents(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        solution: Sequence[Tensor],
        given: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> list[Tensor | None]:
        """Those of θ_0 and φ."""
        names = list(call.arguments(tensors)[0])
        params = dict(zip(names, solution, strict=True))
        learned = call.learned(needed)
        pull = call.pullback(tensors, learned, 0, params)

        def product(x: list[Tensor]) -> list[Tensor]:
            direction = dict(zip(names, x, strict=True))
            curved, _ = pull(direction)
            return [curved[name] + self.strength * direction[name] for name in names]

        v = [torch.zeros_like(x) if g is None else g for x, g in zip(solution, given, strict=True)]
        x = conjugate_gradients(product, v, iterations=self.iterations, tolerance=self.tolerance)
        totals: dict[int, Tensor] = {place: self.strength * value for place, value in enumerate(x)}
        if learned:
            _, mixed = pull(dict(zip(names, x, strict=True)))
            totals.update({place: -value for place, value in zip(learned, mixed, strict=True)})
        return [totals.get(place) if needed[place] else None for place in range(len(tensors))]


class _Solution(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(call: Call, implicit: Implicit, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(implicit.steps(call, tensors[: call.count], tensors[call.count :]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, ctx.implicit = inputs[:2]
        tensors = inputs[2 + ctx.call.count :]
        ctx.save_for_backward(*tensors, *output)
        ctx.arguments = len(tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, solution = ctx.saved_tensors[: ctx.arguments], ctx.saved_tensors[ctx.arguments :]
        before: int = 2 + ctx.call.count  # the call, the options, and the first gradient, which is a constant
        needed = ctx.needs_input_grad[before:]
        found = ctx.implicit.cotangents(ctx.call, tensors, solution, cotangents, needed)
        return (*(None for _ in range(before)), *found)


def conjugate_gradients(
    product: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], *, iterations: int, tolerance: float
) -> list[Tensor]:
    """x of A·x = v by products with A, symmetric and positive definite; where it is not, the search ends.

    Ends are taken by multiplying with 0, not by leaving the loop: under vmap every task has its own.
    Source: Hestenes and Stiefel 1952.
    """
    x = [torch.zeros_like(value) for value in v]
    residual, direction = v, v
    square = _dot(residual, residual)
    least = tolerance**2 * square
    going = square > least
    for _ in range(iterations):
        turned = product(direction)
        bend = _dot(direction, turned)
        going = going & (bend > 0)
        length = torch.where(going, square / torch.where(going, bend, 1.0), 0.0)
        x = [a + length * b for a, b in zip(x, direction, strict=True)]
        residual = [a - length * b for a, b in zip(residual, turned, strict=True)]
        before, square = square, _dot(residual, residual)
        going = going & (square > least)
        share = torch.where(going, square / torch.where(going, before, 1.0), 0.0)
        direction = [a + share * b for a, b in zip(residual, direction, strict=True)]
    return x


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
