"""Derivatives for which there is no fused map: the reference's, with a warning that names the price."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metattn import torch_internals as internals
from metattn.backends import reference
from metattn.caller import level_of_caller
from metattn.layout import NO_RESULTS, VJP_JVP, Arguments, Cotangents, Layout, Needs
from metattn.problem import Constants, Primals, Problem

Tensors = Sequence[Tensor | None]


class HigherOrderWarning(UserWarning):
    """A derivative is taken for which there is no fused map: it costs the reference's time and N×M memory."""


def warn(what: str) -> None:
    warnings.warn(
        f"{what} of attention has no fused map: it goes through the reference, in eager PyTorch with N×M "
        "matrices in memory",
        HigherOrderWarning,
        stacklevel=level_of_caller(),
    )


def by_reference(
    problem: Problem, given: Arguments, cotangents: Primals, wanted: Arguments
) -> tuple[Primals, Cotangents]:
    """The gradients of ⟨cotangents, VjpJvp⟩ in the primals, do and dlse that are wanted."""
    of_constants = Constants(*(False,) * len(Constants._fields))  # type: ignore[arg-type]
    flags = VJP_JVP.join(Arguments(wanted.primals, of_constants, NO_RESULTS, wanted.cotangents))
    places = [place for place, flag in enumerate(flags) if flag]
    found: list[Tensor | None] = [None] * VJP_JVP.size
    if places:
        warn("a third derivative")
        values, along = VJP_JVP.join(given), [c for c in cotangents if c is not None]
        needs: Any = tuple([c is not None for c in cotangents])

        def product(*x: Tensor) -> Tensor:
            """⟨cotangents, VjpJvp⟩ of the wanted tensors."""
            tensors = list(values)
            for place, value in zip(places, x, strict=True):
                tensors[place] = value
            results = VJP_JVP.run(reference, problem, VJP_JVP.split(tensors), needs)
            there = [result for result in results if result is not None]
            return torch.stack([(r * c).sum() for r, c in zip(there, along, strict=True)]).sum()

        gradient_of = torch.func.grad(product, argnums=tuple(range(len(places))))
        for place, gradient in zip(places, gradient_of(*(values[place] for place in places)), strict=True):
            found[place] = gradient
    gradients = VJP_JVP.split(found)
    return gradients.primals, gradients.cotangents


def reference_jvp(
    layout: Layout, problem: Problem, needs: Needs | None, given: Arguments, move: Arguments
) -> Tensors:
    """The tangents of the reference's map, inside a Function's jvp: its operations have forward mode."""
    duals = [
        x if x is None or t is None else internals.with_tangent(x, t)
        for x, t in zip(layout.join(given), layout.join(move), strict=True)
    ]
    found = layout.run(reference, problem, layout.split(duals), needs)
    return tuple([x if x is None else _tangent(x) for x in found])


def _tangent(x: Tensor) -> Tensor:
    tangent = internals.tangent_of(x)
    return torch.zeros_like(x) if tangent is None else tangent
