"""The maps as a backend offers them, for backends to which all are one: a layout and what is given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metattn.layout import DOUBLE_BACKWARD, FORWARD, JVP, VJP, VJP_JVP, Arguments, Cotangents, Layout, Needs
from metattn.problem import Constants, Primals, Problem, Results


class Maps:
    """Five functions of `run`."""

    def run(
        self,
        layout: Layout,
        problem: Problem,
        given: Arguments,
        needs: Needs | None,
        dq: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """What the map gives, flat, with None for what is not needed or not there."""
        raise NotImplementedError

    def forward(self, problem: Problem, primals: Primals, constants: Constants) -> Results:
        """o, lse, and what rounding o lost."""
        return Results(*self.run(FORWARD, problem, Arguments(primals, constants), None))

    def vjp(
        self,
        problem: Problem,
        primals: Primals,
        constants: Constants,
        results: Results,
        do: Tensor | None,
        dlse: Tensor | None,
        needs: Needs,
    ) -> Primals:
        """The gradients of ⟨dO, O⟩ + ⟨dL, L⟩ for those primals that `needs` names, None for the others."""
        given = Arguments(primals, constants, results, Cotangents(do, dlse))
        return Primals(*self.run(VJP, problem, given, needs))

    def jvp(
        self, problem: Problem, primals: Primals, constants: Constants, results: Results, tangents: Primals
    ) -> Results:
        """The tangents of what forward gives."""
        given = Arguments(primals, constants, results, tangents=tangents)
        return Results(*self.run(JVP, problem, given, None))

    def vjp_jvp(
        self,
        problem: Problem,
        primals: Primals,
        constants: Constants,
        results: Results,
        do: Tensor | None,
        dlse: Tensor | None,
        tangents: Primals,
        results_t: Results,
        needs: Needs,
    ) -> Primals:
        """The tangents of vjp's gradients along `tangents`, dO and dL held fixed; None where not needed."""
        given = Arguments(primals, constants, results, Cotangents(do, dlse), tangents, results_t)
        return Primals(*self.run(VJP_JVP, problem, given, needs))

    def double_backward(
        self,
        problem: Problem,
        primals: Primals,
        constants: Constants,
        results: Results,
        do: Tensor | None,
        dlse: Tensor | None,
        tangents: Primals,
        needs: Needs,
        dq: Tensor | None = None,
    ) -> tuple[Results, Primals]:
        """jvp and vjp_jvp at once; dq, the gradient that vjp gave for q, may spare work."""
        given = Arguments(primals, constants, results, Cotangents(do, dlse), tangents)
        found = self.run(DOUBLE_BACKWARD, problem, given, needs, dq)
        return Results(*found[:3]), Primals(*found[3:])
