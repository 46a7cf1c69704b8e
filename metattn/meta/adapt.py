"""adapt: an optimizer's steps on one task, as a function that can itself be differentiated."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module  # functional_call's, for two modules at once

from metattn.meta.checkpointed import Checkpointed
from metattn.meta.implicit import Implicit
from metattn.meta.inner_loop import FirstOrder, InnerLoop, MetaGradient, Reverse, samples_of
from metattn.meta.optimizers import SGD, Adam, InnerOptimizer, MetaSGD, Params
from metattn.meta.torch_fixes import ExactDerivatives

Samples: TypeAlias = tuple[Any, Any]  # (inputs, targets)
LossFunction: TypeAlias = Callable[[Any, Any], Tensor]  # (outputs, targets) → scalar

META_GRADIENTS: dict[str, MetaGradient] = {
    "reverse": Reverse(),
    "checkpointed": Checkpointed(),
    "first-order": FirstOrder(),
    "implicit": Implicit(),
}


def adapt(
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: LossFunction | nn.Module,
    support: Samples | list[Samples],
    *,
    optimizer: InnerOptimizer,
    steps: int,
    meta_gradient: str | MetaGradient = "reverse",
) -> Params:
    """Steps of an optimizer on one task, as a function that can itself be differentiated.

    θ_{t+1} = optimizer.step(θ_t, ∇θ loss_fn(model(inputs; θ_t), targets)),  t = 0 … steps−1

    Arguments:
        model: any module; it is called with θ in the place of its parameters, so that one thread at a time
            may use it. Its buffers are copies there, and what a layer writes to them
            (running statistics) is dropped.
        params: θ_0 by name, all of ``dict(model.named_parameters())`` or a part of it, adapted whether they
            require a gradient or not; what is not named stays the module's own (ANIL, arXiv 1909.09157,
            adapts a head alone).
        loss_fn: (outputs, targets) → scalar; a function, or a module, whose parameters are then
            differentiated too (a learned loss). ``model.parameters()`` inside of it are θ.
        support: a pair, (inputs, targets) of the task, or a list of pairs, one for each step. Inputs are a
            tensor, a tuple of positional arguments or a dict of keyword arguments of the model; targets are
            what loss_fn makes of them.
        optimizer: :class:`SGD`, :class:`Adam`, or a dataclass of your own (:class:`InnerOptimizer`).
        steps: how many steps, 0 or more.
        meta_gradient: how the derivative of the result is taken:

            * "reverse": exact, by recording every step.
            * "checkpointed", or :class:`Checkpointed`: exact, step by step, each computed again; memory for
              one step and the parameters' trajectory.
            * "first-order": inner gradients are taken for constants.
            * :class:`Compiled`: exact, by steps that are compiled once for all.
            * "implicit", or :class:`Implicit`: of the inner problem's solution, whatever the steps to it.

    Returns the adapted parameters, by name: functions of ``params``, of the model's and loss_fn's other
    parameters and buffers, and of tensors in ``support`` and ``optimizer``. Under ``torch.no_grad()`` the
    steps are taken and nothing is recorded.
    Differentiable: "reverse" and "checkpointed" as often as the model allows, under autograd,
    torch.func.grad and vmap; "reverse" in forward mode too; :class:`Compiled` once, under autograd and vmap.
    Errors: ValueError for a negative step count, for a name the model lacks, for a step size that is missing,
    for a support that is no pair or a list of another length than steps, for a meta_gradient that is none,
    and for an optimizer whose step changes names, shapes or dtypes of parameters; TypeError for params
    without names and for an optimizer that is none.
    Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1, line 6.
    """
    way, steps = _way_of(meta_gradient), _count_of(steps)
    _check_optimizer(optimizer, params)
    whole = Whole(model, loss_fn)
    whole.check_names(params)
    if isinstance(support, list):
        support = [pair_of(each, "support") for each in support]
        if len(support) != steps:
            raise ValueError(
                f"support: expected one pair of inputs and targets, or a list of {steps} pairs, one a step; "
                f"got {len(support)}"
            )
    else:
        support = pair_of(support, "support")

    def loss(current: Mapping[str, Tensor], others: Any, index: int) -> Tensor:
        inputs, targets = samples_of(others, index)["support"]
        return whole.loss(current, others["rest"], inputs, targets)

    if steps == 0:
        return dict(params)
    others = {"rest": whole.rest(params), "support": support}
    return way.adapted(InnerLoop(loss, optimizer, steps, tuple(whole.modules.values())), dict(params), others)


class Whole:
    """A model and its loss as one: what either holds can be replaced for a call of both.

    So a loss that looks at the model's parameters (a penalty) sees those of the call.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFunction | nn.Module) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.modules = {"model": model}
        if isinstance(loss_fn, nn.Module):
            self.modules["loss_fn"] = loss_fn

    def check_names(self, params: Mapping[str, Tensor]) -> None:
        if not isinstance(params, Mapping):
            raise TypeError(
                "params: expected tensors by name, as dict(model.named_parameters()), got "
                f"{type(params).__name__}"
            )
        kind, own = type(self.model).__name__, dict(self.model.named_parameters())
        unknown = sorted(params.keys() - own.keys())
        if unknown:
            raise ValueError(
                f"params: expected names of {kind}'s parameters, as named_parameters() has them (of a tied "
                f"one the first), got also {unknown}"
            )

    def rest(self, params: Mapping[str, Tensor]) -> Params:
        """All other parameters and buffers, of the model and of the loss; of tied ones the first name."""
        first: dict[Tensor, str] = {}
        for name, value in (self._parameters() | self._buffers()).items():
            first.setdefault(value, name)
        given = {f"model.{name}" for name in params}
        return {name: value for value, name in first.items() if name not in given}

    def loss(
        self, params: Mapping[str, Tensor], rest: Mapping[str, Tensor], inputs: Any, targets: Any
    ) -> Tensor:
        """loss_fn(model(inputs), targets) with these tensors, of which derivatives of any order are right."""
        if isinstance(inputs, Mapping):
            args, kwargs = (), dict(inputs)
        else:
            args, kwargs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
        buffers = self._buffers()
        values = {
            **{name: value.clone() if name in buffers else value for name, value in rest.items()},
            **{f"model.{name}": value for name, value in params.items()},
        }
        own = self._parameters() | buffers
        by_own = {own[name]: value for name, value in values.items()}  # tied ones under every name
        held: dict[str, Params] = {place: {} for place in self.modules}
        for name, value in own.items():
            place, _, inner = name.partition(".")
            if value in by_own:  # a buffer that was registered since is the module's own
                held[place][inner] = by_own[value]
        with ExactDerivatives(), _reparametrize_module(self.model, held["model"], stack_weights=True):
            if "loss_fn" not in held:
                return self.loss_fn(self.model(*args, **kwargs), targets)
            with _reparametrize_module(self.modules["loss_fn"], held["loss_fn"], stack_weights=True):
                return self.loss_fn(self.model(*args, **kwargs), targets)

    def _parameters(self) -> Params:
        """Under all their names."""
        found: Params = {}
        for place, module in self.modules.items():
            found.update(module.named_parameters(place, remove_duplicate=False))
        return found

    def _buffers(self) -> Params:
        found: Params = {}
        for place, module in self.modules.items():
            found.update(module.named_buffers(place, remove_duplicate=False))
        return found


