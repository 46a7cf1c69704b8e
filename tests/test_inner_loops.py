"""Inner loops: every optimizer, algorithm and way to differentiate, against autograd of the unrolled loop."""

from __future__ import annotations

import dataclasses
import warnings
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from unrolled import (
    LATER,
    TASKS,
    LearnedLoss,
    Params,
    agree,
    gradient_of,
    head_of,
    model_of,
    of_task,
    plain_sgd,
    samples_of,
    unrolled_mean,
)

import metattn
from metattn.meta import (
    SGD,
    Adam,
    Checkpointed,
    FirstOrder,
    Implicit,
    InnerOptimizer,
    MetaSGD,
    Reverse,
    adapt,
    maml_loss,
    reptile_loss,
)
from metattn.meta.implicit import conjugate_gradients

EXACT = [Reverse(), Checkpointed(), Checkpointed(2), Checkpointed(3)]


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


@pytest.mark.parametrize("kind", EXACT, ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_meta_gradient_of_every_optimizer(name: str, kind: Any) -> None:
    ours, step, _ = OPTIMIZERS[name]
    model, support, query = model_of(), samples_of(2, 1), samples_of(4, 2)
    params = dict(model.named_parameters())
    expected = unrolled_mean(model, support, query, step, 4)
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

    model, loss_fn = model_of(), LearnedLoss()
    head = head_of(model)
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
    head = head_of(model)
    expected = unrolled_mean(
        model,
        support,
        query,
        plain_sgd(0.1),
        3,
        adapted=lambda name: name.startswith("decoder."),
    )
    own = dict(model.named_parameters())
    exact = gradient_of(expected, own)
    for kind in ("reverse", "checkpointed"):
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
    expected = unrolled_mean(
        model,
        support,
        query,
        lambda values, gradients, state, index: (
            [x - a * g for x, a, g in zip(values, rates.rates, gradients, strict=True)],
            state,
        ),
        2,
    )
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
    """Its gradient is θ − mean φ, so that a step of size 1 arrives at the mean of adapted ones."""
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


@pytest.mark.parametrize("kind", [Checkpointed(), Checkpointed(2)], ids=str)
def test_checkpointed_under_torch_func(kind: Any) -> None:
    """grad, grad of vmap, vmap of grad, and the meta-gradient's own derivative, as in reverse mode."""
    model, support, query = model_of(), samples_of(1, 1), samples_of(1, 2)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: Params, meta_gradient: Any, i: int = 0) -> Tensor:
        adapted = adapt(
            model,
            params,
            mse_loss,
            of_task(support, i),
            optimizer=SGD(0.1, momentum=0.5),
            steps=3,
            meta_gradient=meta_gradient,
        )
        return mse_loss(functional_call(model, adapted, (query[0][i],)), query[1][i])

    agree(torch.func.grad(loss)(params, kind), torch.func.grad(loss)(params, "reverse"))

    def many(params: Params, meta_gradient: Any) -> Tensor:
        return maml_loss(
            model,
            params,
            mse_loss,
            support,
            query,
            optimizer=Adam(0.03),
            steps=3,
            meta_gradient=meta_gradient,
        )

    agree(torch.func.grad(many)(params, kind), torch.func.grad(many)(params, "reverse"))

    starts = {name: torch.stack([value, 1.1 * value]) for name, value in params.items()}
    for way in ("vmap of grad", "grad of grad"):
        found = []
        for meta_gradient in (kind, "reverse"):
            if way == "vmap of grad":
                each = torch.func.vmap(torch.func.grad(lambda p, m=meta_gradient: loss(p, m)))(starts)
            else:
                with pytest.warns(metattn.HigherOrderWarning):
                    each = torch.func.grad(
                        lambda p, m=meta_gradient: sum(
                            g.square().sum() for g in torch.func.grad(loss)(p, m).values()
                        )
                    )(params)
            found.append(each)
        agree(*found)


