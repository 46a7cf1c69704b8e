"""adapt: an optimizer's steps on one task, as a function that can itself be differentiated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.func import functional_call

from metattn.meta.exact import ExactDerivatives
from metattn.meta.implicit import Implicit
from metattn.meta.inner import FirstOrder, InnerLoop, MetaGradient, Reverse
from metattn.meta.optimizers import InnerOptimizer, Params
from metattn.meta.stepwise import Checkpointed, Mixed

Samples: TypeAlias = tuple[Any, Any]  # (inputs, targets)
LossFunction: TypeAlias = Callable[[Any, Any], Tensor]  # (outputs, targets) → scalar

META_GRADIENTS: dict[str, MetaGradient] = {
    "reverse": Reverse(),
    "checkpointed": Checkpointed(),
    "mixed": Mixed(),
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
        model: any module; it is called as ``functional_call(model, θ, inputs)`` and never written to: its
            buffers are copies there, and what a layer writes to them (running statistics) is dropped.
        params: θ_0 by name, all of ``dict(model.named_parameters())`` or a part of it; what is not named
            stays the module's own and is not adapted (ANIL, arXiv 1909.09157, adapts a head alone).
        loss_fn: (outputs, targets) → scalar; a function, or a module, whose parameters are then
            differentiated too (a learned loss).
        support: (inputs, targets) of the task, or a list of them, one for each step. Inputs are a tensor, a
            tuple of positional arguments or a dict of keyword arguments of the model; targets are what
            loss_fn makes of them.
        optimizer: :class:`SGD`, :class:`Adam`, or your own (:class:`InnerOptimizer`).
        steps: how many steps, 0 or more.
        meta_gradient: how the derivative of the result is taken:

            * "reverse": exact, by recording every step.
            * "checkpointed", or :class:`Checkpointed`: exact, step by step, each computed again; memory for
              one step and the parameters' trajectory.
            * "mixed", or :class:`Mixed`: the same in forward mode over reverse mode.
            * "first-order": inner gradients are taken for constants.
            * "implicit", or :class:`Implicit`: of the inner problem's solution, whatever the steps to it.

    Returns the adapted parameters, by name: functions of ``params``, of the model's other parameters, of
    tensors in ``support``, ``optimizer`` and ``loss_fn``. Under ``torch.no_grad()`` the steps are taken and
    nothing is recorded.
    Differentiable: "reverse", "checkpointed" and "mixed" as often as the model allows, under autograd,
    torch.func.grad and vmap; "reverse" in forward mode too.
    Errors: ValueError for a negative step count, for a name the model lacks, for a step size that is missing,
    for a list of another length than steps, and for a meta_gradient that is none; TypeError for an optimizer
    that is none.
    Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1, line 6.
    """
    if isinstance(meta_gradient, str):
        if meta_gradient not in META_GRADIENTS:
            raise ValueError(
                f"meta_gradient: expected one of {', '.join(META_GRADIENTS)}, got {meta_gradient!r}"
            )
        meta_gradient = META_GRADIENTS[meta_gradient]
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an integer of 0 or more, got {steps!r}")
    if not (isinstance(optimizer, InnerOptimizer) and dataclasses.is_dataclass(optimizer)):
        raise TypeError(
            f"optimizer: expected SGD, Adam or a dataclass like them, got {type(optimizer).__name__}"
        )
    own = dict(model.named_parameters())
    unknown = sorted(params.keys() - own.keys())
    if unknown:
        raise ValueError(f"params: expected names of {type(model).__name__}'s parameters, got also {unknown}")
    loop = InnerLoop(_loss_of(model, loss_fn), optimizer, steps)
    for field, value in loop.fields().items():
        missing = sorted(params.keys() - value.keys()) if isinstance(value, dict) else []
        if missing:
            raise ValueError(f"{field}: expected a value for every name in params, got none for {missing}")
    if isinstance(support, list) and len(support) != steps:
        raise ValueError(
            f"support: expected one pair of inputs and targets, or a list of {steps}, one a step; "
            f"got {len(support)}"
        )
    others = {
        "rest": {name: value for name, value in own.items() if name not in params and value.requires_grad},
        "loss": dict(loss_fn.named_parameters()) if isinstance(loss_fn, nn.Module) else {},
        "support": support,
    }
    if steps == 0:
        return dict(params)
    return meta_gradient.adapted(loop, dict(params), others)


def _loss_of(
    model: nn.Module, loss_fn: LossFunction | nn.Module
) -> Callable[[Mapping[str, Tensor], Any, int], Tensor]:
    def loss(params: Mapping[str, Tensor], others: Any, index: int) -> Tensor:
        samples = others["support"]
        inputs, targets = samples[index] if isinstance(samples, list) else samples
        return loss_on(model, {**params, **others["rest"]}, loss_fn, others["loss"], inputs, targets)

    return loss


def loss_on(
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: LossFunction | nn.Module,
    loss_params: Mapping[str, Tensor],
    inputs: Any,
    targets: Any,
) -> Tensor:
    """loss_fn(model(inputs; params), targets), of which derivatives of any order are right."""
    if isinstance(inputs, Mapping):
        args, kwargs = (), dict(inputs)
    else:
        args, kwargs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
    with ExactDerivatives():
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        outputs = functional_call(model, {**buffers, **params}, args, kwargs)
        if isinstance(loss_fn, nn.Module):
            value: Tensor = functional_call(loss_fn, dict(loss_params), (outputs, targets))
        else:
            value = loss_fn(outputs, targets)
    return value
