"""The rows of bench: a case's steps timed for every contestant, and its memory measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from metattn.bench.answers import TOLERANCES, Inputs, Outputs, errors, exact, make_inputs
from metattn.bench.cases import WHOLE, Case
from metattn.bench.peers import CHECKPOINTED, MATH, Contestant, backend_of, contestants
from metattn.measure import SIZE, ChildError, Product, Timing, in_fresh_process, interleave, per_round

Advance = Callable[[float, str], None]
Row = dict[str, Any]

LONGEST_PEER = 8192  # N to which torch's memory is measured: 6 GiB there, and four times that at the next
LONGEST_CHECKED = 8192  # N to which all outputs are compared with float64; beyond, those of a few queries
LAST = 512  # how many


@dataclass(frozen=True)
class Prepared:
    """A case with its inputs, and what its outputs are held against."""

    case: Case
    inputs: Inputs
    answer: Outputs
    unmasked: Outputs  # of the first head without the mask, where somebody leaves it away
    allowed: dict[str | None, float]

    def checked(
        self, contestant: Contestant, step: str
    ) -> tuple[Callable[[], Any], dict[str, float], str | None]:
        """The contestant's step, warm, the errors of its outputs, and what is wrong with them."""
        run_step = contestant.start(step, self.inputs)
        answer = self.unmasked if contestant.full else self.answer
        found = errors(self.case, step, contestant.tensors(run_step()), answer)
        return run_step, found, complaint(found, self.allowed)


def prepare(case: Case, found: list[Contestant]) -> Prepared:
    inputs = make_inputs(case)
    answer, unmasked = exact(case, inputs), {}
    if any(contestant.full for contestant in found):
        unmasked = exact(replace(case.full(), heads=1), inputs.first_head())
    math = next((contestant for contestant in found if contestant.name == MATH), None)
    its_errors = {}
    if math is not None:
        its_errors = errors(case, WHOLE, math.start(WHOLE, inputs)(), answer)
    return Prepared(case, inputs, answer, unmasked, allowed_errors(case, its_errors))


def timed_rows(
    case: Case, found: list[Contestant], seconds: float, least: int, advance: Advance
) -> tuple[list[Row], list[Row]]:
    """Times every step of a case: checked against float64 first, then all contestants in turn.

    Returns the contestants' rows, and those of the matrix product that was timed among them.
    """
    advance(0.0, f"{case.name}: float64 answer")
    prepared = prepare(case, found)
    rows: list[Row] = []
    products: list[Row] = []
    for step in case.steps:
        advance(1 / (len(case.steps) + 1), f"{case.name}: {step}")
        about = {"case": case.asdict(), "shape": case.shape, "options": case.options, "step": step}
        here: dict[str, Row] = {}
        right: dict[str, Callable[[], Any]] = {}
        for contestant in found:
            if step not in contestant.steps:
                continue
            row: Row = about | {"contestant": contestant.name}
            row["operations"] = (case.full() if contestant.full else case).operations(step)
            try:
                run_step, row["errors"], row["wrong"] = prepared.checked(contestant, step)
            except Exception as error:
                if contestant.backend is not None:
                    raise
                # another's compiler may fail in many ways: the rest is measured all the same
                row["wrong"] = f"failed: {type(error).__name__}: {error}".splitlines()[0][:200]
            here[contestant.name] = row
            if row["wrong"] is None:
                right[contestant.name] = run_step
        product = Product(case.torch_dtype)
        # the check has warmed everybody up
        timings = interleave(right, seconds=seconds, least=least, warmup=0, each_round=product)
        for name, timing in timings.items():
            here[name] |= figures(name, timing, timings, here[name]["operations"], product)
        rows += here.values()
        products.append(about | {"size": SIZE, "samples": product.samples})
    advance(1 / (len(case.steps) + 1), case.name)
    return rows, products


def figures(
    name: str, timing: Timing, timings: dict[str, Timing], operations: float, product: Product
) -> Row:
    """What a row says of its time; ours also how many times as long every other took, in the same rounds."""
    row: Row = timing.summary() | {
        "gflops": operations / timing.median * 1e-9,
        "share_of_product": per_round([operations / t for t in timing.samples], product.rates).summary(),
        "samples": timing.samples,
    }
    if backend_of(name) is not None:
        row["ratios"] = {
            other: per_round(theirs.samples, timing.samples).summary()
            for other, theirs in timings.items()
            if other != name
        }
    return row


def memory_rows(case: Case, advance: Advance) -> list[Row]:
    """Measures the peak of the second-order step, each contestant in a process of its own."""
    able = measured_for_memory(case)
    advance(0.0, f"memory at N={case.n}: float64 answer of one head")
    one_head = replace(case, heads=1)
    inputs = make_inputs(case)
    sizes = {"input_bytes": inputs.nbytes(), "output_bytes": inputs.output_nbytes()}
    first = inputs.first_head()
    del inputs
    rows = []
    # the floor alone is the stricter rule, and saves a run of the math path for its own error
    allowed = allowed_errors(case, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.pt"
        torch.save(exact(one_head, first, None if case.n <= LONGEST_CHECKED else LAST), path)
        for contestant in able:
            advance(1 / (len(able) + 1), f"memory at N={case.n}: {contestant.name}")
            about = {"case": case.asdict(), "shape": case.shape, "options": case.options, "step": WHOLE}
            row: Row = about | {"contestant": contestant.name, **sizes, "wrong": None}
            try:
                row |= in_fresh_process(
                    "metattn.bench.peak",
                    {
                        "case": case.asdict(),
                        "contestant": contestant.name,
                        "step": WHOLE,
                        "threads": torch.get_num_threads(),
                        "answer": str(path),
                    },
                )
            except ChildError as error:
                row |= {"bytes": None, "wrong": str(error)}
            if "errors" in row:
                row["wrong"] = complaint(row["errors"], allowed)
            rows.append(row)
    advance(1 / (len(able) + 1), f"memory at N={case.n}")
    return rows


def measured_for_memory(case: Case) -> list[Contestant]:
    """The contestants of a memory case: ours, and to LONGEST_PEER torch's paths that have a second order."""
    ours = [contestant for contestant in contestants(case) if contestant.backend is not None]
    found = contestants(case, patient=True) if case.n <= LONGEST_PEER else []
    return ours + [contestant for contestant in found if contestant.name in (MATH, CHECKPOINTED)]


def allowed_errors(case: Case, math: dict[str, float]) -> dict[str | None, float]:
    """What each output may be off by: a factor times the math path's own error, or the floor (key None)."""
    factor, floor = TOLERANCES[case.torch_dtype]
    return {None: floor, **{name: max(factor * error, floor) for name, error in math.items()}}


def complaint(found: dict[str, float], allowed: dict[str | None, float]) -> str | None:
    """The worst output past its tolerance, None where all are within (a NaN is not)."""
    past = {name: error for name, error in found.items() if not error <= allowed.get(name, allowed[None])}
    if not past:
        return None
    name = max(past, key=lambda key: past[key] / allowed.get(key, allowed[None]))
    return f"{name} is off by {past[name]:.1e}, allowed {allowed.get(name, allowed[None]):.1e}"
