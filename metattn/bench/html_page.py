"""bench's results as one HTML file that needs nothing beside it: its pictures are inside."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from metattn.bench import goals, pictures, tables
from metattn.bench.cases import PRODUCTS

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 80rem;
  padding: 0 1rem }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; margin: 1rem 0 }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
th { background: #f4f4f4; white-space: normal; vertical-align: bottom }
th.left, td.left { text-align: left }
td.long { white-space: normal; text-align: left }
td.bad { color: #a11; font-weight: 600 }
td.good { color: #176b2c; font-weight: 600 }
img { max-width: 100% }
pre { background: #f4f4f4; padding: 1rem; overflow-x: auto; font-size: 12px }
"""


def page(results: tables.Results, folder: Path) -> str:
    """The whole file; the pictures are read from where they were drawn."""
    steps = tuple(PRODUCTS)
    parts = [_heading("Goals"), table(goals.table(results), 3)]
    for name, title in pictures.TITLES.items():
        parts += [_heading(title), picture(folder / name, title)]
    if results["rows"]:
        parts += [_heading("Ratios"), table(tables.ratio_table(results, steps), 2)]
        parts += [_heading("Times"), table(tables.timing_table(results, steps), 2)]
    if results["memory"]:
        parts += [_heading("Memory"), table(tables.memory_table(results), 1)]
    wrong = tables.wrong(results)
    if wrong:
        parts += [_heading("Wrong or failed"), *(f"<p>{html.escape(said)}</p>" for said in wrong)]
    parts.append(_heading("How it was measured"))
    parts += [f"<p>{html.escape(said)}</p>" for said in tables.notes(results)]
    parts.append(f"<pre>{html.escape(json.dumps(results['machine'], indent=1))}</pre>")
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>metattn bench</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<h1>metattn bench</h1>\n{body}\n</body>\n</html>\n"
    )


def _heading(title: str) -> str:
    return f"<h2>{html.escape(title)}</h2>"


def picture(path: Path, title: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'


def table(content: tables.Table, left: int) -> str:
    header, lines = content
    cells = [_cell("th", said, index < left) for index, said in enumerate(header)]
    rows = ["".join(cells)]
    rows += ["".join(_cell("td", said, index < left) for index, said in enumerate(line)) for line in lines]
    return "<table>\n" + "\n".join(f"<tr>{row}</tr>" for row in rows) + "\n</table>"


def _cell(tag: str, said: str, left: bool) -> str:
    kinds = {"wrong": "bad", "not reached": "bad", "reached": "good"}
    classes = [*(["left"] if left else []), *(["long"] if len(said) > 70 else [])]
    classes += [kinds[said]] if said in kinds else []
    return f'<{tag} class="{" ".join(classes)}">{html.escape(said)}</{tag}>'
