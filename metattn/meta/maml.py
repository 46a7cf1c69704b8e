"""Model-agnostic meta-learning (MAML) on torch.func, exact to second order."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import batch_norm, instance_norm, layer_norm
from torch.overrides import TorchFunctionMode

Samples: TypeAlias = tuple[Tensor, Tensor]  # (inputs, targets)
LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) → scalar
LearningRate: TypeAlias = float | Tensor | Mapping[str, float | Tensor]


def adapt(
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: LossFunction,
    support: Samples,
    *,
    steps: int,
    lr: LearningRate,
    first_order: bool = False,
) -> dict[str, Tensor]:
    """Gradient descent on one task, as a function that can itself be differentiated.

    θ_{t+1} = θ_t − lr·∇θ loss_fn(model(inputs; θ_t), targets),  t = 0 … steps−1

    Arguments:
        model: any module; it is called as ``functional_call(model, θ, (inputs,))`` and never written to.
        params: θ_0 by name, all of ``dict(model.named_parameters())`` or a part of it; what is not named
            stays the module's own and is not adapted.
        loss_fn: (outputs, targets) → scalar.
        support: (inputs, targets) of the task.
        steps: how many steps, 0 or more.
        lr: step size: a number, a tensor (it may require a gradient, then it is learned too), or either by
            name.
        first_order: treat the inner gradients as constants (first-order MAML). Cheaper, no second derivative.

    Returns the adapted parameters, by name. Their derivative with respect to ``params`` contains the
    second-order term unless ``first_order``. Under ``torch.no_grad()`` the steps are taken and nothing is
    recorded.
    Differentiable: once more than the model's forward pass; works under vmap, grad and plain autograd.
    Errors: ValueError for a negative step count, for a name the model lacks and for a step size that is
    missing.
    Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1, line 6.
    """
    if not isinstance(steps, int) or steps < 0:
        raise ValueError(f"steps: expected an integer of 0 or more, got {steps!r}")
    unknown = sorted(params.keys() - dict(model.named_parameters()).keys())
    if unknown:
        raise ValueError(f"params: expected names of {type(model).__name__}'s parameters, got also {unknown}")
    if isinstance(lr, Mapping):
        missing = sorted(params.keys() - lr.keys())
        if missing:
            raise ValueError(f"lr: expected a step size for every name in params, got none for {missing}")
    inputs, targets = support

    def loss(current: Mapping[str, Tensor]) -> Tensor:
        with _ExactNorms():
            return loss_fn(functional_call(model, dict(current), (inputs,)), targets)

    def rate(name: str) -> float | Tensor:
        return lr[name] if isinstance(lr, Mapping) else lr

    adapted = dict(params)
    for _ in range(steps):
        if first_order:
            # Detached before too, so that no graph of the inner gradient is ever built.
            gradients = grad(loss)({name: value.detach() for name, value in adapted.items()})
            gradients = {name: value.detach() for name, value in gradients.items()}
        else:
            gradients = grad(loss)(adapted)
        adapted = {name: value - rate(name) * gradients[name] for name, value in adapted.items()}
    return adapted


def maml_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: LossFunction,
    support: Samples,
    query: Samples,
    *,
    steps: int,
    lr: LearningRate,
    first_order: bool = False,
    randomness: str = "different",
    chunk_size: int | None = None,
) -> Tensor:
    """The loss after adaptation, averaged over tasks: what MAML's outer loop minimises.

    1/T · Σ_i loss_fn(model(query_i; adapt(params, support_i)), query targets_i)

    Arguments:
        model, params, loss_fn, steps, lr, first_order: as for :func:`adapt`.
        support, query: (inputs, targets), every tensor with the T tasks in front: [T, …]. The tasks are
            adapted together, by vmap.
        randomness: as for ``torch.vmap``: "different" draws dropout for every task, "same" once, "error"
            refuses.
        chunk_size: how many tasks at a time, None for all; less memory, same result.

    Returns a scalar. ``maml_loss(...).backward()`` gives the meta-gradient, second order included, for every
    one of ``params`` (and ``lr``) that requires it; torch.func.grad over ``params`` gives the same.
    Errors: ValueError where the tensors do not agree on T, and as :func:`adapt`.
    Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1, line 8.
    """
    counts = [tensor.shape[0] if tensor.dim() else None for tensor in (*support, *query)]
    if len(set(counts)) != 1 or not counts[0]:
        raise ValueError(
            "support, query: expected every tensor to have the same number of tasks (1 or more) in front, "
            f"got shapes {[tuple(tensor.shape) for tensor in (*support, *query)]}"
        )

    def task_loss(support: Samples, query: Samples) -> Tensor:
        with _ExactNorms():  # the query's loss too: of maml_loss there may be a second derivative
            adapted = adapt(model, params, loss_fn, support, steps=steps, lr=lr, first_order=first_order)
            inputs, targets = query
            return loss_fn(functional_call(model, adapted, (inputs,)), targets)

    losses = vmap(task_loss, randomness=randomness, chunk_size=chunk_size)(support, query)
    return torch.mean(losses)


class _ExactNorms(TorchFunctionMode):
    """Within it layer_norm, batch_norm and instance_norm are made of operations that torch differentiates.

    Their own backward takes the saved mean and variance for constants: under vmap with a weight for every
    task their second derivative is silently wrong (pytorch/functorch#534), the third is everywhere.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func not in (layer_norm, batch_norm, instance_norm):
            return func(*args, **(kwargs or {}))
        bound = _signature(func).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        options = bound.arguments
        weight, bias = options.pop("weight"), options.pop("bias")
        if func is layer_norm:
            dims = tuple(range(-len(options["normalized_shape"]), 0))
        else:
            rest = range(2, options["input"].dim())
            dims = (0, *rest) if func is batch_norm else tuple(rest)
        if options.get("training", options.get("use_input_stats", True)):
            with torch.no_grad():  # its refusals, its dtype, and what it does to running statistics
                dtype = func(**options).dtype
            x = options["input"]
            x = x if x.dtype == torch.float64 else x.float()
            centred = x - x.mean(dims, keepdim=True)
            variance = centred.square().mean(dims, keepdim=True)
            output = (centred * torch.rsqrt(variance + options["eps"])).to(dtype)
        else:
            output = func(**options)
        channels = (-1,) + (1,) * (output.dim() - 2)  # dimension 1 of batch_norm and instance_norm
        for combine, tensor in ((torch.mul, weight), (torch.add, bias)):
            if tensor is not None:
                output = combine(output, tensor if func is layer_norm else tensor.view(channels))
        return output


@functools.cache
def _signature(func: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(func)
