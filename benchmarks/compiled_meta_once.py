"""One measurement: `python -m benchmarks.compiled_meta_once` reads a request, and answers, in JSON."""

from __future__ import annotations

import json
import sys

from benchmarks.compiled_meta import measure, peak


def main() -> None:
    request = json.load(sys.stdin)
    what = request.pop("what")
    print(json.dumps(peak(**request) if what == "peak" else {"rows": measure(**request)}))


if __name__ == "__main__":
    main()
