"""Inner loops: every optimizer, algorithm and way to differentiate, against autograd of the unrolled loop."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from unrolled import (
    EXACT,
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
    InnerOptimizer,
    MetaSGD,
    Reverse,
    adapt,
    maml_loss,
    reptile_loss,
)


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
