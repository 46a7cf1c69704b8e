"""What surrounds an inner loop: randomness, buffers, modes, data and what changes before the way back."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from unrolled import (
    EXACT,
    TASKS,
    agree,
    gradient_of,
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
    adapt,
    maml_loss,
)


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
