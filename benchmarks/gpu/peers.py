"""Who takes part in the GPU benchmark: metattn's backends, and the peers that can take a case.

A contestant starts a step, which gives a call without arguments. What is not installed, or would need more
memory than a third of the device, says so before anything is tried.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

import metattn
from benchmarks.gpu.cases import FLEX, JAX
from metattn.bench import jax_peer
from metattn.bench.answers import Inputs, sequences
from metattn.bench.cases import WHOLE, Case
from metattn.bench.peers import (
    CHECKPOINTED,
    FIRST_ORDER,
    FLASH,
    MATH,
    PUBLIC,
    Contestant,
    checkpointed,
    ends,
    our_step,
    torch_path,
)
from metattn.bench.steps import Step, step_of, step_of_compiled
from metattn.measure import available_memory

EFFICIENT, CUDNN, JVP_FLASH = "torch memory-efficient", "torch cuDNN", "jvp_flash_attention"
FUSED = {
    FLASH: SDPBackend.FLASH_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    CUDNN: SDPBackend.CUDNN_ATTENTION,
}
# N×M matrices of 4 bytes that exist at once in each step (torch's math path computes bfloat16 in float32).
# Eleven is what the second-order step was measured to hold: see the memory table of `metattn bench`.
MATRICES = {"forward": 3, "vjp": 5, "jvp": 7, "double backward": 11, WHOLE: 11}
MASK_BYTES = 12  # of each (query, key): distances in int32, comparisons, the mask as numbers
SHARE = 1 / 3  # of the device's memory that a peer's matrices may take


def refusal(contestant: Contestant, step: str, device: torch.device) -> str | None:
    """Why a contestant's step is not tried."""
    if contestant.missing is not None:
        return contestant.missing
    needed = contestant.needs(step)
    if needed > SHARE * device_memory(device):
        return f"would need {needed / 2**30:.0f} GiB"
    return None


@cache
def device_memory(device: torch.device) -> float:
    """Bytes of the device's memory, or of the machine's that are free."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(available_memory() or 2**33)


def contestants(case: Case) -> list[Contestant]:
    """Ours by backend, and the peers, for a case."""
    found = [
        Contestant(f"metattn {name}", case.steps, partial(our_step, case, name))
        for name, reason in metattn.available_backends().items()
        if reason is None and name != "reference"
    ]
    peers = packed_peers(case) if case.lengths else dense_peers(case)
    return found + [peer for peer in peers if peer.steps]


def of_case(case: Case, *steps: str) -> tuple[str, ...]:
    return tuple(step for step in case.steps if step in steps)


def dense_peers(case: Case) -> list[Contestant]:
    first = of_case(case, *FIRST_ORDER)
    math = partial(torch_path, case, SDPBackend.MATH)
    pairs = case.n * case.keys
    plain_only = "takes neither mask nor bias" if case.needs_mask or case.bias else None
    fused = [
        Contestant(
            name,
            first,
            partial(step_of, partial(torch_path, case, kernel)),
            needs=lambda step: MASK_BYTES * pairs if case.needs_mask else 0.0,
            missing=plain_only if name == FLASH else None,
        )
        for name, kernel in FUSED.items()
    ]
    found = [
        Contestant(MATH, of_case(case, *PUBLIC), partial(step_of, math), needs=partial(math_bytes, case)),
        Contestant(
            CHECKPOINTED, of_case(case, WHOLE), partial(checkpointed, case), needs=partial(piece_bytes, case)
        ),
        *fused,
        Contestant(
            JVP_FLASH,
            of_case(case, "jvp"),
            partial(step_of, partial(jvp_flash, case)),
            missing=no_jvp_flash(case),
        ),
    ]
    if FLEX in case.compiled:
        found.append(Contestant(FLEX, first, partial(flex_step, case)))
    if JAX in case.compiled:
        steps = of_case(case, "forward", "vjp", "jvp", WHOLE)
        found.append(
            Contestant(
                JAX,
                steps,
                partial(jax_peer.start, case),
                needs=partial(math_bytes, case),
                missing=None if installed("jax") else "not installed",
                tensors=jax_peer.tensors,
                own_clock=True,
            )
        )
    return found  # fmt: skip


def packed_peers(case: Case) -> list[Contestant]:
    has_varlen = installed("torch.nn.attention.varlen")
    return [
        Contestant(MATH, of_case(case, *PUBLIC), partial(looped, case), needs=partial(looped_bytes, case)),
        Contestant(
            FLASH,
            of_case(case, *FIRST_ORDER),
            partial(step_of, partial(varlen_flash, case)),
            missing=None if has_varlen else "this torch has no torch.nn.attention.varlen",
        ),
    ]


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of it
        return False


# How much they need.


def math_bytes(case: Case, step: str) -> float:
    return MATRICES[step] * 4.0 * case.batch * case.heads * case.n * case.keys


def piece_bytes(case: Case, step: str) -> float:
    """A checkpointed piece is at least a group of heads."""
    group = case.heads // (case.kv_heads or case.heads)
    return MATRICES[step] * 4.0 * group * case.n * case.keys


def looped(case: Case, step: str, inputs: Inputs) -> Step:
    """Packed sequences one after the other, whole steps of each: no padding, and one's matrices at a time."""
    steps = [
        step_of(partial(torch_path, case.sequence(part.do.shape[2]), SDPBackend.MATH), step, part)
        for part in sequences(case, inputs)
    ]

    def run() -> tuple[Tensor, ...]:
        each = [run_one() for run_one in steps]
        return tuple(torch.cat(ts, dim=2)[0].transpose(0, 1) for ts in zip(*each, strict=True))

    return run


