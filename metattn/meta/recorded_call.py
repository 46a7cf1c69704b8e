"""A call of an inner loop as a flat list of tensors, which an autograd Function can be differentiated in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.func import vjp
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metattn.meta.inner_loop import InnerLoop
from metattn.meta.optimizers import Params, State
from metattn.meta.replay import Replay

_TENSOR = object()  # where a tensor was among the leaves


class RecordedCall:
    """One call: the loop, what is no tensor among its arguments, and how to repeat what it computes.

    The tensors are those of (params, others, hyper), in this order; `tensors` is what they are now.
    """

    def __init__(self, loop: InnerLoop, params: Params, others: Any, tensors: list[Tensor]) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise NotImplementedError(
                'meta_gradient: only "reverse" and "first-order" can be compiled, for a compiled backward '
                "cannot repeat a step; take one of these, or leave the call to eager PyTorch and take "
                "Compiled(checkpoint=True), which repeats compiled steps"
            )
        self.loop = loop
        leaves, self._spec = tree_flatten((params, others, loop.fields()))
        tensors += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._leaves = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.count = len(params)
        self._first_hyper = self.count + sum(isinstance(leaf, Tensor) for leaf in tree_leaves(others))
        self.replay = Replay(tensors, loop.modules)

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Params, Any, dict[str, Any]]:
        """(params, others, hyper) made of these tensors."""
        given = iter(tensors)
        leaves = [next(given) if leaf is _TENSOR else leaf for leaf in self._leaves]
        params, others, hyper = tree_unflatten(leaves, self._spec)
        return params, others, hyper

    def replaced(
        self, tensors: Sequence[Tensor], places: Sequence[int], values: Sequence[Tensor]
    ) -> tuple[Params, Any, dict[str, Any]]:
        """The same with other tensors in some places."""
        by_place = dict(zip(places, values, strict=True))
        return self.arguments([by_place.get(place, x) for place, x in enumerate(tensors)])

    def learned(self, needed: Sequence[bool]) -> list[int]:
        """Places of tensors of `others` that need a gradient."""
        return [place for place in range(self.count, self._first_hyper) if needed[place]]

    def tuned(self, needed: Sequence[bool]) -> list[int]:
        """Places of tensors of `hyper` that need one."""
        return [place for place in range(self._first_hyper, len(needed)) if needed[place]]

    def steps(
        self,
        tensors: Sequence[Tensor],
        change: Callable[[Params, Params], Params] = lambda params, found: found,
    ) -> Iterator[tuple[Params, State, Params]]:
        """(θ, state) before each step and its gradient, then both after the last and no gradient; constants.

        change: what the optimizer is given in place of the gradient, by θ and that.
        They are computed outside of any Function, for within one the tensors of outer transforms are no
        longer what they are. ValueError where they depend on a tensor that is none of these, and would be cut
        off.
        """
        params, others, hyper = self.arguments([x.detach() for x in tensors])
        state = self.loop.with_fields(hyper).init(params)
        for index in range(self.loop.steps):
            self.replay.remember(("gradient", index))
            found = self.loop.gradient(params, others, index)
            _refuse_recorded(found, "loss")
            yield params, state, found
            self.replay.remember(("step", index))
            params, state = self.loop.step(index, params, change(params, found), state, hyper)
            _refuse_recorded((params, state), "optimizer")
        yield params, state, {}

    def step(
        self, index: int, moment: tuple[Params, State], gradients: Params, hyper: Any
    ) -> tuple[Params, State]:
        """A step once more."""
        with self.replay.again(("step", index)):
            return self.loop.step(index, moment[0], gradients, moment[1], hyper)

    def pullback(
        self, tensors: Sequence[Tensor], learned: Sequence[int], index: int, params: Params
    ) -> Callable[..., tuple[Params, list[Tensor]]]:
        """(∂g/∂θ)ᵀ v and (∂g/∂φ)ᵀ v as a function of v, of an inner gradient g in θ and the
        learned tensors φ: by reverse mode over it, which is computed once.

        The function takes retain_graph too, as torch.func.vjp's does.
        """

        def gradient(current: Params, values: list[Tensor]) -> Params:
            return self.loop.gradient(current, self.replaced(tensors, learned, values)[1], index)

        with self.replay.again(("gradient", index)):
            _, pull, *_ = vjp(gradient, params, [tensors[place] for place in learned])
        return pull


def _refuse_recorded(tree: Any, what: str) -> None:
    """Of constants alone nothing would be recorded."""
    if any(isinstance(x, Tensor) and is_recorded(x) for x in tree_leaves(tree)):
        raise ValueError(
            'meta_gradient: all but "reverse" and "first-order" differentiate in params, other parameters '
            "and buffers of the model and of a loss_fn that is a torch.nn.Module, support, and tensors and "
            f"dicts of them among the optimizer's fields; the {what} depends on another tensor that requires "
            'a gradient: make it one of these, or use "reverse"'
        )


def is_recorded(x: Tensor) -> bool:
    """Whether autograd, or a transform of torch.func on any level, has a graph of it."""
    while not x.requires_grad:
        if not is_functorch_wrapped_tensor(x):
            return False
        x = get_unwrapped(x)
    return True
