"""Where a measurement's results go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from metattn.bench.files import json_text
from metattn.bench.report import rewrite


def publish(
    results: dict[str, Any],
    table: str,
    folder: Path,
    name: str,
    page: Path | None = None,
    marks: tuple[str, str] = ("", ""),
) -> None:
    """Writes NAME.json and NAME.md, the table, which is printed, and what lies between a page's marks."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json_text(results))
    (folder / f"{name}.md").write_text(table)
    if page is not None:
        rewrite(page, marks, f"\n{table}\n")
    print(table)
