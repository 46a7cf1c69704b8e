"""Makes docs/scenarios.md of the results kept beside this file: `python examples/scenarios/results.py`."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import FORMS, Row, figure_of

HERE = Path(__file__).resolve().parent
KEPT = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "scenarios.md"
HEAD = """# Scenarios

Tasks learned with attention, differentiated twice where that is called for, with published figures beside
ours where there are any. Each is one command in a checkout, with the Python in which `make build`
(`.venv/bin/python`) or `pip install ".[demo,transformers]"` put what they need. It shows
a live bar; Ctrl-C ends the training early. `--full` is as large as the source, where there is one with
figures; `--tiny` takes seconds; `--seed` and `--out` are what they say. What a command writes, a JSON file
and a picture, is kept in `examples/scenarios/results`. This page is made of them by
`python examples/scenarios/results.py`.

Figures are means ± half a 95 % confidence interval. Seconds are those of two virtual cores whose processor
others used at the same time.
"""


def kept(folder: Path = KEPT) -> list[dict[str, Any]]:
    """The results on file, by scenario, the longest form first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return sorted(found, key=lambda one: (one["scenario"], -FORMS.index(one["form"])))


def first_line(name: str) -> str:
    """Of a scenario's own description."""
    module = ast.parse((HERE / f"{name}.py").read_text())
    return (ast.get_docstring(module) or "").partition("\n")[0]


def page(folder: Path = KEPT) -> str:
    parts = [HEAD]
    seen: set[str] = set()
    for results in kept(folder):
        name, form = results["scenario"], results["form"]
        if name not in seen:
            parts.append(f"## {name}\n\n{first_line(name)}\n")
            seen.add(name)
        option = "" if form == "short" else f" --{form}"
        versions = results["machine"]["versions"]
        parts.append(
            f"`python examples/scenarios/{name}.py{option}`: "
            f"{results['seconds']:.0f} s on {results['threads']} "
            f"thread{'' if results['threads'] == 1 else 's'} "
            f"({results['processor_seconds']:.0f} s of processors), torch {versions['torch']}, "
            f"seed {results['seed']}. {results['protocol']}\n"
        )
        if results["differs"]:
            parts.append(f"Unlike the source: {results['differs']}\n")
        rows = [Row(**entry) for entry in results["rows"]]
        common_of = rows[0].of if all(row.of == rows[0].of for row in rows) else None
        lines = [
            f"| {'' if common_of is None else common_of} | ours | published | source |",
            "| --- | ---: | ---: | --- |",
        ]
        for row in rows:
            of = f" ({row.of})" if row.of and common_of is None else ""
            lines.append(f"| {row.quantity}{of} | {figure_of(row)} | {row.published or '–'} | {row.source} |")
        parts.append("\n".join(lines) + "\n")
        parts.append(f"![{name}, {form} form](../examples/scenarios/results/{name}-{form}.png)\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
