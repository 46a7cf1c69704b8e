"""An inner loop of compiled steps: one step is compiled, with its derivative, and called for every step.

PyTorch differentiates once what it compiled. That is enough here, for the inner gradient is taken inside of
the step: of the step itself a first derivative is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten

from metattn.meta.inner_loop import InnerLoop, samples_of
from metattn.meta.optimizers import Params, State
from metattn.meta.recorded_call import is_recorded
from metattn.meta.replay import Replay
from metattn.torch_internals import (
    Vmap,
    any_dual,
    batched,
    batched_in_backward,
    beyond_transforms,
    many_graphs,
    mark_size,
    vmaps_at_work,
    without_dim,
)


@dataclass(frozen=True)
class Compiled:
    """Exact: as "reverse", by steps that are one compiled function, which eager PyTorch calls.

    Compiling takes the same time for any number of steps. Tasks that vmap has mapped are mapped inside of the
    compiled function. :func:`metattn.meta.maml_loss` compiles its loss after adaptation too.

    Arguments:
        checkpoint: False keeps every step's activations. True keeps parameters and the optimizer's state
            between the steps alone, and computes each step again on the way back, as "checkpointed" does.
            Everything that is differentiated must then be an argument of :func:`adapt`, and what a step reads
            of Python must be the same on the way back.
        backend, options: those of torch.compile. ``options={"cpp_wrapper": True}`` compiles a step faster on
            CPUs.

    Differentiable once, by autograd: a second derivative of the result raises RuntimeError, and so do
    retain_graph and is_grads_batched, of compiled code. Tensors that an outer vmap maps must be arguments,
    not read by a loss from around it.
    Errors: NotImplementedError inside of torch.compile, of torch.func's grad, vjp and jvp, and for dual
    numbers, which compiled code would drop; ValueError for an optimizer whose state is not made of tensors,
    and beside checkpoint for a loss or an optimizer that depends on another tensor that requires a gradient.
    """

    checkpoint: bool = False
    backend: str | Callable[..., Any] = "inductor"
    options: Mapping[str, Any] | None = None

    def adapted(self, loop: InnerLoop, params: Params, others: Any) -> Params:
        hyper = loop.fields()
        vmaps = _vmaps((params, others, hyper))
        params = {name: _of_every_task(value, vmaps) for name, value in params.items()}
        state = loop.with_fields(hyper).init(params)
        if not all(isinstance(x, Tensor) for x in tree_leaves(state)):
            raise ValueError('optimizer: expected a state of tensors for Compiled; "reverse" takes any')
        if _any_recorded((params, others, hyper)):  # as they are after a step, for the same graph
            params, state = tree_map(lambda x: _recorded(x, vmaps), (params, state))

        def step(
            params: Params, state: State, others: Any, hyper: Any, counter: Tensor
        ) -> tuple[Params, State]:
            gradients = loop.gradient(params, others, 0)
            return loop.step(counter.shape[0] - _FIRST, params, gradients, state, hyper)

        for index in range(loop.steps):
            arguments = params, state, samples_of(others, index), hyper, _counter(index)
            params, state = self.call(step, arguments, loop.modules, again=self.checkpoint)
        return params

    def call(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        modules: Sequence[nn.Module] = (),
        *,
        again: bool = False,
    ) -> Any:
        """function(*arguments), compiled, within the vmaps that are at work.

        arguments and result are trees of tensors; the former may have other leaves. again: as `checkpoint`,
        for this call; modules are those whose training flags it depends on.
        """
        leaves, spec = tree_flatten(arguments)
        vmaps, maps = _vmaps(leaves), []
        for each in vmaps:
            found = [without_dim(x, each.level) if isinstance(x, Tensor) else (x, None) for x in leaves]
            leaves = [x for x, _ in found]
            maps.append((tree_unflatten([dim for _, dim in found], spec), each.randomness))
        places = [place for place, x in enumerate(leaves) if isinstance(x, Tensor)]

        def run(*tensors: Tensor) -> Any:
            given = list(leaves)
            for place, x in zip(places, tensors, strict=True):
                given[place] = x
            return self._compiled(function, tuple(maps), tree_unflatten(given, spec))

        tensors = [leaves[place] for place in places]
        with beyond_transforms(), many_graphs():
            if again and torch.is_grad_enabled():
                result = _repeated(run, tensors, Replay(tensors, modules))
            else:
                result = run(*tensors)
        for each in reversed(vmaps):
            result = tree_map(lambda x, level=each.level: batched(x, 0, level), result)
        return result

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        options = None if self.options is None else dict(self.options)
        return torch.compile(_mapped, fullgraph=True, backend=self.backend, options=options)


def _mapped(
    function: Callable[..., Any], maps: tuple[tuple[Any, str], ...], arguments: tuple[Any, ...]
) -> Any:
    """function(*arguments) under vmaps: the arguments' dimensions and randomness, the innermost first."""
    for dims, randomness in maps:
        function = vmap(function, in_dims=dims, randomness=randomness)
    return function(*arguments)


