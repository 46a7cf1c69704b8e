"""Inner loops as functions of explicit tensors, and the two simple ways to differentiate through them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.func import grad

from metattn.meta.optimizers import InnerOptimizer, Params, State


@dataclass(frozen=True)
class InnerLoop:
    """An inner loop whose every tensor that may be differentiated is an argument.

    θ of step t + 1 is optimizer.step(t, θ, ∇θ loss(θ, others, t), its state). Here `others` stands for what
    the loss depends on beside θ, and `hyper` for the optimizer's fields.
    """

    loss: Callable[[Mapping[str, Tensor], Any, int], Tensor]
    optimizer: InnerOptimizer
    steps: int
    modules: tuple[nn.Module, ...] = ()  # what the loss calls

    def gradient(self, params: Mapping[str, Tensor], others: Any, index: int) -> Params:
        gradients: Params = grad(lambda current: self.loss(current, others, index))(dict(params))
        return gradients

    def step(
        self, index: int, params: Params, gradients: Params, state: State, hyper: Mapping[str, Any]
    ) -> tuple[Params, State]:
        """(θ, state) after a step, names in θ's order. ValueError for one that changes what θ consists of."""
        found, state = self.with_fields(hyper).step(index, params, gradients, state)
        for name, value in params.items():
            new = found.get(name)
            if new is None or (new.shape, new.dtype) != (value.shape, value.dtype):
                got = "none" if new is None else f"{list(new.shape)}, {new.dtype}"
                raise ValueError(
                    f"optimizer: expected a step to leave {name} {list(value.shape)}, {value.dtype}; "
                    f"got {got}"
                )
        return {name: found[name] for name in params}, state

    def with_fields(self, hyper: Mapping[str, Any]) -> InnerOptimizer:
        optimizer: InnerOptimizer = dataclasses.replace(self.optimizer, **hyper)  # type: ignore[type-var]
        return optimizer

    def fields(self) -> dict[str, Any]:
        """The optimizer's, mappings as dicts."""
        found = {
            field.name: getattr(self.optimizer, field.name)
            for field in dataclasses.fields(self.optimizer)  # type: ignore[arg-type]
            if field.init
        }
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}

    def run(self, params: Params, others: Any, *, first_order: bool = False) -> Params:
        """The steps as they come; what autograd or torch.func record of them is the exact derivative."""
        hyper = self.fields()
        state = self.with_fields(hyper).init(params)
        for index in range(self.steps):
            if first_order:
                # Detached before too, so that no graph of the inner gradient is ever built.
                gradients = self.gradient({name: x.detach() for name, x in params.items()}, others, index)
                gradients = {name: x.detach() for name, x in gradients.items()}
            else:
                gradients = self.gradient(params, others, index)
            params, state = self.step(index, params, gradients, state, hyper)
        return params


def samples_of(others: Any, index: int) -> Any:
    """`others` of one step, whose "support" may be a list with a pair for each."""
    support = others["support"]
    return {**others, "support": support[index]} if isinstance(support, list) else others


class MetaGradient(Protocol):
    """A way to run an inner loop such that its result can be differentiated."""

    def adapted(self, loop: InnerLoop, params: Params, others: Any) -> Params: ...


@dataclass(frozen=True)
class Reverse:
    """Exact: reverse mode over the recorded steps. Memory grows with every step."""

    def adapted(self, loop: InnerLoop, params: Params, others: Any) -> Params:
        return loop.run(params, others)


@dataclass(frozen=True)
class FirstOrder:
    """First-order MAML: the inner gradients are constants. Cheaper; no second derivative is taken."""

    def adapted(self, loop: InnerLoop, params: Params, others: Any) -> Params:
        return loop.run(params, others, first_order=True)
