"""The cases of `metattn bench` under pytest-benchmark, for its statistics and for comparing saved runs.

    python -m pytest benchmarks --benchmark-group-by=group --benchmark-autosave

`-k` chooses, for instance `-k "few-shot and second-order"`. Outputs are checked against float64 first.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest

from metattn.cli import _cases, bench

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture
    from torch import Tensor

ROWS = [
    pytest.param(case, step, contestant, id=f"{case.name}-{step}-{contestant.name}")
    for case in _cases.CASES
    for step in case.steps
    for contestant in _cases.contestants()
    if contestant.can(case, step)
]


@functools.lru_cache(maxsize=1)  # rows of a case follow each other
def prepared(case: _cases.Case) -> tuple[_cases.Inputs, dict[str, Tensor], dict[str | None, float]]:
    inputs = _cases.make_inputs(case)
    answer = _cases.exact(case, inputs)
    math = next(contestant for contestant in _cases.contestants() if contestant.name == _cases.MATH)
    whole = _cases.make_step(math, case, "second-order step", inputs)()
    allowed = bench.allowed_errors(case, _cases.errors(case, "second-order step", whole, answer))
    return inputs, answer, allowed


@pytest.mark.parametrize(("case", "step", "contestant"), ROWS)
def test_step(
    case: _cases.Case, step: str, contestant: _cases.Contestant, benchmark: BenchmarkFixture
) -> None:
    inputs, answer, allowed = prepared(case)
    run = _cases.make_step(contestant, case, step, inputs)
    assert bench.complaint(_cases.errors(case, step, run(), answer), allowed) is None
    benchmark.group = f"{case.name}: {step}"
    benchmark.extra_info["operations"] = case.operations(step)
    benchmark(run)
