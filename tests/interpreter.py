"""Triton's interpreter, made fit for kernels that are built of many small functions."""

from __future__ import annotations

from types import FunctionType
from typing import Any


def remember_patches() -> None:
    """Patch Triton's language once a launch, not at every call of a function: that takes a millisecond each."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: FunctionType) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return interpreter._LangPatchScope()
        patched.add(module)
        return patch(function)

    def launch_afresh(self: Any, *arguments: Any, **options: Any) -> None:
        patched.clear()
        launch(self, *arguments, **options)

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