def looped_bytes(case: Case, step: str) -> float:
    """The longest sequence's matrices; every sequence's where graphs are kept from before the timing."""
    kept = step in ("vjp", "double backward")
    squares = [length**2 for length in case.lengths]
    return MATRICES[step] * 4.0 * case.heads * (sum(squares) if kept else max(squares))


def varlen_flash(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    cu = ends(case, q.device)
    # torch 2.10 says is_causal what later ones say by a window
    causal = "is_causal" in inspect.signature(varlen_attn).parameters
    how: dict[str, Any] = {"is_causal": True} if causal else {"window_size": (-1, 0)}
    o = varlen_attn(q, k, v, cu, cu, case.n, case.n, **how)
    assert isinstance(o, Tensor)
    return o


# Compiled, and others'.


@cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # type: ignore[return-value]


def flex_step(case: Case, step: str, inputs: Inputs) -> Step:
    """FlexAttention with a block mask; compiled afresh for each case and step."""
    from torch.nn.attention.flex_attention import create_block_mask

    torch._dynamo.reset()  # it gives up after eight shapes
    offset, (left, right) = case.offset, case.reach

    def attends(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j - i - offset
        return (distance >= -left) & (distance <= right)

    blocks = None
    if case.masked:
        blocks = create_block_mask(attends, None, None, case.n, case.keys, device=str(inputs.do.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    return step_of_compiled(attend, step, inputs)


def no_jvp_flash(case: Case) -> str | None:
    """What jvp_flash_attention cannot take, by its own checks."""
    if not installed("jvp_flash_attention"):
        return "not installed"
    if case.kv_heads is not None or case.bias or case.needs_mask or case.keys != case.n:
        return "takes neither grouped heads, bias, window nor other keys than queries"
    if case.d not in (16, 32, 64, 128, 256) or case.n % 2 or case.n < 32:
        return "takes d of 16, 32, 64, 128 or 256 and an even N of at least 32"
    return None


def jvp_flash(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from jvp_flash_attention.jvp_attention import JVPAttn

    o = JVPAttn.fwd_dual(q, k, v, causal=case.causal is not None)
    assert isinstance(o, Tensor)
    return o
