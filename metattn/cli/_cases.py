"""What bench measures: cases, contestants, the steps they run, and the float64 answer they must give."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import metattn
from metattn import backends
from metattn.cli._measure import chunks
from metattn.problem import Call, Options, Primals, dense

Step = Callable[[], tuple[Tensor, ...]]

# Products of 2·N·M·d FLOP in each step (docs/math.md). jvp is what torch.func.jvp gives: the forward too.
PRODUCTS = {
    "forward": 2,
    "vjp": 5,
    "jvp": 7,
    "vjp_jvp": 10,
    "double backward": 15,
    "second-order step": 22,
}
OUTPUTS = {
    "forward": ("o",),
    "vjp": ("dq", "dk", "dv", "dbias"),
    "jvp": ("o", "ot"),
    "vjp_jvp": ("dqt", "dkt", "dvt", "dbiast"),
    "double backward": ("dqt", "dkt", "dvt", "dbiast", "ot"),
    "second-order step": ("o", "dq", "dk", "dv", "dbias", "dqt", "dkt", "dvt", "dbiast", "ot"),
}
# Relative error allowed beside the float64 answer: (factor on the math path's own error, floor).
TOLERANCES = {
    torch.float64: (4.0, 1e-12),
    torch.float32: (4.0, 5e-6),
    torch.bfloat16: (1.5, 4e-3),
    torch.float16: (1.5, 1e-3),
}
SCORES_AT_ONCE = 2**22  # elements of an N×M matrix that checkpointing and the float64 answer hold at a time


@dataclass(frozen=True)
class Case:
    """A shape, dtype and option to measure."""

    name: str
    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: str = "float32"
    kv_heads: int | None = None  # fewer than heads: grouped queries
    causal: bool = False
    bias: bool = False  # a dense float bias [1, heads, N, M] that gets a gradient
    steps: tuple[str, ...] = tuple(PRODUCTS)
    quick: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def shape(self) -> str:
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else str(self.heads)
        return f"B{self.batch} H{heads} N{self.length} d{self.head_dim}"

    @property
    def options(self) -> str:
        return ", ".join(
            [self.dtype, *(["causal"] if self.causal else []), *(["bias gradient"] if self.bias else [])]
        )

    def operations(self, step: str) -> float:
        """FLOP of the step by the count of products; a causal mask halves it."""
        product = 2.0 * self.batch * self.heads * self.length**2 * self.head_dim
        return PRODUCTS[step] * product * (0.5 if self.causal else 1.0)

    def asdict(self) -> dict[str, Any]:
        return asdict(self)


CASES = (
    Case("few-shot", 32, 8, 64, 32, quick=True),
    Case("small", 8, 8, 256, 64),
    Case("long", 1, 8, 2048, 64),
    Case("long causal", 1, 8, 2048, 64, causal=True),
    Case("long bf16", 1, 8, 2048, 64, dtype="bfloat16"),
    Case("grouped causal", 1, 16, 1024, 64, kv_heads=4, causal=True),
    Case("one head", 1, 1, 2048, 64, quick=True),
    Case("molecule", 8, 8, 200, 64, bias=True),
)
# Peak memory of the second-order step, each contestant in a process of its own.
MEMORY_CASES = tuple(
    Case("memory", 1, 4, length, 64, steps=("second-order step",), quick=length == 4096)
    for length in (4096, 8192, 16384)
)
# Small twins of the above for `--quick` and for the tests of bench itself.
QUICK_MEMORY_CASES = tuple(
    Case("memory", 1, 2, length, 64, steps=("second-order step",), quick=True) for length in (1024, 2048)
)


@dataclass(frozen=True)
class Inputs:
    """Leaves, cotangent and tangents of a case."""

    primals: tuple[Tensor, ...]  # q, k, v and, with a bias, the bias
    do: Tensor
    tangents: tuple[Tensor, ...]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.primals, self.do, *self.tangents))


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # drawn in float32 and rounded once, so that every dtype and the float64 answer see the same numbers
        return torch.randn(shape, generator=generator).to(case.torch_dtype)

    rows = (case.batch, case.heads, case.length, case.head_dim)
    keys = (case.batch, case.kv_heads or case.heads, case.length, case.head_dim)
    shapes = [rows, keys, keys]
    if case.bias:
        shapes.append((1, case.heads, case.length, case.length))
    primals = tuple(normal(*shape).requires_grad_() for shape in shapes)
    return Inputs(primals, normal(*rows).requires_grad_(), tuple(normal(*shape) for shape in shapes))


Attend = Callable[..., Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute attention: a metattn backend, or a path of torch's own function."""

    name: str
    steps: frozenset[str]  # what it can do at all
    longest: int | None = None  # the largest N it takes part in

    @property
    def backend(self) -> str | None:
        prefix, _, backend = self.name.partition(" ")
        return backend if prefix == "metattn" else None

    def can(self, case: Case, step: str) -> bool:
        """Whether this step of this case exists for the contestant."""
        if self.longest is not None and case.length > self.longest:
            return False
        return step in self.steps and not (self.name == FLASH and case.bias and step != "forward")


