"""Rows whose scores are all large, of either sign: a row's reference and the log of its total travel apart.

Scores are exact in the dtype, so that the plain formula of that dtype is right: a bias, a sink or products
near an offset, and steps by which they differ. Above some offset a dtype's steps leave but equal scores.

`python tests/test_large_scores.py` prints the table of docs/math.md, of the CPU's backend.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script too

from helpers import Call, both_orders

WIDE, NARROW = torch.float64, torch.float32
DTYPES = {"cpu": (WIDE, NARROW), "cuda": (WIDE, NARROW), "reference": (WIDE, NARROW), "triton": (NARROW,)}
OFFSETS = (1e3, 2.0**31, 3e12, 1e15, 1e18)
TOLERANCE = {WIDE: 1e-11, NARROW: 1e-5}


def offsets(dtype: torch.dtype, all_of_them: bool) -> Iterator[float]:
    """Of either sign; and the lowest number, a common mask."""
    for offset in OFFSETS if all_of_them else OFFSETS[2::2]:
        yield from (-offset, offset)
    yield torch.finfo(dtype).min


def step_at(offset: float, dtype: torch.dtype) -> float:
    """What scores near an offset may differ by, and stay exact."""
    return max(0.5, 4 * torch.finfo(dtype).eps * abs(offset)) if math.isfinite(4 * offset) else 0.0


def call_near(offset: float, dtype: torch.dtype, names: tuple[str, ...], m: int = 5) -> Call:
    """S = offset − step·(0, 1 or 2), less ALiBi; q is (1, 0): only k's first feature is in the scores."""
    step, n = step_at(offset, dtype), 3
    generator = torch.Generator().manual_seed(0)
    below = step * torch.randint(0, 3, (1, 2, m), generator=generator).to(dtype)
    q = torch.tensor([1.0, 0.0], dtype=dtype).expand(1, 2, n, 2)
    k, v = (torch.randn(1, 2, m, 2, generator=generator, dtype=WIDE).to(dtype) for _ in range(2))
    k[..., 0] = -below
    inputs, constants = {"q": q, "k": k, "v": v}, {"scale": 1.0}
    if "bias" in names:
        inputs["bias"] = torch.zeros(1, 2, n, m, dtype=dtype)
        inputs["bias"][:, :, 1:] = offset  # and a row of small scores beside
    else:
        k[..., 0] += offset
    if "sinks" in names:
        inputs["sinks"] = torch.tensor([offset, 0.0], dtype=dtype)
    if "softcap" in names:
        constants["softcap"] = 1.5
        k[..., 0] = torch.randn(1, 2, m, generator=generator, dtype=WIDE).to(dtype)
    if "alibi" in names:
        constants["alibi_slopes"] = torch.tensor([2.0, 0.5], dtype=dtype)
    if "mask" in names:
        constants["mask"] = torch.arange(m) != torch.arange(n)[:, None]
    return Call(inputs, constants, None)


