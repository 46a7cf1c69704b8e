"""JAX as a peer of gpu.py: softmax attention written out, differentiated by JAX, compiled by XLA."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_cases
from benchmarks.gpu_cases import WHOLE, Case
from metattn.cli._cases import Inputs

# Before JAX is imported: it would take most of the GPU's memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".4")

STEPS = ("forward", "vjp", "jvp", WHOLE)


def attention(case: Case, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    """[B, H, N, d] → [B, H, N, d]; scores and softmax in float32, as torch's math path."""
    import jax
    import jax.numpy as jnp

    # exact products for float32, where XLA would round to TF32 and torch does not
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = product("bhgnd,bhmd->bhgnm", grouped, k) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.reshape(scores.shape).astype(scores.dtype)
    if case.causal is not None or case.window is not None:
        distance = jnp.arange(case.keys) - jnp.arange(case.n)[:, None]
        distance = distance - gpu_cases.alignment(case, case.n, case.keys)
        left, right = case.window or (-1, -1)
        attends = distance <= (0 if case.causal is not None else case.keys)
        attends = attends & (distance >= -left) if left >= 0 else attends
        attends = attends & (distance <= right) if right >= 0 else attends
        scores = jnp.where(attends, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return product("bhgnm,bhmd->bhgnd", weights, v).astype(q.dtype).reshape(q.shape)


def start(case: Case, step: str, inputs: Inputs) -> Callable[[], Any]:
    """The step, compiled by its first call; each call waits for its results."""
    import jax

    on_gpu = inputs.do.device.type == "cuda"
    if on_gpu and not any(device.platform == "gpu" for device in jax.devices()):
        raise RuntimeError("this JAX has no GPU")
    primals, tangents = (tuple(map(given, ts)) for ts in (inputs.primals, inputs.tangents))
    do = given(inputs.do)
    attend = partial(attention, case)
    if step == "forward":
        return waiting(jax.jit(lambda *p: (attend(*p),)), *primals)
    if step == "vjp":
        _, pullback = jax.jit(lambda *p: jax.vjp(attend, *p))(*primals)  # the forward, outside the timing
        return waiting(jax.jit(lambda back, cotangent: back(cotangent)), pullback, do)
    if step == "jvp":
        return waiting(jax.jit(lambda p, t: jax.jvp(attend, p, t)), primals, tangents)
    return waiting(jax.jit(partial(second_order, attend)), primals, do, tangents)


def second_order(attend: Callable[..., Any], primals: Any, do: Any, tangents: Any) -> tuple[Any, ...]:
    """o, its gradients, and the gradients of ⟨gradients, tangents⟩."""
    import jax

    def first(primals: Any, do: Any) -> tuple[Any, Any]:
        o, pullback = jax.vjp(attend, *primals)
        return pullback(do), o

    gradients, pullback, o = jax.vjp(first, primals, do, has_aux=True)
    second, ot = pullback(tangents)
    return o, *gradients, *second, ot


def waiting(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    import jax

    return lambda: jax.block_until_ready(function(*arguments))


def given(t: Tensor) -> Any:
    """The same memory as a JAX array."""
    import jax

    return jax.dlpack.from_dlpack(t.detach().contiguous())


def tensors(results: Any) -> tuple[Tensor, ...]:
    """JAX's results as torch's, in the same memory."""
    return tuple(torch.utils.dlpack.from_dlpack(result) for result in results)
