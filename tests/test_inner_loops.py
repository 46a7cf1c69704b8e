"""Inner loops: every optimizer, algorithm and way to differentiate, against autograd through an unrolled loop."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, huber_loss, layer_norm, mse_loss, soft_margin_loss

import metattn
from metattn.meta import (
    SGD,
    Adam,
    AttentionMetaLearner,
    FirstOrder,
    Implicit,
    InnerOptimizer,
    MetaSGD,
    Mixed,
    Reverse,
    adapt,
    maml_loss,
    reptile_loss,
)
from metattn.meta.exact import ExactDerivatives
from metattn.meta.implicit import conjugate_gradients

TASKS, POINTS = 3, 5
EXACT = [Reverse(), Mixed(), Mixed(2), Mixed(3)]
Samples = tuple[Any, Any]
Params = dict[str, Tensor]


def model_of(seed: int = 0) -> AttentionMetaLearner:
    torch.manual_seed(seed)
    model = AttentionMetaLearner(2, 8, 3, num_heads=2, dtype=torch.float64)
    for name, parameter in model.named_parameters():  # the biases' 0 hides mistakes
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


def samples_of(sets: int, seed: int, tasks: int = TASKS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (tasks, sets, POINTS, 2), (tasks, sets, POINTS, 3)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return x, y


def of_task(samples: Samples, i: int) -> Samples:
    return samples[0][i], samples[1][i]


def plain_sgd(
    lr: Any, momentum: float = 0.0, decay: float = 0.0, nesterov: bool = False
) -> Callable[..., tuple[list[Tensor], Any]]:
    """One step of torch.optim.SGD's rule, out of place, on lists."""

    def step(values: list[Tensor], gradients: list[Tensor], state: Any, index: int) -> Any:
        gradients = [g + decay * x for g, x in zip(gradients, values, strict=True)]
        if momentum:
            state = gradients if state is None else [momentum * b + g for b, g in zip(state, gradients)]
            directions = [g + momentum * b for g, b in zip(gradients, state)] if nesterov else state
        else:
            directions = gradients
        return [x - lr * d for x, d in zip(values, directions, strict=True)], state

    return step


def plain_adam(lr: float, decay: float = 0.0) -> Callable[..., tuple[list[Tensor], Any]]:
    """One of torch.optim.Adam's; the square root is moved off 0, where units that are off have their v."""

    def step(values: list[Tensor], gradients: list[Tensor], state: Any, index: int) -> Any:
        gradients = [g + decay * x for g, x in zip(gradients, values, strict=True)]
        state = state or [(torch.zeros_like(x), torch.zeros_like(x)) for x in values]
        state = [
            (0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2) for (m, v), g in zip(state, gradients, strict=True)
        ]
        corrected = [(m / (1 - 0.9 ** (index + 1)), v / (1 - 0.999 ** (index + 1))) for m, v in state]
        return [
            x - lr * m / ((v + 1e-300).sqrt() + 1e-8) for x, (m, v) in zip(values, corrected, strict=True)
        ], state

    return step


OPTIMIZERS: dict[str, tuple[InnerOptimizer, Callable[..., Any], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (SGD(0.1), plain_sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum, decay": (
        SGD(0.1, momentum=0.9, weight_decay=0.02),
        plain_sgd(0.1, 0.9, 0.02),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.02),
    ),
    "nesterov": (
        SGD(0.1, momentum=0.8, nesterov=True),
        plain_sgd(0.1, 0.8, nesterov=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True),
    ),
    "adam": (Adam(0.03), plain_adam(0.03), lambda p: torch.optim.Adam(p, lr=0.03)),
    "adam, decay": (
        Adam(0.03, weight_decay=0.1),
        plain_adam(0.03, 0.1),
        lambda p: torch.optim.Adam(p, lr=0.03, weight_decay=0.1),
    ),
}


