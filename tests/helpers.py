"""What tests share: the options by name, calls made of them, plain PyTorch maths, and the rule for errors."""

from __future__ import annotations

import itertools
import math as _math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import metattn
from metattn.backends import operators, reference
from metattn.layout import MAPS, Arguments, Cotangents
from metattn.problem import Constants, Options, Packing, Primals, Problem, dense
from metattn.problem import packed as packed_problem

DIFFERENTIABLE = ("q", "k", "v", "bias", "sinks")
FLOAT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Shape:
    """Of a call; `lengths` are those of packed sequences (queries, keys)."""

    batch: int = 2
    heads: int = 2
    n: int = 5
    m: int = 4
    d: int = 3
    dv: int = 2
    kv_heads: int = 2
    lengths: tuple[tuple[int, int], ...] = ((3, 2), (2, 4), (0, 1), (2, 0))


Draw = Callable[..., Tensor]  # Draw(*sizes): standard normal, in the call's dtype
Option = Callable[[Shape, Draw], dict[str, Any]]


def _mask(shape: Shape, draw: Draw) -> dict[str, Any]:
    """One row in four attends to nothing; one key is masked for every query."""
    mask = draw(shape.batch, shape.heads, shape.n, shape.m) > -0.5
    mask[0, 0, ::4] = False
    mask[-1, :, :, -1:] = False
    return {"mask": mask}


def _bias_inf(shape: Shape, draw: Draw) -> dict[str, Any]:
    """A float mask: −inf for one key in three, and for all keys of one row."""
    bias = draw(shape.batch, 1, shape.n, shape.m)
    bias[..., 1::3] = -torch.inf
    bias[0, :, 0] = -torch.inf
    return {"bias": bias}


OPTIONS: dict[str, Option] = {
    "plain": lambda shape, draw: {},
    "mask": _mask,
    "key_mask": lambda shape, draw: {"mask": draw(shape.batch, 1, 1, shape.m) > -0.5},
    "bias": lambda shape, draw: {"bias": draw(shape.batch, shape.heads, shape.n, shape.m)},
    "bias_of_heads": lambda shape, draw: {"bias": draw(1, shape.heads, shape.n, shape.m)},
    "bias_of_keys": lambda shape, draw: {"bias": draw(shape.batch, 1, 1, shape.m)},
    "bias_inf": _bias_inf,
    "causal": lambda shape, draw: {"causal": "top-left"},
    "causal_bottom_right": lambda shape, draw: {"causal": "bottom-right"},
    "window": lambda shape, draw: {"window": (1, 1)},
    "scale": lambda shape, draw: {"scale": -0.7},
    "softcap": lambda shape, draw: {"softcap": 1.5},
    "alibi": lambda shape, draw: {
        "alibi_slopes": (2.0 ** -torch.arange(1.0, shape.heads + 1)).to(draw(0).dtype)
    },
    "sinks": lambda shape, draw: {"sinks": draw(shape.heads)},
    "sinks_of_batch": lambda shape, draw: {"sinks": draw(shape.batch, shape.heads)},
    "dropout": lambda shape, draw: {"dropout_p": 0.3, "dropout_seed": 2**40 + 7},
    "grouped": lambda shape, draw: {},
    "packed": lambda shape, draw: {},
}


def pairs() -> Iterator[tuple[str, str]]:
    """Pairs of options that do not set the same argument."""
    shape, sets = Shape(), {}
    for name, option in OPTIONS.items():
        sets[name] = set(option(shape, torch.randn)) | {name}
    names = [name for name in OPTIONS if name != "plain"]
    yield from ((a, b) for a, b in itertools.combinations(names, 2) if not sets[a] & sets[b])


