"""A case's inputs, and the float64 answer that every output is compared with."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from metattn.bench.cases import WHOLE, Case
from metattn.measure import chunks

OUTPUTS = {
    "forward": ("o",),
    "vjp": ("dq", "dk", "dv", "dbias"),
    "jvp": ("o", "ot"),
    "vjp_jvp": ("dqt", "dkt", "dvt", "dbiast"),
    "double backward": ("dqt", "dkt", "dvt", "dbiast", "ot"),
    WHOLE: ("o", "dq", "dk", "dv", "dbias", "dqt", "dkt", "dvt", "dbiast", "ot"),
}
# Relative error allowed beside the float64 answer: (factor on the math path's own error, floor).
TOLERANCES = {
    torch.float64: (4.0, 1e-12),
    torch.float32: (4.0, 5e-6),
    torch.bfloat16: (1.5, 4e-3),
    torch.float16: (1.5, 1e-3),
}
# Elements of an N×M matrix that an answer holds at a time.
SCORES_AT_ONCE = {"cpu": 2**22, "cuda": 2**25}

Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Inputs:
    """Leaves, cotangent and tangents of a case."""

    primals: tuple[Tensor, ...]  # q, k, v and, with a bias, the bias
    do: Tensor
    tangents: tuple[Tensor, ...]

    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.primals, self.do, *self.tangents))

    def output_nbytes(self) -> int:
        """Bytes of what a second-order step gives: o, the gradients, their gradients and that in do."""
        return 2 * sum(t.nbytes for t in (*self.primals, self.do))

    def first_head(self) -> Inputs:
        """The first head alone, of a case whose keys have as many heads as its queries."""
        one = [tuple(t.detach()[:, :1] for t in ts) for ts in (self.primals, (self.do,), self.tangents)]
        return Inputs(one[0], one[1][0], one[2])


def make_inputs(case: Case, device: torch.device | str = "cpu", seed: int = 0) -> Inputs:
    """Leaves, cotangent, tangents; [B, H, N, d], packed [total, H, d]."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # drawn in float32 and rounded once, so that every dtype and the float64 answer see the same numbers
        return torch.randn(shape, generator=generator, device=device).to(case.torch_dtype)

    rows: tuple[int, ...] = (case.batch, case.heads, case.n, case.d)
    keys: tuple[int, ...] = (case.batch, case.kv_heads or case.heads, case.keys, case.d)
    if case.lengths:
        rows = keys = (sum(case.lengths), case.heads, case.d)
    shapes = [rows, keys, keys]
    if case.bias is not None:
        shapes.append((1 if case.bias == "shared" else case.batch, case.heads, case.n, case.keys))
    primals = tuple(normal(*shape).requires_grad_() for shape in shapes)
    return Inputs(primals, normal(*rows).requires_grad_(), tuple(normal(*shape) for shape in shapes))


def sequences(case: Case, inputs: Inputs) -> list[Inputs]:
    """The inputs of each packed sequence as [1, H, length, d]: q, k, v, do are views of the whole."""

    def part(t: Tensor, start: int, end: int) -> Tensor:
        return t[start:end].transpose(0, 1)[None]

    found = []
    for start, end in pairwise([0, *itertools.accumulate(case.lengths)]):
        leaves = [part(t.detach(), start, end).requires_grad_() for t in (*inputs.primals, inputs.do)]
        tangents = tuple(part(t, start, end) for t in inputs.tangents)
        found.append(Inputs(tuple(leaves[:-1]), leaves[-1], tangents))
    return found


