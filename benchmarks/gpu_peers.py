"""Who takes part in gpu.py's benchmark: metattn's backends, and the peers that can take a case.

A contestant starts a step, which gives a call without arguments. What is not installed, or would need more
memory than a third of the device, says so before anything is tried.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from benchmarks import gpu_cases
from benchmarks.gpu_cases import FLEX, JAX, WHOLE, Case
from metattn.cli import _jax
from metattn.cli._cases import Inputs
from metattn.cli._measure import available_memory
from metattn.cli._steps import Step, checkpointed_step, raw_vjp_jvp, step_of
from metattn.problem import Options, Packing, dense, packed

MATH, CHECKPOINTED, FLASH = "torch math", "torch checkpointed", "torch flash"
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


def as_they_are(results: Any) -> tuple[Tensor, ...]:
    """Results that are torch's tensors."""
    return tuple(results)


def no_bytes(step: str) -> float:
    return 0.0


@dataclass(frozen=True)
class Contestant:
    """A name, the steps it has, and how it starts one."""

    name: str
    steps: tuple[str, ...]
    start: Callable[[str, Inputs], Callable[[], Any]]
    needs: Callable[[str], float] = no_bytes  # bytes of N×M matrices in a step
    missing: str | None = None  # why it cannot take part at all
    tensors: Callable[[Any], tuple[Tensor, ...]] = as_they_are  # a step's results as torch's
    own_clock: bool = False  # events on torch's stream do not see it: timed by the host's clock

    def refusal(self, step: str, device: torch.device) -> str | None:
        """Why this step is not tried."""
        if self.missing is not None:
            return self.missing
        needed = self.needs(step)
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
        Contestant(f"metattn {name}", case.steps, partial(ours_step, case, name))
        for name, reason in metattn.available_backends().items()
        if reason is None and name != "reference"
    ]
    peers = packed_peers(case) if case.lengths else dense_peers(case)
    return found + [peer for peer in peers if peer.steps]


def of_case(case: Case, *steps: str) -> tuple[str, ...]:
    return tuple(step for step in case.steps if step in steps)


def dense_peers(case: Case) -> list[Contestant]:
    first = of_case(case, "forward", "vjp")
    math = partial(torch_path, case, SDPBackend.MATH)
    pairs = case.n * case.keys
    fused = [
        Contestant(
            name,
            first,
            partial(step_by, partial(torch_path, case, kernel)),
            needs=lambda step: MASK_BYTES * pairs if case.masked else 0.0,
            missing="takes neither mask nor bias" if name == FLASH and (case.masked or case.bias) else None,
        )
        for name, kernel in FUSED.items()
    ]
    found = [
        Contestant(MATH, math_steps(case), partial(step_by, math), needs=partial(math_bytes, case)),
        Contestant(
            CHECKPOINTED, of_case(case, WHOLE), partial(checkpointed, case), partial(piece_bytes, case)
        ),
        *fused,
        Contestant(
            JVP_FLASH,
            of_case(case, "jvp"),
            partial(step_by, partial(jvp_flash, case)),
            missing=no_jvp_flash(case),
        ),
    ]
    if FLEX in case.compiled:
        found.append(Contestant(FLEX, first, partial(flex_step, case)))
    if JAX in case.compiled:
        from benchmarks import gpu_jax

        steps = of_case(case, *gpu_jax.STEPS)
        found.append(
            Contestant(
                JAX,
                steps,
                partial(gpu_jax.start, case),
                needs=partial(math_bytes, case),
                missing=None if installed("jax") else "not installed",
                tensors=_jax.tensors,
                own_clock=True,
            )
        )
    return found  # fmt: skip


def packed_peers(case: Case) -> list[Contestant]:
    has_varlen = installed("torch.nn.attention.varlen")
    return [
        Contestant(MATH, math_steps(case), partial(looped, case), needs=partial(looped_bytes, case)),
        Contestant(
            FLASH,
            of_case(case, "forward", "vjp"),
            partial(step_by, partial(varlen_flash, case)),
            missing=None if has_varlen else "this torch has no torch.nn.attention.varlen",
        ),
    ]


def installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of it
        return False


def math_steps(case: Case) -> tuple[str, ...]:
    return tuple(step for step in case.steps if step != "vjp_jvp")  # that map has no public name


def step_by(attend: Callable[..., Tensor], step: str, inputs: Inputs) -> Step:
    return step_of(attend, step, inputs)


# Ours.


