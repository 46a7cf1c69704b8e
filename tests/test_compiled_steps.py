"""Compiled: inner loops of compiled steps give the values and meta-gradients of eager PyTorch, in float64."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_meta_compile import network, optimizer_of, value_and_gradient
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.functional import mse_loss
from unrolled import TASKS, LearnedLoss, Params, head_of, model_of, of_task, samples_of

import metattn
from metattn.meta import SGD, Adam, Compiled, adapt, maml_loss

WAYS = [False, True]  # checkpoint

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Counted:
    """The aot_eager backend, and how many graphs it was given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def agree(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)


def size_of(adapted: Params) -> Tensor:
    return torch.stack([value.square().sum() for value in adapted.values()]).sum()


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
@pytest.mark.parametrize(
    ("kind", "optimizer", "tasks"),
    [
        ("learner", "adam", "vmap"),
        ("encoder", "momentum", "vmap"),
        ("layer norm", "sgd", "loop"),
        ("batch norm", "meta-sgd", "vmap"),
        ("running statistics", "sgd", "vmap"),
    ],
)
def test_two_graphs_for_any_number_of_steps(kind: str, optimizer: str, tasks: str, again: bool) -> None:
    """One of the step, one of the loss after it; values, meta-gradients and the model as ever."""
    model, support, query = network(kind), samples_of(2, 1), samples_of(2, 2)
    params = dict(model.named_parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inner, learned = optimizer_of(optimizer, params)
    leaves = params | learned
    backend = Counted()

    def loss(way: Any, steps: int) -> Tensor:
        return maml_loss(
            *(model, params, mse_loss, support, query),
            optimizer=inner,
            steps=steps,
            meta_gradient=way,
            tasks=tasks,
        )

    for steps in (1, 4):
        expected = value_and_gradient(loss("reverse", steps), leaves)
        agree(value_and_gradient(loss(Compiled(again, backend), steps), leaves), expected)
    assert backend.graphs == 2
    own = dict(model.named_parameters())
    assert all(own[name] is params[name] for name in params)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_samples_and_tasks_whose_number_changes() -> None:
    """A graph for the first sizes and one for all others, of the step and of the loss."""
    model, backend = network("layer norm"), Counted()
    params = dict(model.named_parameters())
    for tasks, points in ((3, 5), (4, 7), (2, 4), (6, 9)):
        support, query = (
            (torch.randn(tasks, 2, n, 2).double(), torch.randn(tasks, 2, n, 3).double())
            for n in (points, points + 2)
        )
        expected, found = (
            value_and_gradient(
                maml_loss(
                    model, params, mse_loss, support, query, optimizer=SGD(0.1), steps=2, meta_gradient=way
                ),
                params,
            )
            for way in ("reverse", Compiled(True, backend))
        )
        agree(found, expected)
    assert backend.graphs == 4


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_a_pair_for_every_step_in_chunks(again: bool) -> None:
    model = network("layer norm")
    params = dict(model.named_parameters())
    support, query = [samples_of(2, seed, 4) for seed in range(3)], samples_of(2, 5, 4)
    backend = Counted()

    def loss(way: Any) -> Tensor:
        return maml_loss(
            *(model, params, mse_loss, support, query),
            optimizer=Adam(0.03),
            steps=3,
            meta_gradient=way,
            chunk_size=2,
        )

    expected = value_and_gradient(loss("reverse"), params)
    agree(value_and_gradient(loss(Compiled(again, backend)), params), expected)
    assert backend.graphs == 2


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_part_of_a_model_with_learned_loss_targets_and_rate(again: bool) -> None:
    model, loss_fn = model_of(), LearnedLoss()
    head = head_of(model)
    x, y = of_task(samples_of(2, 1), 0)
    y.requires_grad_()
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    leaves = dict(model.named_parameters()) | {"loss": loss_fn.weight, "targets": y, "rate": rate}

    def size(way: Any) -> Tensor:
        inner = SGD(rate, momentum=0.5)
        return size_of(adapt(model, head, loss_fn, (x, y), optimizer=inner, steps=3, meta_gradient=way))

    expected = value_and_gradient(size("reverse"), leaves)
    assert all(expected[1][list(leaves).index(name)].norm() > 0 for name in ("loss", "targets", "rate"))
    agree(value_and_gradient(size(Compiled(again, "aot_eager")), leaves), expected)


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_two_vmaps_over_several_dimensions(again: bool) -> None:
    """Tasks along the last dimension of the targets, rates along the first of theirs."""
    model, (x, y) = network("layer norm"), samples_of(1, 1)
    params = dict(model.named_parameters())
    rates = torch.tensor([0.05, 0.1], dtype=torch.float64, requires_grad=True)
    leaves = params | {"rates": rates}
    last = y.movedim(0, -1)

    def size(way: Any) -> Tensor:
        def of_task(x: Tensor, y: Tensor, rate: Tensor) -> Tensor:
            inner = SGD(rate)
            return size_of(
                adapt(model, params, mse_loss, (x, y), optimizer=inner, steps=2, meta_gradient=way)
            )

        over_tasks = vmap(of_task, (0, -1, None))
        weights = torch.arange(1.0, 7.0, dtype=torch.float64).view(2, 3)
        return (weights * vmap(over_tasks, (None, None, 0))(x, last, rates)).sum()

    expected = value_and_gradient(size("reverse"), leaves)
    agree(value_and_gradient(size(Compiled(again, "aot_eager")), leaves), expected)


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_without_a_graph_and_without_steps(again: bool) -> None:
    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())

    def adapted(way: Any, steps: int) -> Params:
        return adapt(model, params, mse_loss, samples, optimizer=Adam(0.1), steps=steps, meta_gradient=way)

    with torch.no_grad():
        found = adapted(Compiled(again, "aot_eager"), 2)
        agree(found, adapted("reverse", 2))
    assert not any(value.requires_grad for value in found.values())
    agree(adapted(Compiled(again, "aot_eager"), 0), params)


class Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.dropout(self.linear(x), 0.5, self.training))


def test_a_repeated_step_draws_again_what_it_drew() -> None:
    """And it has the training flags that it had: gradients are those of what is kept."""
    model, (x, y) = Dropped(), samples_of(1, 1)
    params = dict(model.named_parameters())
    found = []
    for again in WAYS:
        torch.manual_seed(5)
        model.train()
        way = Compiled(again, "aot_eager")
        loss = maml_loss(
            model, params, mse_loss, (x, y), (x, y), optimizer=SGD(0.5), steps=3, meta_gradient=way
        )
        model.eval()
        torch.rand(7)
        found.append(value_and_gradient(loss, params))
    agree(found[1], found[0])
    model.eval()
    loss = maml_loss(model, params, mse_loss, (x, y), (x, y), optimizer=SGD(0.5), steps=3, meta_gradient=way)
    assert not torch.equal(loss, found[0][0])  # dropout was at work


def test_repeated_steps_keep_parameters_alone() -> None:
    """For each further step the way back holds the tasks' parameters, and no activations."""
    model, (x, y) = network("layer norm"), samples_of(1, 1)
    params = dict(model.named_parameters())
    samples = x.repeat(1, 1, 50, 1), y.repeat(1, 1, 50, 1)
    held: weakref.WeakSet[Held] = weakref.WeakSet()

    def pack(x: Tensor) -> Held:
        each = Held(x)
        held.add(each)
        return each

    def growth(again: bool) -> int:
        """Bytes a step."""
        way, sizes = Compiled(again, "aot_eager"), []

        def loss(steps: int) -> Tensor:
            return maml_loss(
                *(model, params, mse_loss, samples, samples),
                optimizer=SGD(0.1),
                steps=steps,
                meta_gradient=way,
            )

        loss(1)  # compiled outside of the hooks
        for steps in (2, 4):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda each: each.tensor):
                kept = loss(steps)
            storages = [each.tensor.untyped_storage() for each in held if not each.tensor.is_meta]
            sizes.append(sum({each.data_ptr(): each.nbytes() for each in storages}.values()))
            del kept
        return (sizes[1] - sizes[0]) // 2

    size = TASKS * sum(value.nbytes for value in params.values())
    assert 0 < growth(True) <= size
    assert growth(False) > 10 * size


