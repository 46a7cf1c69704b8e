"""The inner loop against plain autograd through an unrolled loop."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from meta_learners import POINTS, TASKS, Samples, learner, meta_gradient
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss

import metattn
from metattn.meta import SGD, AttentionMetaLearner, adapt, maml_loss


def with_torch_attention(model: AttentionMetaLearner) -> nn.Module:
    """The same network and parameters with nothing of metattn's calculus inside."""
    plain = copy.deepcopy(model)
    attention = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    attention.load_state_dict(model.attention.state_dict())
    plain.attention = attention  # type: ignore[assignment]
    if model.pooling is not None:
        plain.pooling = SoftmaxPooling(model.pooling.score)  # type: ignore[assignment]
    return plain


class SoftmaxPooling(nn.Module):
    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return (torch.softmax(self.score(x), dim=1) * x).sum(1)


def task_batch(pooling: str | None, tasks: int = TASKS, seed: int = 1) -> tuple[Samples, Samples]:
    generator = torch.Generator().manual_seed(seed)

    def samples(sets: int) -> Samples:
        inputs = torch.randn(tasks, sets, POINTS, 2, generator=generator, dtype=torch.float64)
        shape = (tasks, sets, 3) if pooling else (tasks, sets, POINTS, 3)
        return inputs, torch.randn(shape, generator=generator, dtype=torch.float64)

    return samples(2), samples(4)


def unrolled(
    model: nn.Module, support: Samples, query: Samples, *, steps: int, first_order: bool = False
) -> Tensor:
    """MAML's loss of one task by torch.autograd.grad alone, step size 0.1, on the module's parameters."""
    names = [name for name, _ in model.named_parameters()]
    values: list[Tensor] = list(model.parameters())
    for _ in range(steps):
        loss = mse_loss(
            functional_call(model, dict(zip(names, values, strict=True)), (support[0],)), support[1]
        )
        gradients = torch.autograd.grad(loss, values, create_graph=not first_order)
        values = [value - 0.1 * gradient for value, gradient in zip(values, gradients, strict=True)]
    return mse_loss(functional_call(model, dict(zip(names, values, strict=True)), (query[0],)), query[1])


@pytest.mark.parametrize("kind", ["reverse", "checkpointed", "first-order"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("pooling", [None, "attention"])
def test_maml_against_unrolled_autograd(pooling: str | None, steps: int, kind: str) -> None:
    model = learner(pooling)
    plain = with_torch_attention(model)
    support, query = task_batch(pooling)
    params = dict(model.named_parameters())
    loss = maml_loss(
        model, params, mse_loss, support, query, steps=steps, optimizer=SGD(0.1), meta_gradient=kind
    )
    with sdpa_kernel(SDPBackend.MATH):
        per_task = [
            unrolled(
                plain,
                (support[0][i], support[1][i]),
                (query[0][i], query[1][i]),
                steps=steps,
                first_order=kind == "first-order",
            )
            for i in range(TASKS)
        ]
        expected = torch.stack(per_task).mean()
        expected_gradient = meta_gradient(expected, plain)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    gradient = meta_gradient(loss, model)
    assert gradient.keys() == expected_gradient.keys()
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected_gradient[name], rtol=1e-9, atol=1e-12)


class Norms(nn.Module):
    """The three normalisations whose second derivative torch loses under vmap where they have a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.layer = nn.LayerNorm([POINTS, 4])
        self.batch = nn.BatchNorm1d(POINTS, track_running_stats=False)
        self.instance = nn.InstanceNorm1d(POINTS, affine=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.batch(self.layer(self.first(x))))
        output: Tensor = self.last(self.instance(hidden))
        return output


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(self.layer(self.first(x)))
        return output


@pytest.mark.parametrize("way", ["reverse", "checkpointed"])
@pytest.mark.parametrize("kind", [Norms, Encoder])
def test_maml_of_models_with_normalisation(kind: type[nn.Module], way: str) -> None:
    torch.manual_seed(0)
    model = kind().double()
    for parameter in model.parameters():  # weights of 1 and biases of 0 hide mistakes
        nn.init.normal_(parameter, std=0.5)
    plain = copy.deepcopy(model)
    metattn.replace_attention(model)
    support, query = task_batch(None)
    loss = maml_loss(
        model,
        dict(model.named_parameters()),
        mse_loss,
        support,
        query,
        steps=2,
        optimizer=SGD(0.1),
        meta_gradient=way,
    )
    with sdpa_kernel(SDPBackend.MATH):
        per_task = [
            unrolled(plain, (support[0][i], support[1][i]), (query[0][i], query[1][i]), steps=2)
            for i in range(TASKS)
        ]
        expected = meta_gradient(torch.stack(per_task).mean(), plain)
    gradient = meta_gradient(loss, model)
    for name, value in gradient.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-11)


def test_the_second_order_term_is_there() -> None:
    """On a quadratic loss it is known: one step from w gives (1 − lr·a)·w, whose derivative the term is."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    model, lr = Scaled(), 0.3
    params = dict(model.named_parameters())
    curvature = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def half_square(outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (targets * outputs.square()).sum()

    samples = torch.ones(1, 2, dtype=torch.float64), curvature.unsqueeze(0)
    shrunk = 1 - lr * curvature
    for kind, term in (
        ("reverse", shrunk),
        ("checkpointed", shrunk),
        ("first-order", torch.ones_like(shrunk)),
    ):
        loss = maml_loss(
            model, params, half_square, samples, samples, steps=1, optimizer=SGD(lr), meta_gradient=kind
        )
        (gradient,) = torch.autograd.grad(loss, [model.weight])
        torch.testing.assert_close(gradient, term * curvature * shrunk * model.weight.detach())


@pytest.mark.parametrize("pooling", [None, "attention"])
def test_first_order_differs_from_exact_in_every_attention_parameter(pooling: str | None) -> None:
    """The canary of the above on the real learner: a second derivative lost in attention would show here."""
    model = learner(pooling)
    support, query = task_batch(pooling)
    params = dict(model.named_parameters())
    exact, truncated = (
        meta_gradient(
            maml_loss(
                model, params, mse_loss, support, query, steps=2, optimizer=SGD(0.1), meta_gradient=kind
            ),
            model,
        )
        for kind in ("checkpointed", "first-order")
    )
    names = ["attention.in_proj_weight", "attention.out_proj.weight"] + (
        ["pooling.score.weight"] if pooling else []
    )
    for name in names:
        assert (exact[name] - truncated[name]).norm() > 1e-3 * exact[name].norm()


def test_functional_gradient_and_chunks_agree_with_backward() -> None:
    model = learner()
    support, query = task_batch(None)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: dict[str, Tensor], chunk_size: int | None = None) -> Tensor:
        return maml_loss(
            model, params, mse_loss, support, query, steps=2, optimizer=SGD(0.1), chunk_size=chunk_size
        )

    own = dict(model.named_parameters())
    expected = meta_gradient(
        maml_loss(model, own, mse_loss, support, query, steps=2, optimizer=SGD(0.1)), model
    )
    for gradient in (torch.func.grad(loss)(params), torch.func.grad(loss)(params, 2)):
        for name, value in gradient.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-12)


