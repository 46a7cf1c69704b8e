"""What a backend offers: a module of `metattn.backends` with these names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from metattn.layout import Layout, Needs
from metattn.problem import Constants, Primals, Problem, Results

if TYPE_CHECKING:  # mypy holds the modules to it
    from metattn.backends import cpu, cuda, reference, triton

    _all: tuple[Backend, ...] = (reference, cpu, cuda, triton)


class ReusesDq(Protocol):
    """Whether a double backward has a use for the gradient that vjp gave for q."""

    def __call__(self, problem: Problem, primals: Primals, constants: Constants, needs: Needs, /) -> bool: ...


class RunPlain(Protocol):
    """A map by an operator of fewer arguments: what it gives, flat; None where the call has options."""

    def __call__(
        self, layout: Layout, problem: Problem, needs: Needs | None, tensors: Sequence[Any], /
    ) -> tuple[Any, ...] | None: ...


class Backend(Protocol):
    """The five maps of docs/math.md, and where they serve. What each takes and gives: metattn.layout.

    A map takes tensors in the canonical form (metattn.problem), of any strides, None for what is absent. It
    gives None for gradients that `needs` does not name. It takes no derivatives and knows no transform.
    """

    @property
    def reuses_dq(self) -> ReusesDq | None:
        """None: never."""

    @property
    def run_plain(self) -> RunPlain | None:
        """None: there are no such operators."""

    def unavailable_reason(self) -> str | None:
        """Why it cannot run on this machine, or None. Asked once a process; may load a library."""

    def unsupported(self, problem: Problem, primals: Primals, constants: Constants, /) -> str | None:
        """Why it cannot serve a call, or None. Asked at every call; reads no values."""

    def forward(self, problem: Problem, primals: Primals, constants: Constants, /) -> Results: ...

    def vjp(
        self, problem: Problem, primals: Primals, constants: Constants, results: Results,
        do: Tensor | None, dlse: Tensor | None, needs: Needs, /,
    ) -> Primals: ...  # fmt: skip

    def jvp(
        self, problem: Problem, primals: Primals, constants: Constants, results: Results,
        tangents: Primals, /,
    ) -> Results: ...  # fmt: skip

    def vjp_jvp(
        self, problem: Problem, primals: Primals, constants: Constants, results: Results,
        do: Tensor | None, dlse: Tensor | None, tangents: Primals, results_t: Results, needs: Needs, /,
    ) -> Primals: ...  # fmt: skip

    def double_backward(
        self, problem: Problem, primals: Primals, constants: Constants, results: Results,
        do: Tensor | None, dlse: Tensor | None, tangents: Primals, needs: Needs, dq: Tensor | None = None, /,
    ) -> tuple[Results, Primals]:  # fmt: skip
        """jvp, and vjp_jvp with what that gives. dq: what vjp gave for q, where reuses_dq said yes."""
