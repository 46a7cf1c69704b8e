"""`metattn doctor`: which backends work here, why the others do not, and what they were built from."""

from __future__ import annotations

import argparse
import json
import platform
import re
from typing import Any

import torch

import metattn
from metattn import backends, host, installation
from metattn.backends import cpu
from metattn.backends.triton import devices, tuned
from metattn.measure import machine

OLDEST_TORCH = (2, 10)
# Working float32 attention at the size below is off by less than 1e-6, a broken kernel by far more.
SELF_TEST_TOLERANCE = 1e-4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same in JSON")


def run(args: argparse.Namespace) -> int:
    report = examine()
    print(json.dumps(report, indent=1) if args.json else text(report))
    return 0 if report["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything doctor tells; `ok` is False when a part is broken or no fused backend works here."""
    problems = []
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        problems.append(f"torch {torch.__version__} is older than {'.'.join(map(str, OLDEST_TORCH))}")
    backends = dict(metattn.available_backends())
    self_tests = {}
    for name, reason in backends.items():
        if reason is not None:
            continue
        try:
            error = self_test(name)
        except Exception as failure:  # whatever it is, it is what the user came to read
            problems.append(f"backend {name} fails: {type(failure).__name__}: {failure}")
            continue
        self_tests[name] = error
        if not error <= SELF_TEST_TOLERANCE:
            problems.append(f"backend {name} gives wrong numbers: relative error {error:.1e}")
    hidden = [str(path) for path in installation.hidden()]
    if not any(reason is None for name, reason in backends.items() if name != "reference"):
        problems.append(
            "no fused backend works here: the reference serves, slowly and with N×M matrices in memory"
        )
        if hidden:
            problems.append(
                f"this is {installation.FOLDER}, and hides the installation in {', '.join(hidden)}: "
                "start Python in another folder, or without PYTHONPATH"
            )
    built = backends["cpu"] is None or cpu.LIBRARY.exists()
    return {
        "ok": not problems,
        "problems": problems,
        "package": str(installation.FOLDER),
        "version": metattn.__version__,
        "hidden": hidden,
        "not_built": None if built else installation.why_not_built(),
        "mend": [] if built else installation.how_to_mend(),
        "backends": backends,
        "self_test_errors": self_tests,
        "machine": machine(),
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}",
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "tiles": tiles(),
        **extension(),
    }


def self_test(backend: str) -> float:
    """Relative error of a small second-order step beside torch's math path in float64, the worst output's."""
    interpreted = backend == "triton" and devices.interpreted()
    device = "cpu" if interpreted or backend in ("reference", "cpu") else "cuda"
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 33, 16, generator=generator) for _ in range(7)]

    def second_order(dtype: torch.dtype, backend: str | None) -> tuple[torch.Tensor, ...]:
        q, k, v, do = (t.to(device, dtype).requires_grad_() for t in drawn[:4])
        seeds = [t.to(device, dtype) for t in drawn[4:]]
        if backend is None:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            o = scores.softmax(dim=-1) @ v
        else:
            o = metattn.attention(q, k, v, backend=backend)
        first = torch.autograd.grad(o, (q, k, v), do, create_graph=True)
        second = torch.autograd.grad(first, (q, k, v, do), seeds)
        return o.detach(), *(gradient.detach() for gradient in first), *second

    exact = second_order(torch.float64, None)
    found = second_order(torch.float32, backend)
    return max(
        float((mine.double() - right).norm() / right.norm()) for mine, right in zip(found, exact, strict=True)
    )


def tiles() -> dict[str, Any]:
    """How many tuned tiles the Triton backend uses here, from which file, and why none are."""
    if backends.unavailable_reason("triton") is not None:
        return {"tuned": 0, "file": None, "reason": "backend triton is unavailable"}
    table = tuned.table(devices.gpu(devices.device_at_hand()))
    return {"tuned": len(table.tiles), "file": table.path and str(table.path), "reason": table.reason}


def extension() -> dict[str, Any]:
    """What the extension tells about itself and the processor, or why it does not."""
    try:
        return {"build": host.build_info(), "isa": host.isa(), "cpu_features": host.cpu_features()}
    except RuntimeError as error:
        return {"build": None, "build_missing": str(error), "isa": None, "cpu_features": None}


def text(report: dict[str, Any]) -> str:
    """The report for a person."""
    about = report["machine"]
    lines = ["package", f"  version      {report['version']}", f"  folder       {report['package']}"]
    lines += [f"  hides        {path}" for path in report["hidden"]]
    lines.append("backends")
    for name, reason in report["backends"].items():
        if reason is not None:
            lines.append(f"  {name:12} no   {reason}")
        elif name in report["self_test_errors"]:
            lines.append(f"  {name:12} yes  second order right to {report['self_test_errors'][name]:.0e}")
        else:
            lines.append(f"  {name:12} fails, see below")
    lines.append("versions")
    lines += [f"  {name:12} {version or 'not installed'}" for name, version in about["versions"].items()]
    lines.append("machine")
    lines.append(f"  cpu          {about['cpu']}, {about['cores']} cores, {about['threads']} threads in use")
    lines.append(f"  gpu          {report['cuda'] or 'none that torch can use'}")
    tiles = report["tiles"]
    found = f"{tiles['tuned']} tuned ones, from {tiles['file']}"
    lines.append(f"  tiles        {'shipped: ' + tiles['reason'] if tiles['reason'] else found}")
    if report["not_built"]:
        lines += ["extension", f"  not built: {report['not_built']}"]
        lines += [f"  to have it: {step}" for step in report["mend"]]
    elif report["build"] is None:
        lines.append(f"extension\n  {report['build_missing']}")
    else:
        lines.append(f"  features     {', '.join(report['cpu_features']) or 'none beyond the baseline'}")
        lines.append(f"  code used    {report['isa']}")
        lines.append("extension")
        lines += [
            f"  {name:12} {', '.join(value) if isinstance(value, list) else value}"
            for name, value in report["build"].items()
        ]
    lines += [f"problem: {problem}" for problem in report["problems"]] or ["all is well"]
    return "\n".join(lines)
