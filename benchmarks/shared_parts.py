"""Errors where keys, values, queries, cotangents or tangents have a large part in common, in low precision.

    python -m benchmarks.shared_parts [--isa amx] [--before RESULTS.json] [--page docs/math.md]

Every row of a tensor [heads, rows, features] of standard normal numbers gains the same direction, so many
standard deviations long. Everything is rounded once to the dtype; the truth is the plain formula's in
float64. Beside ours stand torch's math path and the plain formula in that dtype. `--before` takes the first
from another build's results. Writes a JSON file and a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from benchmarks.publish import publish
from metattn import host
from metattn.bench.report import rewrite
from metattn.measure import machine

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

HEADS, ROWS, FEATURES = 4, 192, 64
OFFSETS = (1, 3, 10, 30)
SHARED = {
    "keys": "k",
    "values": "v",
    "queries": "q",
    "cotangents": "do",
    "keys' tangents": "tk",
    "values' tangents": "tv",
}
GRADIENTS = ("dq", "dk", "dv", "d2q", "d2k", "d2v", "d2do")
MARKS = ("<!-- shared:begin (written by `python -m benchmarks.shared_parts`) -->", "<!-- shared:end -->")


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * FEATURES**-0.5).softmax(-1) @ v


def math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return metattn.attention(q, k, v)


CONTESTANTS: dict[str, Attention] = {"ours": ours, "torch math": math, "plain formula": plain}


def drawn(shared: str, offset: float, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = {name: normal(1, HEADS, ROWS, FEATURES) for name in ("q", "k", "v", "do", "tq", "tk", "tv")}
    direction = normal(FEATURES)
    x[shared] += offset * direction / direction.square().mean().sqrt()
    return {name: y.to(dtype) for name, y in x.items()}


def gradients(attend: Attention, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of ⟨do, o⟩, and of ⟨those, tangents⟩ in the inputs and do."""
    inputs = [x[name].clone().requires_grad_() for name in ("q", "k", "v", "do")]
    first = torch.autograd.grad(attend(*inputs[:3]), inputs[:3], inputs[3], create_graph=True)
    second = torch.autograd.grad(first, inputs, [x["tq"], x["tk"], x["tv"]])
    return dict(zip(GRADIENTS, (y.detach() for y in (*first, *second)), strict=True))


def measure(dtype: torch.dtype) -> list[dict[str, Any]]:
    rows = []
    for what, name in SHARED.items():
        for offset in (0, *OFFSETS) if what == "keys" else OFFSETS:
            x = drawn(name, offset, dtype)
            truth = gradients(plain, {key: y.double() for key, y in x.items()})
            errors = {}
            for contestant, attend in CONTESTANTS.items():
                found = gradients(attend, x)
                errors[contestant] = {
                    key: float((found[key].double() - y).norm() / y.norm()) for key, y in truth.items()
                }
            rows.append({"shared": what if offset else "nothing", "offset": offset, "errors": errors})
    return rows


def markdown(results: dict[str, Any], before: dict[str, Any] | None, offsets: Sequence[int]) -> str:
    names = list(CONTESTANTS)
    heads = " | ".join(GRADIENTS)
    lines = [f"| shared | deviations | whose error, in 10⁻³ | {heads} |", f"|---|---:|---|{'---:|' * 7}"]
    earlier = {(row["shared"], row["offset"]): row for row in before["rows"]} if before else {}
    for row in results["rows"]:
        if row["offset"] not in offsets:
            continue
        errors = {"ours": row["errors"]["ours"]}
        if before:
            errors = {"before": earlier[row["shared"], row["offset"]]["errors"]["ours"], **errors}
        errors |= {name: row["errors"][name] for name in names[1:]}
        for name, by_gradient in errors.items():
            cells = " | ".join(f"{1e3 * by_gradient[key]:.1f}" for key in GRADIENTS)
            first = name == next(iter(errors))
            what = f"{row['shared']} | {row['offset'] or '–'}" if first else " | "
            lines.append(f"| {what} | {name} | {cells} |")
    what = results["machine"]
    lines += [
        "",
        f"`{results['isa']}`, {results['dtype']}, {HEADS} heads, {ROWS} queries and keys of {FEATURES}",
    ]
    lines[-1] += f" features; torch {what['versions']['torch']}, commit {what['commit']}."
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--isa", default=host.isa(), choices=host.usable_isas())
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/shared-parts"))
    parser.add_argument("--name", default="shared_parts", help="of the files")
    parser.add_argument("--before", type=Path, help="an earlier build's JSON file, for its errors of ours")
    parser.add_argument(
        "--page", type=Path, help="a Markdown file whose table, of the largest offsets, is rewritten"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    host.set_isa(args.isa)
    rows = measure(getattr(torch, args.dtype))
    results = {"machine": machine(), "isa": args.isa, "dtype": args.dtype, "rows": rows}
    before = json.loads(args.before.read_text()) if args.before else None
    publish(results, markdown(results, before, (0, *OFFSETS)), args.out, args.name)
    if args.page is not None:
        rewrite(args.page, MARKS, f"\n{markdown(results, before, (0, OFFSETS[-1]))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
