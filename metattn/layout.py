"""Which tensors each map takes, and in which order: nobody else addresses them by position.

A map's tensors come in groups, (primals, constants, results, …). `Arguments` holds the groups by name. A
`Layout` turns them into the flat sequences that autograd Functions and operators take, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from metattn.problem import Constants, Primals, Problem, Results

Needs = tuple[bool, bool, bool, bool, bool, bool]  # which primals' gradients are wanted


class Cotangents(NamedTuple):
    """Of what forward gives."""

    do: Tensor | None  # [B, Hq, N, dv] like o
    dlse: Tensor | None  # [B, Hq, N] float64, of the log-sum-exp, one number a row


NO_PRIMALS = Primals(None, None, None, None, None, None)  # type: ignore[arg-type]
NO_RESULTS = Results(None, None, None)  # type: ignore[arg-type]
NO_COTANGENTS = Cotangents(None, None)


class Arguments(NamedTuple):
    """What a map may be given, by group; a group that it does not take holds None throughout."""

    primals: Primals
    constants: Constants
    results: Results = NO_RESULTS
    cotangents: Cotangents = NO_COTANGENTS
    tangents: Primals = NO_PRIMALS
    results_t: Results = NO_RESULTS


KINDS: dict[str, Any] = {
    "primals": Primals,
    "constants": Constants,
    "results": Results,
    "cotangents": Cotangents,
    "tangents": Primals,
    "results_t": Results,
}


class Layout:
    """The groups that a map takes, in order, and what it gives: results, gradients, or both.

    The groups' members may be anything, not tensors alone: a layout of `needs_input_grad` holds bools.
    """

    def __init__(
        self, name: str, groups: tuple[str, ...], of: Callable[[Any], Any], *, results: bool, gradients: bool
    ) -> None:
        self.name, self.groups, self.of = name, groups, of  # of: the map of a backend
        self.gives_results, self.gives_gradients = results, gradients
        self.gives_tangents = results and "tangents" in groups  # of the results
        self.size_given = results * len(Results._fields) + gradients * len(Primals._fields)
        self.parts: dict[str, slice] = {}
        self.size = 0
        for group in groups:
            self.parts[group] = slice(self.size, self.size + len(KINDS[group]._fields))
            self.size = self.parts[group].stop
        # of every group how it is made, where it is, and what stands for one that is not taken
        self._makers = [
            (KINDS[group]._make, self.parts.get(group), Arguments._field_defaults.get(group))
            for group in KINDS
        ]

    def join(self, given: Arguments) -> tuple[Any, ...]:
        """All members, flat."""
        return tuple([member for group in self.groups for member in getattr(given, group)])

    def split(self, members: Sequence[Any]) -> Arguments:
        """The inverse of join."""
        return Arguments._make(
            [default if part is None else make(members[part]) for make, part, default in self._makers]
        )

    def gradients(self, **groups: Sequence[Any]) -> tuple[Any, ...]:
        """A flat sequence of gradients: those of the groups that are named, None for all others."""
        found: list[Any] = [None] * self.size
        for group, members in groups.items():
            found[self.parts[group]] = members
        return tuple(found)

    def spread(self, given: Arguments, needs: Needs | None) -> list[Any]:
        """What a backend's function of this map takes after the problem: the groups, and the needs."""
        arguments: list[Any] = []
        for group in self.groups:
            members = getattr(given, group)
            arguments += members if group == "cotangents" else (members,)
        if self.gives_gradients:
            arguments.append(needs)
        return arguments

    def run(self, backend: Any, problem: Problem, given: Arguments, needs: Needs | None) -> tuple[Any, ...]:
        """A backend's map on a call: what it gives, flat."""
        found: tuple[Any, ...] = self.of(backend)(problem, *self.spread(given, needs))
        return (*found[0], *found[1]) if self.gives_results and self.gives_gradients else found


_FIRST = ("primals", "constants")
_SECOND = (*_FIRST, "results", "cotangents", "tangents")
FORWARD = Layout("forward", _FIRST, lambda b: b.forward, results=True, gradients=False)
VJP = Layout("vjp", (*_FIRST, "results", "cotangents"), lambda b: b.vjp, results=False, gradients=True)
JVP = Layout("jvp", (*_FIRST, "results", "tangents"), lambda b: b.jvp, results=True, gradients=False)
VJP_JVP = Layout("vjp_jvp", (*_SECOND, "results_t"), lambda b: b.vjp_jvp, results=False, gradients=True)
DOUBLE_BACKWARD = Layout(
    "double_backward", _SECOND, lambda b: b.double_backward, results=True, gradients=True
)
MAPS = {layout.name: layout for layout in (FORWARD, VJP, JVP, VJP_JVP, DOUBLE_BACKWARD)}
