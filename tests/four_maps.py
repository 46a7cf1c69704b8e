"""Random calls of the four maps, straight to a backend, and every output compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metattn.layout import Needs
from metattn.problem import Constants, Primals, Problem

Outputs = dict[str, Tensor | None]

# sizes [B, Hq, Hkv, N, M, d, dv], lengths of packed sequences, and options
SHORT = (1, 4, 2, 19, 23, 8, 12)
LONG = (1, 2, 1, 70, 130, 8, 12)
LENGTHS = ((0, 5), (70, 130), (1, 3), (7, 0))
SHORT_LENGTHS = ((0, 5), (20, 31), (1, 3), (7, 0))
ALL = dict(softcap=1.5, causal="bottom-right", window=(20, -1), dropout_p=0.2, sinks=True, slopes=True)
MAP_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-left": {"causal": "top-left"},
    "bottom-right": {"causal": "bottom-right"},
    "window": {"window": (9, 5)},
    "window-causal": {"window": (11, -1), "causal": "bottom-right"},
    "softcap": {"softcap": 2.0},
    "dropout": {"dropout_p": 0.3},
    "bias": {"bias": (1, 1, 1, 1)},
    "bias-of-heads": {"bias": (0, 1, 1, 1)},
    "mask": {"mask": (1, 1, 1, 1)},
    "sinks-masked": {"sinks": True, "mask": (0, 0, 1, 1)},
    "slopes": {"slopes": True},
    "everything": {**ALL, "bias": (1, 1, 1, 1), "mask": (1, 0, 1, 1)},
}
ODD = {
    "one": (1, 1, 1, 1, 1, 1, 1),
    "no-heads": (1, 0, 0, 4, 5, 4, 4),
    "no-rows": (2, 2, 2, 0, 4, 4, 4),
    "no-keys": (2, 2, 2, 3, 0, 4, 4),
    "no-features": (1, 1, 1, 3, 4, 0, 2),
    "two-parts": (1, 1, 1, 33, 35, 80, 96),
    "widest": (1, 1, 1, 33, 20, 203, 256),
    "tall": (1, 1, 1, 200, 70, 8, 8),
    "27-heads-on-one": (1, 27, 1, 3, 40, 4, 4),
}
# of a bias: which dimensions it has; the fully shared ones are cut into parts
SHARED = [(0, 0, 0, 0), (1, 0, 0, 1), (0, 1, 1, 0), (1, 1, 0, 1), (0, 0, 1, 1)]
OF_QKV: Needs = (True, True, True, False, False, False)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class MapCall:
    """A random call of the four maps: sizes [B, Hq, Hkv, N, M, d, dv] and options.

    Not helpers.Call, which the public checks settle first: here a map gets what it must bear itself, such as
    no heads or a window without end. Options are values, for sizes at which they cross tiles.
    """

    sizes: tuple[int, ...] = (2, 4, 2, 35, 70, 8, 12)
    dtype: torch.dtype = torch.float64
    softcap: float | None = None
    causal: str | None = None
    window: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0
    bias: tuple[int, ...] | None = None  # which of [B, Hq, N, M] it has; the others are broadcast
    mask: tuple[int, ...] | None = None
    sinks: bool = False
    slopes: bool = False
    lengths: tuple[
        tuple[int, int], ...
    ] = ()  # of packed sequences, rows and keys; sizes' B, N, M are then unused
    seed: int = field(default=0, compare=False)

    def make(self) -> tuple[Problem, Primals, Primals, Constants, Tensor, Tensor]:
        """problem, primals, tangents, constants, do, dlse."""
        generator = torch.Generator().manual_seed(self.seed)
        batch, heads, kv_heads, n, m, d, dv = self.sizes
        cu_q = cu_k = None
        rows, keys, leading = n, m, batch
        if self.lengths:
            ends = torch.tensor([(0, 0), *self.lengths]).cumsum(0).int()
            cu_q, cu_k = ends[:, 0].contiguous(), ends[:, 1].contiguous()
            batch, leading = len(self.lengths), 1
            n, m = (max(pair[i] for pair in self.lengths) for i in (0, 1))
            rows, keys = int(cu_q[-1]), int(cu_k[-1])
        compute = torch.float64 if self.dtype == torch.float64 else torch.float32

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

        def shape_of(has: tuple[int, ...]) -> list[int]:
            return [full if one else 1 for one, full in zip(has, (batch, heads, n, m), strict=True)]

        def primals() -> Primals:
            return Primals(
                normal(leading, heads, rows, d),
                normal(leading, kv_heads, keys, d),
                normal(leading, kv_heads, keys, dv),
                None if self.bias is None else normal(*shape_of(self.bias)),
                normal(batch if batch > 1 else 1, heads, dtype=compute) if self.sinks else None,
                normal(1 if self.sinks else batch, heads, dtype=compute).abs() if self.slopes else None,
            )

        rng = torch.stack([torch.full((batch,), -(2**40) - 3), torch.arange(batch)], 1)
        constants = Constants(
            None if self.mask is None else torch.rand(shape_of(self.mask), generator=generator) < 0.7,
            rng if self.dropout_p else None,
            cu_q,
            cu_k,
        )
        problem = Problem(
            scale=0.5,
            softcap=self.softcap,
            causal=self.causal,
            window=self.window,
            dropout_p=self.dropout_p,
            max_q=n if self.lengths else 0,
            max_k=m if self.lengths else 0,
            backend="cpu",
        )
        do, dlse = normal(leading, heads, rows, dv), normal(leading, heads, rows, dtype=torch.float64)
        return problem, primals(), primals(), constants, do, dlse


class Moved:
    """A backend for CPU tensors: they are moved to its device, and what it gives is moved back."""

    def __init__(self, backend: Any, device: str) -> None:
        self.backend, self.device = backend, device

    def move(self, x: Any) -> Any:
        return x.to(self.device) if isinstance(x, Tensor) else x

    def back(self, x: Any) -> Any:
        if isinstance(x, tuple):
            parts = [self.back(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return x.cpu() if isinstance(x, Tensor) else x

    def __getattr__(self, name: str) -> Any:
        def run(*arguments: Any) -> Any:
            moved = [
                type(x)(*map(self.move, x)) if hasattr(x, "_fields") else self.move(x) for x in arguments
            ]
            return self.back(getattr(self.backend, name)(*moved))

        return run


def four_maps(backend: Any, call: MapCall, wide: bool = False) -> Outputs:
    """Every output of the four maps; `wide`: of the same inputs in float64."""
    problem, primals, tangents, constants, do, dlse = call.make()
    if wide:
        primals, tangents, constants = (
            type(x)(*(t.double() if t is not None and t.is_floating_point() else t for t in x))
            for x in (primals, tangents, constants)
        )
        do = do.double()
    needs = tuple(primal is not None for primal in primals)
    results = backend.forward(problem, primals, constants)
    moved = backend.jvp(problem, primals, constants, results, tangents)
    first = backend.vjp(problem, primals, constants, results, do, dlse, needs)
    second = backend.vjp_jvp(problem, primals, constants, results, do, dlse, tangents, moved, needs)
    named: Outputs = {"o": results.o, "lse": results.lse.sum(-1), "ot": moved.o, "lt": moved.lse}
    named.update({f"d{name}": x for name, x in first._asdict().items()})
    named.update({f"d{name}t": x for name, x in second._asdict().items()})
    return named


def assert_close(found: Outputs, exact: Outputs, relative: float, absolute: float = 1e-12) -> None:
    for name, right in exact.items():
        mine = found[name]
        assert (mine is None) == (right is None), name
        if mine is None or right is None:
            continue
        assert mine.shape == right.shape, name
        dead = torch.isneginf(right)
        assert torch.equal(torch.isneginf(mine), dead), name
        error = (mine.double() - right.double()).masked_fill(dead, 0.0).norm()
        limit = (
            relative * right.double().masked_fill(dead, 0.0).norm() + absolute * max(1, right.numel()) ** 0.5
        )
        assert error <= limit, f"{name}: {error} > {limit}"