def unrolled(
    model: nn.Module,
    support: Samples,
    query: Samples,
    step: Callable[..., Any],
    steps: int,
    *,
    adapted: Callable[[str], bool] = lambda name: True,
) -> Tensor:
    """The query loss after steps by torch.autograd.grad alone."""
    own = dict(model.named_parameters())
    names = [name for name in own if adapted(name)]
    values: list[Tensor] = [own[name] for name in names]
    state = None
    for index in range(steps):
        params = dict(zip(names, values, strict=True))
        loss = mse_loss(functional_call(model, params, (support[0],)), support[1])
        gradients = torch.autograd.grad(loss, values, create_graph=True)
        values, state = step(values, list(gradients), state, index)
    params = dict(zip(names, values, strict=True))
    return mse_loss(functional_call(model, params, (query[0],)), query[1])


def gradient_of(loss: Tensor, leaves: dict[str, Tensor]) -> Params:
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def agree(found: Params, expected: Params) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", EXACT, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradient_of_every_optimizer(name: str, kind: Any) -> None:
    ours, step, _ = OPTIMIZERS[name]
    model, support, query = model_of(), samples_of(2, 1), samples_of(4, 2)
    params = dict(model.named_parameters())
    expected = torch.stack(
        [unrolled(model, of_task(support, i), of_task(query, i), step, 4) for i in range(TASKS)]
    ).mean()
    expected_gradient = gradient_of(expected, params)
    for tasks in ("vmap", "loop"):
        loss = maml_loss(
            model,
            params,
            mse_loss,
            support,
            query,
            optimizer=ours,
            steps=4,
            meta_gradient=kind,
            tasks=tasks,
        )
        torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
        agree(gradient_of(loss, params), expected_gradient)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_are_torch_optims(name: str) -> None:
    ours, _, theirs = OPTIMIZERS[name]
    model = model_of()
    samples = of_task(samples_of(2, 1), 0)
    with torch.no_grad():
        adapted = adapt(model, dict(model.named_parameters()), mse_loss, samples, optimizer=ours, steps=6)
    optimizer = theirs(model.parameters())
    for _ in range(6):
        optimizer.zero_grad()
        mse_loss(model(samples[0]), samples[1]).backward()
        optimizer.step()
    agree(adapted, {name: value.detach() for name, value in model.named_parameters()})


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_everything_the_loop_depends_on_gets_its_gradient(kind: Any) -> None:
    """ANIL's body, a learned loss, learned targets, step sizes and momentum: one call, against autograd."""

    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (self.weight * (outputs - targets).square()).mean()

    model, loss_fn = model_of(), Learned()
    head = {name: value for name, value in model.named_parameters() if name.startswith("decoder.")}
    x, y = of_task(samples_of(2, 1), 0)
    query = of_task(samples_of(4, 2), 0)
    y = y.clone().requires_grad_()
    rates = {name: torch.full_like(value, 0.1, requires_grad=True) for name, value in head.items()}
    momentum = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    leaves = {
        **dict(model.named_parameters()),
        "loss": loss_fn.weight,
        "targets": y,
        "momentum": momentum,
        **{f"rate of {name}": rate for name, rate in rates.items()},
    }

    values, buffer = dict(head), None
    for _ in range(4):
        loss = loss_fn(functional_call(model, values, (x,)), y)
        found = torch.autograd.grad(loss, list(values.values()), create_graph=True)
        buffer = found if buffer is None else [momentum * b + g for b, g in zip(buffer, found, strict=True)]
        values = {
            name: value - rates[name] * b for (name, value), b in zip(values.items(), buffer, strict=True)
        }
    expected = gradient_of(mse_loss(functional_call(model, values, (query[0],)), query[1]), leaves)

    adapted = adapt(
        model, head, loss_fn, (x, y), optimizer=SGD(rates, momentum=momentum), steps=4, meta_gradient=kind
    )
    assert adapted.keys() == head.keys()
    found = gradient_of(mse_loss(functional_call(model, adapted, (query[0],)), query[1]), leaves)
    agree(found, expected)
    assert all(
        value.norm() > 0 for name, value in found.items() if not name.startswith("attention.in_proj_b")
    )