def ours(case: Case, backend: str, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    options: dict[str, Any] = {"causal": case.causal or False, "window": case.window, "bias": bias}
    if case.lengths:
        cu = gpu_cases.ends(case, q.device)
        o = metattn.varlen_attention(q, k, v, cu, cu, case.n, case.n, backend=backend, **options)
    else:
        o = metattn.attention(q, k, v, backend=backend, **options)
    assert isinstance(o, Tensor)
    return o


def ours_step(case: Case, backend: str, step: str, inputs: Inputs) -> Step:
    if step != "vjp_jvp":
        return step_of(partial(ours, case, backend), step, inputs)
    q, k, v, *bias = inputs.primals
    options = Options(causal=case.causal or False, window=case.window, bias=bias[0] if bias else None)
    if not case.lengths:
        return raw_vjp_jvp(backend, dense(q, k, v, options), inputs.do, inputs.tangents)
    cu = gpu_cases.ends(case, q.device)
    call = packed(q, k, v, Packing(cu, cu, case.n, case.n), options)
    do, *tangents = (t.transpose(0, 1)[None] for t in (inputs.do, *inputs.tangents))
    run = raw_vjp_jvp(backend, call, do, tuple(tangents))
    return lambda: tuple(t[0].transpose(0, 1) for t in run())


# torch.


def torch_path(
    case: Case, kernel: SDPBackend | None, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None
) -> Tensor:
    """torch's function on one of its paths, or on that which it chooses."""
    mask = gpu_cases.position_mask(case, q.device) if case.masked else bias
    kernels = [*FUSED.values(), SDPBackend.MATH] if kernel is None else [kernel]
    with sdpa_kernel(kernels):
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=case.causal is not None and not case.masked,
            enable_gqa=q.shape[1] != k.shape[1],
        )


def math_bytes(case: Case, step: str) -> float:
    return MATRICES[step] * 4.0 * case.batch * case.heads * case.n * case.keys


def checkpointed(case: Case, step: str, inputs: Inputs) -> Step:
    math, forward = (partial(torch_path, case, kernel) for kernel in (SDPBackend.MATH, None))
    at_once = scores_at_once(inputs.do.device)
    return lambda: checkpointed_step(math, forward, inputs, at_once)


def scores_at_once(device: torch.device) -> int:
    """Elements of a checkpointed piece's N×M matrices: enough to fill the device, no more."""
    return 2**28 if device.type == "cuda" else 2**22


def piece_bytes(case: Case, step: str) -> float:
    """A checkpointed piece is at least a group of heads."""
    group = case.heads // (case.kv_heads or case.heads)
    return MATRICES[step] * 4.0 * group * case.n * case.keys


def looped(case: Case, step: str, inputs: Inputs) -> Step:
    """Packed sequences one after the other, whole steps of each: no padding, and one's matrices at a time."""
    one = Case("one of them", 1, case.heads, case.n, case.d, dtype=case.dtype, causal=case.causal)
    attend = partial(torch_path, one, SDPBackend.MATH)
    steps = [step_of(attend, step, part) for part in gpu_cases.sequences(case, inputs)]

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

    cu = gpu_cases.ends(case, q.device)
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
    offset = gpu_cases.alignment(case, case.n, case.keys)
    left, right = case.window or (-1, -1)

    def attends(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        distance = j - i - offset
        mask = distance <= (0 if case.causal is not None else case.keys)
        mask = mask & (distance >= -left) if left >= 0 else mask
        return mask & (distance <= right) if right >= 0 else mask

    blocks = None
    if case.causal is not None or case.window is not None:
        blocks = create_block_mask(attends, None, None, case.n, case.keys, device=str(inputs.do.device))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return compiled_flex()(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])

    # compiled backwards may free what they read; these run many times
    with torch._functorch.config.patch(donated_buffer=False):
        return step_of(attend, step, inputs)


def no_jvp_flash(case: Case) -> str | None:
    """What jvp_flash_attention cannot take, by its own checks."""
    if not installed("jvp_flash_attention"):
        return "not installed"
    if case.kv_heads is not None or case.bias or case.masked or case.keys != case.n:
        return "takes neither grouped heads, bias, window nor other keys than queries"
    if case.d not in (16, 32, 64, 128, 256) or case.n % 2 or case.n < 32:
        return "takes d of 16, 32, 64, 128 or 256 and an even N of at least 32"
    return None


def jvp_flash(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from jvp_flash_attention.jvp_attention import JVPAttn

    o = JVPAttn.fwd_dual(q, k, v, causal=case.causal is not None)
    assert isinstance(o, Tensor)
    return o
