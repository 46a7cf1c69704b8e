"""Who takes part in the benchmarks: metattn's backends, torch's paths, what torch and JAX compile."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from metattn.bench import jax_peer
from metattn.bench.answers import Inputs
from metattn.bench.cases import PRODUCTS, WHOLE, Case
from metattn.bench.steps import Step, checkpointed_step, raw_vjp_jvp, step_of, step_of_compiled
from metattn.problem import Options, Packing, dense, packed

MATH = "torch math"
CHECKPOINTED = "torch checkpointed"
FLASH = "torch flash"
COMPILED = "torch compiled math"
JAX = "JAX"
FULL = ", full"  # after a backend's name: a masked case without its mask
TINY, SMALL, LARGE = 2**20, 2**22, 2**25
NAMES = ("metattn cpu", "metattn reference", FLASH, MATH, COMPILED, CHECKPOINTED, JAX, "metattn cpu" + FULL)
FIRST_ORDER = ("forward", "vjp")
PUBLIC = tuple(step for step in PRODUCTS if step != "vjp_jvp")  # that map has no public name
EVERY_PATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
PIECE = {"cpu": 2**22, "cuda": 2**28}  # scores of a checkpointed piece: enough to fill the device, no more


def no_bytes(step: str) -> float:
    return 0.0


def as_they_are(results: Any) -> tuple[Tensor, ...]:
    """Results that are torch's tensors."""
    return tuple(results)


@dataclass(frozen=True)
class Contestant:
    """One way to compute a case's attention: a name, the steps it has, and how it starts one.

    `start` gives a call without arguments. Graphs that the step starts from are built there, outside the
    timing. What compiles does so there or in the first call.
    """

    name: str
    steps: tuple[str, ...]
    start: Callable[[str, Inputs], Callable[[], Any]]
    _: KW_ONLY
    full: bool = False  # it leaves the case's mask away, to show what the mask saves
    needs: Callable[[str], float] = no_bytes  # bytes of N×M matrices in a step
    missing: str | None = None  # why it cannot take part at all
    tensors: Callable[[Any], tuple[Tensor, ...]] = as_they_are  # a step's results as torch's
    own_clock: bool = False  # events on torch's stream do not see it: timed by the host's clock

    @property
    def backend(self) -> str | None:
        return backend_of(self.name)


def backend_of(name: str) -> str | None:
    """The backend of ours by that contestant's name, None for a peer's."""
    prefix, _, backend = name.partition(" ")
    return backend.removesuffix(FULL) if prefix == "metattn" else None


def contestants(case: Case, without: Collection[str] = (), *, patient: bool = False) -> list[Contestant]:
    """Who can compute a case on the CPU: metattn's backends that work here and the peers that are here, ours
    first. patient: those too that would take all the time beside the others."""
    fused = metattn.available_backends()["cpu"] is None
    torch_function = partial(torch_path, case)
    found: list[tuple[Contestant, int | None]] = [
        # it specifies, it does not compete: beside a fused backend it is timed in few-shot alone
        (
            Contestant("metattn reference", tuple(PRODUCTS), partial(our_step, case, "reference")),
            TINY if fused else None,
        ),
        (Contestant(MATH, PUBLIC, partial(step_of, partial(torch_function, SDPBackend.MATH))), LARGE),
        (Contestant(CHECKPOINTED, (WHOLE,), partial(checkpointed, case)), LARGE),
        # its backward is a closed operator: neither a tangent nor a second derivative exists, nor a bias's
        (
            Contestant(
                FLASH,
                FIRST_ORDER if case.bias is None else ("forward",),
                partial(step_of, partial(torch_function, SDPBackend.FLASH_ATTENTION)),
            ),
            LARGE,
        ),
    ]
    if fused:
        ours = Contestant("metattn cpu", tuple(PRODUCTS), partial(our_step, case, "cpu"))
        unmasked = Contestant(ours.name + FULL, ours.steps, partial(our_step, case.full(), "cpu"), full=True)
        found.insert(0, (ours, None))
        if case.masked and case.kv_heads is None:
            found.insert(1, (unmasked, None))
    here = absent()
    # torch compiles no second derivative, and takes ten seconds for each
    if COMPILED not in here and not (case.masked or case.bias or case.kv_heads is not None):
        found.append((Contestant(COMPILED, FIRST_ORDER, compiled_step), LARGE))
    if JAX not in here and case.dtype != "float64":  # a setting of the whole process
        start = partial(jax_peer.start, case)
        found.append((Contestant(JAX, jax_peer.STEPS, start, tensors=jax_peer.tensors), SMALL))
    return [
        contestant
        for contestant, most in found
        if contestant.name not in without and (patient or most is None or case.scores <= most)
    ]


