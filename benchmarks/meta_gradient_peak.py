"""One memory measurement: `python -m benchmarks.meta_gradient_peak` reads a request, and answers, in JSON."""

from __future__ import annotations

import json
import sys

import torch

from benchmarks.meta_gradient import PEER, Task
from metattn.measure import peak_memory


def main() -> None:
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    task = Task(ours=request["way"] != PEER)
    task.step(request["way"], 1)()  # threads, code and small buffers exist afterwards
    print(json.dumps({"bytes": peak_memory(task.step(request["way"], request["steps"]))}))


if __name__ == "__main__":
    main()