def written_out(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """softmax(QKᵀ/√d)V as it is."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out


def torch_math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The same by torch's math path."""
    if bias is not None and mask is not None:
        mask = bias.masked_fill(~mask, -torch.inf)
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(
            q, k, v, attn_mask=bias if mask is None else mask, enable_gqa=q.shape[1] != k.shape[1]
        )


def exact(case: Case, inputs: Inputs, last: int | None = None) -> Outputs:
    """Every output of every step in float64. With `last`, those of so many last queries alone: a fraction of
    the work."""
    tensors = [t.detach().double() for t in (*inputs.primals, inputs.do, *inputs.tangents)]
    start = 0 if last is None else max(0, case.n - last)
    found = answer(case, tensors, written_out, start)
    if last is None:
        return found
    return {name: found[name][:, :, start:] for name in ("o", "dq", "dqt", "ot")}


def answer(case: Case, tensors: Sequence[Tensor], attend: Callable[..., Tensor], start: int = 0) -> Outputs:
    """Every output of every step, from primals, do and tangents, [B, H, N, d], of a part of the case's batch
    and heads. Queries before `start` are left out.

    A few rows of queries at a time. All sums over queries are additive, so the gradients of keys and values
    are summed over the pieces, in float32 or more.
    """
    count = len(tensors) // 2
    primals, do, tangents = tensors[:count], tensors[count], tensors[count + 1 :]
    case = case.sequence(do.shape[2], primals[1].shape[2])
    wide = torch.promote_types(do.dtype, torch.float32)
    names = OUTPUTS["vjp"][:count]
    likes = [do, *primals, *primals, do]
    found = {
        name: torch.zeros_like(like, dtype=wide)
        for name, like in zip(["o", *names, *(f"{name}t" for name in names), "ot"], likes, strict=True)
    }
    per_row = do.shape[0] * do.shape[1] * case.keys
    for piece in chunks(case.n - start, max(1, SCORES_AT_ONCE[do.device.type] // per_row)):
        rows = slice(start + piece.start, start + piece.stop)
        keys = case.attended(rows)
        mask = case.mask(rows, keys, do.device)

        def of(those: Sequence[Tensor], rows: slice = rows, keys: slice = keys) -> list[Tensor]:
            q, k, v, *bias = those
            return [q[:, :, rows], k[:, :, keys], v[:, :, keys], *(b[:, :, rows, keys] for b in bias)]

        leaves = [t.detach().requires_grad_() for t in of(primals)]
        cotangent = do[:, :, rows].detach().requires_grad_()
        o = attend(*leaves, *(None,) * (4 - count), mask)
        first = torch.autograd.grad(o, leaves, cotangent, create_graph=True)
        second = torch.autograd.grad(first, (*leaves, cotangent), of(tangents))
        for name, part in zip(found, (o, *first, *second), strict=True):
            if name.startswith(("dk", "dv")):
                found[name][:, :, keys] += part.detach()
            elif name.startswith("dbias"):
                found[name][:, :, rows, keys] = part.detach()
            else:
                found[name][:, :, rows] = part.detach()
    return {name: t.to(do.dtype) for name, t in found.items()}


def outputs_of(case: Case, step: str = WHOLE) -> tuple[str, ...]:
    """The names of a step's outputs, in their order."""
    return tuple(name for name in OUTPUTS[step] if case.bias is not None or not name.startswith("dbias"))


def relative_error(found: Tensor, exact_value: Tensor) -> float:
    """‖x − x64‖ / ‖x64‖, whole or for the worst (batch, head), whichever is larger."""
    difference = found.detach().double() - exact_value
    whole = difference.norm() / exact_value.norm()
    each = difference.flatten(2).norm(dim=2) / exact_value.flatten(2).norm(dim=2)
    return float(torch.maximum(whole, each.max()))


def errors(case: Case, step: str, outputs: Sequence[Tensor], truth: Outputs) -> dict[str, float]:
    """The relative error of each output; the answer may be of the first head or of the last queries alone."""
    found = {}
    for name, output in zip(outputs_of(case, step), outputs, strict=True):
        if name in truth:
            heads, rows = truth[name].shape[1:3]
            found[name] = relative_error(output[:, :heads, -rows:], truth[name])
    return found
