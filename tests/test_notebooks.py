"""The notebooks as they are kept: small, without outputs. `make docs` runs them, and fails where they do."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))
PACKAGES = {"matplotlib", "metattn", "numpy", "torch"}
WIDTH = 93  # characters of code that the site shows without scrolling


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture
def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return found


def sources(cells: list[dict[str, Any]], kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


def test_no_outputs_are_kept(cells: list[dict[str, Any]]) -> None:
    for cell in cells:
        assert not cell.get("outputs"), cell["id"]
        assert cell.get("execution_count") is None, cell["id"]


def test_no_machine_is_named(path: Path) -> None:
    """Jupyter saves the version of Python and the name of the environment, which are its user's."""
    assert json.loads(path.read_text())["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def test_small(path: Path, cells: list[dict[str, Any]]) -> None:
    assert len(cells) <= 15
    assert path.stat().st_size <= 16 * 1024
    lines = [line for source in sources(cells, "code") for line in source.splitlines()]
    assert max(map(len, lines)) <= WIDTH


def test_imports_are_torch_the_package_and_matplotlib(cells: list[dict[str, Any]]) -> None:
    for node in ast.walk(ast.parse("\n".join(sources(cells, "code")))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            top = name.partition(".")[0]
            assert top in PACKAGES or top in sys.stdlib_module_names, name
            assert top != "metattn" or name in ("metattn", "metattn.meta", "metattn.nn"), name  # public


def test_links_lead_somewhere(path: Path, cells: list[dict[str, Any]]) -> None:
    for source in sources(cells, "markdown"):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", source):
            assert "://" in target or (path.parent / target).exists(), target


def test_every_notebook_is_in_the_menu(path: Path) -> None:
    assert f"\ndocs/notebooks/{path.stem}\n" in (ROOT / "docs/site/index.md").read_text()
