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

from metattn.meta.inner_loop import InnerLoop
from metattn.meta.optimizers import Params
from metattn.meta.recorded_call import RecordedCall, is_recorded


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
        if not isinstance(self.strength, (int, float)) or not self.strength > 0:
            raise ValueError(f"strength: expected a number above 0, got {self.strength}")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations: expected an integer of 1 or more, got {self.iterations!r}")
        if not isinstance(self.tolerance, (int, float)) or not self.tolerance >= 0:
            raise ValueError(f"tolerance: expected a number of 0 or more, got {self.tolerance}")

    def adapted(self, loop: InnerLoop, params: Params, others: Any) -> Params:
        if isinstance(others["support"], list):
            raise ValueError('support: expected one pair of inputs and targets for "implicit", got a list')
        tensors: list[Tensor] = []
        call = RecordedCall(loop, params, others, tensors)
        if torch.is_grad_enabled() and call.tuned([is_recorded(x) for x in tensors]):
            raise ValueError(
                "optimizer: expected no field that requires a gradient, for the implicit one does not depend "
                "on them"
            )

        def pulled(current: Params, found: Params) -> Params:
            return {
                name: g + self.strength * (current[name] - params[name].detach()) for name, g in found.items()
            }

        solution: Params = {}
        for moment in call.steps(tensors, pulled):
            solution = moment[0]
        outputs = _Solution.apply(call, self, *solution.values(), *tensors)
        return dict(zip(params, outputs, strict=True))

    def cotangents(
        self,
        call: RecordedCall,
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
    def forward(call: RecordedCall, implicit: Implicit, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[: call.count])

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
        before: int = 2 + ctx.call.count  # the call, the options, and the solution, a constant
        needed = ctx.needs_input_grad[before:]
        found = ctx.implicit.cotangents(ctx.call, tensors, solution, cotangents, needed)
        return (*(None for _ in range(before)), *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        raise NotImplementedError('meta_gradient: "implicit" has no forward-mode derivative; use "reverse"')


def conjugate_gradients(
    product: Callable[[list[Tensor]], list[Tensor]], v: list[Tensor], *, iterations: int, tolerance: float
) -> list[Tensor]:
    """x of A·x = v by products with A, symmetric and positive definite; where it is not, the search ends.

    Ends are taken by multiplying with 0, not by leaving the loop: under vmap every task has its own.
    Source: Hestenes and Stiefel 1952.
    """
    largest = torch.stack([value.abs().max() for value in v if value.numel()]).max()
    scale = torch.where(largest > 0, largest, 1.0)  # squares of tiny or huge numbers are not theirs to lose
    residual = [value / scale for value in v]
    x, direction = [torch.zeros_like(value) for value in v], residual
    square = _dot(residual, residual)
    least = tolerance**2 * square
    going = square > least
    for _ in range(iterations):
        turned = product(direction)
        bend = _dot(direction, turned)
        going = going & (bend > 0)
        length = torch.where(going, square / torch.where(going, bend, 1.0), 0.0)
        x = _moved(x, length, direction)
        residual = _moved(residual, -length, turned)
        before, square = square, _dot(residual, residual)
        going = going & (square > least)
        share = torch.where(going, square / torch.where(going, before, 1.0), 0.0)
        direction = _moved(residual, share, direction)
    return [value * scale for value in x]


def _moved(a: list[Tensor], length: Tensor, b: list[Tensor]) -> list[Tensor]:
    return [x + length.to(x.dtype) * y for x, y in zip(a, b, strict=True)]


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """In float32 at least."""
    wide = [x if x.dtype == torch.float64 else x.float() for x in a]
    return torch.stack([(x * y).sum() for x, y in zip(wide, b, strict=True)]).sum()
