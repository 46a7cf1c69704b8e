"""The compiled CPU operators at the edges: large scores, dead rows, masks and sizes nobody would ask for."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from four_maps import OF_QKV, MapCall, Outputs, assert_close
from torch import Tensor

from metattn.backends import cpu, reference
from metattn.problem import Primals, Problem, Results

if cpu.unavailable_reason() is not None:
    pytest.skip(f"backend cpu: {cpu.unavailable_reason()}", allow_module_level=True)


@pytest.mark.parametrize("offset", [1e4, 3e38])
def test_probabilities_keep_their_digits_where_scores_are_large(offset: float) -> None:
    """P = exp(S − L): a float32 L near 1e4 would leave P right to three digits, near 3e38 to none."""
    call = MapCall((1, 1, 1, 5, 70, 8, 8), dtype=torch.float32, bias=(0, 0, 0, 0))
    problem, primals, _, constants, do, _ = call.make()
    primals = primals._replace(bias=torch.full_like(primals.bias, -offset))
    needs = OF_QKV
    found, exact = [], []
    for backend, results, cast in ((cpu, found, Tensor.float), (reference, exact, Tensor.double)):
        p = Primals(*(None if t is None else cast(t) for t in primals))
        if offset > 1e30:  # what float32 scores of that size are: all equal
            p = p._replace(q=torch.zeros_like(p.q))
        o, lse = backend.forward(problem, p, constants)[:2]
        results += [o, *backend.vjp(problem, p, constants, Results(o, lse), cast(do), None, needs)[:3]]
    for mine, right in zip(found, exact, strict=True):
        assert (mine.double() - right).norm() <= 1e-3 * right.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "levels", [(-1e9, -2e9), (-2e9, -4e9), (-1e10, -3.4028234663852886e38), (-1e4, -2e9)], ids=str
)
def test_finite_masks_of_several_levels(levels: tuple[float, float], dtype: torch.dtype) -> None:
    """A row whose scores are all far below zero still prefers the highest, in both orders."""
    call = MapCall((1, 2, 2, 3, 70, 8, 8), dtype=dtype, bias=(0, 0, 1, 1))
    problem, primals, tangents, constants, do, _ = call.make()
    bias = torch.full_like(primals.bias, levels[1])
    bias[0, 0, 0, :2] = bias[0, 0, 1, 5:] = levels[0]
    primals = primals._replace(bias=bias)
    needs = (True, True, True, True, False, False)

    def both_orders(backend: Any) -> list[Tensor | None]:
        results = backend.forward(problem, primals, constants)
        moved = backend.jvp(problem, primals, constants, results, tangents)
        first = backend.vjp(problem, primals, constants, results, do, None, needs)
        second = backend.vjp_jvp(problem, primals, constants, results, do, None, tangents, moved, needs)
        return [results.o, moved.o, *first[:3], *second[:3]]

    for mine, right in zip(both_orders(cpu), both_orders(reference), strict=True):
        assert (mine - right).norm() <= 2e-5 * right.norm()


def test_empty_blocks_are_skipped() -> None:
    """A narrow window of a long sequence costs a small part of the whole: measured 1/16, 1/4 is asked."""

    def seconds(window: tuple[int, int]) -> float:
        problem, primals, _, constants, do, _ = MapCall(
            (1, 1, 1, 6000, 6000, 64, 64), dtype=torch.float32, window=window
        ).make()
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            o, lse = cpu.forward(problem, primals, constants)[:2]
            cpu.vjp(
                problem,
                primals,
                constants,
                Results(o, lse),
                do,
                None,
                OF_QKV,
            )
            best = min(best, time.process_time() - start)
        return best

    torch.set_num_threads(1)  # waiting threads spin
    assert seconds((64, 0)) < seconds((-1, -1)) / 4


def test_a_dead_row_with_a_sink_leaks_nothing() -> None:
    """Its log-sum-exp is finite, so NaN in its query, cotangent or tangent must be found out by the mask."""
    call = MapCall((1, 2, 1, 4, 5, 4, 4), sinks=True, mask=(0, 0, 1, 1))
    problem, primals, tangents, constants, do, _ = call.make()
    constants.mask[:, :, 1] = False
    needs = (True, True, True, False, True, False)

    def both_orders() -> Outputs:
        results = cpu.forward(problem, primals, constants)
        moved = cpu.jvp(problem, primals, constants, results, tangents)
        first = cpu.vjp(problem, primals, constants, results, do, None, needs)
        second = cpu.vjp_jvp(problem, primals, constants, results, do, None, tangents, moved, needs)
        named = {**results._asdict(), **{f"d{k}": x for k, x in first._asdict().items()}}
        return {**named, "ot": moved.o, **{f"d{k}t": x for k, x in second._asdict().items()}}

    clean = both_orders()
    primals.q[:, :, 1] = do[:, :, 1] = tangents.q[:, :, 1] = torch.nan
    assert_close(both_orders(), clean, 1e-14)


def test_a_tangent_under_a_mask_is_nobodys_business() -> None:
    call = MapCall((1, 2, 1, 4, 5, 4, 4), bias=(0, 0, 1, 1))
    problem, primals, tangents, constants, do, _ = call.make()
    primals.bias[..., 2] = -torch.inf
    results = cpu.forward(problem, primals, constants)
    outputs = []
    for value in (1.0, torch.inf, torch.nan):
        tangents.bias[..., 2] = value
        moved = cpu.jvp(problem, primals, constants, results, tangents)
        needs = (True, True, True, True, False, False)
        second = cpu.vjp_jvp(problem, primals, constants, results, do, None, tangents, moved, needs)
        outputs.append({"ot": moved.o, "lt": moved.lse, **second._asdict()})
    for other in outputs[1:]:
        assert_close(other, outputs[0], 1e-14)


def test_an_output_beyond_float16_leaves_finite_gradients() -> None:
    call = MapCall((1, 2, 2, 8, 8, 8, 4), dtype=torch.float16, dropout_p=0.5)
    problem, primals, _, constants, do, _ = call.make()
    primals = primals._replace(v=torch.full_like(primals.v, 5e4))
    needs = OF_QKV
    results = cpu.forward(problem, primals, constants)
    assert torch.isinf(results.o).any()
    found = cpu.vjp(problem, primals, constants, results, do * 1e-4, None, needs)
    right = reference.vjp(problem, primals, constants, results, do * 1e-4, None, needs)
    for mine, exact in zip(found[:3], right[:3], strict=True):
        assert (mine - exact).norm() <= 2e-2 * exact.norm()


def test_a_generous_bound_of_packed_lengths_costs_nothing() -> None:
    call = MapCall(lengths=((3, 4), (4, 3)))
    problem, primals, _, constants, _, _ = call.make()
    o = cpu.forward(problem, primals, constants).o
    generous = replace(problem, max_q=2**31 - 1, max_k=2**31 - 1)
    assert torch.equal(cpu.forward(generous, primals, constants).o, o)


def test_outputs_keep_the_layout_of_their_inputs() -> None:
    q = torch.randn(2, 7, 3, 8).transpose(1, 2)
    problem, _, _, constants, _, _ = MapCall().make()
    o, lse = cpu.forward(problem, Primals(q, q, q, None, None, None), constants)[:2]
    assert o.stride() == q.stride()
    needs = OF_QKV
    gradients = cpu.vjp(
        problem, Primals(q, q, q, None, None, None), constants, Results(o, lse), o, None, needs
    )
    assert all(gradient.stride() == q.stride() for gradient in gradients[:3])


def test_raw_operators_refuse_what_would_read_out_of_bounds() -> None:
    problem, primals, _, constants, _, _ = MapCall().make()
    q, k, v = primals[:3]
    wrong = {
        "k": primals._replace(k=k[..., :-1]),
        "v": primals._replace(v=v[:, :, :-1]),
        "heads": primals._replace(q=q[:, :3]),
        "bias": primals._replace(bias=torch.zeros(1, 1, 5, 5, dtype=torch.float64)),
        "dtype": primals._replace(k=k.float()),
    }
    for broken in wrong.values():
        with pytest.raises(RuntimeError, match="metattn"):
            cpu.forward(problem, broken, constants)
    o, lse = cpu.forward(problem, primals, constants)[:2]
    with pytest.raises(RuntimeError, match="lse must be float64"):
        cpu.vjp(
            problem,
            primals,
            constants,
            Results(o, lse.float()),
            o,
            None,
            OF_QKV,
        )
    cu = torch.tensor([0, 40, 35], dtype=torch.int32)
    packed = Primals(q[:1], k[:1, :, :35], v[:1, :, :35], None, None, None)
    with pytest.raises(RuntimeError, match="must not decrease"):
        cpu.forward(
            Problem(1.0, None, None, (-1, -1), 0.0, 40, 40, "cpu"),
            packed,
            constants._replace(cu_q=cu, cu_k=cu),
        )
