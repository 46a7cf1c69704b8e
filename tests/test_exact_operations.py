"""Operations of inner loops whose higher derivatives torch gets wrong, or lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import huber_loss, mse_loss, soft_margin_loss
from unrolled import (
    TASKS,
    agree,
    gradient_of,
    plain_sgd,
    unrolled_mean,
)

import metattn
from metattn.meta import (
    SGD,
    maml_loss,
)
from metattn.meta.torch_fixes import ExactDerivatives


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("loss", "weighted"),
    [(mse_loss, False), (mse_loss, True), (huber_loss, False), (huber_loss, True), (soft_margin_loss, False)],
)
def test_exact_losses_are_torchs(loss: Callable[..., Tensor], weighted: bool, reduction: str) -> None:
    torch.manual_seed(0)
    x = (2 * torch.randn(4, 3, dtype=torch.float64)).requires_grad_()
    y = torch.randn(4, 3, dtype=torch.float64)
    y = y.sign() if loss is soft_margin_loss else y
    options: dict[str, Any] = {"reduction": reduction}
    if weighted:
        options["weight"] = torch.rand(4, 3, dtype=torch.float64)
    if loss is huber_loss:
        options["delta"] = 0.8
    expected = loss(x, y, **options)
    with ExactDerivatives():
        found = loss(x, y, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))

    def total(x: Tensor) -> Tensor:
        with ExactDerivatives():
            return loss(x, y, **options).sin().sum()

    direction = torch.randn_like(x)
    _, forward = torch.func.jvp(torch.func.grad(total), (x.detach(),), (direction,))
    (first,) = torch.autograd.grad(total(x), x, create_graph=True)
    (reverse,) = torch.autograd.grad((first * direction).sum(), x)
    torch.testing.assert_close(forward, reverse)


def test_exact_losses_refuse_what_torch_refuses() -> None:
    x = torch.randn(2, 3)
    with ExactDerivatives():
        with pytest.raises(ValueError, match="not a valid value for reduction"):
            mse_loss(x, x, reduction="median")
        with pytest.warns(UserWarning, match="target size"):
            mse_loss(x, torch.randn(3))
        with pytest.warns(UserWarning, match="size_average"):
            torch.testing.assert_close(mse_loss(x, 0 * x, size_average=False), x.square().sum())


@pytest.mark.parametrize("of", [torch, torch.ops.aten], ids=["torch", "aten"])
@pytest.mark.parametrize("name", ["layer_norm", "batch_norm", "instance_norm"])
def test_norms_by_torchs_own_names(name: str, of: Any) -> None:
    """Under vmap with weights of every task, against one task after the other."""
    norm = getattr(of, name)

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64))
            self.bias = nn.Parameter(torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            if name == "layer_norm":
                return norm(x, (3,), self.weight, self.bias, 1e-5, False)
            return norm(x.mT, self.weight, self.bias, None, None, True, 0.1, 1e-5, False).mT

    model = Normed()
    generator = torch.Generator().manual_seed(2)
    support, query = (
        tuple(torch.randn(TASKS, 4, 5, 3, generator=generator, dtype=torch.float64) for _ in "xy")
        for _ in range(2)
    )
    params = dict(model.named_parameters())
    options: dict[str, Any] = {"optimizer": SGD(0.3), "steps": 2}
    expected = unrolled_mean(model, support, query, plain_sgd(0.3), 2)
    found = maml_loss(model, params, mse_loss, support, query, **options)
    agree(gradient_of(found, params), gradient_of(expected, params))
    with ExactDerivatives(), pytest.raises(NotImplementedError, match="native_layer_norm: its higher"):
        of.native_layer_norm(support[0], (3,), None, None, 1e-5)


@pytest.mark.parametrize("kind", [nn.LayerNorm, metattn.nn.LayerNorm])
def test_norms_of_an_exported_program(kind: type[nn.LayerNorm]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), kind(3)).double()
    generator = torch.Generator().manual_seed(2)
    support, query = (
        tuple(torch.randn(TASKS, 5, 3, generator=generator, dtype=torch.float64) for _ in "xy")
        for _ in range(2)
    )
    program = torch.export.export(model, (support[0][0],)).module()
    losses = []
    for each in (model, program):
        params = dict(each.named_parameters())
        loss = maml_loss(each, params, mse_loss, support, query, optimizer=SGD(0.5), steps=2)
        losses.append((loss, *gradient_of(loss, params).values()))
    expected = unrolled_mean(model, support, query, plain_sgd(0.5), 2)
    expected_gradient = gradient_of(expected, dict(model.named_parameters())).values()
    for found in losses:
        for values in zip(found, (expected, *expected_gradient), strict=True):
            torch.testing.assert_close(*values, rtol=1e-9, atol=1e-10)
