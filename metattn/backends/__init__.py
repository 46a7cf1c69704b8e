"""The backends, and the one function that picks. Each module offers forward, vjp, jvp and vjp_jvp."""

from __future__ import annotations

import importlib
from types import ModuleType

MODULES = {"reference": "metattn.backends.reference", "cpu": "metattn.backends.native"}


def load(name: str) -> ModuleType:
    """The module of a backend."""
    return importlib.import_module(MODULES[name])