def test_learned_step_sizes() -> None:
    """The derivative with respect to the step size, as a number and by name, against finite differences."""
    model = learner()
    support, query = task_batch(None)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(lr: Tensor) -> Tensor:
        return maml_loss(model, params, mse_loss, support, query, steps=2, optimizer=SGD(lr))

    def loss_by_name(*rates: Tensor) -> Tensor:
        by_name = dict(zip(params, rates, strict=True))
        return maml_loss(model, params, mse_loss, support, query, steps=2, optimizer=SGD(by_name))

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (rate,))
    rates = [rate.detach().clone().requires_grad_() for _ in params]
    assert torch.autograd.gradcheck(loss_by_name, rates, fast_mode=True)


def test_only_the_named_parameters_are_adapted() -> None:
    model = learner()
    decoder = {name: value for name, value in model.named_parameters() if name.startswith("decoder.")}
    support, _ = task_batch(None)
    before = {name: value.clone() for name, value in model.named_parameters()}
    one_task = support[0][0], support[1][0]
    adapted = adapt(model, decoder, mse_loss, one_task, steps=2, optimizer=SGD(0.1))
    assert adapted.keys() == decoder.keys()
    assert all(not torch.equal(adapted[name], before[name]) for name in adapted)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_adaptation_lowers_the_loss_and_records_nothing_without_grad() -> None:
    model = learner()
    support, _ = task_batch(None)
    one_task = support[0][0], support[1][0]
    with torch.no_grad():
        adapted = adapt(
            model, dict(model.named_parameters()), mse_loss, one_task, steps=20, optimizer=SGD(0.1)
        )
        after = mse_loss(functional_call(model, adapted, (one_task[0],)), one_task[1])
        before = mse_loss(model(one_task[0]), one_task[1])
    assert not any(value.requires_grad for value in adapted.values())
    assert after < 0.7 * before


