"""One memory measurement: `python -m metattn.bench.peak` reads a request, and answers, in JSON."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import torch

from metattn.bench.answers import errors, make_inputs
from metattn.bench.cases import Case
from metattn.bench.peers import contestant
from metattn.measure import available_memory, peak_memory


def limit_memory(more: int) -> None:
    """Lets this process grow by `more` bytes: past them an allocation fails and nothing is killed."""
    import resource

    with open("/proc/self/statm") as handle:
        now = int(handle.read().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))


def measure(case: Case, name: str, step: str, answer_path: str | None) -> dict[str, object]:
    """Peak bytes of the step with all its inputs counted, its seconds, and its errors."""
    small = replace(case, n=64)
    # threads, code and small buffers exist afterwards
    contestant(small, name).start(step, make_inputs(small))()
    available = available_memory()
    if available is not None and sys.platform == "linux":
        limit_memory(int(0.9 * available))

    kept: list[tuple[torch.Tensor, ...]] = []
    answer: dict[str, object] = {}

    def whole() -> None:
        run_step = contestant(case, name).start(step, make_inputs(case))
        start = time.perf_counter()
        kept.append(run_step())
        answer["seconds"] = time.perf_counter() - start

    try:
        peak = peak_memory(whole)
    except RuntimeError as error:  # torch's allocator says so; anything else is a fault of the step
        if "alloc" not in str(error) and "memory" not in str(error):
            raise
        return {"bytes": None, "does_not_fit_in": int(0.9 * (available or 0))}
    answer["bytes"] = peak
    if answer_path is not None:
        answer["errors"] = errors(case, step, kept[0], torch.load(answer_path))
    return answer


def main() -> None:
    request = json.load(sys.stdin)
    case = Case.of(request["case"])
    torch.set_num_threads(request["threads"])
    print(json.dumps(measure(case, request["contestant"], request["step"], request["answer"])))


if __name__ == "__main__":
    main()