class Noisy(nn.Module):
    """With dropout in attention and outside, and a buffer that its forward pass writes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.attention = metattn.nn.MultiheadAttention(8, 2, dropout=0.4, batch_first=True)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.first(x))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        output: Tensor = self.last(h)
        return output


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("kind", [Checkpointed(), Checkpointed(2)], ids=str)
def test_dropout_is_drawn_again_as_it_was(kind: Any, tasks: str) -> None:
    torch.manual_seed(0)
    model, support, query = Noisy().double(), samples_of(2, 1), samples_of(4, 2)
    params = dict(model.named_parameters())
    found, after = [], []
    for meta_gradient in ("reverse", kind):
        torch.manual_seed(5)
        loss = maml_loss(
            model,
            params,
            mse_loss,
            support,
            query,
            optimizer=SGD(0.1),
            steps=3,
            meta_gradient=meta_gradient,
            tasks=tasks,
        )
        torch.rand(7)  # what is drawn in between is of no consequence
        found.append(gradient_of(loss, params))
        after.append(torch.rand(3))
    agree(found[1], found[0])
    assert torch.equal(*after)  # and the generator goes on as if nothing had been drawn again


def test_surroundings_are_the_same_on_the_way_back() -> None:
    """Autocast, the named backend and torch's function modes, though the backward pass is outside."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), Attending(), nn.Linear(8, 3))
    x, y = (t.float() for t in of_task(samples_of(2, 1), 0))
    params = dict(model.named_parameters())
    seen: list[tuple[Any, Any]] = []
    model[1].register_forward_hook(
        lambda module, args, output: seen.append((output.dtype, metattn.backends.named()))
    )
    found = []
    for meta_gradient in ("reverse", "checkpointed"):
        with (
            torch.autocast("cpu", torch.bfloat16),
            metattn.use_backend("reference"),
            metattn.sdpa_override() as override,
        ):
            adapted = adapt(
                model, params, mse_loss, (x, y), optimizer=SGD(0.1), steps=2, meta_gradient=meta_gradient
            )
        loss = sum((value.square().sum() for value in adapted.values()), start=torch.zeros(()))
        found.append(gradient_of(loss, params))
    assert len(seen) == 2 + 2 + 2  # two steps each, and two again on the way back
    assert set(seen) == {(torch.bfloat16, "reference")}
    assert override.calls == 4
    for name, value in found[1].items():
        error = (value - found[0][name]).norm() / found[0][name].norm().clamp_min(1e-3)
        assert error < 0.02, name
    assert metattn.backends.named() is None


