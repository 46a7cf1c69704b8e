"""The cases of `metattn bench`, and with a GPU those of `make gpu`, under pytest-benchmark.

    python -m pytest benchmarks --benchmark-group-by=group --benchmark-autosave

For its statistics and for comparing saved runs. `-k` chooses, for instance `-k "few-shot and second-order"`.
Outputs are checked against float64 first.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import gpu_cases, gpu_measure, gpu_peers
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
GPU = torch.device("cuda")
GPU_ROWS = [
    pytest.param(case, step, contestant, id=f"{case.name}-{step}-{contestant.name}")
    for case in (gpu_cases.CASES if torch.cuda.is_available() else ())
    if not case.memory
    for step in case.steps
    for contestant in gpu_measure.with_graphs(gpu_peers.contestants(case), GPU)
    if step in contestant.steps
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


@functools.lru_cache(maxsize=1)
def prepared_for_gpu(case: gpu_cases.Case) -> gpu_measure.Prepared:
    return gpu_measure.prepare(case, GPU)


@pytest.mark.parametrize(("case", "step", "contestant"), GPU_ROWS)
def test_step_on_gpu(
    case: gpu_cases.Case, step: str, contestant: gpu_peers.Contestant, benchmark: BenchmarkFixture
) -> None:
    """Each call waits for the GPU: the host's clock sees all of it, launches too."""
    row: gpu_measure.Row = {}
    run = gpu_measure.checked(contestant, case, step, prepared_for_gpu(case), row)
    if "cannot" in row:
        pytest.skip(row["cannot"])
    assert run is not None, row["wrong"]
    benchmark.group = f"{case.name}: {step}"
    benchmark.extra_info["operations"] = case.operations(step)

    def call() -> None:
        run()
        torch.cuda.synchronize()

    benchmark(call)
