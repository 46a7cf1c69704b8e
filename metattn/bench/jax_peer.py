"""JAX as a peer: softmax attention written out, differentiated by JAX, compiled by XLA."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metattn.bench.answers import Inputs
from metattn.bench.cases import WHOLE, Case

# Before JAX is imported: it would take most of a GPU's memory at once.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".4")

STEPS = ("forward", "vjp", "jvp", "double backward", WHOLE)
Attend = Callable[..., Any]


def attention(attends: Callable[[], Any] | None, q: Any, k: Any, v: Any, bias: Any = None) -> Any:
    """[B, H, N, d] → [B, H, N, d], scores in float32 as in torch's math path; `attends` gives the mask."""
    import jax
    import jax.numpy as jnp

    # exact products for float32, where XLA would round to TF32 and torch does not
    product = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    scores = product("bhgnd,bhmd->bhgnm", grouped, k) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.reshape(-1, *scores.shape[1:]).astype(scores.dtype)
    if attends is not None:
        scores = jnp.where(attends(), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return product("bhgnm,bhmd->bhgnd", weights, v).astype(q.dtype).reshape(q.shape)


def mask(case: Case) -> Any:
    """Case.mask of all rows and columns, for XLA to make."""
    import jax.numpy as jnp

    left, right = case.reach
    distance = jnp.arange(case.keys) - jnp.arange(case.n)[:, None] - case.offset
    return (distance >= -left) & (distance <= right)


def start(case: Case, step: str, inputs: Inputs) -> Callable[[], Any]:
    """The step, compiled by its first call; each call waits for its results."""
    import jax

    if inputs.do.device.type == "cuda" and not any(device.platform == "gpu" for device in jax.devices()):
        raise RuntimeError("this JAX has no GPU")
    attend = partial(attention, partial(mask, case) if case.masked else None)
    primals, tangents = (tuple(map(given, ts)) for ts in (inputs.primals, inputs.tangents))
    do = given(inputs.do)
    if step == "forward":
        return waiting(jax.jit(lambda *p: (attend(*p),)), *primals)
    if step == "vjp":
        _, pullback = jax.jit(lambda *p: jax.vjp(attend, *p))(*primals)  # the forward, outside the timing
        return waiting(jax.jit(lambda back, cotangent: back(cotangent)), pullback, do)
    if step == "jvp":
        return waiting(jax.jit(lambda p, t: jax.jvp(attend, p, t)), primals, tangents)
    if step == "double backward":
        graph = jax.jit(lambda p, cotangent: jax.vjp(partial(gradients, attend), p, cotangent)[1])
        return waiting(jax.jit(pulled_back), graph(primals, do), tangents)
    if step == WHOLE:
        return waiting(jax.jit(partial(second_order, attend)), primals, do, tangents)
    raise ValueError(f"step: expected one of {', '.join(STEPS)}, got {step!r}")


def gradients(attend: Attend, primals: Any, do: Any) -> Any:
    import jax

    return jax.vjp(attend, *primals)[1](do)


def pulled_back(pullback: Callable[..., Any], tangents: Any) -> tuple[Any, ...]:
    """The gradients of ⟨gradients, tangents⟩ in the primals and in do."""
    second, ot = pullback(tangents)
    return *second, ot


def second_order(attend: Attend, primals: Any, do: Any, tangents: Any) -> tuple[Any, ...]:
    """o, its gradients, and the gradients of ⟨gradients, tangents⟩."""
    import jax

    def first(primals: Any, do: Any) -> tuple[Any, Any]:
        o, pullback = jax.vjp(attend, *primals)
        return pullback(do), o

    found, pullback, o = jax.vjp(first, primals, do, has_aux=True)
    return o, *found, *pulled_back(pullback, tangents)


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
