"""Plain calls: dense, without options, nothing rounded. NAME_bare::plain_* take and give fewer tensors.

To convert an operator's arguments from Python costs as much time as a small problem's attention, and the full
forward has 18. The numbers are the full operators'. Only the compiled backend of CPUs has plain ones
(csrc/ops.cpp): on GPUs the host's time lies behind kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from metattn.layout import MAPS, Layout
from metattn.problem import Primals

NAMESPACE = "metattn"  # the operators that have plain twins, and how those are called
PREFIX = "plain_"
DTYPES = (torch.float32, torch.float64)
# How many members of a group there are in a plain call, which has those and no others.
MEMBERS = {"primals": 3, "constants": 0, "results": 2, "cotangents": 1, "tangents": 3, "results_t": 2}
NEEDS = 1 << MEMBERS["primals"]  # above all sums of needs


def _there(layout: Layout) -> list[bool]:
    """Which of a map's tensors a plain call has."""
    return [
        index < MEMBERS[group]
        for group, part in layout.parts.items()
        for index in range(part.stop - part.start)
    ]


def places_of(layout: Layout) -> tuple[int, ...]:
    """Where among a full operator's results those of the plain one are."""
    results = range(MEMBERS["results"] if layout.gives_results else 0)
    gradients = range(MEMBERS["primals"] if layout.gives_gradients else 0)
    return (*results, *(3 * layout.gives_results + index for index in gradients))


THERE = {name: _there(layout) for name, layout in MAPS.items()}
PLACES = {name: places_of(layout) for name, layout in MAPS.items()}


def _spreader(layout: Layout) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    places = PLACES[layout.name]
    return itemgetter(*(places.index(i) if i in places else len(places) for i in range(layout.size_given)))


_SPREADERS = {name: _spreader(layout) for name, layout in MAPS.items()}


def arguments_of(
    layout: Layout, tensors: Sequence[Any], scale: Any, causal: int, needs: int | None
) -> tuple[Any, ...] | None:
    """What a map's plain operator takes in a call of a plain problem; None where tensors make it none."""
    if [x is not None for x in tensors] != THERE[layout.name] or (needs is not None and needs >= NEEDS):
        return None
    q, k, v, *others = [x for x in tensors if x is not None]
    return (q, k, v, scale, causal, *others) if needs is None else (q, k, v, scale, causal, *others, needs)


def spread(layout: Layout, found: Sequence[Any]) -> tuple[Any, ...]:
    """A plain operator's results where the full one's are, None for the others."""
    return _SPREADERS[layout.name]((*found, None))


def fake(layout: Layout, full: Callable[..., Sequence[Any]]) -> Callable[..., tuple[Any, ...]]:
    """The shapes of a plain operator's results, by the full one's."""
    first = MEMBERS["primals"]
    absent = (None,) * (len(Primals._fields) - first)

    def shapes(*arguments: Any) -> tuple[Any, ...]:
        found = full(*arguments[:first], *absent, *arguments[first:])
        return tuple([found[place] for place in PLACES[layout.name]])

    return shapes
