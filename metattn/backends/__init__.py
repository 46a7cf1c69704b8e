"""The backends, and the one function that picks.

What a backend's module offers is the Protocol `Backend` (metattn.backends.contract). All but the reference
have OPERATORS besides.
"""

from __future__ import annotations

import importlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metattn.caller import level_of_caller
from metattn.problem import Constants, Primals, Problem

if TYPE_CHECKING:
    from metattn.backends.contract import Backend

IMPORTING_PROCESS = os.getpid()  # a child that was forked from it has none of its threads
NAMES = ("reference", "cpu", "cuda", "triton")
MODULES = {
    "reference": "metattn.backends.reference",
    "cpu": "metattn.backends.cpu",
    "cuda": "metattn.backends.cuda",
    "triton": "metattn.backends.triton",
}
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("triton", "cuda", "reference")}  # other devices: the reference

MANY_SCORES = 10**6  # a head's, from which on the reference is felt

_told = False
_loaded: dict[str, Any] = {}
_reasons: dict[str, str | None] = {}
_loading = threading.RLock()  # a library is loaded, and its operators described, once


# (layout, problem, needs, tensors) → what the map gives, as a function of its tensors: for operators that are
# called by themselves. autodiff, which stands above the backends, sets it.
differentiate: Callable[..., tuple[Tensor | None, ...]]

# What use_backend names: for eager code in this thread or task; for Dynamo, which guards a global but cannot
# trace a ContextVar, the name last entered or restored.
_named: ContextVar[str | None] = ContextVar("metattn_backend", default=None)
_named_for_dynamo: str | None = None


def load(name: str) -> Backend:
    """The module of a backend."""
    if name not in _loaded:
        _loaded[name] = importlib.import_module(MODULES[name])
    found: Backend = _loaded[name]
    return found


def operators_of(name: str) -> Any:
    """A backend's operators, which carry their derivatives."""
    if name != "reference":
        loaded: Any = load(name)
        return loaded.OPERATORS
    from metattn.backends import operators  # slow to import, and there where operators are

    with _loading:
        return operators.of_reference()


def unavailable_reason(name: str) -> str | None:
    """Why a backend cannot run on this machine, or None; asked once a process."""
    if name in _reasons:
        return _reasons[name]
    with _loading:
        if name not in _reasons:
            try:
                _reasons[name] = load(name).unavailable_reason()
            except ImportError as error:
                _reasons[name] = str(error)
        return _reasons[name]


# A constant of the process for Dynamo too: asking may load a library, which cannot be traced.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available_backends() -> dict[str, str | None]:
    """Every backend with the reason why it is unavailable on this machine, or None where it is available."""
    return {name: unavailable_reason(name) for name in NAMES}


def check_name(name: str | None) -> None:
    """Refuse what is no backend's name."""
    if name is not None and name not in NAMES:
        error = ValueError if isinstance(name, str) else TypeError
        raise error(f"backend: expected None or one of {', '.join(NAMES)}, got {name!r}")


def named() -> str | None:
    """The backend that use_backend names."""
    return _named_for_dynamo if torch.compiler.is_compiling() else _named.get()


def _name(name: str | None) -> None:
    global _named_for_dynamo  # noqa: PLW0603
    _named_for_dynamo = name
    if not torch.compiler.is_compiling():
        _named.set(name)


def objection(name: str, problem: Problem, primals: Primals, constants: Constants) -> str | None:
    """Why a backend cannot serve this call, or None."""
    reason = unavailable_reason(name)
    return reason if reason is not None else load(name).unsupported(problem, primals, constants)


def choose(problem: Problem, primals: Primals, constants: Constants, name: str | None = None) -> Problem:
    """The problem with its backend, as first has it; tells once that a large one goes to the reference."""
    chosen = first(problem, primals, constants, name)
    if chosen.backend == "reference" and not (torch.compiler.is_compiling() or _told or name or named()):
        _tell(problem, primals)
    return chosen


def first(problem: Problem, primals: Primals, constants: Constants, name: str | None = None) -> Problem:
    """The problem with its backend: the one named here or by use_backend, else the first that serves it."""
    check_name(name)
    name = name or named()
    if name is not None:
        reason = objection(name, problem, primals, constants)
        if reason is not None:
            raise NotImplementedError(
                f"backend: {name!r} was asked for by name and cannot serve this call: {reason}"
            )
        return problem.on(name)
    for candidate in ORDER.get(primals.q.device.type, ()):
        if objection(candidate, problem, primals, constants) is None:
            return problem.on(candidate)
    return problem


def _tell(problem: Problem, primals: Primals) -> None:
    """Warn, once a process, where the reference serves a large problem because no other backend is there."""
    global _told  # noqa: PLW0603
    n = problem.max_q or primals.q.shape[-2]
    m = problem.max_k or primals.k.shape[-2]
    device = primals.q.device.type
    absent = {each: unavailable_reason(each) for each in ORDER.get(device, ()) if each != "reference"}
    if n * m < MANY_SCORES or not absent or None in absent.values():
        return
    _told = True
    reasons = "; ".join(f"{each}: {reason}" for each, reason in absent.items())
    warnings.warn(
        f"attention over {n}×{m} scores goes to the reference, slowly and with matrices of that size in "
        f"memory, for no other backend is there for {device} tensors ({reasons}). backend='reference' and "
        "use_backend('reference') ask for it without this warning",
        stacklevel=level_of_caller(),
    )


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Context manager: calls in this thread that name no backend use this one, or raise saying why.

    None restores the automatic choice inside. Code under torch.compile goes by the name last entered in any
    thread, and is compiled again when it changes. Raises ValueError for a name that is no backend's and
    TypeError for what is no name; a call inside that the backend cannot serve raises NotImplementedError.
    """
    check_name(name)
    outer = named()
    _name(name)
    try:
        yield
    finally:
        _name(outer)