def orders(call: Call, function: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Both orders of o and lse. Of large products what such keys leave digits: a query's gradient, and what
    moves with it, are differences of numbers as large as the scores.
    """
    if "bias" in call.inputs:
        return both_orders(function, call.inputs)
    x = {name: t.detach().clone().requires_grad_() for name, t in call.inputs.items()}
    o, lse = function(*x.values())
    do, dlse = torch.ones_like(o).cumsum(-1).requires_grad_(), torch.ones_like(lse)
    first = torch.autograd.grad((o, lse), (x["k"], x["v"]), (do, dlse), create_graph=True)
    second = torch.autograd.grad(first[1], (x["k"], do), torch.ones_like(first[1]).cumsum(-2))
    return dict(zip(("o", "lse", "dk", "dv", "d2k", "d2do"), (o, lse, *first, *second), strict=True))


def check(call: Call, backend: str, tolerance: float) -> None:
    right = orders(call, call.math)
    for name, found in orders(call, call.function(backend)).items():
        scale = right[name].double().norm().clamp(1.0, 1e30)
        assert right[name].isfinite().all()
        difference = (found.double() - right[name].double()).clamp(-1e300, 1e300)
        assert difference.norm() <= tolerance * scale, (name, float(difference.norm()), float(scale))


@pytest.mark.parametrize(
    "names",
    [("bias",), ("products",), ("bias", "alibi", "mask"), ("bias", "sinks"), ("products", "sinks")],
    ids="+".join,
)
def test_both_orders(names: tuple[str, ...], backend: str) -> None:
    for dtype in DTYPES[backend]:
        for offset in offsets(dtype, all_of_them=backend in ("cpu", "reference")):
            if "products" in names and abs(offset) > 1e30:  # their gradients have no dtype
                continue
            check(call_near(offset, dtype, names), backend, TOLERANCE[dtype])


def test_softcap(backend: str) -> None:
    """Where a bias of that size leaves nothing of capped scores."""
    for dtype in DTYPES[backend]:
        for offset in (-1e18, torch.finfo(dtype).min):
            check(call_near(offset, dtype, ("bias", "softcap")), backend, TOLERANCE[dtype])


@pytest.mark.parametrize("names", [("bias", "mask"), ("products",)], ids="+".join)
def test_more_keys_than_a_block(names: tuple[str, ...]) -> None:
    """Of which later ones may have the largest score."""
    for dtype in DTYPES["cpu"]:
        for offset in (-3e12, 1e15):
            check(call_near(offset, dtype, names, m=330), "cpu", 4 * TOLERANCE[dtype])


def test_the_lowest_number_as_a_mask_with_alibi(backend: str) -> None:
    """A row of it throughout weighs its keys alike, forward and backward: ALiBi is lost beside it."""
    for dtype in DTYPES[backend]:
        q, k = torch.randn(2, 1, 1, 4, 2).to(dtype)
        bias = torch.zeros(1, 1, 4, 4, dtype=dtype)
        bias[..., 1, :] = torch.finfo(dtype).min
        call = Call(
            {"q": q, "k": k, "v": torch.eye(4, dtype=dtype)[None, None], "bias": bias},
            {"mask": ~torch.eye(4, dtype=torch.bool), "alibi_slopes": torch.tensor([2.0], dtype=dtype)},
            None,
        )
        v = call.inputs["v"].requires_grad_()
        o, _ = call.function(backend)(*call.tensors)
        (columns,) = torch.autograd.grad(o[0, 0, 1, 0], v)  # of v's column 0, the row's weights
        thirds = torch.tensor([1, 0, 1, 1], dtype=dtype) / 3
        torch.testing.assert_close(o[0, 0, 1], thirds)
        torch.testing.assert_close(columns[0, 0, :, 0], thirds)


def test_a_row_that_only_a_sink_holds(backend: str) -> None:
    """Its log-sum-exp is the sink, and what its queries hold is nobody's business."""
    for dtype in DTYPES[backend]:
        for score in (0.25, -3e12, 1e15):
            sink = torch.full((2,), score, dtype=dtype)
            q, k, v = (torch.randn(1, 2, 4, 2).to(dtype).requires_grad_() for _ in range(3))
            mask = torch.ones(4, 4, dtype=torch.bool)
            mask[2] = False
            poisoned = q.detach().clone()
            poisoned[:, :, 2] = torch.nan
            poisoned.requires_grad_()
            options = {"mask": mask, "sinks": sink, "backend": backend}
            found: list[tuple[Tensor, ...]] = []
            for x in (q, poisoned):
                o, lse = Call({"q": x, "k": k, "v": v}, options, None).function(backend)(x, k, v)
                torch.testing.assert_close(lse[:, :, 2], sink[None])
                assert not o[:, :, 2].any()
                found.append(torch.autograd.grad(o.square().sum() + lse.sum(), (x, k, v)))
            for clean, other in zip(*found, strict=True):
                assert torch.equal(clean, other)


def worst(call: Call) -> float:
    """The CPU's largest ‖x − x*‖ / ‖x*‖ of o and both orders' derivatives; x* is the plain formula's."""
    found, right = orders(call, call.function("cpu")), orders(call, call.math)
    names = right.keys() - {"lse"}  # that it is large is no merit
    return max(float((found[x] - right[x]).norm() / right[x].norm().clamp(min=1e-30)) for x in names)


def table() -> str:
    lines = ["| scores near | float64 | float32 |", "|---|---:|---:|"]
    for offset in (*OFFSETS, None):
        cells = []
        for dtype in (WIDE, NARROW):
            near = (torch.finfo(dtype).min,) if offset is None else (-offset, offset)
            cells.append(max(worst(call_near(x, dtype, ("bias", "alibi", "mask"))) for x in near))
        name = "the lowest number" if offset is None else f"±{offset:.0e}"
        lines.append(f"| {name} | {cells[0]:.0e} | {cells[1]:.0e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
