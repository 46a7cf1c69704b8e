"""JAX as a peer of gpu.py: the masks of its cases, and a GPU's memory shared with torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import gpu_cases
from benchmarks.gpu_cases import WHOLE, Case
from metattn.cli import _jax
from metattn.cli._cases import Inputs

# Before JAX is imported: it would take most of the GPU's memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".4")

STEPS = ("forward", "vjp", "jvp", WHOLE)


def mask(case: Case) -> Any:
    import jax.numpy as jnp

    distance = jnp.arange(case.keys) - jnp.arange(case.n)[:, None]
    distance = distance - gpu_cases.alignment(case, case.n, case.keys)
    left, right = case.window or (-1, -1)
    attends = distance <= (0 if case.causal is not None else case.keys)
    attends = attends & (distance >= -left) if left >= 0 else attends
    return attends & (distance <= right) if right >= 0 else attends


def start(case: Case, step: str, inputs: Inputs) -> Callable[[], Any]:
    """The step, compiled by its first call; each call waits for its results."""
    import jax

    on_gpu = inputs.do.device.type == "cuda"
    if on_gpu and not any(device.platform == "gpu" for device in jax.devices()):
        raise RuntimeError("this JAX has no GPU")
    masked = case.causal is not None or case.window is not None
    return _jax.start(partial(_jax.attention, partial(mask, case) if masked else None), step, inputs)
