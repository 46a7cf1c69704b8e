"""What metattn.tune measures: recorded launches of the four maps, which run again with any configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metattn.backends import triton
from metattn.backends.triton import devices, planner
from metattn.backends.triton.plans import Launch
from metattn.kernels import configs
from metattn.kernels.configs import Config
from metattn.problem import NO_CONSTANTS, Constants, Primals, Problem

# How far the results of two tiles may lie apart, relative, in any (batch, head): twice what each may be off
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
TF32_TOLERANCE = 4e-3
HEADS, TOKENS = 16, 8192  # what fills a GPU


@dataclass(eq=False)
class Step:
    """A recorded launch: it writes the same outputs again, with any configuration."""

    kernel: str
    map: str
    shipped: Config
    launch: Callable[[Config], None]
    outputs: dict[str, Tensor]
    tolerance: float
    right: dict[str, Tensor] = field(default_factory=dict)  # what the shipped configuration gives

    def settle(self) -> None:
        """Runs with the shipped configuration; later steps read what it gives."""
        self._run(self.shipped)
        self.right = {name: output.clone() for name, output in self.outputs.items()}

    def objection(self, config: Config) -> str | None:
        """Why a configuration cannot take the shipped one's place, or None."""
        try:
            self._run(config)
            reason = self._difference()
        except Exception as error:  # compilers and launches fail in many ways, and each is a finding
            reason = f"{type(error).__name__}: {error}"
        for name, output in self.outputs.items():
            output.copy_(self.right[name])
        return reason

    def _run(self, config: Config) -> None:
        for name, output in self.outputs.items():
            # NaN shows what is not written; of dbias, which starts as zeros, that is what nobody attends to
            output.fill_(0.0 if name == "dbias" else math.nan)
        self.launch(config)
        if next(iter(self.outputs.values())).is_cuda:
            torch.cuda.synchronize()

    def _difference(self) -> str | None:
        found, right = _values(self.outputs), _values(self.right)
        for name, expected in right.items():
            error = _error(found[name], expected)
            if not error <= self.tolerance:
                return f"wrong: {name} is off by {error:.1e}"
        return None


