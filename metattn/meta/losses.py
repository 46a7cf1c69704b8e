"""What an outer loop minimises, over a batch of tasks: MAML's loss and Reptile's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import tree_leaves, tree_map

from metattn.meta.adapt import LossFunction, Samples, Whole, adapt, pair_of
from metattn.meta.compiled import Compiled
from metattn.meta.inner_loop import MetaGradient
from metattn.meta.optimizers import InnerOptimizer


def maml_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: LossFunction | nn.Module,
    support: Samples | list[Samples],
    query: Samples,
    *,
    optimizer: InnerOptimizer,
    steps: int,
    meta_gradient: str | MetaGradient = "reverse",
    outer_loss_fn: LossFunction | nn.Module | None = None,
    tasks: str = "vmap",
    randomness: str = "different",
    chunk_size: int | None = None,
) -> Tensor:
    """The loss after adaptation, averaged over tasks: what MAML's outer loop minimises.

    1/T · Σ_i outer_loss_fn(model(query_i; adapt(params, support_i)), query targets_i)

    Arguments:
        model, params, loss_fn, optimizer, steps, meta_gradient: as for :func:`adapt`.
        support, query: as for :func:`adapt`, every tensor with the T tasks in front: [T, …].
        outer_loss_fn: of the queries, where it is another than loss_fn.
        tasks: "vmap" adapts them together; "loop" one after the other, for models that vmap cannot take
            (LSTM, GRU, control flow by values).
        randomness: as for ``torch.vmap``: "different" draws dropout for every task, "same" once, "error"
            refuses.
        chunk_size: how many tasks of a vmap at a time, None for all; less memory, same result.

    Returns a scalar. ``maml_loss(...).backward()`` gives the meta-gradient, second order included, for every
    one of ``params`` (and of the optimizer's fields) that requires it; torch.func.grad over ``params`` gives
    the same.
    Errors: ValueError where the tensors do not agree on T, for a ``tasks`` that is neither, and for options
    of vmap beside "loop"; TypeError for what cannot be divided into tasks; and as :func:`adapt`.
    Source: Finn, Abbeel and Levine 2017 (arXiv 1703.03400), algorithm 1, line 8.
    """
    judge = Whole(model, loss_fn if outer_loss_fn is None else outer_loss_fn)

    def task_loss(support: Samples | list[Samples], query: Samples) -> Tensor:
        adapted = adapt(
            model, params, loss_fn, support, optimizer=optimizer, steps=steps, meta_gradient=meta_gradient
        )
        arguments = adapted, judge.rest(adapted), *query
        if isinstance(meta_gradient, Compiled):
            loss: Tensor = meta_gradient.call(judge.loss, arguments)
            return loss
        return judge.loss(*arguments)

    samples = (_pairs_of(support), pair_of(query, "query"))
    return _mean_over_tasks(task_loss, samples, tasks, randomness, chunk_size)


def reptile_loss(
    model: nn.Module,
    params: Mapping[str, Tensor],
    loss_fn: LossFunction | nn.Module,
    support: Samples | list[Samples],
    *,
    optimizer: InnerOptimizer,
    steps: int,
    tasks: str = "vmap",
    randomness: str = "different",
    chunk_size: int | None = None,
) -> Tensor:
    """1/T · Σ_i ½·‖θ − φ_i‖², φ_i = adapt(θ, support_i) a constant: its gradient is Reptile's, θ − mean φ.

    A step of plain gradient descent of size ε on it is Reptile's θ ← θ + ε·(mean φ − θ); any torch.optim
    optimizer may take its place. Arguments and errors as for :func:`maml_loss`.
    Returns a scalar, differentiable in ``params``.
    Source: Nichol, Achiam and Schulman 2018 (arXiv 1803.02999), algorithm 2.
    """

    def task_loss(support: Samples | list[Samples]) -> Tensor:
        constants = {name: value.detach() for name, value in params.items()}
        adapted = adapt(
            model,
            constants,
            loss_fn,
            support,
            optimizer=optimizer,
            steps=steps,
            meta_gradient="first-order",
        )
        distances = [(value - adapted[name].detach()).square().sum() for name, value in params.items()]
        return 0.5 * torch.stack(distances).sum()

    return _mean_over_tasks(task_loss, (_pairs_of(support),), tasks, randomness, chunk_size)


def _pairs_of(support: Samples | list[Samples]) -> Samples | list[Samples]:
    if isinstance(support, list):
        return [pair_of(each, "support") for each in support]
    return pair_of(support, "support")


def _mean_over_tasks(
    task_loss: Callable[..., Tensor],
    samples: tuple[Any, ...],
    tasks: str,
    randomness: str,
    chunk_size: int | None,
) -> Tensor:
    if tasks not in ("vmap", "loop"):
        raise ValueError(f'tasks: expected "vmap" or "loop", got {tasks!r}')
    if tasks == "loop" and (randomness != "different" or chunk_size is not None):
        raise ValueError(
            'randomness, chunk_size: expected "different" and None beside tasks="loop", for they are '
            f"vmap's; got {randomness!r} and {chunk_size}"
        )
    for leaf in tree_leaves(samples):
        if not isinstance(leaf, (Tensor, int, float, str, type(None))):
            raise TypeError(
                "support, query: expected tensors, numbers, strings and None, in tuples, lists and dicts, to "
                f"be divided into tasks; got {type(leaf).__name__}"
            )
    tensors = [leaf for leaf in tree_leaves(samples) if isinstance(leaf, Tensor)]
    count = tensors[0].shape[0] if tensors and tensors[0].dim() else 0
    # compared, not hashed: a graph that is compiled for all sizes would be one for this size
    if count == 0 or not all(tensor.dim() and tensor.shape[0] == count for tensor in tensors):
        raise ValueError(
            "support, query: expected every tensor to have the same number of tasks (1 or more) in front, "
            f"got shapes {[tuple(tensor.shape) for tensor in tensors]}"
        )
    if tasks == "vmap":
        dims = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, samples)
        return torch.mean(vmap(task_loss, dims, randomness=randomness, chunk_size=chunk_size)(*samples))
    losses = [
        task_loss(*tree_map(lambda leaf, i=i: leaf[i] if isinstance(leaf, Tensor) else leaf, samples))
        for i in range(count)
    ]
    return torch.stack(losses).mean()
