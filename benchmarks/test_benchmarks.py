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

from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import measure as gpu_measure
from benchmarks.gpu import peers as gpu_peers
from metattn.bench import cases, peers, rows

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

ROWS = [
    pytest.param(case, step, contestant, id=f"{case.name}-{step}-{contestant.name}")
    for case in cases.CASES
    for step in case.steps
    for contestant in peers.contestants(case)
    if step in contestant.steps
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
def prepared(case: cases.Case) -> rows.Prepared:
    return rows.prepare(case, peers.contestants(case))


@pytest.mark.parametrize(("case", "step", "contestant"), ROWS)
def test_step(case: cases.Case, step: str, contestant: peers.Contestant, benchmark: BenchmarkFixture) -> None:
    run, _, complaint = prepared(case).checked(contestant, step)
    assert complaint is None
    benchmark.group = f"{case.name}: {step}"
    benchmark.extra_info["operations"] = (case.full() if contestant.full else case).operations(step)
    benchmark(run)


@functools.lru_cache(maxsize=1)
def prepared_for_gpu(case: cases.Case) -> gpu_measure.Prepared:
    return gpu_measure.prepare(case, GPU)


@pytest.mark.parametrize(("case", "step", "contestant"), GPU_ROWS)
def test_step_on_gpu(
    case: cases.Case, step: str, contestant: peers.Contestant, benchmark: BenchmarkFixture
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