def pair_of(samples: Any, name: str) -> Samples:
    """(inputs, targets), mappings as dicts."""
    if not isinstance(samples, (tuple, list)) or len(samples) != 2:
        got = f"{len(samples)} of them" if isinstance(samples, (tuple, list)) else type(samples).__name__
        raise ValueError(f"{name}: expected a pair (inputs, targets), got {got}")
    inputs, targets = (dict(part) if isinstance(part, Mapping) else part for part in samples)
    return inputs, targets


def _way_of(meta_gradient: str | MetaGradient) -> MetaGradient:
    if isinstance(meta_gradient, str) and meta_gradient in META_GRADIENTS:
        return META_GRADIENTS[meta_gradient]
    if isinstance(meta_gradient, (str, type)) or not hasattr(meta_gradient, "adapted"):
        raise ValueError(
            f"meta_gradient: expected one of {', '.join(META_GRADIENTS)}, or an object such as "
            f"Checkpointed(save_every=4), got {meta_gradient!r}"
        )
    return meta_gradient


def _count_of(steps: int) -> int:
    try:
        count = operator.index(steps)
    except TypeError:
        count = -1
    if count < 0:
        raise ValueError(f"steps: expected an integer of 0 or more, got {steps!r}")
    return count


def _check_optimizer(optimizer: InnerOptimizer, params: Mapping[str, Tensor]) -> None:
    if isinstance(optimizer, MetaSGD):
        raise TypeError("optimizer: expected what MetaSGD's optimizer() returns, got the MetaSGD itself")
    if (
        isinstance(optimizer, type)
        or not isinstance(optimizer, InnerOptimizer)
        or not dataclasses.is_dataclass(optimizer)
    ):
        got = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
        raise TypeError(
            "optimizer: expected SGD(…), Adam(…) or an object of a dataclass with init and step like them, "
            f"got {got}"
        )
    rates = optimizer.lr if isinstance(optimizer, (SGD, Adam)) else None
    missing = sorted(params.keys() - rates.keys()) if isinstance(rates, Mapping) else []
    if missing:
        raise ValueError(f"lr: expected a value for every name in params, got none for {missing}")
