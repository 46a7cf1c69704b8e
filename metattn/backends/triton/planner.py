"""From a call to its plan: views of its tensors as kernels take them, tiles, allocations, launches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metattn.backends import operators
from metattn.backends.operators import ROUNDED
from metattn.backends.triton import devices, tuned
from metattn.backends.triton.plans import Launch, Like, Made, Plan, stand_in
from metattn.kernels import configs
from metattn.kernels.call import Call, Given, Room, View, Wanted
from metattn.kernels.configs import Config
from metattn.kernels.double_backward import double_rows
from metattn.kernels.forward import forward_rows
from metattn.kernels.jvp import jvp_rows
from metattn.kernels.shared import Parts, bias_sums, share_sums
from metattn.kernels.spans import SPAN
from metattn.kernels.vjp import vjp_keys, vjp_rows
from metattn.kernels.vjp_jvp import vjp_jvp_keys, vjp_jvp_rows
from metattn.layout import FORWARD, MAPS, NO_PRIMALS, Needs
from metattn.problem import Constants, Primals, Problem, Results

LONG = 4 * SPAN.value  # blocks of a sweep that is cut into spans
PLANS = 1024  # plans are kept for so many different calls, those that were used last
STATISTICS = 5  # fields of kernels.call.Statistics
WIDE = 2**31 // (2 * configs.MOST_FEATURES)  # strides from which offsets within a block pass 31 bits
BIAS_PROGRAMS = 512  # a sum over fewer tiles than this is cut into parts
# What a kernel sums up of each row or key: numbers, accumulators as wide as q and as wide as v.
SUMS = {
    "forward_rows": (4, 0, 1),
    "vjp_rows": (2, 1, 0),
    "vjp_keys": (0, 1, 1),
    "jvp_rows": (2, 0, 1),
    "vjp_jvp_rows": (3, 1, 0),
    "vjp_jvp_keys": (0, 1, 1),
    "double_rows": (5, 2, 1),
}


def _view(t: Tensor | None, *, rows_of_all: bool = False, broadcast: bool = False) -> View | None:
    """A tensor [B, H, rows[, columns]] or [B, H]; rows_of_all: packed, the rows of all sequences lie in
    batch 0; broadcast: a dimension of size 1 stands for all.
    """
    if t is None:
        return None
    strides = t.stride()
    if broadcast and t.numel():
        strides = tuple(0 if size == 1 else stride for size, stride in zip(t.shape, strides, strict=True))
    batch, head, row, column = (*strides, 0, 0)[:4]
    wide = 1 if max(abs(row), abs(column)) >= WIDE else ()
    return View(t, 0 if rows_of_all else batch, head, row, column, wide)


def _reach(problem: Problem, most: int) -> tuple[int | None, int | None]:
    """How far before and after its own place a query attends; None: without limit."""
    left, right = (None if side < 0 else min(side, most) for side in problem.window)
    return left, 0 if problem.causal is not None else right


def _unit(problem: Problem, primals: Primals) -> float | None:
    """The last factor on the way to the scores, as far as float32 goes: a bias is added after it."""
    factor = problem.scale if problem.softcap is None else problem.softcap
    return factor if primals.bias is None and 1e-18 < factor < 1e18 else None


class Setting(NamedTuple):
    """What a plan depends on besides its call."""

    device: torch.device
    architecture: str
    tf32: bool  # whether torch allows float32 products to be taken in TF32
    tuned: tuned.Table | None  # what metattn.tune saved; kernels compiled without a GPU get the shipped tiles


def setting(device: torch.device) -> Setting:
    """What holds now for tensors on a device."""
    row = devices.architecture(device)
    assert row is not None  # unsupported() said so
    tiles = None if device.type == "meta" else tuned.table(devices.gpu(device))
    return Setting(device, row, operators.allows_tf32(), tiles)


class Planner:
    """Plans a call of a map, on tensors whose data it never reads: its views, sizes and configurations."""

    def __init__(self, here: Setting, problem: Problem, primals: Primals, constants: Constants) -> None:
        q, k, v = primals.q, primals.k, primals.v
        self.here, self.q, self.primals = here, q, primals
        self.rooms: list[tuple[Tensor, bool]] = []
        self.launches: list[tuple[Launch, tuple[Any, ...]]] = []
        self.made: list[Made] = []
        self.packed = constants.cu_q is not None
        self.batch = constants.cu_q.shape[0] - 1 if constants.cu_q is not None else q.shape[0]
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.n = problem.max_q if self.packed else q.shape[2]
        self.m = problem.max_k if self.packed else k.shape[2]
        self.head, self.value = configs.parts(q.shape[3]), configs.parts(v.shape[3])
        left, right = _reach(problem, self.n + self.m)
        rng = constants.rng
        self.call = Call(
            q=self.rows(q),
            k=self.rows(k),
            v=self.rows(v),
            bias=_view(primals.bias, broadcast=True),
            sinks=_view(primals.sinks, broadcast=True),
            slopes=_view(primals.slopes, broadcast=True),
            mask=_view(constants.mask, broadcast=True),
            rng=None if rng is None else View(rng, rng.stride(0), 0, 0, rng.stride(1), ()),
            cu_q=constants.cu_q,
            cu_k=constants.cu_k,
            heads=self.heads,
            group=max(1, self.heads // max(1, self.kv_heads)),
            n=self.n,
            m=self.m,
            scale=problem.scale,
            unit=_unit(problem, primals),
            softcap=problem.softcap,
            left=left,
            right=right,
            bottom_right=0 if problem.causal == "top-left" else 1,
            threshold=min(round(problem.dropout_p * 2**32), 2**32 - 1),
            kept=1.0 / (1.0 - problem.dropout_p) if problem.dropout_p < 1.0 else 0.0,
        )

    def rows(self, t: Tensor | None) -> View | None:
        """A tensor shaped like q, k, v, o or lse, or one of its tangents or cotangents."""
        return _view(t, rows_of_all=self.packed)

    def given(
        self,
        statistics: Tensor | None = None,
        *,
        results: Results | None = None,
        do: Tensor | None = None,
        dlse: Tensor | None = None,
        tangents: Primals = NO_PRIMALS,
        results_t: Results | None = None,
        dq: Tensor | None = None,
    ) -> Given:
        rows = self.rows
        o, lse, o_lo = results if results is not None else (None, None, None)
        o_t, lse_t, o_t_lo = results_t if results_t is not None else (None, None, None)
        table = None
        if statistics is not None:
            field, batch, head, row = statistics.stride()
            table = View(statistics, 0 if self.packed else batch, head, row, field, ())
        return Given(
            o=rows(o), o_lo=rows(o_lo), lse=rows(lse), do=rows(do), dlse=rows(dlse),
            a=rows(tangents.q), b=rows(tangents.k), c=rows(tangents.v),
            beta=_view(tangents.bias, broadcast=True), sigma=_view(tangents.sinks, broadcast=True),
            omega=_view(tangents.slopes, broadcast=True),
            o_t=rows(o_t), o_t_lo=rows(o_t_lo), lse_t=rows(lse_t), dq=rows(dq), statistics=table,
        )  # fmt: skip

    def wanted(self, **tensors: Tensor | None) -> Wanted:
        views = {name: self.rows(t) for name, t in tensors.items() if name != "dbias"}
        return Wanted(**{name: views.get(name) for name in Wanted._fields if name != "dbias"},
                      dbias=_view(tensors.get("dbias")))  # fmt: skip

    def config(self, kernel: str) -> Config:
        size, better = self.q.element_size(), {} if self.here.tuned is None else self.here.tuned.tiles
        return configs.choose(self.here.architecture, kernel, self.features, size, self.n, self.m, better)

    @property
    def features(self) -> int:
        return max(int(self.head[0]), int(self.value[0]))

    def precision(self) -> str:
        """How float32 products are taken: three TF32 ones unless torch allows one; AMD has no TF32 of use."""
        if self.here.architecture in ("gfx9", "interpreter") or self.q.dtype in ROUNDED:
            return "ieee"
        return "tf32" if self.here.tf32 else "tf32x3"

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.room(torch.empty(shape, dtype=dtype or self.q.dtype, device="meta"))

    def empty_like(self, t: Tensor) -> Tensor:
        return self.room(torch.empty_like(t, device="meta"))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self.room(torch.empty(shape, dtype=dtype, device="meta"), zero=True)

    def room(self, stand_in: Tensor, *, zero: bool = False) -> Tensor:
        """Plans an allocation."""
        self.rooms.append((stand_in, zero))
        return stand_in

    def make(self, source: Tensor, how: Callable[[Tensor], Tensor]) -> Tensor:
        """Plans what torch shall make of a tensor after the launches."""
        self.made.append(Made(how(source), source, how))
        return self.made[-1].result

    def launch(self, kernel: Any, *arguments: Any, of_keys: bool = False, whole: bool = False) -> None:
        """A row pass, or a column pass, of all (sequence, head) pairs; whole: its one block has all keys."""
        name = kernel.__name__
        config = (
            configs.choose_whole(name, self.q.element_size(), self.n, self.m) if whole else self.config(name)
        )
        length, size = (self.m, config.keys) if of_keys else (self.n, config.rows)
        blocks = 1 if whole else -(-length // size)
        programs = blocks * self.batch * (self.kv_heads if of_keys else self.heads)
        visits = -(-self.n // config.rows) * self.call.group if of_keys else -(-self.m // config.keys)
        if visits >= LONG and not whole:
            given, wanted = arguments
            arguments = given, wanted._replace(room=self.room_for_sums(name, programs, size))
        twice = {}
        if of_keys:
            twice["TWICE"] = whole or configs.multiplies_twice(self.here.architecture, name, self.features)
        self.start(kernel, programs, config, *arguments, blocks, **twice)

    def room_for_sums(self, kernel: str, programs: int, rows: int) -> Room:
        """Room for what each program of a kernel sums up, over all partners of so many rows or keys."""
        numbers, heads, values = SUMS[kernel]
        size = rows * (numbers + heads * sum(self.head[1:]) + values * sum(self.value[1:]))
        return Room(self.empty(programs * size, dtype=torch.float32), size)

    def start(self, kernel: Any, programs: int, config: Config, *arguments: Any, **constants: Any) -> None:
        constants |= {
            "ROWS": config.rows,
            "KEYS": config.keys,
            "HEAD": self.head,
            "VALUE": self.value,
            "PRECISION": self.precision(),
            "num_warps": config.warps,
            "num_stages": config.stages,
            # elements are rounded alike in all maps, for a reference is one; a bias sees to it by selection
            "enable_fp_fusion": self.call.unit is not None or self.call.bias is not None,
        }
        self.add(Launch(kernel, programs, constants), self.call, *arguments)

    def add(self, launch: Launch, *arguments: Any) -> None:
        """Plans a launch, if there is something to do."""
        if launch.programs:
            self.launches.append((launch, arguments))

    def empty_results(self, lse: tuple[int, ...] = ()) -> Results:
        """Room for o, lse and o_lo, or their tangents. lse: its size beyond [B, Hq, N]."""
        q = self.q
        width = self.primals.v.shape[3]
        o = self.empty_like(q) if width == q.shape[3] else self.empty(*q.shape[:3], width)
        low = None
        if q.dtype in ROUNDED:
            low = self.room(torch.empty_like(o, dtype=torch.bfloat16, device="meta"))
        return Results(o, self.empty(*q.shape[:3], *lse, dtype=torch.float64), low)

    def is_whole(self, needs: Needs) -> bool:
        """Whether the few-sample path serves: one launch that finds every statistic itself."""
        shared_bias = needs[3] and not self.own_entries
        size = self.q.element_size()
        return not shared_bias and configs.is_whole(
            self.here.architecture, self.features, size, self.n, self.m
        )

    def takes_one_sweep(self, needs: Needs) -> bool:
        """Whether one row pass shall serve jvp and vjp_jvp: dQt is asked for, and no entry of dSt by itself,
        nor slopes' sums of them, which need τ and Dt at once.
        """
        fits = configs.in_one_sweep(self.here.architecture, self.features, self.q.element_size())
        return fits and needs[0] and not (needs[3] and self.own_entries) and not needs[5]

    def reuses_dq(self, needs: Needs) -> bool:
        """Whether a double backward with these needs takes what vjp gave for q."""
        return self.takes_one_sweep(needs) and not self.is_whole(needs)

    @property
    def own_entries(self) -> bool:
        """Whether the bias is nowhere broadcast."""
        bias = self.primals.bias
        return bias is not None and tuple(bias.shape) == (self.batch, self.heads, self.n, self.m)

    def gradients(
        self,
        kernels: tuple[Any, Any],
        needs: Needs,
        given: Callable[[Tensor | None], Given],
        results_t: Results | None = None,
    ) -> Primals:
        """Launches a row and a column pass, or a whole one, and the sums for a shared bias, sinks and
        slopes, as needed.

        `given` makes the views for a table of statistics. results_t: room for what jvp gives, of a pass that
        gives that too.
        """
        q, k, v, bias, sinks, slopes = self.primals
        dq = self.empty_like(q) if needs[0] else None
        dk = self.empty_like(k) if needs[1] else None
        dv = self.empty_like(v) if needs[2] else None
        dbias = None
        if needs[3] and bias is not None and self.own_entries:
            # blocks that position leaves out are never visited
            dbias = self.zeros(bias.shape, bias.dtype)
        shares = [self.empty(*q.shape[:3], dtype=torch.float32) if need else None for need in needs[4:]]
        of_rows = {"dq": dq, "dbias": dbias, "dsinks": shares[0], "dslopes": shares[1]}
        if results_t is not None:
            of_rows |= results_t._asdict()
        if self.is_whole(needs):
            self.launch(
                kernels[1], given(None), self.wanted(dk=dk, dv=dv, **of_rows), of_keys=True, whole=True
            )
        else:
            statistics = given(self.empty(STATISTICS, *q.shape[:3], dtype=torch.float32))
            self.launch(kernels[0], statistics, self.wanted(**of_rows))
            if needs[1] or needs[2]:
                self.launch(kernels[1], statistics, self.wanted(dk=dk, dv=dv), of_keys=True)
            if needs[3] and bias is not None and not self.own_entries:
                dbias = self.sum_bias(statistics, bias)
        of_heads = map(self.sum_shares, shares, (sinks, slopes))
        return Primals(dq, dk, dv, dbias, *of_heads)  # type: ignore[arg-type]

    def sum_bias(self, given: Given, bias: Tensor) -> Tensor:
        """The gradient of a bias that is broadcast in some dimension."""
        config = self.config("bias_sums")
        row_blocks, key_blocks = -(-self.n // config.rows), -(-self.m // config.keys)
        counts = (self.batch, self.heads, row_blocks, key_blocks)
        full = (self.batch, self.heads, self.n, self.m)
        summed = tuple(size != whole for size, whole in zip(bias.shape, full, strict=True))
        tiles_owned = math.prod(count for count, over in zip(counts, summed, strict=True) if not over)
        terms = math.prod(count for count, over in zip(counts, summed, strict=True) if over)
        pieces = max(1, min(terms, BIAS_PROGRAMS // max(1, tiles_owned)))
        out = self.zeros((pieces, *bias.shape), torch.float32)
        self.start(
            bias_sums,
            pieces * tiles_owned if out.numel() else 0,
            config,
            given,
            Parts(out, *out.stride()),
            self.batch,
            row_blocks,
            key_blocks,
            pieces,
            SUMMED=summed,
            TANGENT=given.lse_t is not None,
        )
        return self.make(out, functools.partial(_sum_of_parts, dtype=bias.dtype))

    def sum_shares(self, shares: Tensor | None, primal: Tensor | None) -> Tensor | None:
        """The gradient of sinks or slopes from each row's share, None where it is not wanted."""
        if shares is None or primal is None:
            return None
        out = self.zeros(primal.shape, torch.float32)
        batches = self.batch if primal.shape[0] != self.batch else 1
        launch = Launch(share_sums, out.numel(), {"STEP": 256})
        self.add(launch, self.call, self.rows(shares), out, batches)
        return self.make(out, functools.partial(_rounded, dtype=primal.dtype))

    # The four maps.

    def forward(self) -> Results:
        results = self.empty_results(lse=(2,))
        self.launch(forward_rows, self.given(), self.wanted(**results._asdict()))
        return results

    def vjp(self, results: Results, do: Tensor | None, dlse: Tensor | None, needs: Needs) -> Primals:
        given = functools.partial(self.given, results=results, do=do, dlse=dlse)
        return self.gradients((vjp_rows, vjp_keys), needs, given)

    def jvp(self, results: Results, tangents: Primals) -> Results:
        results_t = self.empty_results()
        given = self.given(results=results, tangents=tangents)
        self.launch(jvp_rows, given, self.wanted(**results_t._asdict()))
        return results_t

    def vjp_jvp(
        self,
        results: Results,
        do: Tensor | None,
        dlse: Tensor | None,
        tangents: Primals,
        results_t: Results,
        needs: Needs,
    ) -> Primals:
        given = functools.partial(
            self.given, results=results, do=do, dlse=dlse, tangents=tangents, results_t=results_t
        )
        return self.gradients((vjp_jvp_rows, vjp_jvp_keys), needs, given)

    def double_backward(
        self,
        results: Results,
        do: Tensor | None,
        dlse: Tensor | None,
        tangents: Primals,
        needs: Needs,
        dq: Tensor | None,
    ) -> tuple[Results, Primals]:
        given = functools.partial(self.given, results=results, do=do, dlse=dlse, tangents=tangents)
        if self.is_whole(needs):
            results_t = self.empty_results()
            return results_t, self.gradients((vjp_jvp_rows, vjp_jvp_keys), needs, given, results_t)
        if dq is not None and do is not None and self.reuses_dq(needs):
            results_t = self.empty_results()
            given = functools.partial(given, results_t=results_t, dq=dq)
            return results_t, self.gradients((double_rows, vjp_jvp_keys), needs, given, results_t)
        results_t = self.jvp(results, tangents)
        return results_t, self.vjp_jvp(results, do, dlse, tangents, results_t, needs)


def _sum_of_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    return parts.sum(0).to(dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype, copy=True)


@functools.lru_cache(maxsize=PLANS)
def plan_of(
    map_: str, here: Setting, problem: Problem, needs: Needs | None, of: tuple[Like | None, ...]
) -> Plan:
    """The plan of a map's call: on the tensors of its layout, and dq after them."""
    *tensors, dq = stand_ins = [stand_in(each) for each in of]
    layout = MAPS[map_]
    given = layout.split(tensors)
    planner = Planner(here, problem, given.primals, given.constants)
    found = getattr(planner, map_)(
        *layout.spread(given, needs)[2:], *([dq] if map_ == "double_backward" else [])
    )
    flat = (*found[0], *found[1]) if map_ == "double_backward" else tuple(found)
    return Plan(stand_ins, planner.rooms, planner.launches, planner.made, flat)


@functools.lru_cache(maxsize=PLANS)
def reuses_dq(here: Setting, problem: Problem, needs: Needs, of: tuple[Like | None, ...]) -> bool:
    """Planner.reuses_dq of a call whose primals and constants are given."""
    given = FORWARD.split([stand_in(each) for each in of])
    return Planner(here, problem, given.primals, given.constants).reuses_dq(needs)
