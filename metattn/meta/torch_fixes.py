"""torch functions whose higher derivatives are wrong or missing, made of operations that have them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    batch_norm,
    huber_loss,
    instance_norm,
    layer_norm,
    linear,
    mse_loss,
    soft_margin_loss,
    softplus,
)
from torch.overrides import TorchFunctionMode

from metattn.nn import symbolic
from metattn.nn.norm import affine, standardized
from metattn.nn.norm import layer_norm as exact_layer_norm
from metattn.torch_internals import leave_uncompiled


class ExactDerivatives(TorchFunctionMode):
    """Within it these functions have exact derivatives of any order, in reverse and forward mode.

    * layer_norm, batch_norm, instance_norm: torch's backward takes the saved mean and variance for constants:
      under vmap with a weight for every task their second derivative is silently wrong
      (pytorch/functorch#534), the third everywhere.
    * mse_loss, huber_loss, soft_margin_loss: forward mode over their backward raises.
    """

    def __init__(self) -> None:
        super().__init__()
        if not torch.compiler.is_compiling():
            leave_uncompiled(ExactDerivatives.__torch_function__)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if torch.compiler.is_compiling():
            func = _traced(func)
        if func in _NAMED_OTHERWISE:
            named, places = _NAMED_OTHERWISE[func]
            given = dict(zip(places, args, strict=False)) | dict(kwargs or {})
            func, args, kwargs = named, (), {name: x for name, x in given.items() if "cudnn" not in name}
        if func in _REFUSED:
            name = _REFUSED[func]
            raise NotImplementedError(
                f"{name}: its higher derivatives are wrong under vmap; call torch.nn.functional's "
                f"{name.removeprefix('native_')} in an inner loop"
            )
        if func is layer_norm:
            return exact_layer_norm(*args, **(kwargs or {}))
        if func in (batch_norm, instance_norm):
            return _normalised(func, args, kwargs or {})
        if func in _LOSSES:
            return _reduced(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def _traced(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a graph: in a function mode Dynamo does not know unflatten as a method.

    And linear and chunk would make a graph for every size.
    """
    if func is Tensor.unflatten:
        return torch.unflatten
    if func is linear:
        return symbolic.linear
    return symbolic.chunk if func in (torch.chunk, Tensor.chunk) else func


_BY_CHANNEL = ("input", "weight", "bias", "running_mean", "running_var")


def _spellings(name: str) -> tuple[Callable[..., Any], ...]:
    """torch's own, and those of exported programs."""
    packet = getattr(torch.ops.aten, name)
    return getattr(torch, name), packet, packet.default


# other spellings than torch.nn.functional's, and what their arguments are called there
_NAMED_OTHERWISE: dict[Callable[..., Any], tuple[Callable[..., Any], tuple[str, ...]]] = {
    spelling: (named, places)
    for named, places in (
        (layer_norm, ("input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")),
        (batch_norm, (*_BY_CHANNEL, "training", "momentum", "eps", "cudnn_enabled")),
        (instance_norm, (*_BY_CHANNEL, "use_input_stats", "momentum", "eps", "cudnn_enabled")),
    )
    for spelling in _spellings(named.__name__)
}
_REFUSED = {
    spelling: name for name in ("native_layer_norm", "native_batch_norm") for spelling in _spellings(name)
}


def _normalised(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """batch_norm or instance_norm."""
    options = _bound(func, args, kwargs)
    by_batch = options.get("training") or options.get("use_input_stats")
    if by_batch:
        options.update(running_mean=None, running_var=None)  # to be written to, in a buffer that is a copy
    with torch.no_grad():  # its refusals and its dtype
        dtype = func(**options).dtype
    x, weight, bias = (options.pop(name) for name in ("input", "weight", "bias"))
    rest = range(2, x.dim())
    if by_batch:
        output, _ = standardized(x, (0, *rest) if func is batch_norm else tuple(rest), options["eps"])
    else:
        output = func(x, **options)
    channels = (-1,) + (1,) * len(rest)
    weight, bias = (None if t is None else t.view(channels) for t in (weight, bias))
    return affine(output, weight, bias).to(dtype)


def _squared(input: Tensor, target: Tensor, options: Mapping[str, Any]) -> Tensor:
    return (input - target).square()


def _huber(input: Tensor, target: Tensor, options: Mapping[str, Any]) -> Tensor:
    delta, distance = options["delta"], (input - target).abs()
    return torch.where(distance < delta, 0.5 * distance * distance, delta * (distance - 0.5 * delta))


def _soft_margin(input: Tensor, target: Tensor, options: Mapping[str, Any]) -> Tensor:
    return softplus(-target * input)


_LOSSES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    mse_loss: _squared,
    huber_loss: _huber,
    soft_margin_loss: _soft_margin,
}


def _reduced(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    options = _bound(func, args, kwargs)
    if options.get("size_average") is not None or options.get("reduce") is not None:
        result: Tensor = func(*args, **kwargs)  # their deprecated meaning is torch's to know
        return result
    with torch.no_grad():  # its refusals, its warnings and its dtype
        dtype = func(*args, **kwargs).dtype
    elements = _LOSSES[func](options["input"], options["target"], options)
    weight, reduction = options.get("weight"), options["reduction"]
    if weight is not None:
        elements = elements * weight
    if reduction == "none":
        return elements.to(dtype)
    if reduction == "sum":
        total = elements.sum()
    elif weight is not None and func is mse_loss:
        total = elements.sum() / weight.sum()
    else:
        total = elements.mean()
    return total.to(dtype)


# names of arguments in their order, and defaults: bound by hand, for Dynamo cannot trace inspect
_BOUND: tuple[Callable[..., Any], ...] = (batch_norm, instance_norm, *_LOSSES)
_NAMES = {func: tuple(inspect.signature(func).parameters) for func in _BOUND}
_DEFAULTS = {
    func: {
        name: parameter.default
        for name, parameter in inspect.signature(func).parameters.items()
        if parameter.default is not parameter.empty
    }
    for func in _BOUND
}


def _bound(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name."""
    names = _NAMES[func]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    options = _DEFAULTS[func] | given
    if len(given) != len(args) + len(kwargs) or set(options) != set(names):
        func(*args, **kwargs)  # its TypeError
    return {name: options[name] for name in names}
