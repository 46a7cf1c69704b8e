"""Who takes part in bench: metattn's backends, torch's paths, compiled code of torch's and of JAX's."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from metattn.cli import _jax
from metattn.cli._cases import PRODUCTS, Case, Inputs
from metattn.cli._steps import Attend, checkpointed_step, raw_vjp_jvp, step_of
from metattn.problem import Options, dense

MATH = "torch math"
CHECKPOINTED = "torch checkpointed"
FLASH = "torch flash"
COMPILED = "torch compiled math"
JAX = "JAX"
FULL = ", full"  # after a backend's name: a masked case without its mask
TINY, SMALL, LARGE = 2**20, 2**22, 2**25
NAMES = ("metattn cpu", "metattn reference", FLASH, MATH, COMPILED, CHECKPOINTED, JAX, "metattn cpu" + FULL)


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention."""

    name: str
    steps: frozenset[str]  # what it can do at all
    most: int | None = None  # scores of a case it takes part in: a far slower one would take all the time

    @property
    def backend(self) -> str | None:
        prefix, _, backend = self.name.partition(" ")
        return backend.removesuffix(FULL) if prefix == "metattn" else None

    @property
    def full(self) -> bool:
        """Whether it leaves the case's mask away, to show what the mask saves."""
        return self.name.endswith(FULL)

    def can(self, case: Case, step: str) -> bool:
        """Whether this step of this case exists for the contestant."""
        if self.most is not None and case.scores > self.most:
            return False
        if self.full and (case.kv_heads is not None or not case.masked):
            return False
        if self.name == JAX and case.dtype == "float64":  # a setting of the whole process
            return False
        if self.name == COMPILED and (case.masked or case.bias or case.kv_heads is not None):
            return False  # ten seconds of compiling for each
        return step in self.steps and not (self.name == FLASH and case.bias and step != "forward")

    def tensors(self, results: Any) -> tuple[Tensor, ...]:
        """A step's results as torch's."""
        return _jax.tensors(results) if self.name == JAX else tuple(results)


def contestants() -> list[Contestant]:
    """metattn's backends that work here and the peers that are here, ours first."""
    every = frozenset(PRODUCTS)
    fused = metattn.available_backends()["cpu"] is None
    first = frozenset({"forward", "vjp"})
    return [
        *([Contestant("metattn cpu", every), Contestant("metattn cpu" + FULL, every)] if fused else []),
        # it specifies, it does not compete: beside a fused backend it is timed in few-shot alone
        Contestant("metattn reference", every, TINY if fused else None),
        Contestant(MATH, every - {"vjp_jvp"}, LARGE),
        Contestant(CHECKPOINTED, frozenset({"second-order step"}), LARGE),
        # its backward is a closed operator: neither a tangent nor a second derivative exists
        Contestant(FLASH, first, LARGE),
        # torch compiles no second derivative
        *([] if COMPILED in absent() else [Contestant(COMPILED, first, LARGE)]),
        *([] if JAX in absent() else [Contestant(JAX, frozenset(_jax.STEPS), SMALL)]),
    ]


def absent() -> dict[str, str]:
    """Who cannot take part on this machine, and why."""
    found = {}
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        found[COMPILED] = "no C++ compiler"
    if importlib.util.find_spec("jax") is None:
        found[JAX] = "not installed"
    return found


def attend_by(contestant: Contestant, case: Case) -> Attend:
    """The contestant as a function of (q, k, v[, bias])."""
    if contestant.backend is not None:

        def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            how: dict[str, Any] = {"causal": case.causal, "window": case.window, "bias": bias}
            o = metattn.attention(q, k, v, backend=contestant.backend, **how)
            assert isinstance(o, Tensor)
            return o

        return ours
    kernel = SDPBackend.FLASH_ATTENTION if contestant.name == FLASH else SDPBackend.MATH
    mask = None
    if case.window is not None:  # torch has no word for it
        everything = slice(0, case.length)
        mask = case.mask(everything, everything)

    def theirs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=bias if mask is None else mask,
                is_causal=case.causal and mask is None,
                enable_gqa=case.kv_heads is not None,
            )

    return theirs


def make_step(contestant: Contestant, case: Case, step: str, inputs: Inputs) -> Callable[[], Any]:
    """The step as a call without arguments; graphs that it starts from are built here, outside the timing.

    What compiles does so here or in the first call.
    """
    if contestant.full:
        case = case.full()
    if contestant.name == JAX:
        masked = partial(_jax.mask, case) if case.masked else None
        return _jax.start(partial(_jax.attention, masked), step, inputs)
    if contestant.name == CHECKPOINTED:
        math, flash = (attend_by(Contestant(name, frozenset()), case) for name in (MATH, FLASH))
        return lambda: checkpointed_step(math, flash, inputs)
    if contestant.name == COMPILED:
        torch._dynamo.reset()  # it gives up after eight shapes
        compiled = torch.compile(attend_by(contestant, case), dynamic=False, fullgraph=True)
        # compiled backwards may free what they read; these run many times
        with torch._functorch.config.patch(donated_buffer=False):
            return step_of(compiled, step, inputs)
    if step == "vjp_jvp":
        assert contestant.backend is not None
        q, k, v, *bias = inputs.primals
        options = Options(causal=case.causal, window=case.window, bias=bias[0] if bias else None)
        return raw_vjp_jvp(contestant.backend, dense(q, k, v, options), inputs.do, inputs.tangents)
    return step_of(attend_by(contestant, case), step, inputs)
