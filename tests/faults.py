"""What tests of faults share: both orders of a call beside those of the plain formula in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import emulation
import torch
from helpers import FLOORS
from torch import Tensor

import metattn
from metattn import functional
from metattn.backends import reference
from metattn.backends.triton import devices

INF = math.inf
Leaves = dict[str, Tensor]
Layout = Callable[[str, Tensor], Tensor]


DEVICES = {
    "reference": "cpu",
    "cpu": "cpu",
    "cuda": "cpu" if emulation.installed() else "cuda",
    "triton": "cpu" if devices.interpreted() else "cuda",
}


def in_interpreter(backend: str) -> bool:
    """Whether the backend's kernels run in Triton's interpreter."""
    return backend == "triton" and devices.interpreted()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed), dtype=torch.float64)


def qkv(
    *,
    batch: int = 2,
    heads: int = 2,
    n: int = 5,
    m: int = 7,
    d: int = 8,
    dv: int | None = None,
    kv_heads: int | None = None,
) -> Leaves:
    kv_heads = heads if kv_heads is None else kv_heads
    shapes = {"q": (heads, n, d), "k": (kv_heads, m, d), "v": (kv_heads, m, dv or d)}
    return {name: randn(batch, *shape, seed=ord(name)) for name, shape in shapes.items()}


def both_orders(call: Callable[..., tuple[Tensor, Tensor]], leaves: Leaves, seeds: Leaves) -> Leaves:
    """o, lse, the gradients of both along `seeds`' cotangents, and the gradients of those along its tangents.

    Unlike helpers.both_orders, leaves and cotangents keep the layouts they come in.
    """
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    results = dict(zip(("o", "lse"), call(**leaves), strict=True))
    outputs = {name: t for name, t in results.items() if t.requires_grad}  # lse does not depend on v
    cotangents = {
        f"d{name}": seeds[name].detach().to(t.dtype).requires_grad_() for name, t in outputs.items()
    }
    first = torch.autograd.grad(
        list(outputs.values()), list(leaves.values()), list(cotangents.values()), create_graph=True
    )
    tangents = [seeds[name].to(t.dtype) for name, t in zip(leaves, first, strict=True)]
    inputs = {f"d{name}": t for name, t in leaves.items()} | cotangents
    second = torch.autograd.grad(first, list(inputs.values()), tangents, materialize_grads=True)
    results |= {f"d{name}": t for name, t in zip(leaves, first, strict=True)}
    results |= {f"second {name}": t for name, t in zip(inputs, second, strict=True)}
    return {name: t.detach() for name, t in results.items()}


def plain(call: Callable[..., Any], **arguments: Any) -> Any:
    """The call through the reference's formula, differentiated by torch: none of our Functions, no kernel."""
    with mock.patch.object(functional, "attend", lambda *problem: reference.forward(*problem)[:2]):
        return call(**arguments, backend="reference")


def seeds_for(leaves: Leaves, o: Tensor, lse: Tensor) -> Leaves:
    """A cotangent of o and of lse, a tangent for the gradient of each leaf."""
    like = {"o": o, "lse": lse, **leaves}
    return {
        name: randn(*t.shape, seed=100 + index).to(t.device) for index, (name, t) in enumerate(like.items())
    }


def relative_error(found: Tensor, exact: Tensor, packed: bool = False, *, vanishes: bool = False) -> float:
    """‖x − x64‖/‖x64‖ of the whole or of the worst (batch, head), `vanishes`: of ones at least."""
    dead = exact == -INF
    assert torch.equal(found == -INF, dead), "-inf in other places than the float64 reference's"
    difference, exact = (t.masked_fill(dead, 0.0) for t in (found.double() - exact, exact))
    if packed and exact.ndim == 3:  # [total, H, d]
        difference, exact = (t.transpose(0, 1)[None] for t in (difference, exact))
    worst = 0.0
    for by_head in (False, True):
        split = by_head and exact.ndim > 2
        rows = [t.flatten(2).flatten(0, 1) if split else t.flatten()[None] for t in (difference, exact)]
        if exact.numel():
            error, size = (row.norm(dim=-1) for row in rows)
            size = size.clamp_min(math.sqrt(rows[1].shape[-1])) if vanishes else size
            ratio = torch.where(error == 0, 0.0, error / size).max().item()
            worst = ratio if not ratio <= worst else worst
    return worst


def check(
    backend: str,
    leaves: Leaves,
    dtype: torch.dtype = torch.float32,
    *,
    layout: Layout = lambda name, t: t,
    function: Callable[..., Any] = metattn.attention,
    unchecked: tuple[str, ...] = (),
    vanishing: tuple[str, ...] = (),
    **options: Any,
) -> Leaves:
    """Both orders on a backend against float64, within the rule beside eager torch in the same dtype; ours.

    `layout` lays out what our call gets: the leaves and options by their names, the cotangent of o as "do".
    """
    device = DEVICES[backend]

    def constants(dtype: torch.dtype, layout: Layout) -> dict[str, Any]:
        return {
            name: layout(name, t.to(device, dtype if t.is_floating_point() else None))
            if isinstance(t, Tensor)
            else t
            for name, t in options.items()
        }

    def call(dtype: torch.dtype, layout: Layout = lambda name, t: t) -> Callable[..., tuple[Tensor, Tensor]]:
        return partial(function, **constants(dtype, layout), return_lse=True)

    rounded = {name: t.to(device, dtype) for name, t in leaves.items()}
    seeds = seeds_for(rounded, *plain(call(dtype), **rounded))
    seeds = {name: t.to(dtype).double() for name, t in seeds.items()}
    ours = both_orders(
        partial(call(dtype, layout), backend=backend),
        {name: layout(name, t) for name, t in rounded.items()},
        seeds | {"o": layout("do", seeds["o"].to(dtype))},
    )
    eager = both_orders(partial(plain, call(dtype)), rounded, seeds)
    exact = both_orders(
        partial(plain, call(torch.float64)), {name: t.double() for name, t in rounded.items()}, seeds
    )
    factor, floor = {torch.float64: (4.0, 1e-12), **FLOORS}[dtype]
    packed = function is metattn.varlen_attention
    for name in exact.keys() - set(unchecked):
        error, eagers = (
            relative_error(x[name], exact[name], packed, vanishes=name in vanishing) for x in (ours, eager)
        )
        limit = max(factor * eagers, floor)
        assert error <= limit, f"{name}: relative error {error:.2e} above {limit:.2e}"
    for name, t in leaves.items():
        assert ours[f"d{name}"].shape == ours[f"second d{name}"].shape == t.shape
        assert ours[f"d{name}"].dtype == ours[f"second d{name}"].dtype == dtype
    return ours


def mask_of(*shape: int, empty_row: int | None = None) -> Tensor:
    mask = randn(*shape) > -0.5
    mask[..., 0] = True
    if empty_row is not None:
        mask[..., empty_row, :] = False
    return mask


def nothing_in_row(result: Leaves, row: int) -> None:
    """The row's output is 0, its lse −inf, its gradients 0, all else is finite."""
    assert not result["o"][..., row, :].any()
    assert (result["lse"][..., row] == -INF).all()
    for name in ("dq", "second dq"):
        assert not result[name][..., row, :].any()
    assert all(t.isfinite().all() for name, t in result.items() if name != "lse")
