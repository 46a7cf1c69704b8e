"""Inner loops under torch.compile, whole: the values and meta-gradients of eager PyTorch, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from unrolled import POINTS, LearnedLoss, Params, Samples, head_of, model_of, of_task, samples_of

import metattn
from metattn.meta import SGD, Adam, MetaSGD, adapt, maml_loss, reptile_loss

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Network(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(2, 8), inner, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.last(torch.tanh(self.inner(self.first(x))))
        return output


class ByChannel(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).view(x.shape)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "learner": model_of,
    "encoder": lambda: Network(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)),
    "layer norm": lambda: Network(nn.LayerNorm(8)),
    "batch norm": lambda: Network(ByChannel(8)),
    "running statistics": lambda: Network(ByChannel(8)).eval(),
}


def network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]().double()
    for parameter in model.parameters():  # weights of 1 and biases of 0 hide mistakes
        nn.init.normal_(parameter, std=0.4)
    metattn.replace_attention(model)
    return model


def optimizer_of(name: str, params: Params) -> tuple[Any, Params]:
    """An optimizer, and what of it is learned."""
    if name == "meta-sgd":
        rates = MetaSGD(params, 0.1)
        return rates.optimizer(), {f"rate {i}": rate for i, rate in enumerate(rates.rates)}
    made = {"sgd": SGD(0.1), "momentum": SGD(0.1, momentum=0.9, weight_decay=0.02), "adam": Adam(0.03)}
    return made[name], {}


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, **{"fullgraph": True, "backend": "aot_eager", **options})  # type: ignore[no-any-return]


def agree(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def value_and_gradient(loss: Tensor, leaves: Params) -> tuple[Tensor, tuple[Tensor, ...]]:
    return loss.detach(), torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)


@pytest.mark.parametrize(
    ("way", "kind", "optimizer", "tasks"),
    [
        ("reverse", "learner", "sgd", "vmap"),
        ("reverse", "encoder", "adam", "vmap"),
        ("reverse", "layer norm", "momentum", "loop"),
        ("reverse", "batch norm", "meta-sgd", "vmap"),
        ("reverse", "running statistics", "momentum", "vmap"),
        ("first-order", "learner", "adam", "vmap"),
        ("first-order", "layer norm", "meta-sgd", "vmap"),
        ("first-order", "batch norm", "sgd", "loop"),
    ],
)
def test_maml_of_one_graph(way: str, kind: str, optimizer: str, tasks: str) -> None:
    model, support, query = network(kind), samples_of(2, 1), samples_of(2, 2)
    params = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inner, learned = optimizer_of(optimizer, params)

    def loss(params: Params, support: Samples, query: Samples) -> Tensor:
        return maml_loss(
            *(model, params, mse_loss, support, query),
            optimizer=inner,
            steps=2,
            meta_gradient=way,
            tasks=tasks,
        )

    leaves = params | learned
    expected = value_and_gradient(loss(params, support, query), leaves)
    agree(value_and_gradient(compiled(loss)(params, support, query), leaves), expected)
    own = dict(model.named_parameters())
    assert own.keys() == params.keys()
    assert all(own[name] is params[name] for name in own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_functional_gradient_inside_of_the_graph() -> None:
    model, support, query = model_of(), samples_of(2, 1), samples_of(2, 2)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def gradient(params: Params, support: Samples, query: Samples) -> Params:
        def loss(params: Params) -> Tensor:
            return maml_loss(model, params, mse_loss, support, query, optimizer=SGD(0.1), steps=2)

        found: Params = torch.func.grad(loss)(params)
        return found

    agree(compiled(gradient)(params, support, query), gradient(params, support, query))


def test_adapt_with_a_learned_loss_and_learned_targets() -> None:
    """ANIL: only the head is adapted; what else the steps depend on gets its gradient."""

    model, loss_fn = model_of(), LearnedLoss()
    head = head_of(model)
    x, y = of_task(samples_of(2, 1), 0)
    y.requires_grad_()
    leaves = dict(model.named_parameters()) | {"loss": loss_fn.weight, "targets": y}

    def size(head: Params, x: Tensor, y: Tensor) -> Tensor:
        adapted = adapt(model, head, loss_fn, (x, y), optimizer=SGD(0.1, momentum=0.5), steps=3)
        return torch.stack([value.square().sum() for value in adapted.values()]).sum()

    expected = value_and_gradient(size(head, x, y), leaves)
    assert all(expected[1][list(leaves).index(name)].norm() > 0 for name in ("loss", "targets"))
    agree(value_and_gradient(compiled(size)(head, x, y), leaves), expected)


def test_reptile() -> None:
    model, support = network("layer norm"), samples_of(2, 1)
    params = dict(model.named_parameters())

    def loss(params: Params, support: Samples) -> Tensor:
        return reptile_loss(model, params, mse_loss, support, optimizer=Adam(0.03), steps=3)

    expected = value_and_gradient(loss(params, support), params)
    agree(value_and_gradient(compiled(loss)(params, support), params), expected)


def test_what_repeats_its_steps_is_not_compiled() -> None:
    """fullgraph=True says so; without it the call is left to eager PyTorch, and right."""
    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())

    def size(way: str, params: Params, samples: Samples) -> Tensor:
        adapted = adapt(model, params, mse_loss, samples, optimizer=SGD(0.1), steps=2, meta_gradient=way)
        return torch.stack([value.square().sum() for value in adapted.values()]).sum()

    for way in ("checkpointed", "implicit"):
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match='only "reverse" and "first-order" can be compiled'
        ):
            compiled(size)(way, params, samples)
    torch._dynamo.reset()
    expected = value_and_gradient(size("checkpointed", params, samples), params)
    in_parts = compiled(size, fullgraph=False)
    agree(value_and_gradient(in_parts("checkpointed", params, samples), params), expected)


def test_two_graphs_for_all_sizes() -> None:
    """Numbers of tasks and of points that change: one graph for the first, one for all others."""
    model = model_of()
    params = dict(model.named_parameters())
    graphs = 0

    def counted(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def loss(params: Params, support: Samples, query: Samples) -> Tensor:
        return maml_loss(model, params, mse_loss, support, query, optimizer=SGD(0.1), steps=1)

    function = compiled(loss, backend=counted)
    for tasks, points in ((3, 5), (4, 7), (2, 4), (6, 9)):
        support, query = (
            (torch.randn(tasks, 2, n, 2).double(), torch.randn(tasks, 2, n, 3).double())
            for n in (points, points + 2)
        )
        expected = value_and_gradient(loss(params, support, query), params)
        agree(value_and_gradient(function(params, support, query), params), expected)
    assert graphs == 2


def test_inductor_and_its_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled to machine code, and found again by what starts anew."""
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = network("layer norm")
    support, query = (of_task(samples_of(1, seed), 0) for seed in (1, 2))
    params = dict(model.named_parameters())

    def loss(params: Params, support: Samples, query: Samples) -> Tensor:
        adapted = adapt(model, params, mse_loss, support, optimizer=SGD(0.1), steps=1)
        return mse_loss(torch.func.functional_call(model, adapted, query[:1]), query[1])

    expected = value_and_gradient(loss(params, support, query), params)
    for missed in (1, 0):
        torch._dynamo.reset()
        counters.clear()
        function = compiled(loss, backend="inductor")
        agree(value_and_gradient(function(params, support, query), params), expected)
        caught = counters["aot_autograd"]
        assert (caught["autograd_cache_miss"], caught["autograd_cache_hit"]) == (missed, 1 - missed)


def test_a_module_that_stands_in_two_places() -> None:
    """Its parameters are the model's own again after a call, eager or compiled."""
    shared = nn.Linear(2, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Sequential(shared, nn.Tanh()), shared)
    params = dict(model.named_parameters())
    assert list(params) == ["0.0.weight", "0.0.bias"]
    samples = torch.randn(POINTS, 2, dtype=torch.float64), torch.randn(POINTS, 2, dtype=torch.float64)

    def size(params: Params, samples: Samples) -> Tensor:
        adapted = adapt(model, params, mse_loss, samples, optimizer=SGD(0.1), steps=2)
        return torch.stack([value.square().sum() for value in adapted.values()]).sum()

    weight = shared.weight
    expected = value_and_gradient(size(params, samples), params)
    assert shared.weight is weight
    agree(value_and_gradient(compiled(size)(params, samples), params), expected)
    assert shared.weight is weight