class SelfAttending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = metattn.nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize("kind", [Checkpointed(), Checkpointed(2)], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
def test_batched_meta_gradients(kind: Any, create_graph: bool) -> None:
    """is_grads_batched: its older vmap lies around the steps' forward mode and torch.func's transforms."""
    model = SelfAttending()
    params = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    x, y = torch.randn(2, 1, 5, 4, dtype=torch.float64)

    def gradients(meta_gradient: Any, batched: bool) -> list[Tensor]:
        adapted = adapt(
            model,
            params,
            mse_loss,
            (x, y),
            optimizer=SGD(0.1),
            steps=2,
            meta_gradient=meta_gradient,
        )
        found = torch.cat([value.flatten() for value in adapted.values()])[:3]
        of, basis = list(params.values()), torch.eye(3, dtype=x.dtype)
        if batched:
            rows = torch.autograd.grad(found, of, basis, is_grads_batched=True, create_graph=create_graph)
        else:
            each = [
                torch.autograd.grad(found, of, c, retain_graph=True, create_graph=create_graph) for c in basis
            ]
            rows = tuple(torch.stack(row) for row in zip(*each, strict=True))
        if not create_graph:
            return list(rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", metattn.HigherOrderWarning)
            return list(
                torch.autograd.grad(sum(row.square().sum() for row in rows), of, materialize_grads=True)
            )

    for ours, expected in zip(gradients(kind, True), gradients("reverse", False), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


class Attending(nn.Module):
    """Calls torch's own function, which has no second derivative without the override."""

    def forward(self, h: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(h[None], h[None], h[None])[0]


def test_nothing_is_kept_without_grad() -> None:
    model = model_of()
    with torch.no_grad():
        adapted = adapt(
            model,
            dict(model.named_parameters()),
            mse_loss,
            of_task(samples_of(2, 1), 0),
            optimizer=Adam(0.1),
            steps=3,
            meta_gradient="checkpointed",
        )
    assert all(value.grad_fn is None and not value.requires_grad for value in adapted.values())


@pytest.mark.parametrize("kind", ["reverse", "checkpointed"])
def test_inputs_of_every_form_and_data_of_every_step(kind: str) -> None:
    """Positional and keyword arguments, no targets, and a list with a pair for each step."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 3, dtype=torch.float64)

        def forward(self, x: Tensor, scale: Tensor, shift: float = 0.0) -> dict[str, Tensor]:
            return {"loss": (self.linear(x) * scale + shift).square().mean()}

    torch.manual_seed(0)
    model = Two()
    params = dict(model.named_parameters())
    x, scale = torch.randn(3, TASKS, 4, 2, dtype=torch.float64), torch.randn(3, TASKS, 3, dtype=torch.float64)

    def loss_fn(outputs: dict[str, Tensor], targets: None) -> Tensor:
        return outputs["loss"]

    found = []
    for form in ("tuple", "dict"):
        steps = [
            ((x[t], scale[t], 0.5) if form == "tuple" else {"x": x[t], "scale": scale[t], "shift": 0.5}, None)
            for t in range(3)
        ]
        loss = maml_loss(
            model, params, loss_fn, steps, steps[0], optimizer=SGD(0.1), steps=3, meta_gradient=kind
        )
        found.append(gradient_of(loss, params))

    losses = []
    for i in range(TASKS):
        values = list(params.values())
        for t in range(3):
            now = dict(zip(params, values, strict=True))
            loss = functional_call(model, now, (x[t, i], scale[t, i], 0.5))["loss"]
            values = [
                v - 0.1 * g
                for v, g in zip(values, torch.autograd.grad(loss, values, create_graph=True), strict=True)
            ]
        now = dict(zip(params, values, strict=True))
        losses.append(functional_call(model, now, (x[0, i], scale[0, i], 0.5))["loss"])
    expected = gradient_of(torch.stack(losses).mean(), params)
    for one in found:
        agree(one, expected)


@pytest.mark.parametrize("kind", EXACT, ids=str)
def test_an_optimizer_of_ones_own_may_hand_tensors_on(kind: Any) -> None:
    """Sign descent on some parameters; the others, and its memory, it returns as they came."""

    @dataclasses.dataclass(frozen=True)
    class Some:
        lr: Tensor

        def init(self, params: Params) -> dict[str, Params]:
            return {"first": dict(params)}

        def step(
            self, index: int, params: Params, gradients: Params, state: dict[str, Params]
        ) -> tuple[Params, dict[str, Params]]:
            moved = {
                name: value - self.lr * gradients[name] if name.endswith("weight") else value
                for name, value in params.items()
            }
            return moved, state

    model = model_of()
    params = dict(model.named_parameters())
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaves = {**params, "lr": lr}
    samples = of_task(samples_of(2, 1), 0)
    found = []
    for meta_gradient in ("reverse", kind):
        adapted = adapt(
            model, params, mse_loss, samples, optimizer=Some(lr), steps=4, meta_gradient=meta_gradient
        )
        loss = sum((v.square().sum() for v in adapted.values()), start=torch.zeros((), dtype=torch.float64))
        found.append(gradient_of(loss, leaves))
    agree(found[1], found[0])


def test_no_steps_give_the_parameters() -> None:
    model = model_of()
    params = dict(model.named_parameters())
    for kind in ("reverse", "checkpointed", "first-order", "implicit"):
        adapted = adapt(
            model,
            params,
            mse_loss,
            of_task(samples_of(2, 1), 0),
            optimizer=SGD(0.1),
            steps=0,
            meta_gradient=kind,
        )
        assert all(adapted[name] is value for name, value in params.items())


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("kind", ["reverse", "checkpointed"])
def test_running_statistics_are_left_alone(kind: str, tasks: str) -> None:
    """Batch normalisation goes by the batch, and nothing is written to the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    support, query = (
        (torch.randn(TASKS, 6, 2, dtype=torch.float64), torch.randn(TASKS, 6, 3, dtype=torch.float64))
        for _ in range(2)
    )
    params = dict(model.named_parameters())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    options: dict[str, Any] = {"optimizer": SGD(0.1), "steps": 3, "meta_gradient": kind, "tasks": tasks}
    loss = maml_loss(model, params, mse_loss, support, query, **options)
    found = gradient_of(loss, params)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    expected = unrolled_mean(model, support, query, plain_sgd(0.1), 3)
    agree(found, gradient_of(expected, params))


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


@pytest.mark.parametrize("kind", [Reverse(), *LATER], ids=str)
def test_an_optimizers_own_order_and_dicts(kind: Any) -> None:
    """Names may come back in any order, and a dict among the fields need not be by parameter."""

    @dataclasses.dataclass(frozen=True)
    class Sorted:
        options: dict[str, Tensor]

        def init(self, params: Params) -> dict[str, Params]:
            return {}

        def step(self, index: int, params: Params, gradients: Params, state: Any) -> tuple[Params, Any]:
            return {n: params[n] - self.options["rate"] * gradients[n] for n in sorted(params)}, state

    model, samples = model_of(), of_task(samples_of(2, 1), 0)
    params = dict(reversed(list(model.named_parameters())))
    found = []
    rate = torch.tensor(0.1, dtype=torch.float64)
    for optimizer in (Sorted({"rate": rate}), SGD(0.1)):
        adapted = adapt(model, params, mse_loss, samples, optimizer=optimizer, steps=3, meta_gradient=kind)
        loss = mse_loss(functional_call(model, adapted, (samples[0],)), samples[1])
        found.append({"loss": loss, **gradient_of(loss, params)})
    agree(*found)


@pytest.mark.parametrize("kind", EXACT, ids=str)
@pytest.mark.parametrize("as_module", [False, True], ids=["function", "module"])
def test_a_penalty_on_the_models_parameters_is_on_those_of_the_step(as_module: bool, kind: Any) -> None:
    model, samples = model_of(), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return mse_loss(outputs, targets) + 0.5 * sum(p.square().sum() for p in model.parameters())

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return penalised(outputs, targets)

    found = []
    for loss_fn, optimizer in (
        (Penalised() if as_module else penalised, SGD(0.1)),
        (mse_loss, SGD(0.1, weight_decay=1.0)),
    ):
        adapted = adapt(model, params, loss_fn, samples, optimizer=optimizer, steps=3, meta_gradient=kind)
        loss = mse_loss(functional_call(model, adapted, (samples[0],)), samples[1])
        found.append({"loss": loss, **gradient_of(loss, params)})
    agree(*found)


@pytest.mark.parametrize("tasks", ["vmap", "loop"])
@pytest.mark.parametrize("kind", ["reverse", "checkpointed"])
def test_buffers_of_a_loss_are_copies_and_inputs_may_be_any_mapping(kind: str, tasks: str) -> None:
    class Running(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            loss = mse_loss(outputs, targets)
            self.mean = 0.9 * self.mean + 0.1 * loss.detach()
            return loss

    model, loss_fn = model_of(), Running()
    support, query = samples_of(2, 1), samples_of(4, 2)
    params = dict(model.named_parameters())
    options: dict[str, Any] = {"optimizer": SGD(0.1), "steps": 2, "meta_gradient": kind, "tasks": tasks}
    found = [
        gradient_of(maml_loss(model, params, loss, each, query, **options), params)
        for loss, each in ((loss_fn, (UserDict(x=support[0]), support[1])), (mse_loss, support))
    ]
    agree(*found)
    assert torch.equal(loss_fn.mean, torch.zeros((), dtype=torch.float64))


def test_what_changes_before_the_way_back() -> None:
    """Training flags are as they were; buffers and frozen parameters changed in place raise."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double().eval()
    model[0].weight.requires_grad_(False)
    with torch.no_grad():
        model[1].running_mean.normal_()
    samples = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    params = {name: value for name, value in model.named_parameters() if value.requires_grad}

    def loss(kind: str) -> Tensor:
        adapted = adapt(model, params, mse_loss, samples, optimizer=SGD(0.1), steps=2, meta_gradient=kind)
        return sum((x.square().sum() for x in adapted.values()), start=torch.zeros((), dtype=torch.float64))

    expected = gradient_of(loss("reverse"), params)
    for kind in ("checkpointed", Checkpointed(2)):
        value = loss(kind)
        model.train()
        agree(gradient_of(value, params), expected)
        assert all(module.training for module in model.modules())
        model.eval()
        for changed in (model[1].running_mean, model[0].weight):
            value = loss(kind)
            with torch.no_grad():
                changed.mul_(1.0)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                gradient_of(value, params)


def test_torchs_own_attention_with_its_formula_asked_for() -> None:
    """sdpa_kernel is open again on the way back, where torch's fused kernel would have no derivative."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), Attending(), nn.Linear(8, 3))
    params = dict(model.named_parameters())
    samples = tuple(t.float() for t in of_task(samples_of(2, 1), 0))
    found = []
    for kind in ("reverse", "checkpointed"):
        with sdpa_kernel(SDPBackend.MATH):
            adapted = adapt(model, params, mse_loss, samples, optimizer=SGD(0.1), steps=2, meta_gradient=kind)
        loss = sum((x.square().sum() for x in adapted.values()), start=torch.zeros(()))
        found.append(gradient_of(loss, params))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)


@pytest.mark.parametrize(
    ("dtype", "factor"), [(torch.float32, 1e-23), (torch.float32, 1e23), (torch.float16, 1e3)], ids=str
)
def test_conjugate_gradients_of_tiny_and_huge_numbers(dtype: torch.dtype, factor: float) -> None:
    values = torch.tensor([1.0, 2.0, 5.0], dtype=dtype)
    v = [torch.full((3,), factor, dtype=dtype)]
    (x,) = conjugate_gradients(lambda x: [values * x[0]], v, iterations=10, tolerance=1e-6)
    torch.testing.assert_close(x, v[0] / values, rtol=1e-2 if dtype == torch.float16 else 1e-5, atol=0.0)


@pytest.mark.parametrize("way", ["reverse", "checkpointed"])
def test_a_buffer_that_is_registered_in_the_first_forward(way: str) -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "table"):
                self.register_buffer("table", torch.arange(3.0, dtype=x.dtype)[:, None], persistent=False)
            output: Tensor = self.linear(x) + self.table
            return output

    torch.manual_seed(0)
    lazy, ready = Lazy(), Lazy()
    ready.load_state_dict(lazy.state_dict())
    x, y = torch.randn(2, 3, 4, dtype=torch.float64)
    ready(x)
    found, expected = (
        adapt(m, dict(m.named_parameters()), mse_loss, (x, y), optimizer=SGD(0.1), steps=2, meta_gradient=way)
        for m in (lazy, ready)
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
