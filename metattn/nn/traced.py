"""Modules under torch.fx and torch.jit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn


def traced_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call of a module whose first argument is a torch.fx.Proxy: a leaf, as torch.nn's modules are."""
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, dict(kwargs))


def refuse_script(module: nn.Module, restore: str) -> NoReturn:
    """torch.jit.script asks for a module in this one's place, and would leave it there in the model."""
    name = type(module).__name__
    raise NotImplementedError(
        f"torch.jit.script: expected a torch.nn.{name}, got a metattn.nn.{name}, whose derivatives "
        f"TorchScript has no words for. Call metattn.{restore} on a copy of the model and script that, or "
        "take torch.export or torch.compile"
    )
