"""Derivatives of a function along a vector, by reverse and forward mode in every order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jvp

Formula = Callable[[Tensor], Tensor]
X64: dict[str, Any] = {"dtype": torch.float64}


def reverse_twice(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return grad(lambda x: (grad(f)(x) * t).sum())(x)


def forward_over_reverse(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return jvp(grad(f), (x,), (t,))[1]  # type: ignore[no-any-return]


def reverse_over_forward(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return grad(lambda x: jvp(f, (x,), (t,))[1])(x)


def forward_twice(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return jacfwd(lambda x: jvp(f, (x,), (t,))[1])(x)


def duals(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    """Reverse over forward without torch.func."""
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        rate = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
    assert rate is not None
    return torch.autograd.grad(rate, x)[0]


def reverse_thrice(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    (second,) = torch.autograd.grad((first * t).sum(), x, create_graph=True)
    return torch.autograd.grad((second * t).sum(), x)[0]
