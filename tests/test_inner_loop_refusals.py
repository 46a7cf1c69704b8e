"""What inner loops refuse: wrong arguments, and whatever would lose a gradient without a word."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss
from unrolled import (
    LATER,
    TASKS,
    Params,
    Samples,
    model_of,
    of_task,
    samples_of,
)

from metattn.meta import (
    SGD,
    Adam,
    Checkpointed,
    Implicit,
    MetaSGD,
    adapt,
    maml_loss,
)


@pytest.mark.parametrize("kind", [Checkpointed(), Checkpointed(2), Implicit(1.0)], ids=str)
@pytest.mark.parametrize("transform", ["none", "grad", "vmap", "vmap of grad", "grad of grad"])
def test_a_captured_tensor_is_refused(kind: Any, transform: str) -> None:
    """Its gradient would be lost without a word."""
    model, support, query = model_of(), samples_of(2, 1), samples_of(4, 2)
    params = {name: value.detach() for name, value in model.named_parameters()}
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def query_loss(factor: Tensor, support: Samples, query: Samples) -> Tensor:
        adapted = adapt(
            model,
            params,
            lambda outputs, targets: factor * mse_loss(outputs, targets),
            support,
            optimizer=SGD(0.1),
            steps=2,
            meta_gradient=kind,
        )
        return mse_loss(functional_call(model, adapted, (query[0],)), query[1])

    one = of_task(support, 0), of_task(query, 0)
    call: dict[str, Callable[[], Any]] = {
        "none": lambda: query_loss(factor, *one),
        "grad": lambda: torch.func.grad(query_loss)(factor.detach(), *one),
        "vmap": lambda: torch.func.vmap(query_loss, in_dims=(None, 0, 0))(factor, support, query),
        "vmap of grad": lambda: torch.func.vmap(torch.func.grad(query_loss), in_dims=(None, 0, 0))(
            factor.detach(), support, query
        ),
        "grad of grad": lambda: torch.func.grad(torch.func.grad(query_loss))(factor.detach(), *one),
    }
    with pytest.raises(ValueError, match="depends on another tensor that requires a gradient"):
        call[transform]()


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SGD(0.1, nesterov=True), ValueError, "nesterov: expected a momentum beside it"),
        (lambda: Adam(0.1, betas=(0.9, 1.0)), ValueError, "betas: expected two numbers of 0 or more"),
        (lambda: Adam(0.1, eps=0.0), ValueError, "eps: expected a number above 0, got 0.0"),
        (lambda: Checkpointed(0), ValueError, "save_every: expected an integer of 1 or more, got 0"),
        (lambda: Checkpointed(1.5), ValueError, "save_every: expected an integer of 1 or more, got 1.5"),
        (lambda: Implicit(0.0), ValueError, "strength: expected a number above 0, got 0.0"),
        (lambda: Implicit(iterations=0), ValueError, "iterations: expected an integer of 1 or more, got 0"),
        (lambda: Implicit(tolerance=-1.0), ValueError, "tolerance: expected a number of 0 or more, got -1.0"),
        (lambda: Implicit(torch.ones(())), ValueError, "strength: expected a number above 0"),
        (lambda: SGD("0.1"), TypeError, "lr: expected a number, a tensor or a dict of them by name, got str"),
        (lambda: Adam(nn.ParameterDict()), TypeError, "lr: expected a number.*got ParameterDict"),
    ],
)
def test_refusals_of_options(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        make()


def test_refusals_of_calls() -> None:
    model, samples = model_of(), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())

    def call(**change: Any) -> None:
        options = {"support": samples, "optimizer": SGD(0.1), "steps": 2, **change}
        adapt(model, params, mse_loss, **options)

    with pytest.raises(TypeError, match=r"optimizer: expected SGD\(…\), Adam.*, got float"):
        call(optimizer=0.1)
    with pytest.raises(TypeError, match="got SGD"):
        call(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="got SGD"):
        call(optimizer=SGD)
    with pytest.raises(TypeError, match=r"expected what MetaSGD's optimizer\(\) returns"):
        call(optimizer=MetaSGD(params, 0.1))
    with pytest.raises(
        ValueError, match=r"support: expected one pair .* a list of 2 pairs, one a step; got 3"
    ):
        call(support=[samples] * 3)
    with pytest.raises(ValueError, match=r"support: expected a pair \(inputs, targets\), got Tensor"):
        call(support=list(samples))
    with pytest.raises(ValueError, match=r"support: expected a pair \(inputs, targets\), got 3 of them"):
        call(support=(*samples, samples[1]))
    with pytest.raises(
        ValueError, match='expected one pair of inputs and targets for "implicit", got a list'
    ):
        call(support=[samples] * 2, meta_gradient="implicit")
    with pytest.raises(ValueError, match="optimizer: expected no field that requires a gradient"):
        call(optimizer=SGD(torch.tensor(0.1, requires_grad=True)), meta_gradient="implicit")
    for way in (None, Checkpointed, "exact"):
        with pytest.raises(ValueError, match="meta_gradient: expected one of reverse, checkpointed"):
            call(meta_gradient=way)
    with pytest.raises(TypeError, match="params: expected tensors by name"):
        adapt(model, model.parameters(), mse_loss, samples, optimizer=SGD(0.1), steps=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer: expected a step to leave encoder.0.weight \[8, 2\]"):
        call(optimizer=SGD(torch.full((3, 1, 1), 0.1, dtype=torch.float64)))

    tasks = samples_of(2, 1)
    options: dict[str, Any] = {"optimizer": SGD(0.1), "steps": 1}
    with pytest.raises(ValueError, match=r"query: expected a pair \(inputs, targets\), got 1 of them"):
        maml_loss(model, params, mse_loss, tasks, tasks[:1], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='randomness, chunk_size: expected "different" and None beside'):
        maml_loss(model, params, mse_loss, tasks, tasks, tasks="loop", chunk_size=2, **options)
    with pytest.raises(TypeError, match=r"support, query: expected tensors, numbers.*got SimpleNamespace"):
        maml_loss(model, params, mse_loss, (SimpleNamespace(x=tasks[0]), tasks[1]), tasks, **options)


@pytest.mark.parametrize("kind", LATER, ids=str)
def test_an_optimizers_captured_tensor_is_refused(kind: Any) -> None:
    """A module among the fields is no tensor and no dict of tensors: what it holds would be cut off."""

    @dataclasses.dataclass(frozen=True)
    class Learned:
        net: nn.Module

        def init(self, params: Params) -> dict[str, Params]:
            return {}

        def step(self, index: int, params: Params, gradients: Params, state: Any) -> tuple[Params, Any]:
            gain = self.net(torch.ones(1, dtype=torch.float64))
            return {name: value - 0.1 * gain * gradients[name] for name, value in params.items()}, state

    model = model_of()
    optimizer = Learned(nn.Linear(1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="the optimizer depends on another tensor that requires a gradient"):
        adapt(
            model,
            dict(model.named_parameters()),
            mse_loss,
            of_task(samples_of(2, 1), 0),
            optimizer=optimizer,
            steps=2,
            meta_gradient=kind,
        )


@pytest.mark.parametrize("kind", [Checkpointed(), Checkpointed(2)], ids=str)
def test_a_tensor_captured_at_a_later_step_is_refused(kind: Any) -> None:
    model, samples = model_of(), of_task(samples_of(2, 1), 0)
    factor = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    support = [(samples[0], ("plain", samples[1])), (samples[0], ("weighted", samples[1]))]

    def loss_fn(outputs: Tensor, targets: tuple[str, Tensor]) -> Tensor:
        return mse_loss(outputs, targets[1]) * (factor if targets[0] == "weighted" else 1.0)

    with pytest.raises(ValueError, match="the loss depends on another tensor"):
        adapt(
            model,
            dict(model.named_parameters()),
            loss_fn,
            support,
            optimizer=SGD(0.1),
            steps=2,
            meta_gradient=kind,
        )


@pytest.mark.parametrize("kind", ["reverse", "checkpointed", "first-order", "implicit"])
def test_a_step_that_loses_a_parameter_is_refused(kind: str) -> None:
    @dataclasses.dataclass(frozen=True)
    class Some:
        def init(self, params: Params) -> dict[str, Params]:
            return {}

        def step(self, index: int, params: Params, gradients: Params, state: Any) -> tuple[Params, Any]:
            return {n: x for n, x in params.items() if n.endswith("weight")}, state

    model = model_of()
    with pytest.raises(ValueError, match=r"optimizer: expected a step to leave encoder.0.bias .*; got none"):
        adapt(
            model,
            dict(model.named_parameters()),
            mse_loss,
            of_task(samples_of(2, 1), 0),
            optimizer=Some(),
            steps=2,
            meta_gradient=kind,
        )


def test_a_state_that_changes_is_for_reverse_mode_alone() -> None:
    @dataclasses.dataclass(frozen=True)
    class Lazy:
        def init(self, params: Params) -> dict[str, Params]:
            return {}

        def step(self, index: int, params: Params, gradients: Params, state: Any) -> tuple[Params, Any]:
            return {n: x - 0.1 * gradients[n] for n, x in params.items()}, {"last": gradients}

    model = model_of()
    params, samples = dict(model.named_parameters()), of_task(samples_of(2, 1), 0)
    options: dict[str, Any] = {"optimizer": Lazy(), "steps": 2}
    adapt(model, params, mse_loss, samples, meta_gradient="reverse", **options)
    for kind in ("checkpointed", Checkpointed(2)):
        with pytest.raises(
            ValueError, match="expected a state of floating-point tensors whose structure never"
        ):
            adapt(model, params, mse_loss, samples, meta_gradient=kind, **options)


def test_forward_mode_says_where_it_is() -> None:
    model = model_of()
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: Params, kind: str) -> Tensor:
        adapted = adapt(
            model,
            params,
            mse_loss,
            of_task(samples_of(2, 1), 0),
            optimizer=SGD(0.1),
            steps=1,
            meta_gradient=kind,
        )
        return sum((x.square().sum() for x in adapted.values()), start=torch.zeros((), dtype=torch.float64))

    for kind in ("checkpointed", "implicit"):
        with pytest.raises(NotImplementedError, match='use "reverse"'):
            torch.func.jvp(lambda p, kind=kind: loss(p, kind), (params,), (params,))


def test_implicit_leaves_learned_rates_alone_where_nothing_is_recorded() -> None:
    model, samples = model_of(), samples_of(2, 1)
    params = dict(model.named_parameters())
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        adapt(
            model,
            params,
            mse_loss,
            of_task(samples, 0),
            optimizer=SGD(lr),
            steps=1,
            meta_gradient="implicit",
        )

    def loss(lr: Tensor, x: Tensor, y: Tensor) -> Tensor:
        adapted = adapt(model, params, mse_loss, (x, y), optimizer=SGD(lr), steps=1, meta_gradient="implicit")
        return sum((v.square().sum() for v in adapted.values()), start=torch.zeros((), dtype=torch.float64))

    with pytest.raises(ValueError, match="optimizer: expected no field that requires a gradient"):
        torch.func.vmap(loss)(lr.expand(TASKS), *samples)