MATH = "torch math"
CHECKPOINTED = "torch checkpointed"
FLASH = "torch flash"


def contestants() -> list[Contestant]:
    """metattn's backends that work here and torch's paths, ours first."""
    every = frozenset(PRODUCTS)
    fused = metattn.available_backends()["cpu"] is None
    return [
        *([Contestant("metattn cpu", every)] if fused else []),
        # it specifies, it does not compete: beside a fused backend it is timed in the small cases alone
        Contestant("metattn reference", every, longest=256 if fused else None),
        Contestant(MATH, every - {"vjp_jvp"}),
        Contestant(CHECKPOINTED, frozenset({"second-order step"})),
        # its backward is a closed operator: neither a tangent nor a second derivative exists
        Contestant(FLASH, frozenset({"forward", "vjp"})),
    ]


def attend_by(contestant: Contestant, case: Case) -> Attend:
    """The contestant as a function of (q, k, v[, bias])."""
    if contestant.backend is not None:

        def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
            o = metattn.attention(q, k, v, bias=bias, causal=case.causal, backend=contestant.backend)
            assert isinstance(o, Tensor)
            return o

        return ours
    kernel = SDPBackend.FLASH_ATTENTION if contestant.name == FLASH else SDPBackend.MATH

    def theirs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(
                q, k, v, attn_mask=bias, is_causal=case.causal, enable_gqa=case.kv_heads is not None
            )

    return theirs


def make_step(contestant: Contestant, case: Case, step: str, inputs: Inputs) -> Step:
    """The step as a call without arguments; graphs that it starts from are built here, outside the timing."""
    if contestant.name == CHECKPOINTED:
        math, flash = (attend_by(Contestant(name, frozenset()), case) for name in (MATH, FLASH))
        return lambda: checkpointed_step(math, flash, inputs)
    if step == "vjp_jvp":
        assert contestant.backend is not None
        q, k, v, *bias = inputs.primals
        call = dense(q, k, v, Options(causal=case.causal, bias=bias[0] if bias else None))
        return raw_vjp_jvp(contestant.backend, call, inputs.do, inputs.tangents)
    return step_of(attend_by(contestant, case), step, inputs)


def step_of(attend: Attend, step: str, inputs: Inputs) -> Step:
    """make_step for attention as a function of the primals."""
    primals, do, tangents = inputs.primals, inputs.do, inputs.tangents
    if step == "forward":
        detached = [p.detach() for p in primals]
        return lambda: (attend(*detached),)
    if step == "vjp":
        o = attend(*primals)
        cotangent = do.detach()
        return lambda: torch.autograd.grad(o, primals, cotangent, retain_graph=True)
    if step == "jvp":
        plain = tuple(p.detach() for p in primals)
        return lambda: torch.func.jvp(attend, plain, tangents)
    if step == "double backward":
        gradients = torch.autograd.grad(attend(*primals), primals, do, create_graph=True)
        return lambda: torch.autograd.grad(gradients, (*primals, do), tangents, retain_graph=True)
    if step == "second-order step":

        def second_order() -> tuple[Tensor, ...]:
            o = attend(*primals)
            gradients = torch.autograd.grad(o, primals, do, create_graph=True)
            second = torch.autograd.grad(gradients, (*primals, do), tangents)
            return o.detach(), *(g.detach() for g in gradients), *second

        return second_order
    raise ValueError(f"step: expected one of {', '.join(PRODUCTS)}, got {step!r}")


def raw_vjp_jvp(backend: str, call: Call, do: Tensor, tangents: tuple[Tensor, ...]) -> Step:
    """The fourth map by itself, straight from the backend: no public call runs it without the third.

    Everything in a call's canonical form, [B, H, N, d]; tangents of q, k, v and, with a bias, the bias.
    """
    module = backends.load(backend)
    problem, (q, k, v, bias, sinks), constants = call[0].on(backend), call[1], call[2]
    primals = Primals(q.detach(), k.detach(), v.detach(), None if bias is None else bias.detach(), sinks)
    padded = Primals(*tangents, *(None,) * (5 - len(tangents)))
    cotangent = do.detach()
    needs = (True, True, True, bias is not None, False)
    with torch.no_grad():
        results = module.forward(problem, primals, constants)
        results_t = module.jvp(problem, primals, constants, results, padded)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            gradients = module.vjp_jvp(
                problem, primals, constants, results, cotangent, None, padded, results_t, needs
            )
        return tuple(g for g in gradients if g is not None)

    return step