def contestant(case: Case, name: str) -> Contestant:
    """The contestant of that name."""
    return next(each for each in contestants(case, patient=True) if each.name == name)


def absent() -> dict[str, str]:
    """Who cannot take part on this machine, and why."""
    found = {}
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        found[COMPILED] = "no C++ compiler"
    if importlib.util.find_spec("jax") is None:
        found[JAX] = "not installed"
    return found


# Ours.


def our_function(
    case: Case, backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    options: dict[str, Any] = {"causal": case.causal or False, "window": case.window, "bias": bias}
    if case.lengths:
        cu = ends(case, q.device)
        o = metattn.varlen_attention(q, k, v, cu, cu, case.n, case.n, backend=backend, **options)
    else:
        o = metattn.attention(q, k, v, backend=backend, **options)
    assert isinstance(o, Tensor)
    return o


def our_step(case: Case, backend: str, step: str, inputs: Inputs) -> Step:
    if step != "vjp_jvp":
        return step_of(partial(our_function, case, backend), step, inputs)
    q, k, v, *bias = inputs.primals
    options = Options(causal=case.causal or False, window=case.window, bias=bias[0] if bias else None)
    if not case.lengths:
        return raw_vjp_jvp(backend, dense(q, k, v, options), inputs.do, inputs.tangents)
    cu = ends(case, q.device)
    call = packed(q, k, v, Packing(cu, cu, case.n, case.n), options)
    do, *tangents = (t.transpose(0, 1)[None] for t in (inputs.do, *inputs.tangents))
    run = raw_vjp_jvp(backend, call, do, tuple(tangents))
    return lambda: tuple(t[0].transpose(0, 1) for t in run())


@lru_cache(maxsize=1)
def ends(case: Case, device: torch.device) -> Tensor:
    """Where packed sequences end, 0 first: int32 [sequences + 1]."""
    return torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32, device=device)


# torch's.


@lru_cache(maxsize=1)  # torch's paths read it in every call of a case
def whole_mask(case: Case, device: torch.device) -> Tensor | None:
    """Causal and window as a mask [N, M], where torch's function needs one."""
    return case.mask(slice(0, case.n), slice(0, case.keys), device) if case.needs_mask else None


def torch_path(
    case: Case, kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    """torch's function on one of its paths, or on that which it chooses."""
    mask = whole_mask(case, q.device)
    with sdpa_kernel(list(EVERY_PATH) if kernel is None else kernel):
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=bias if mask is None else mask,
            is_causal=case.causal is not None and mask is None,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def checkpointed(case: Case, step: str, inputs: Inputs) -> Step:
    math, forward = (partial(torch_path, case, kernel) for kernel in (SDPBackend.MATH, None))
    return lambda: checkpointed_step(math, forward, inputs, PIECE[inputs.do.device.type])


def compiled_step(step: str, inputs: Inputs) -> Step:
    """torch's math path without a mask, compiled afresh for each case and step."""

    def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return scaled_dot_product_attention(q, k, v)

    torch._dynamo.reset()  # it gives up after eight shapes
    return step_of_compiled(torch.compile(math, dynamic=False, fullgraph=True), step, inputs)