def _values(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """In float64; o with what rounding it lost, which by itself depends on the last bit."""
    values = {name: output.double() for name, output in outputs.items()}
    lost = values.pop("o_lo", None)
    if lost is not None:
        values["o"] = values["o"] + lost
    return values


def _error(found: Tensor, right: Tensor) -> float:
    """Of the worst (batch, head); inf unless what is not finite is the same."""
    finite = right.isfinite()
    same = torch.where(finite, found.isfinite(), (found == right) | (found.isnan() & right.isnan()))
    if not bool(same.all()):
        return math.inf
    zero = right.new_zeros(())
    distance = torch.where(finite, found - right, zero).flatten(0, 1).flatten(1).norm(dim=1)
    size = torch.where(finite, right, zero).flatten(0, 1).flatten(1).norm(dim=1)
    return float((distance / size.clamp_min(1e-30)).max())


class _Recorder(planner.Planner):
    """Plans the maps with tensors that have data, and keeps how to launch each kernel."""

    def __init__(self, problem: Problem, primals: Primals, constants: Constants) -> None:
        if constants.mask is not None:
            constants = constants._replace(mask=constants.mask.view(torch.uint8))
        super().__init__(planner.setting(primals.q.device), problem, primals, constants)
        self.steps: dict[str, Step] = {}
        self.known: set[int] = set()  # addresses of tensors that no later step is the first to write
        self.map = ""
        self.trial: Config | None = None

    def is_whole(self, needs: Any) -> bool:
        return False

    def config(self, kernel: str) -> Config:
        return self.trial or super().config(kernel)

    def allocate(self, stand_in: Tensor, *, zero: bool = False) -> Tensor:
        return torch.empty_like(stand_in, device=self.here.device).fill_(0.0 if zero else math.nan)

    def add(self, launch: Launch, *arguments: Any) -> None:
        with devices.on(self.here.device):
            triton.run(launch, *arguments)

    def launch(self, kernel: Any, *arguments: Any, of_keys: bool = False, whole: bool = False) -> None:
        new = {t.data_ptr(): (name, t) for name, t in _tensors(arguments) if t.data_ptr() not in self.known}
        self.known |= set(new)
        start = super().launch

        def replay(config: Config) -> None:
            self.trial = config
            start(kernel, *arguments, of_keys=of_keys)

        name = kernel.__name__
        slot = configs.slot(name, self.features, self.q.element_size())
        shipped = configs.shipped(self.here.architecture, *slot)
        tolerance = TF32_TOLERANCE if self.precision() == "tf32" else TOLERANCE[self.q.dtype]
        self.steps.setdefault(name, Step(name, self.map, shipped, replay, dict(new.values()), tolerance))

    def sum_shares(self, shares: Tensor | None, primal: Tensor | None) -> Tensor | None:
        return primal  # there is nothing to sum yet


def _tensors(arguments: tuple[Any, ...]) -> list[tuple[str, Tensor]]:
    """Of the views in Given and in Wanted, by name."""
    named = [pair for views in arguments if hasattr(views, "_asdict") for pair in views._asdict().items()]
    return [(name, view.ptr) for name, view in named if view is not None]


@dataclass(frozen=True)
class Workload:
    """Calls of the four maps; everything: with every option."""

    features: int
    dtype: torch.dtype
    length: int
    causal: bool
    everything: bool = False

    def record(self, maps: Sequence[str]) -> list[Step]:
        """The launches of the four maps and of a double backward, in order, each kernel once, up to the last
        that one of `maps` has.
        """
        problem, primals, tangents, constants, do, dlse = self._call()
        needs: Any = tuple(primal is not None for primal in primals)
        recorder = _Recorder(problem, primals, constants)
        given = (*primals, *tangents, *constants, do, dlse)
        recorder.known |= {t.data_ptr() for t in given if t is not None}
        recorder.map = "forward"
        results = recorder.forward()
        recorder.map = "vjp"
        first = recorder.vjp(results, do, dlse, needs)
        recorder.map = "jvp"
        moved = recorder.jvp(results, tangents)
        recorder.map = "vjp_jvp"
        recorder.vjp_jvp(results, do, dlse, tangents, moved, needs)
        # a double backward that gives bias and slopes no gradients may have kernels of its own
        needs = (True, True, True, False, needs[4], False)
        recorder.double_backward(results, do, dlse, tangents, needs, first.q)
        steps = list(recorder.steps.values())
        recorder.steps = {}  # the steps hold the recorder, which would hold them and all their memory
        last = max(index for index, step in enumerate(steps) if step.map in maps)
        return steps[: last + 1]

    def _call(self) -> tuple[Problem, Primals, Primals, Constants, Tensor, Tensor]:
        """problem, primals, tangents, constants, do, dlse."""
        device = devices.device_at_hand()
        small = device.type == "cpu" or self.everything
        n = self.length
        batch, heads = (1, 1) if small else (max(1, TOKENS // n), HEADS)
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=dtype, device=device)

        def primals() -> Primals:
            q, k, v = (normal(batch, heads, n, self.features) for _ in range(3))
            if not self.everything:
                return Primals(q, k, v, None, None, None)
            sinks, slopes = (normal(1, heads, dtype=torch.float32) for _ in range(2))
            return Primals(q, k, v, normal(batch, heads, n, n), sinks, 0.01 * slopes)

        do, dlse = normal(batch, heads, n, self.features), normal(batch, heads, n, dtype=torch.float64)
        problem = Problem(
            scale=self.features**-0.5,
            softcap=2.0 if self.everything else None,
            causal="top-left" if self.causal else None,
            window=(n // 2, -1) if self.everything else (-1, -1),
            dropout_p=0.2 if self.everything else 0.0,
            max_q=0,
            max_k=0,
            backend="triton",
        )
        constants = NO_CONSTANTS
        if self.everything:
            mask = torch.rand(batch, heads, n, n, generator=generator, device=device) < 0.9
            rng = torch.zeros(batch, 2, dtype=torch.int64, device=device)
            constants = Constants(mask, rng, None, None)
        return problem, primals(), primals(), constants, do, dlse

    def at_its_most(self) -> Workload:
        """The call of its slot that needs the most registers and shared memory."""
        width = configs.slot("", self.features, self.dtype.itemsize)[1]
        return replace(self, features=width, length=configs.LARGEST, everything=True)