def test_randomness_of_tasks() -> None:
    """Dropout draws for every task, or once for all: seen in the losses of tasks that are alike."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 64), nn.Dropout(0.5), nn.Linear(64, 1)).double()
    inputs = torch.randn(1, 5, 2, dtype=torch.float64).expand(4, 5, 2)
    params = dict(model.named_parameters())

    def weighted(outputs: Tensor, weight: Tensor) -> Tensor:
        return (weight * outputs.square().mean()).sum()

    def losses(randomness: str) -> Tensor:
        """Of each task: the derivative of their mean in a factor of the task's own."""
        task_weights = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
        samples = inputs, task_weights
        loss = maml_loss(
            model, params, weighted, samples, samples, steps=0, optimizer=SGD(0.1), randomness=randomness
        )
        (per_task,) = torch.autograd.grad(loss, task_weights)
        return 4 * per_task.flatten()

    same, different = losses("same"), losses("different")
    assert (same == same[0]).all()
    assert different.unique().numel() == 4
    with pytest.raises(RuntimeError, match="random"):
        losses("error")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": -1}, "steps: expected an integer of 0 or more, got -1"),
        ({"steps": 1.5}, "steps: expected an integer of 0 or more, got 1.5"),
        ({"params": {"nothing": torch.zeros(1)}}, "params: expected names of AttentionMetaLearner's"),
        (
            {"optimizer": SGD({"decoder.1.bias": 0.1})},
            "lr: expected a value for every name in params, got none",
        ),
        (
            {"meta_gradient": "exact"},
            "meta_gradient: expected one of reverse, checkpointed, first-order, implicit",
        ),
        ({"tasks": "threads"}, 'tasks: expected "vmap" or "loop", got \'threads\''),
        ({"support": [(torch.zeros(3, 1, 5, 2), torch.zeros(3, 1, 5, 3))] * 2}, "support: expected one pair"),
        ({"query": (torch.zeros(2, 1, 5, 2), torch.zeros(3, 1, 5, 3))}, "support, query: expected"),
        ({"query": (torch.zeros(()), torch.zeros(()))}, "support, query: expected"),
    ],
)
def test_refusals(change: dict[str, object], match: str) -> None:
    model = learner()
    support, query = task_batch(None)
    arguments: dict[str, object] = {
        "params": dict(model.named_parameters()),
        "support": support,
        "query": query,
        "steps": 1,
        "optimizer": SGD(0.1),
    }
    with pytest.raises(ValueError, match=match):
        maml_loss(model, loss_fn=mse_loss, **{**arguments, **change})  # type: ignore[arg-type]


class ElementaryNorm(nn.Module):
    """A normalisation's formula: torch's own third derivatives are wrong, under plain autograd too."""

    weight: Tensor
    bias: Tensor

    def __init__(self, norm: Any, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.dims = norm.weight, norm.bias, norm.eps, dims

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, self.dims, correction=0, keepdim=True)
        affine = (-1,) if self.dims == (-1,) else (-1, 1)
        normal = (x - mean) / torch.sqrt(variance + self.eps)
        return normal * self.weight.view(affine) + self.bias.view(affine)


class TestSecondDerivativeOfTheMetaLoss:
    @pytest.mark.parametrize(
        ("norm", "dims"),
        [
            (nn.LayerNorm(4), (-1,)),
            (nn.BatchNorm1d(POINTS, track_running_stats=False), (0, 2)),
            (nn.InstanceNorm1d(POINTS, affine=True), (2,)),
        ],
        ids=["layer", "batch", "instance"],
    )
    @pytest.mark.parametrize("steps", [0, 1, 2])
    def test_against_unrolled_autograd(self, norm: nn.Module, dims: tuple[int, ...], steps: int) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), copy.deepcopy(norm), nn.Linear(4, 3)).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
        plain = nn.Sequential(model[0], model[1], ElementaryNorm(model[2], dims), model[3])
        support, query = task_batch(None)
        params = dict(model.named_parameters())
        loss = maml_loss(model, params, mse_loss, support, query, steps=steps, optimizer=SGD(0.1))
        per_task = [
            unrolled(plain, (support[0][i], support[1][i]), (query[0][i], query[1][i]), steps=steps)
            for i in range(TASKS)
        ]
        values, seconds = list(params.values()), []
        for scalar in (loss, torch.stack(per_task).mean()):
            first = torch.autograd.grad(scalar, values, create_graph=True)
            total = torch.stack([x.sin().sum() for x in first]).sum()
            seconds.append(torch.autograd.grad(total, values))
        for ours, expected in zip(*seconds, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)

    def test_statistics_that_are_kept(self) -> None:
        """In evaluation they are used; where a batch is too small for statistics it is still refused."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).double()
        model(torch.randn(20, 2, dtype=torch.float64))
        x, y = torch.randn(2, 5, 2, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
        params = dict(model.eval().named_parameters())
        loss = maml_loss(model, params, mse_loss, (x, y), (x, y), steps=0, optimizer=SGD(0.1))
        torch.testing.assert_close(loss, mse_loss(model(x.flatten(0, 1)), y.flatten(0, 1)))
        single = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False)).double()
        one = x[:, :1], x[:, :1]
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            maml_loss(
                single, dict(single.named_parameters()), mse_loss, one, one, steps=1, optimizer=SGD(0.1)
            )
