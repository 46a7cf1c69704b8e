"""One memory measurement: `python -m benchmarks.training_steps_peak` reads a request, answers in JSON."""

from __future__ import annotations

import json
import sys

from benchmarks.training_steps import step_of
from metattn.measure import peak_memory


def main() -> None:
    request = json.load(sys.stdin)
    step_of(**request, length=64)()  # threads, code and small buffers exist afterwards
    print(json.dumps({"bytes": peak_memory(step_of(**request))}))


if __name__ == "__main__":
    main()