def test_each_task_draws_its_own() -> None:
    torch.manual_seed(0)
    model = Dropped()
    params = dict(model.named_parameters())
    x, y = (part.expand(64, *part.shape[1:]) for part in samples_of(1, 1, 1))

    def adapted(x: Tensor, y: Tensor) -> Tensor:
        way = Compiled(backend="aot_eager")
        return size_of(adapt(model, params, mse_loss, (x, y), optimizer=SGD(0.5), steps=1, meta_gradient=way))

    assert len(vmap(adapted, randomness="different")(x, y).unique()) > 32
    assert len(vmap(adapted, randomness="same")(x, y).unique()) == 1
    with pytest.raises(Exception, match="randomness"):
        vmap(adapted)(x, y)


def changed_in_place(again: bool) -> None:
    x, y = of_task(samples_of(2, 1), 0)
    model = network("layer norm")
    params = dict(model.named_parameters())
    way = Compiled(again, "aot_eager")
    size = size_of(adapt(model, params, mse_loss, (x, y), optimizer=SGD(0.1), steps=2, meta_gradient=way))
    x.add_(1.0)
    size.backward()


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_samples_changed_in_place_raise(again: bool) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed_in_place(again)


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_a_second_derivative_raises(again: bool) -> None:
    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())
    way = Compiled(again, "aot_eager")

    def twice(optional: bool) -> None:
        """With a way past the inner loop, so that a lost share would raise nothing by itself."""
        size = size_of(
            adapt(model, params, mse_loss, samples, optimizer=SGD(0.1), steps=2, meta_gradient=way)
        )
        first = torch.autograd.grad(size + size_of(params), list(params.values()), create_graph=True)
        slope = torch.stack([each.square().sum() for each in first]).sum()
        torch.autograd.grad(slope, list(params.values()), allow_unused=optional)

    for optional in (False, True):
        with pytest.raises(RuntimeError, match=r"double backward|create_graph"):
            twice(optional)


def transforms() -> dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], Any]]:
    def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autograd.forward_ad.dual_level():
            return f(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))

    return {
        "grad": lambda f, x: torch.func.grad(f)(x),
        "vjp": torch.func.vjp,
        "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
        "vmapped grad": lambda f, x: vmap(torch.func.grad(f))(x[None]),
        "dual": dual,
        "compile": lambda f, x: torch.compile(f, fullgraph=True, backend="aot_eager")(x),
    }


@pytest.mark.parametrize("transform", list(transforms()))
def test_other_transforms_are_refused(transform: str) -> None:
    model = network("layer norm")
    params = {name: value.detach() for name, value in model.named_parameters()}
    x, y = of_task(samples_of(2, 1), 0)

    def size(x: Tensor) -> Tensor:
        way = Compiled(backend="aot_eager")
        return size_of(adapt(model, params, mse_loss, (x, y), optimizer=SGD(0.1), steps=1, meta_gradient=way))

    refusals: tuple[type[Exception], ...] = (NotImplementedError, torch._dynamo.exc.Unsupported)
    with pytest.raises(refusals, match=r'Compiled .*take "reverse"'):
        transforms()[transform](size, x)


def test_a_loss_after_no_step_is_refused_alike() -> None:
    model, samples = network("layer norm"), samples_of(2, 1)
    params = {name: value.detach() for name, value in model.named_parameters()}

    def loss(params: Params) -> Tensor:
        way = Compiled(backend="aot_eager")
        return maml_loss(
            model, params, mse_loss, samples, samples, optimizer=SGD(0.1), steps=0, meta_gradient=way
        )

    with pytest.raises(NotImplementedError, match='take "reverse"'):
        torch.func.grad(loss)(params)


def test_a_tensor_that_is_no_argument() -> None:
    """Kept steps differentiate in it; repeated ones would not, and say so."""
    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())
    weight = torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64, requires_grad=True)
    leaves = params | {"weight": 2 * weight}

    def size(way: Any) -> Tensor:
        def loss_fn(outputs: Tensor, targets: Tensor) -> Tensor:
            return (leaves["weight"] * (outputs - targets).square()).mean()

        return size_of(adapt(model, params, loss_fn, samples, optimizer=SGD(0.1), steps=2, meta_gradient=way))

    expected = value_and_gradient(size("reverse"), leaves)
    assert expected[1][-1].norm() > 0
    agree(value_and_gradient(size(Compiled(backend="aot_eager")), leaves), expected)
    with pytest.raises(ValueError, match="another tensor that requires a gradient"):
        size(Compiled(True, "aot_eager"))


