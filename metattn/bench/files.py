"""Results as files; what is wrong with those that a user names is said before anything is measured."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

RESULTS = ("machine", "rows", "memory")  # what a bench.json has at least


def json_text(value: Any) -> str:
    """JSON with what holds nothing nested on a line: a difference of two files shows what changed."""
    text = json.dumps(value, indent=1)
    # strings have no line breaks in JSON: these are the containers'
    innermost = r"([\[{])\n\s*([^\[\]{}]*?)\n\s*([\]}])"
    return re.sub(innermost, lambda found: found[1] + re.sub(r"\n\s*", " ", found[2]) + found[3], text) + "\n"


def results_of(option: str, path: Path) -> dict[str, Any]:
    """An earlier run's bench.json. Raises ValueError, naming option and path, for what is none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{option}: expected a bench.json, got {path}: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{option}: expected a bench.json, got {path}, which is no JSON: {error}") from error
    if not isinstance(found, dict) or not all(key in found for key in RESULTS):
        raise ValueError(f"{option}: expected a bench.json, got {path}, which has other contents")
    return found


def writable(option: str, folder: Path) -> None:
    """Makes a folder. Raises ValueError where it cannot be made, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"{option}: expected a folder to write to, got {folder}: {error.strerror}"
        ) from error


def page(option: str, path: Path) -> None:
    """Raises ValueError for what is no file to rewrite."""
    if not path.is_file():
        raise ValueError(f"{option}: expected a Markdown file, got {path}, which is none")
