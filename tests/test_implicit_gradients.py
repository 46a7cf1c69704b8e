"""Implicit gradients of inner loops, and the conjugate gradients they are solved by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from unrolled import (
    gradient_of,
    model_of,
    of_task,
    samples_of,
)

from metattn.meta import (
    SGD,
    Implicit,
    adapt,
    maml_loss,
)
from metattn.meta.implicit import conjugate_gradients


class Quadratic(nn.Module):
    """Outputs w, so that a loss on it is a function of w."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def test_implicit_gradient_of_a_quadratic() -> None:
    """min ½ wᵀAw − bᵀw + λ/2·‖w − w_0‖² has (A + λ)w = b + λ·w_0: dw/dw_0 = λ(A + λ)⁻¹, dw/db = (A + λ)⁻¹."""
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    curvature, strength = root @ root.T, 2.0
    model = Quadratic()
    b = torch.randn(4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, dtype=torch.float64)

    def loss_fn(w: Tensor, b: Tensor) -> Tensor:
        return 0.5 * w @ curvature @ w - b @ w

    adapted = adapt(
        model,
        dict(model.named_parameters()),
        loss_fn,
        (torch.zeros(1), b),
        optimizer=SGD(0.05),
        steps=600,
        meta_gradient=Implicit(strength, iterations=20, tolerance=1e-12),
    )["weight"]
    inverse = torch.linalg.inv(curvature + strength * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(adapted, inverse @ (b + strength * model.weight))
    found = torch.autograd.grad(weights @ adapted, [model.weight, b])
    torch.testing.assert_close(found[0], strength * inverse @ weights)
    torch.testing.assert_close(found[1], inverse @ weights)


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_implicit_gradient_is_that_of_long_unrolling(tasks: str) -> None:
    """Of a loss with a pull towards θ_0: autograd through 60 steps that converge, with attention inside."""
    model, support, query = model_of(), samples_of(2, 1, tasks=2), samples_of(4, 2, tasks=2)
    params = dict(model.named_parameters())
    strength = 10.0

    def task_loss(i: int) -> Tensor:
        x, y = of_task(support, i)
        values = list(params.values())
        for _ in range(60):
            now = dict(zip(params, values, strict=True))
            pull = sum((a - b).square().sum() for a, b in zip(values, params.values(), strict=True))
            loss = mse_loss(functional_call(model, now, (x,)), y) + strength / 2 * pull
            found = torch.autograd.grad(loss, values, create_graph=True)
            values = [a - 0.05 * g for a, g in zip(values, found, strict=True)]
        return mse_loss(
            functional_call(model, dict(zip(params, values, strict=True)), (query[0][i],)), query[1][i]
        )

    expected = torch.stack([task_loss(i) for i in range(2)]).mean()
    loss = maml_loss(
        model,
        params,
        mse_loss,
        support,
        query,
        optimizer=SGD(0.05),
        steps=60,
        meta_gradient=Implicit(strength, iterations=60, tolerance=1e-13),
        tasks=tasks,
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    exact = gradient_of(expected, params)
    for name, value in gradient_of(loss, params).items():
        torch.testing.assert_close(value, exact[name], rtol=1e-6, atol=1e-9)


def test_conjugate_gradients_end_where_they_should() -> None:
    """In as many steps as there are eigenvalues; at negative curvature; and each task of a vmap by itself."""
    values = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    v = torch.ones(3, dtype=torch.float64)

    def solve(values: Tensor, iterations: int = 3) -> Tensor:
        return conjugate_gradients(lambda x: [values * x[0]], [v], iterations=iterations, tolerance=1e-12)[0]

    torch.testing.assert_close(solve(values), 1 / values)
    torch.testing.assert_close(solve(values, 50), 1 / values)
    assert torch.equal(solve(-values), torch.zeros_like(v))
    both = torch.func.vmap(lambda values: solve(values, 10))(
        torch.stack([values, torch.full_like(values, 4)])
    )
    torch.testing.assert_close(both, torch.stack([1 / values, torch.full_like(values, 0.25)]))


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1e-23), (torch.float32, 1e23), (torch.float16, 1e3)], ids=str
)
def test_conjugate_gradients_of_tiny_and_huge_numbers(dtype: torch.dtype, factor: float) -> None:
    values = torch.tensor([1.0, 2.0, 5.0], dtype=dtype)
    v = [torch.full((3,), factor, dtype=dtype)]
    (x,) = conjugate_gradients(lambda x: [values * x[0]], v, iterations=10, tolerance=1e-6)
    torch.testing.assert_close(x, v[0] / values, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=0.0)