def test_anil_adapts_the_head_alone() -> None:
    model, support, query = model_of(), samples_of(2, 1), samples_of(4, 2)
    head = {name: value for name, value in model.named_parameters() if name.startswith("decoder.")}
    expected = torch.stack(
        [
            unrolled(
                model,
                of_task(support, i),
                of_task(query, i),
                plain_sgd(0.1),
                3,
                adapted=lambda name: name.startswith("decoder."),
            )
            for i in range(TASKS)
        ]
    ).mean()
    own = dict(model.named_parameters())
    exact = gradient_of(expected, own)
    for kind in ("reverse", "mixed"):
        loss = maml_loss(
            model, head, mse_loss, support, query, optimizer=SGD(0.1), steps=3, meta_gradient=kind
        )
        agree(gradient_of(loss, own), exact)


def test_first_order_leaves_out_the_second_derivative_alone() -> None:
    """FOMAML: the gradient of the query loss at the adapted parameters is handed to the initial ones."""
    model = model_of()
    params = dict(model.named_parameters())
    support, query = of_task(samples_of(2, 1), 0), of_task(samples_of(4, 2), 0)
    for optimizer in (SGD(0.1), Adam(0.03)):
        adapted = adapt(model, params, mse_loss, support, optimizer=optimizer, steps=3)
        leaves = {name: value.detach().requires_grad_() for name, value in adapted.items()}
        expected = gradient_of(mse_loss(functional_call(model, leaves, (query[0],)), query[1]), leaves)
        adapted = adapt(
            model, params, mse_loss, support, optimizer=optimizer, steps=3, meta_gradient=FirstOrder()
        )
        loss = mse_loss(functional_call(model, adapted, (query[0],)), query[1])
        agree(gradient_of(loss, params), expected)


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_meta_sgd(kind: Any) -> None:
    model, support, query = model_of(), samples_of(2, 1), samples_of(4, 2)
    params = dict(model.named_parameters())
    rates = MetaSGD(params, lr=0.1)
    assert sum(rate.numel() for rate in rates.parameters()) == sum(x.numel() for x in params.values())
    expected = torch.stack(
        [
            unrolled(
                model,
                of_task(support, i),
                of_task(query, i),
                lambda values, gradients, state, index: (
                    [x - a * g for x, a, g in zip(values, rates.rates, gradients, strict=True)],
                    state,
                ),
                2,
            )
            for i in range(TASKS)
        ]
    ).mean()
    leaves = {**params, **dict(rates.named_parameters())}
    loss = maml_loss(
        model,
        params,
        mse_loss,
        support,
        query,
        optimizer=rates.optimizer(),
        steps=2,
        meta_gradient=kind,
    )
    agree(gradient_of(loss, leaves), gradient_of(expected, leaves))


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
def test_reptile(tasks: str) -> None:
    """Its gradient is θ − mean φ, so that a step of size 1 arrives at the mean of what the tasks adapted to."""
    model, support = model_of(), samples_of(2, 1)
    params = dict(model.named_parameters())
    options = {"optimizer": Adam(0.03), "steps": 4}
    with torch.no_grad():
        adapted = [adapt(model, params, mse_loss, of_task(support, i), **options) for i in range(TASKS)]
    loss = reptile_loss(model, params, mse_loss, support, tasks=tasks, **options)
    for name, gradient in gradient_of(loss, params).items():
        mean = torch.stack([task[name] for task in adapted]).mean(0)
        torch.testing.assert_close(params[name] - gradient, mean, rtol=1e-9, atol=1e-12)


class Quadratic(nn.Module):
    """Outputs w, so that a loss on it is a function of w."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight


def test_implicit_gradient_of_a_quadratic() -> None:
    """min ½ wᵀAw − bᵀw + λ/2·‖w − w_0‖² has (A + λ)w = b + λ·w_0, so dw/dw_0 = λ(A + λ)⁻¹ and dw/db = (A + λ)⁻¹."""
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
    """Of a loss with a pull towards θ_0: autograd through 60 steps that converge, on a network with attention."""
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
