"""The README and the documents: examples run, links lead somewhere, figures are the measured ones."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import training_steps
from metattn.bench import report

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
# What is deprecated is an error, but for a class of torch's that torch.export and Lightning still use.
WARNINGS = (
    *("-W", "error::FutureWarning"),
    *("-W", "ignore:`isinstance(treespec, LeafSpec)` is deprecated:FutureWarning"),
)
BLOCKS = {
    document: re.findall(r"^```python\n(.*?)^```", document.read_text(), re.M | re.S)
    for document in DOCUMENTS
}


@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if BLOCKS[d]], ids=lambda path: str(path.relative_to(ROOT))
)
def test_examples_run(document: Path, tmp_path: Path) -> None:
    """A page's blocks in order, as one program: their own asserts check what the page claims."""
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *WARNINGS, "-c", "\n".join(BLOCKS[document])],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_forces_example_learns() -> None:
    example = [sys.executable, str(ROOT / "examples/forces.py"), "--steps", "40"]
    done = subprocess.run(example, capture_output=True, text=True, check=True)
    before, after = map(float, re.findall(r"\d+\.\d+", done.stdout))
    assert after < before / 2


def test_readme_example_is_ten_lines() -> None:
    assert len(BLOCKS[ROOT / "README.md"][0].splitlines()) <= 10


def test_maml_recipe_is_twenty_lines() -> None:
    recipe = BLOCKS[ROOT / "docs/recipes/maml.md"][0]
    assert len([line for line in recipe.splitlines() if line]) <= 20


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_figures_are_those_of_the_committed_results() -> None:
    page, results = ROOT / "docs/benchmark.md", ROOT / "benchmarks/results/cpu/bench.json"
    between = page.read_text().partition(report.BLOCK[0] + "\n")[2].partition(report.BLOCK[1])[0]
    assert between == report.block(json.loads(results.read_text()), page, results.parent)


def test_readmes_steps_are_those_of_the_committed_results() -> None:
    begin, end = training_steps.MARKS
    between = (ROOT / "README.md").read_text().partition(begin + "\n")[2].partition(end)[0]
    results = json.loads((ROOT / "benchmarks/results/training-steps/training_steps.json").read_text())
    assert between == f"\n{training_steps.markdown(results)}\n"


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700


def test_scenarios_page_is_made_of_the_committed_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    results = importlib.import_module("results")
    assert (ROOT / "docs/scenarios.md").read_text() == results.page()
    scenarios = {one["scenario"] for one in results.kept()}
    assert scenarios == {
        path.stem.removeprefix("test_scenario_") for path in (ROOT / "tests").glob("test_scenario_*.py")
    }


def test_training_loop_prints_its_line_and_learns() -> None:
    options = ["--epochs", "12", "--every", "4", "--sets", "64"]
    example = [sys.executable, str(ROOT / "examples/training_loop.py"), *options]
    done = subprocess.run(example, capture_output=True, text=True, check=True)
    lines = re.findall(
        r"^Epoch (\d+): Train Loss = (\d+\.\d{4}), Val Loss = (\d+\.\d{4})$", done.stdout, re.MULTILINE
    )
    assert [int(line[0]) for line in lines] == 2 * [0, 4, 8, 11]
    assert float(lines[7][1]) < 0.95 * float(lines[4][1])  # AttentionMetaLearner's, the last and the first
