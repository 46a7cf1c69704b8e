"""Triton's interpreter (TRITON_INTERPRET=1), made right and bearable for metattn's kernels, for no others.

It keeps bfloat16 as bits, and multiplies those: results would be off by a factor of 1e9. It cuts float32 off
to bfloat16, where GPUs round. And it patches Triton's language at every call of a function: a millisecond.
"""

from __future__ import annotations

import threading
from types import FunctionType
from typing import Any

import torch

KERNELS = "metattn.kernels."  # the modules whose launches are meant

_lock = threading.RLock()  # the interpreter has one grid and one language for all threads
_patched: set[int] | None = None  # modules that were patched in the launch of ours that runs


def mend() -> str | None:
    """Makes the interpreter so, once for a process; why that cannot be done, or None."""
    try:
        import numpy as np
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        patch, launch = interpreter._patch_lang, executor.__call__
        multiply, cast = builder.create_dot, builder.cast_impl
        nothing, handle = interpreter._LangPatchScope, interpreter.TensorHandle
        bfloat16, float32 = interpreter.tl.bfloat16, interpreter.tl.float32
    except (ImportError, AttributeError) as error:
        return f"Triton's interpreter is not the one that metattn knows, and takes bfloat16 for bits: {error}"

    def patch_once(function: FunctionType) -> Any:
        module = id(function.__globals__)
        if _patched is None:
            return patch(function)
        if module in _patched:
            return nothing()
        _patched.add(module)
        return patch(function)

    def launch_alone(self: Any, *arguments: Any, **options: Any) -> None:
        global _patched  # noqa: PLW0603
        with _lock:
            before, _patched = _patched, set() if _is_ours(self.fn) else None
            try:
                launch(self, *arguments, **options)
            finally:
                _patched = before

    def multiply_numbers(self: Any, a: Any, b: Any, d: Any, *how: Any) -> Any:
        """Sums are in float64, rounded once: x yᵀ and y xᵀ have the same bits then, as on tensor cores."""
        if _patched is None:
            return multiply(self, a, b, d, *how)
        a, b = (self.create_fp_ext(x, float32) if x.dtype.scalar == bfloat16 else x for x in (a, b))
        product = (a.data.astype(np.float64) @ b.data.astype(np.float64)).astype(d.data.dtype)
        return handle(product + d.data, d.dtype.scalar)

    def round_numbers(self: Any, x: Any, to: Any, *how: Any) -> Any:
        if _patched is None or (x.dtype.scalar, to.scalar) != (float32, bfloat16):
            return cast(self, x, to, *how)
        rounded = torch.from_numpy(np.ascontiguousarray(x.data)).bfloat16().view(torch.uint16)
        return handle(rounded.numpy(), to.scalar)

    interpreter._patch_lang = patch_once
    executor.__call__ = launch_alone
    builder.create_dot = multiply_numbers
    builder.cast_impl = round_numbers
    return None


def _is_ours(function: Any) -> bool:
    return str(function.__globals__.get("__name__", "")).startswith(KERNELS)
