"""What the tests of inner loops share: a model, samples, and the loop written out for autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from metattn.meta import AttentionMetaLearner, Checkpointed, Implicit, Reverse

TASKS, POINTS = 3, 5
EXACT = [Reverse(), Checkpointed(), Checkpointed(2), Checkpointed(3)]
LATER = [Checkpointed(), Checkpointed(2), Implicit(1.0)]  # where autograd does not record the loop
Samples = tuple[Any, Any]
Params = dict[str, Tensor]


def model_of(seed: int = 0) -> AttentionMetaLearner:
    torch.manual_seed(seed)
    model = AttentionMetaLearner(2, 8, 3, num_heads=2, dtype=torch.float64)
    for name, parameter in model.named_parameters():  # the biases' 0 hides mistakes
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model


class LearnedLoss(nn.Module):
    """A squared error with a learned weight for each output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (self.weight * (outputs - targets).square()).mean()


def head_of(model: nn.Module) -> Params:
    """The parameters that ANIL adapts."""
    return {name: value for name, value in model.named_parameters() if name.startswith("decoder.")}


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
            state = (
                gradients
                if state is None
                else [momentum * b + g for b, g in zip(state, gradients, strict=True)]
            )
            directions = (
                [g + momentum * b for g, b in zip(gradients, state, strict=True)] if nesterov else state
            )
        else:
            directions = gradients
        return [x - lr * d for x, d in zip(values, directions, strict=True)], state

    return step


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


def unrolled_mean(
    model: nn.Module, support: Samples, query: Samples, step: Callable[..., Any], steps: int, **options: Any
) -> Tensor:
    """The same, a mean over tasks."""
    losses = [
        unrolled(model, of_task(support, i), of_task(query, i), step, steps, **options) for i in range(TASKS)
    ]
    return torch.stack(losses).mean()


def gradient_of(loss: Tensor, leaves: dict[str, Tensor]) -> Params:
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def agree(found: Params, expected: Params) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )
