"""A call of an inner loop as a flat list of tensors, which an autograd Function can be differentiated in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.func import grad, jvp, vjp
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from metattn.meta.inner import InnerLoop
from metattn.meta.optimizers import Params
from metattn.meta.replay import Replay


class Call:
    """One call: the loop, what is no tensor among its arguments, and how to repeat what it computes.

    The tensors are those of (params, others, hyper), in this order.
    """

    def __init__(self, loop: InnerLoop, params: Params, others: Any) -> None:
        self.loop = loop
        self._leaves, self._spec = tree_flatten((params, others, loop.fields()))
        self.tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        self.count = len(params)
        self._first_hyper = self.count + sum(isinstance(leaf, Tensor) for leaf in tree_leaves(others))
        self.replay = Replay(self.tensors)
        self.replay.remember(0)
        self.first = self._first_gradient()

    def arguments(self, tensors: Sequence[Tensor]) -> tuple[Params, Any, dict[str, Any]]:
        """(params, others, hyper) made of these tensors."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
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

    def _first_gradient(self) -> Params:
        """The inner gradient at θ_0, a constant. ValueError where it depends on a tensor other than these.

        It is found out here, for within a Function tensors of outer transforms are no longer what they are.
        """
        params, others, _ = self.arguments([x.detach() for x in self.tensors])
        found = self.loop.gradient(params, others, 0)
        if any(_is_recorded(x) for x in found.values()):  # made of constants alone it would not be
            raise ValueError(
                'meta_gradient: all but "reverse" and "first-order" differentiate in params, other model '
                "parameters, support, the optimizer's fields and the parameters of a loss_fn that is a "
                "torch.nn.Module; this loss depends on another tensor that requires a gradient: make it one "
                'of these, or use "reverse"'
            )
        return found

    def moved(
        self,
        tensors: Sequence[Tensor],
        learned: Sequence[int],
        index: int,
        params: Params,
        direction: Params,
    ) -> tuple[Params, list[Tensor]]:
        """How the inner gradients, in θ and in the learned tensors, change along a direction of θ."""

        def gradients(current: Params) -> tuple[Params, list[Tensor]]:
            def loss(current: Params, values: list[Tensor]) -> Tensor:
                return self.loop.loss(current, self.replaced(tensors, learned, values)[1], index)

            found: tuple[Params, list[Tensor]] = grad(loss, argnums=(0, 1))(
                current, [tensors[place] for place in learned]
            )
            return found

        with self.replay.again(index):
            change: tuple[Params, list[Tensor]] = jvp(gradients, (params,), (direction,))[1]
        return change

    def pullback(
        self, tensors: Sequence[Tensor], learned: Sequence[int], index: int, params: Params
    ) -> Callable[..., tuple[Params, list[Tensor]]]:
        """The same as a function of the direction, by reverse mode over the inner gradient, computed once.

        The function takes retain_graph too, as torch.func.vjp's does.
        """

        def gradient(current: Params, values: list[Tensor]) -> Params:
            return self.loop.gradient(current, self.replaced(tensors, learned, values)[1], index)

        with self.replay.again(index):
            _, pull, *_ = vjp(gradient, params, [tensors[place] for place in learned])
        return pull


def _is_recorded(x: Tensor) -> bool:
    """Whether autograd, or a transform of torch.func on any level, has a graph of it."""
    while not x.requires_grad:
        if not is_functorch_wrapped_tensor(x):
            return False
        x = get_unwrapped(x)
    return True
