"""Optimizers of inner loops: pure, differentiable functions of parameters, gradients and state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

Params: TypeAlias = dict[str, Tensor]
State: TypeAlias = dict[str, Params]  # by the name of what is kept, then by that of the parameter
Rate: TypeAlias = float | Tensor | Mapping[str, float | Tensor]


@runtime_checkable
class InnerOptimizer(Protocol):
    """What :func:`metattn.meta.adapt` asks of an optimizer: a dataclass with these two methods.

    Both are pure and made of differentiable operations. Tensors, and dicts of tensors, among the fields that
    require a gradient are learned with the parameters. A step returns all parameters, in any order, each with
    the shape and dtype that it had.
    """

    def init(self, params: Mapping[str, Tensor]) -> State:
        """What is remembered before the first step."""
        ...

    def step(
        self, index: int, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: State
    ) -> tuple[Params, State]:
        """Parameters and memory after step number `index`, counted from 0."""
        ...


def _check_rate(lr: Rate) -> None:
    if not isinstance(lr, (int, float, Tensor, Mapping)):
        raise TypeError(f"lr: expected a number, a tensor or a dict of them by name, got {type(lr).__name__}")


def rate_of(rate: Rate, name: str) -> float | Tensor:
    return rate[name] if isinstance(rate, Mapping) else rate


@dataclass(frozen=True)
class SGD:
    """Gradient descent: b ← momentum·b + g + weight_decay·θ, θ ← θ − lr·b; as torch.optim.SGD.

    Arguments:
        lr: step size: a number, a tensor (it may require a gradient, then it is learned too), or either by
            the parameter's name; a tensor of the parameter's shape is a step size for each of its elements.
        momentum: 0 keeps nothing between steps; a number or a tensor.
        weight_decay: of L2 regularisation; a number or a tensor.
        nesterov: step along g + momentum·b, as torch.optim.SGD.
    Errors: ValueError for nesterov without momentum; TypeError for an lr that is none of these.
    """

    lr: Rate
    momentum: float | Tensor = 0.0
    weight_decay: float | Tensor = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        _check_rate(self.lr)
        if self.nesterov and not self._remembers:
            raise ValueError(f"nesterov: expected a momentum beside it, got momentum={self.momentum}")

    @property
    def _remembers(self) -> bool:
        return isinstance(self.momentum, Tensor) or self.momentum != 0

    def init(self, params: Mapping[str, Tensor]) -> State:
        if not self._remembers:
            return {}
        return {"momentum": {name: torch.zeros_like(value) for name, value in params.items()}}

    def step(
        self, index: int, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: State
    ) -> tuple[Params, State]:
        directions = _decayed(params, gradients, self.weight_decay)
        if self._remembers:
            kept = {
                name: self.momentum * state["momentum"][name] + value for name, value in directions.items()
            }
            state = {"momentum": kept}
            if self.nesterov:
                directions = {name: value + self.momentum * kept[name] for name, value in directions.items()}
            else:
                directions = kept
        moved = {name: params[name] - rate_of(self.lr, name) * value for name, value in directions.items()}
        return moved, state


@dataclass(frozen=True)
class Adam:
    """θ ← θ − lr·m̂ / (√v̂ + eps), m and v the decaying means of g and g²; as torch.optim.Adam.

    Arguments: lr, weight_decay as for :class:`SGD`; betas, the decay of both means; eps, above 0.

    Where all gradients of an element were 0, √v̂ is taken for a constant there: the formula's derivative, of
    which that of the square root alone would make NaN.
    Errors: ValueError for betas outside [0, 1) and for an eps that is not above 0.
    Source: Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1.
    """

    lr: Rate
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Tensor = 0.0

    def __post_init__(self) -> None:
        _check_rate(self.lr)
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers of 0 or more and below 1, got {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"eps: expected a number above 0, got {self.eps}")

    def init(self, params: Mapping[str, Tensor]) -> State:
        return {
            kept: {name: torch.zeros_like(value) for name, value in params.items()}
            for kept in ("mean", "square")
        }

    def step(
        self, index: int, params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], state: State
    ) -> tuple[Params, State]:
        first, second = self.betas
        shrunk_first, shrunk_second = 1 - first ** (index + 1), 1 - second ** (index + 1)
        directions = _decayed(params, gradients, self.weight_decay)
        mean = {name: first * state["mean"][name] + (1 - first) * g for name, g in directions.items()}
        square = {
            name: second * state["square"][name] + (1 - second) * g * g for name, g in directions.items()
        }
        moved = {
            name: params[name]
            - rate_of(self.lr, name)
            * (mean[name] / shrunk_first)
            / (_root(square[name] / shrunk_second) + self.eps)
            for name in directions
        }
        return moved, {"mean": mean, "square": square}


def _decayed(
    params: Mapping[str, Tensor], gradients: Mapping[str, Tensor], weight_decay: float | Tensor
) -> Params:
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return dict(gradients)
    return {name: value + weight_decay * params[name] for name, value in gradients.items()}


def _root(x: Tensor) -> Tensor:
    """√x whose derivative at 0 is 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


class MetaSGD(nn.Module):
    """Step sizes of their own for all elements of the parameters, to be learned with them.

    Arguments: params, by name, as for :func:`metattn.meta.adapt`; lr, every step size at the beginning.

    Its parameters are the step sizes, free in size and sign; give them to the outer optimizer too, and
    ``optimizer()`` to the inner loop.
    Source: Li et al. 2017 (arXiv 1707.09835), equation 2.
    """

    def __init__(self, params: Mapping[str, Tensor], lr: float) -> None:
        super().__init__()
        self.names = tuple(params)
        self.rates = nn.ParameterList(
            nn.Parameter(torch.full_like(value, lr, requires_grad=True)) for value in params.values()
        )

    def optimizer(self) -> SGD:
        return SGD(dict(zip(self.names, self.rates, strict=True)))