def _repeated(run: Callable[..., Any], tensors: Sequence[Tensor], replay: Replay) -> Any:
    """run(*tensors), of which nothing is kept but its arguments: the way back runs it again.

    torch.utils.checkpoint does this by hooks, within which nothing that uses torch.func can be compiled.
    """
    replay.remember("run")
    made: list[TreeSpec] = []

    def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
        leaves, spec = tree_flatten(run(*tensors))
        made[:] = [spec]
        return tuple(leaves)

    outputs = _Repeated.apply(flat, replay, *tensors)
    return tree_unflatten(list(outputs), made[0])


class _Repeated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[..., tuple[Tensor, ...]], replay: Replay, *tensors: Tensor) -> Any:
        ctx.run, ctx.replay = run, replay
        ctx.needed = [x.requires_grad for x in tensors]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        with torch.enable_grad():  # for the graph that the way back runs
            leaves = _leaves(tensors, ctx.needed)
            outputs = run(*leaves)
        _refuse_other_sources(outputs, leaves)
        ctx.mark_non_differentiable(*(x for x in outputs if not x.requires_grad))
        return tuple(x.detach() for x in outputs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        # once_differentiable would raise nothing beside another way to the inputs
        if torch.is_grad_enabled():
            raise RuntimeError(
                "meta_gradient: Compiled is differentiated once; got create_graph=True, for a second "
                'derivative: take "reverse" or "checkpointed"'
            )
        leaves = _leaves(ctx.saved_tensors, ctx.needed)
        with torch.enable_grad(), many_graphs(), ctx.replay.again("run"):
            outputs = ctx.run(*leaves)
        pairs = [(y, v) for y, v in zip(outputs, cotangents, strict=True) if v is not None]
        if not pairs:
            return (None,) * (2 + len(leaves))
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                [x for x, needed in zip(leaves, ctx.needed, strict=True) if needed],
                [v for _, v in pairs],
                allow_unused=True,
            )
        )
        return (None, None, *(next(found) if needed else None for needed in ctx.needed))


def _refuse_other_sources(outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> None:
    """ValueError where the outputs' graph goes on to other tensors, which the way back would not reach."""
    own = {id(x) for x in leaves}
    nodes = [y.grad_fn for y in outputs if y.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        variable = getattr(node, "variable", None)
        if variable is not None and id(variable) not in own:
            raise ValueError(
                "meta_gradient: Compiled(checkpoint=True) differentiates in params, other parameters and "
                "buffers of the model and of a loss_fn that is a torch.nn.Module, support, and tensors and "
                "dicts of them among the optimizer's fields; a step depends on another tensor that requires "
                "a gradient: make it one of these, or use Compiled()"
            )
        found = {source for source, _ in node.next_functions if source is not None} - seen
        nodes += found
        seen |= found


def _leaves(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """The others as they are, for a mark on one of them is no part of a copy."""
    return [x.detach().requires_grad_() if need else x for x, need in zip(tensors, needed, strict=True)]


_FIRST = 2  # of a size: 0 and 1 would be numbers of their own in a graph


def _counter(index: int) -> Tensor:
    """A step's number as a size, which may differ between calls of one graph."""
    counter = torch.empty(index + _FIRST, device="meta")
    mark_size(counter)
    return counter


def _of_every_task(x: Tensor, vmaps: Sequence[Vmap]) -> Tensor:
    """A tensor, not a Parameter, of its own for every task."""
    x = x.view_as(x)
    for each in vmaps:
        zeros = torch.zeros(each.size, dtype=x.dtype, device=x.device)
        x = x + batched(zeros, 0, each.level)
    return x


def _any_recorded(tree: Any) -> bool:
    leaves = tree_leaves(tree)
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and is_recorded(x) for x in leaves)


def _recorded(x: Tensor, vmaps: Sequence[Vmap]) -> Tensor:
    """A tensor of which there is a graph; for a constant a leaf."""
    if is_recorded(x) or not x.is_floating_point():
        return x
    dims = []
    for each in vmaps:
        x, dim = without_dim(x, each.level)
        dims.append(dim)
    with beyond_transforms():
        x = x.detach().requires_grad_()
    for each, dim in zip(reversed(vmaps), reversed(dims), strict=True):
        x = batched(x, dim, each.level)
    return x


def _vmaps(tree: Any) -> list[Vmap]:
    """Those at work, the innermost first. NotImplementedError for what would be wrong in compiled code."""
    if torch.compiler.is_dynamo_compiling():  # is_compiling is true in every thread while one compiles
        raise NotImplementedError(
            "meta_gradient: Compiled compiles its steps one by one, and eager PyTorch calls them; inside of "
            'torch.compile take "reverse" or "first-order"'
        )
    vmaps = vmaps_at_work()
    tensors = [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
    if vmaps is None or any_dual(tensors) or batched_in_backward(tensors):
        raise NotImplementedError(
            "meta_gradient: Compiled is differentiated by autograd, once, and mapped by torch.func.vmap; for "
            'other transforms and for forward mode take "reverse"'
        )
    return vmaps
