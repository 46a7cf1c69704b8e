"""Plans: what a call allocates and launches, worked out once for all calls that differ in nothing but which
tensors they are given.

A plan is made with stand-ins: tensors without data, one for each that a call gives, allocates or makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Start = Callable[..., None]


# shape, strides, dtype, and whether the first element lies at a multiple of 16 bytes
Like = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]


def likes(tensors: Sequence[Tensor | None]) -> tuple[Like | None, ...]:
    """What a plan may know of a call's tensors."""
    return tuple(
        [None if t is None else (t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors]
    )


def stand_in(like: Like | None) -> Tensor | None:
    """A tensor without data in place of a call's own."""
    if like is None:
        return None
    shape, strides, dtype, _ = like
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


class Launch:
    """A kernel to launch in so many programs, with compile-time constants, always on arguments that are
    alike: of the same types and sizes, tensors of the same dtype and alignment.
    """

    def __init__(self, kernel: Any, programs: int, constants: dict[str, Any]) -> None:
        self.kernel, self.programs, self.constants = kernel, programs, constants
        self._compiled: Callable[..., None] | None = None
        self._last: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> None:
        if self._compiled is not None:
            self._compiled(*arguments, *self._last)
            return
        compiled = self.kernel[(self.programs,)](*arguments, **self.constants)
        if compiled is not None:  # the interpreter compiles nothing
            # later launches do not pass Triton's search for what is compiled for such arguments
            self._last = tuple(self.constants[name] for name in self.kernel.arg_names[len(arguments) :])
            self._compiled = compiled[(self.programs, 1, 1)]


class Made(NamedTuple):
    """A tensor that torch makes of another one."""

    result: Tensor
    source: Tensor
    how: Callable[[Tensor], Tensor]


class Plan:
    """What is allocated, launched and made, in this order, and which of it a call returns.

    given: stand-ins for the call's tensors, as run() gets them. rooms: what is allocated, and whether as
    zeros. launches: with arguments that are numbers, tensors, or tuples of what an argument may be. results:
    NamedTuples of tensors and None.
    """

    def __init__(
        self,
        given: Sequence[Tensor | None],
        rooms: Sequence[tuple[Tensor, bool]],
        launches: Sequence[tuple[Launch, tuple[Any, ...]]],
        made: Sequence[Made],
        results: tuple[Any, ...],
    ) -> None:
        every = [*given, *(room for room, _ in rooms), *(each.result for each in made)]
        slots = {id(t): slot for slot, t in enumerate(every) if t is not None}
        self._rooms = [(t.shape, t.stride(), t.dtype, zero) for t, zero in rooms]
        self._launches = [(launch, _Template(arguments, slots)) for launch, arguments in launches]
        self._made = [(slots[id(source)], how) for _, source, how in made]
        self._results = _Template(results, slots)

    def run(self, given: Sequence[Tensor | None], device: torch.device, start: Start) -> tuple[Any, ...]:
        """The results; start(launch, *arguments) launches."""
        tensors = list(given)
        for shape, strides, dtype, zero in self._rooms:
            room = torch.empty_strided(shape, strides, dtype=dtype, device=device)
            tensors.append(room.zero_() if zero else room)
        for launch, template in self._launches:
            start(launch, *template.filled(tensors))
        for source, how in self._made:
            tensors.append(how(tensors[source]))  # type: ignore[arg-type]
        results: tuple[Any, ...] = self._results.filled(tensors)
        return results


class _Template:
    """A tuple with places for tensors, in itself and in the tuples it holds."""

    def __init__(self, fields: tuple[Any, ...], slots: dict[int, int]) -> None:
        self._make = _maker(fields)
        self._fields: list[Any] = list(fields)
        self._tensors: list[tuple[int, int]] = []
        self._views: list[tuple[int, Callable[[Any], Any], int, tuple[Any, ...]]] = []  # a tensor and numbers
        self._tuples: list[tuple[int, _Template]] = []
        for index, field in enumerate(fields):
            if _holds(field):
                self._fields[index] = None  # a plan keeps no stand-ins
            if isinstance(field, Tensor):
                self._tensors.append((index, slots[id(field)]))
            elif _holds(field):
                first, *rest = field
                if isinstance(first, Tensor) and not any(map(_holds, rest)):
                    self._views.append((index, _maker(field), slots[id(first)], tuple(rest)))
                else:
                    self._tuples.append((index, _Template(field, slots)))

    def filled(self, tensors: Sequence[Tensor | None]) -> Any:
        fields = self._fields.copy()
        for index, slot in self._tensors:
            fields[index] = tensors[slot]
        for index, make, slot, rest in self._views:
            fields[index] = make((tensors[slot], *rest))
        for index, template in self._tuples:
            fields[index] = template.filled(tensors)
        return self._make(fields)


def _holds(field: Any) -> bool:
    """Whether a plan has to fill something in."""
    return isinstance(field, Tensor) or (isinstance(field, tuple) and len(field) > 0)


def _maker(fields: tuple[Any, ...]) -> Callable[[Any], Any]:
    make: Callable[[Any], Any] = getattr(type(fields), "_make", tuple)
    return make
