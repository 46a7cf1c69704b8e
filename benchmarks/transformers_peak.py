"""One memory measurement for benchmarks.transformers_models: reads a request, and answers, in JSON."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import torch

from benchmarks.transformers_models import LARGE, make, make_inputs, step
from metattn import measure


def main() -> None:
    """What one second-order step needs beyond weights and inputs."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    name, attention = request["model"], request["attention"]
    size = replace(LARGE, length=request["length"])
    model, inputs = make(name, size), make_inputs(name, size, batch=1)
    # threads, code and small buffers exist afterwards
    step(model, make_inputs(name, replace(size, length=32), batch=1), attention)()
    print(json.dumps({"bytes": measure.peak_memory(step(model, inputs, attention))}))


if __name__ == "__main__":
    main()
