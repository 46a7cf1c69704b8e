"""The rows of bench: a case's steps timed for every contestant, and its memory measured."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metattn.cli._cases import TOLERANCES, Case, Inputs, errors, exact, make_inputs
from metattn.cli._contestants import CHECKPOINTED, MATH, Contestant, make_step
from metattn.cli._measure import SIZE, ChildError, Product, Timing, in_fresh_process, interleave, per_round

Advance = Callable[[float, str], None]
Row = dict[str, Any]

WHOLE = "second-order step"
LONGEST_PEER = 8192  # N to which torch's memory is measured: 3 GiB there, and four times that at the next
LONGEST_CHECKED = 8192  # N to which all outputs are compared with float64; beyond, those of a few queries
LAST = 512  # how many


def timed_rows(
    case: Case, found: list[Contestant], seconds: float, least: int, advance: Advance
) -> tuple[list[Row], list[Row]]:
    """Times every step of a case: checked against float64 first, then all contestants in turn.

    Returns the contestants' rows, and those of the matrix product that was timed among them.
    """
    advance(0.0, f"{case.name}: float64 answer")
    able = [contestant for contestant in found if any(contestant.can(case, step) for step in case.steps)]
    inputs = make_inputs(case)
    answer = exact(case, inputs)
    unmasked = exact(replace(case.full(), heads=1), inputs.first_head()) if any(c.full for c in able) else {}
    allowed = allowed_errors(case, math_errors(case, able, inputs, answer))
    rows: list[Row] = []
    products: list[Row] = []
    for step in case.steps:
        advance(1 / (len(case.steps) + 1), f"{case.name}: {step}")
        about = {"case": case.asdict(), "shape": case.shape, "options": case.options, "step": step}
        here: dict[str, Row] = {}
        right: dict[str, Callable[[], Any]] = {}
        for contestant in able:
            if not contestant.can(case, step):
                continue
            row: Row = about | {"contestant": contestant.name}
            row["operations"] = (case.full() if contestant.full else case).operations(step)
            try:
                run_step = make_step(contestant, case, step, inputs)
                outputs = contestant.tensors(run_step())
                row["errors"] = errors(case, step, outputs, unmasked if contestant.full else answer)
                row["wrong"] = complaint(row["errors"], allowed)
                del outputs
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
    if Contestant(name, frozenset()).backend is not None:
        row["ratios"] = {
            other: per_round(theirs.samples, timing.samples).summary()
            for other, theirs in timings.items()
            if other != name
        }
    return row


def math_errors(
    case: Case, able: list[Contestant], inputs: Inputs, answer: dict[str, Tensor]
) -> dict[str, float]:
    """The math path's own error in every output, where it takes part."""
    math = next((contestant for contestant in able if contestant.name == MATH), None)
    if math is None:
        return {}
    return errors(case, WHOLE, make_step(math, case, WHOLE, inputs)(), answer)


def memory_rows(case: Case, found: list[Contestant], advance: Advance) -> list[Row]:
    """Measures the peak of the second-order step, each contestant in a process of its own."""
    able = measured_for_memory(case, found)
    advance(0.0, f"memory at N={case.length}: float64 answer of one head")
    one_head = replace(case, heads=1)
    inputs = make_inputs(case)
    sizes = {
        "input_bytes": inputs.nbytes(),
        "output_bytes": inputs.output_nbytes(),
        "qkv_bytes": sum(p.nbytes for p in inputs.primals[:3]),
    }
    first = inputs.first_head()
    del inputs
    rows = []
    # the floor alone is the stricter rule, and saves a run of the math path for its own error
    allowed = allowed_errors(case, {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.pt"
        torch.save(exact(one_head, first, None if case.length <= LONGEST_CHECKED else LAST), path)
        for contestant in able:
            advance(1 / (len(able) + 1), f"memory at N={case.length}: {contestant.name}")
            about = {"case": case.asdict(), "shape": case.shape, "options": case.options, "step": WHOLE}
            row: Row = about | {"contestant": contestant.name, **sizes, "wrong": None}
            try:
                row |= in_fresh_process(
                    "metattn.cli._peak",
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
    advance(1 / (len(able) + 1), f"memory at N={case.length}")
    return rows


def measured_for_memory(case: Case, found: list[Contestant]) -> list[Contestant]:
    """The contestants of a memory case: ours, and to LONGEST_PEER torch's paths that have a second order."""
    peers = (MATH, CHECKPOINTED)
    return [
        contestant
        for contestant in found
        if (case.length <= LONGEST_PEER and contestant.name in peers)
        or (contestant.backend is not None and contestant.can(case, WHOLE))
    ]


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
