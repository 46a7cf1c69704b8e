"""One measurement: `python -m benchmarks.compiled_meta_once` reads a request, and answers, in JSON."""

from __future__ import annotations

import json
import sys

from benchmarks.compiled_meta import measure


def main() -> None:
    print(json.dumps(measure(**json.load(sys.stdin))))


if __name__ == "__main__":
    main()