@dataclass
class Call:
    """A call to metattn: its differentiable inputs by name, and everything else."""

    inputs: dict[str, Tensor]
    constants: dict[str, Any]
    lengths: tuple[tuple[int, int], ...] | None  # of packed sequences

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(self.inputs.values())

    def to(self, dtype: torch.dtype) -> Call:
        return replace(self, inputs={name: x.to(dtype) for name, x in self.inputs.items()})

    def function(self, backend: str | None) -> Callable[..., tuple[Tensor, Tensor]]:
        """(o, lse) of the differentiable inputs, by the public functions."""

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            x = dict(zip(self.inputs, tensors, strict=True))
            q, k, v = x.pop("q"), x.pop("k"), x.pop("v")
            options = {**self.constants, **x, "backend": backend, "return_lse": True}
            if self.lengths is None:
                return metattn.attention(q, k, v, **options)
            cu_q, cu_k = (cu_seqlens(length) for length in zip(*self.lengths, strict=True))
            max_q, max_k = (max(length) for length in zip(*self.lengths, strict=True))
            return metattn.varlen_attention(
                q, k, v, cu_q.to(q.device), cu_k.to(q.device), max_q, max_k, **options
            )

        return run

    def canonical(self) -> tuple[Problem, Primals, Constants]:
        """The call as the backends take it."""
        x = dict(self.inputs)
        q, k, v = (x.pop(name) for name in "qkv")
        options = Options(**self.constants, **x)
        if self.lengths is None:
            return dense(q, k, v, options)
        lengths_q, lengths_k = zip(*self.lengths, strict=True)
        packing = Packing(cu_seqlens(lengths_q), cu_seqlens(lengths_k), max(lengths_q), max(lengths_k))
        return packed_problem(q, k, v, packing, options)

    def math(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The same in plain PyTorch; as torch's math path does, half precisions are computed in float32."""
        x = dict(zip(self.inputs, tensors, strict=True))
        if self.lengths is None:
            return _math_dense(x, self.constants)
        results, first_q, first_k = [], 0, 0
        for s, (n, m) in enumerate(self.lengths):
            rows, keys = slice(first_q, first_q + n), slice(first_k, first_k + m)
            first_q, first_k = rows.stop, keys.stop
            options = {**self.constants, "batch_index": s}
            if "mask" in options:
                options["mask"] = _of_sequence(options["mask"], s, n, m)
            sequence = {
                name: x[name][part].transpose(0, 1)[None]
                for name, part in zip("qkv", (rows, keys, keys), strict=True)
            }
            if "bias" in x:
                sequence["bias"] = _of_sequence(x["bias"], s, n, m)
            for name in ("sinks", "alibi_slopes"):
                if name in x:
                    sequence[name] = x[name] if x[name].ndim == 1 else x[name][s]
            results.append(_math_dense(sequence, options))
        return torch.cat([o[0].transpose(0, 1) for o, _ in results]), torch.cat(
            [lse[0] for _, lse in results], 1
        )


def _of_sequence(x: Tensor, s: int, n: int, m: int) -> Tensor:
    """A packed call's mask or bias [1|S, 1|H, 1|N, 1|M] for one sequence; what is broadcast stays 1."""
    x = x[s : s + 1] if x.shape[0] != 1 else x
    x = x[:, :, :n] if x.shape[2] != 1 else x
    return x[..., :m] if x.shape[3] != 1 else x


def cu_seqlens(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def make_call(
    names: Iterable[str] = ("plain",),
    shape: Shape = Shape(),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Call:
    """A call with the named options, drawn from a seed."""
    names = tuple(names)
    generator = torch.Generator().manual_seed(seed)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)

    if "grouped" in names:
        shape = replace(shape, kv_heads=1)
    packed = "packed" in names
    if packed:
        lengths_q, lengths_k = zip(*shape.lengths, strict=True)
        shape = replace(shape, batch=len(shape.lengths), n=max(lengths_q), m=max(lengths_k))
        q = draw(sum(lengths_q), shape.heads, shape.d)
        k = draw(sum(lengths_k), shape.kv_heads, shape.d)
        v = draw(sum(lengths_k), shape.kv_heads, shape.dv)
    else:
        q = draw(shape.batch, shape.heads, shape.n, shape.d)
        k = draw(shape.batch, shape.kv_heads, shape.m, shape.d)
        v = draw(shape.batch, shape.kv_heads, shape.m, shape.dv)
    options: dict[str, Any] = {}
    for name in names:
        options |= OPTIONS[name](shape, draw)
    inputs = {"q": q, "k": k, "v": v} | {
        name: options.pop(name) for name in ("bias", "sinks", "alibi_slopes") if name in options
    }
    return Call(inputs, options, shape.lengths if packed else None)


def _math_dense(x: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Attention as a textbook has it, with a row of zeros where nothing is attended."""
    dtype = x["q"].dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (x[name].to(compute) for name in ("q", "k", "v"))
    batch, heads, n, d = q.shape
    m = k.shape[2]
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * options.get("scale", 1 / _math.sqrt(d))
    if "softcap" in options:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    i, j = torch.arange(n)[:, None], torch.arange(m)[None]
    if "bias" in x:
        scores = scores + x["bias"].to(compute)
    if "alibi_slopes" in x or "alibi_slopes" in options:
        slopes = (x["alibi_slopes"] if "alibi_slopes" in x else options["alibi_slopes"]).to(compute)
        scores = scores - slopes[..., None, None] * (i + m - n - j).abs()
    causal, (left, right) = options.get("causal", False), options.get("window", (-1, -1))
    offset = 0 if causal == "top-left" else m - n
    alive = torch.ones(n, m, dtype=torch.bool)
    if causal:
        alive = alive & (j <= i + offset)
    if left >= 0:
        alive = alive & (j >= i + offset - left)
    if right >= 0:
        alive = alive & (j <= i + offset + right)
    if "mask" in options:
        alive = alive & options["mask"]
    scores = scores.masked_fill(~alive, -torch.inf)
    sinks = x["sinks"].to(compute)[..., None, None] if "sinks" in x else scores.new_tensor(-torch.inf)
    scores = torch.cat([scores, sinks.expand(batch, heads, n, 1)], -1)
    dead = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(dead, 0.0)
    p = scores.softmax(-1)[..., :m].masked_fill(dead, 0.0)
    # torch's logsumexp differentiates by its rounded result, which large scores leave no digits
    peak = scores.detach().amax(-1, keepdim=True)
    lse = (peak + (scores - peak).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    lse = lse.masked_fill(dead.squeeze(-1), -torch.inf)
    if "dropout_p" in options:
        first = options.get("batch_index", 0)
        rng = torch.stack(
            [torch.full((batch,), options["dropout_seed"]), torch.arange(first, first + batch)], 1
        )
        p = p * reference.dropout_keep(rng, options["dropout_p"], heads, n, m) / (1 - options["dropout_p"])
    return (p @ v).to(dtype), lse


# Both orders of a call, and the rule for their errors.


def finite(lse: Tensor) -> Tensor:
    """lse without the −inf of dead rows, which no difference quotient survives."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def with_offset(x: Tensor, offset: float) -> Tensor:
    """x [..., features] with so many standard deviations in one direction, the same in every row."""
    if offset == 0.0:
        return x
    direction = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return x + offset * (direction / direction.square().mean().sqrt()).to(x.dtype)


def both_orders(
    function: Callable[..., tuple[Tensor, Tensor]],
    inputs: dict[str, Tensor],
    rounding: torch.dtype = torch.float64,
    offsets: Mapping[str, float] | None = None,
) -> dict[str, Tensor]:
    """o, lse; the gradients of ⟨do, o⟩ + ⟨dlse, lse⟩; and of ⟨those, t⟩, in the inputs, do and dlse.

    The cotangents and tangents are drawn and rounded: the same numbers whatever dtype the inputs have.
    `offsets` of "do" and of tangents ("tq", …) are how much their rows have in common, as in `with_offset`.
    """
    generator = torch.Generator().manual_seed(1)

    def draw_like(x: Tensor, name: str = "") -> Tensor:
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return with_offset(drawn, (offsets or {}).get(name, 0.0)).to(rounding).to(x.dtype)

    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    o, lse = function(*leaves.values())
    live = finite(lse)
    do, dlse = draw_like(o, "do").requires_grad_(), draw_like(live).requires_grad_()
    first = torch.autograd.grad((o, live), tuple(leaves.values()), (do, dlse), create_graph=True)
    tangents = [draw_like(x, f"t{name}") for name, x in zip(leaves, first, strict=True)]
    second = torch.autograd.grad(first, (*leaves.values(), do, dlse), tangents, materialize_grads=True)
    names = tuple(leaves)
    results = {"o": o, "lse": live}
    results |= {f"d{name}": x for name, x in zip(names, first, strict=True)}
    results |= {f"d2{name}": x for name, x in zip((*names, "do", "dlse"), second, strict=True)}
    return {name: x.detach() for name, x in results.items()}


FLOORS = {torch.float32: (4.0, 5e-6), torch.bfloat16: (1.5, 4e-3), torch.float16: (1.5, 1e-3)}


def relative_error(x: Tensor, truth: Tensor, packed: bool = False) -> tuple[float, float]:
    """‖x − truth‖/‖truth‖ of the whole, and of the worst (batch, head) of what has rows: [B, H, …]."""
    error, truth = x.double() - truth.double(), truth.double()
    whole = _ratio(error.norm(), truth.norm())
    if packed and truth.ndim == 3:  # [total, H, d]
        error, truth = error.transpose(0, 1)[None], truth.transpose(0, 1)[None]
    if truth.ndim < 3:  # sinks are one number a head; a packed lse is taken whole
        return whole, whole
    heads = zip(*(t.flatten(2).norm(dim=2).flatten() for t in (error, truth)), strict=True)
    return whole, max((_ratio(*norms) for norms in heads), default=0.0)


def _ratio(error: Tensor, size: Tensor) -> float:
    return 0.0 if error == 0 else float(error / size)


def check_errors(
    ours: dict[str, Tensor],
    baseline: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
    packed: bool = False,
) -> None:
    """Relative errors at most max(4E, 5e-6) in float32, max(1.5E, 4e-3) in bfloat16, max(1.5E, 1e-3) in half.

    E is the baseline's error. Of the whole, and of the worst (batch, head).
    """
    factor, floor = FLOORS[dtype]
    failures = []
    for name, expected in truth.items():
        errors, allowed = (relative_error(x[name], expected, packed) for x in (ours, baseline))
        for what, error, bound in zip(("whole", "worst head"), errors, allowed, strict=True):
            if not error <= max(factor * bound, floor):
                failures.append(
                    f"{name} ({what}): error {error:.2e}, allowed {max(factor * bound, floor):.2e}"
                )
    assert not failures, "; ".join(failures)


def largest_difference(xs: Iterable[Tensor | None], ys: Iterable[Tensor | None]) -> float:
    """Largest |x − y| over tensors, one after the other."""
    largest = 0.0
    for x, y in zip(xs, ys, strict=True):
        assert (x is None) == (y is None)
        if x is not None and y is not None:
            assert x.shape == y.shape, f"{list(x.shape)} is not {list(y.shape)}"
            difference = (x.detach().double() - y.detach().double()).abs()
            assert not difference.isnan().any()
            largest = max(largest, float(difference.max()) if difference.numel() else 0.0)
    return largest


class RecordedMaps(TorchDispatchMode):
    """Which maps run within it as operators, what they are given and which gradients they shall give."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Arguments, Any]] = []

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace.startswith("metattn"):
            layout = MAPS[func._opname]
            _, tensors, needs = operators.parsed(layout, "", args)
            self.calls.append((layout.name, layout.split(tensors), needs))
        return func(*args, **(kwargs or {}))


def operator_arguments(call: Call) -> dict[str, tuple[Any, ...]]:
    """What each of torch.ops.metattn receives for a call, its forward and both orders."""
    module = metattn.backends.load("cpu")
    problem, primals, constants = call.canonical()
    moves = Primals(*[None if primal is None else primal.nan_to_num(neginf=0.0) for primal in primals])
    results = module.forward(problem, primals, constants)
    results_t = module.jvp(problem, primals, constants, results, moves)
    needs = tuple(primal is not None for primal in primals)
    cotangents = Cotangents(results.o, results.lse[..., 1])
    given = Arguments(primals, constants, results, cotangents, moves, results_t)
    return {
        name: operators.arguments_of(layout, problem, given, needs if layout.gives_gradients else None)
        for name, layout in MAPS.items()
    }
