"""Modules under torch.fx."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def traced_call(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The call of a module whose first argument is a torch.fx.Proxy: a leaf, as torch.nn's modules are."""
    tracer = args[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, dict(kwargs))
