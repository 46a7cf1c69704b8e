"""Softmax attention that can be differentiated twice, at fused-kernel speed and in O(N·d) memory."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metattn.backends import available_backends, inductor, use_backend
from metattn.functional import attention, explain, scaled_dot_product_attention, varlen_attention
from metattn.higher_order import HigherOrderWarning
from metattn.integrations.sdpa import sdpa_override

if TYPE_CHECKING:
    from metattn import meta, nn
    from metattn.nn import replace_attention, replace_norms, restore_attention, restore_norms
    from metattn.tuning import tune

__version__ = "0.1.0"  # and in pyproject.toml

__all__ = [
    "HigherOrderWarning",
    "attention",
    "available_backends",
    "explain",
    "meta",
    "nn",
    "replace_attention",
    "replace_norms",
    "restore_attention",
    "restore_norms",
    "scaled_dot_product_attention",
    "sdpa_override",
    "tune",
    "use_backend",
    "varlen_attention",
]


inductor.tag_caches()


def __getattr__(name: str) -> Any:
    if name in ("meta", "nn"):
        return importlib.import_module(f"metattn.{name}")
    if name in ("replace_attention", "replace_norms", "restore_attention", "restore_norms"):
        return getattr(importlib.import_module("metattn.nn"), name)
    if name == "tune":
        return importlib.import_module("metattn.tuning").tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