def test_more_models_than_graphs_of_a_function() -> None:
    (x, y), way = of_task(samples_of(2, 1), 0), Compiled(backend="eager")
    for width in range(2, 14):
        model = nn.Sequential(*(nn.Linear(a, b).double() for a, b in ((2, width), (width, 3))))
        params = dict(model.named_parameters())
        found, expected = (
            adapt(model, params, mse_loss, (x, y), optimizer=SGD(0.1), steps=1, meta_gradient=each)
            for each in (way, "reverse")
        )
        agree(found, expected)


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_batched_cotangents(again: bool) -> None:
    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())
    found = []
    for way in ("reverse", Compiled(again, "aot_eager")):
        adapted = adapt(model, params, mse_loss, samples, optimizer=SGD(0.1), steps=1, meta_gradient=way)
        sizes = torch.stack([value.square().sum() for value in adapted.values()])
        basis = torch.eye(len(sizes), dtype=torch.float64)
        found.append(torch.autograd.grad(sizes, list(params.values()), basis, is_grads_batched=True))
    agree(found[1], found[0])


def test_a_state_that_is_no_tensor_is_refused() -> None:
    @dataclass(frozen=True)
    class Counting:
        def init(self, params: Params) -> Any:
            return {"count": {"steps": 0}}

        def step(self, index: int, params: Params, gradients: Params, state: Any) -> Any:
            return params, state

    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    with pytest.raises(ValueError, match="optimizer: expected a state of tensors"):
        adapt(
            *(model, dict(model.named_parameters()), mse_loss, samples),
            optimizer=Counting(),
            steps=1,
            meta_gradient=Compiled(),
        )


def test_a_step_that_asks_for_its_number() -> None:
    @dataclass(frozen=True)
    class Scheduled:
        rates: tuple[float, ...] = (0.3, 0.1, 0.05)

        def init(self, params: Params) -> Any:
            return {}

        def step(self, index: int, params: Params, gradients: Params, state: Any) -> Any:
            rate = self.rates[index] if index < 2 else self.rates[-1] / index
            return {name: value - rate * gradients[name] for name, value in params.items()}, state

    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())

    def size(way: Any) -> Tensor:
        inner = Scheduled()
        return size_of(adapt(model, params, mse_loss, samples, optimizer=inner, steps=4, meta_gradient=way))

    expected = value_and_gradient(size("reverse"), params)
    agree(value_and_gradient(size(Compiled(backend="aot_eager")), params), expected)


@pytest.mark.parametrize("again", WAYS, ids=["kept", "checkpoint"])
def test_autocast_and_the_named_backend(again: bool) -> None:
    model, samples = model_of().float(), of_task(samples_of(2, 1), 0)
    samples = tuple(part.float() for part in samples)
    params = dict(model.named_parameters())
    found = []
    for way in ("reverse", Compiled(again, "aot_eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16), metattn.use_backend("reference"):
            size = size_of(
                adapt(model, params, mse_loss, samples, optimizer=SGD(0.1), steps=2, meta_gradient=way)
            )
        found.append(torch.autograd.grad(size, list(params.values())))
    for ours, eager in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, eager, rtol=0.1, atol=0.02)


def test_to_machine_code_by_adam() -> None:
    """The step's number is a size of the graph there too."""
    model, samples = network("layer norm"), of_task(samples_of(2, 1), 0)
    params = dict(model.named_parameters())

    def size(way: Any) -> Tensor:
        inner = Adam(0.03)
        return size_of(adapt(model, params, mse_loss, samples, optimizer=inner, steps=3, meta_gradient=way))

    expected = value_and_gradient(size("reverse"), params)
    for again in WAYS:
        agree(value_and_gradient(size(Compiled(again)), params), expected)