def checkpointed_step(
    math: Attend, forward: Attend, inputs: Inputs, scores_at_once: int = SCORES_AT_ONCE
) -> tuple[Tensor, ...]:
    """The cheapest right second order that torch has: a flash forward, then the gradient of the math path,
    a few (batch, head) pairs at a time, checkpointed, so that only their matrices exist at once."""
    q, k, v, *bias = inputs.primals
    do = inputs.do
    batch, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    o = forward(*(p.detach() for p in inputs.primals))

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, cotangent = tensors
        return torch.autograd.grad(math(*leaves), leaves, cotangent, create_graph=True)

    per_head = q.shape[2] * k.shape[2]
    heads_at_once = max(1, min(heads // group, scores_at_once // (batch * per_head * group))) * group
    batch_at_once = max(1, scores_at_once // (per_head * heads_at_once))
    shared = bool(bias) and bias[0].shape[0] != batch  # one bias for all of the batch
    pieces: list[list[tuple[Tensor, ...]]] = []
    for b in chunks(batch, batch_at_once):
        row = []
        for h in chunks(heads, heads_at_once):
            kv = slice(h.start // group, h.stop // group)
            part = (q[b, h], k[b, kv], v[b, kv], *(x[:, h] if shared else x[b, h] for x in bias), do[b, h])
            row.append(checkpoint(gradient, *part, use_reentrant=False))
        pieces.append(row)
    gradients = []
    for i in range(len(inputs.primals)):
        rows = [torch.cat([piece[i] for piece in row], dim=1) for row in pieces]
        gradients.append(torch.stack(rows).sum(dim=0) if i == 3 and shared else torch.cat(rows))
    second = torch.autograd.grad(gradients, (*inputs.primals, do), inputs.tangents)
    return o, *(g.detach() for g in gradients), *second


def exact(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Every output of every step in float64, from softmax written out; a few rows of queries at a time.

    All sums over queries are additive, so the gradients of keys, values and bias are summed over the pieces.
    """
    wide = [t.detach().double() for t in inputs.primals]
    tangents = [t.double() for t in inputs.tangents]
    do = inputs.do.detach().double()
    group = case.heads // (case.kv_heads or case.heads)
    names = OUTPUTS["second-order step"]
    if not case.bias:
        names = tuple(name for name in names if not name.startswith("dbias"))
    columns = torch.arange(case.length)
    found: dict[str, Tensor] = {
        name: torch.zeros_like(like)
        for name, like in zip(names, itertools.chain([do], wide, wide, [do]), strict=True)
    }
    per_row = case.batch * case.heads * case.length
    for rows in chunks(case.length, max(1, SCORES_AT_ONCE // per_row)):
        q, k, v, *bias = (t.clone() for t in wide)
        leaves = [q[:, :, rows], k, v, *(b[:, :, rows] for b in bias)]
        seeds = [tangents[0][:, :, rows], *tangents[1:3], *(t[:, :, rows] for t in tangents[3:])]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        cotangent = do[:, :, rows].detach().requires_grad_()
        keys, values = (t.repeat_interleave(group, dim=1) for t in leaves[1:3])
        scores = leaves[0] @ keys.mT * case.head_dim**-0.5
        if case.bias:
            scores = scores + leaves[3]
        if case.causal:
            later = columns > torch.arange(rows.start, rows.stop)[:, None]
            scores = scores.masked_fill(later, -torch.inf)
        o = scores.softmax(dim=-1) @ values
        first = torch.autograd.grad(o, leaves, cotangent, create_graph=True)
        second = torch.autograd.grad(first, (*leaves, cotangent), seeds)
        for name, part in zip(names, itertools.chain([o], first, second), strict=True):
            if name.startswith(("dk", "dv")):
                found[name] += part.detach()
            else:
                found[name][:, :, rows] = part.detach()
    return found


def relative_error(found: Tensor, exact_value: Tensor) -> float:
    """‖x − x64‖ / ‖x64‖, whole or for the worst (batch, head), whichever is larger."""
    difference = found.detach().double() - exact_value
    whole = difference.norm() / exact_value.norm()
    each = difference.flatten(2).norm(dim=2) / exact_value.flatten(2).norm(dim=2)
    return float(torch.maximum(whole, each.max()))


def errors(case: Case, step: str, outputs: tuple[Tensor, ...], answer: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each output of a step."""
    names = [name for name in OUTPUTS[step] if name in answer]
    return {name: relative_error(output, answer[name]) for name, output in zip(names, outputs, strict=True)}
