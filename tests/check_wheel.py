"""Installs each wheel of a folder under several Pythons, beside several torch versions, and tries it there.

    python tests/check_wheel.py [--torch 2.10 2.13] [--python python3.10 /opt/bin/python3.12] [--wheels dist]

The same file must serve all: each torch under the Python that runs this, the last torch that is named under
each other Python. Unless --python says otherwise, those are the versions in pyproject.toml's classifiers,
looked for as python3.10 and so on. Prints a line for each check, and ends with 1 if one failed. A Python that
is not here is printed as unchecked. torch comes from the package index that pip is set up with: its CUDA
builds are gigabytes.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Run with METATTN_ISA=baseline, and the way that metattn.host should take; "hide" takes the other from it.
SMOKE = """
import sys
if "hide" in sys.argv:
    sys.modules["metattn._host"] = None
import torch, metattn
from metattn import host
assert host.isa() == "baseline", host.isa()
way = "pybind11" if sys.modules.get("metattn._host") else "ctypes"
assert way == sys.argv[1], way
info, usable, features = host.build_info(), host.usable_isas(), host.cpu_features()
assert set(usable) <= set(info["isas"]), (usable, info)
assert "avx2" not in usable or "avx2" in features, features
q = torch.randn(1, 2, 70, 16, requires_grad=True)
def second(backend):
    o = metattn.attention(q, q, q, causal=True, backend=backend)
    (g,) = torch.autograd.grad(o.sin().sum(), q, create_graph=True)
    return torch.autograd.grad(g.square().sum(), q)[0]
right = second("reference")
for isa in reversed(usable):
    host.set_isa(isa)
    error = float((second("cpu") - right).norm() / right.norm())
    assert host.isa() == isa and error < 1e-5, (isa, error)

class Attention(torch.nn.Module):
    def forward(self, q):
        return metattn.attention(q, q, q, causal=True, backend="cpu")
exported = torch.export.export(Attention(), (q.detach(),)).module()
(g,) = torch.autograd.grad(exported(q).sin().sum(), q, create_graph=True)
assert (torch.autograd.grad(g.square().sum(), q)[0] - right).norm() < 1e-5 * right.norm()
torch.compile(Attention(), backend="aot_eager", fullgraph=True)(q).sin().sum().backward()
assert (q.grad - g).norm() < 1e-5 * g.norm()
f = lambda x: metattn.attention(x, x, x, backend="cpu").sin().sum()
x = q[:, :, :3, :2].detach()
hessian = torch.func.hessian(f)(x)
assert (hessian - torch.func.jacrev(torch.func.jacrev(f))(x)).norm() < 1e-5 * hessian.norm()
from metattn.backends import cuda as backend
cuda = metattn.available_backends()["cuda"] or "available"
if backend.LIBRARY.exists() and torch.version.cuda is not None:
    torch.ops.load_library(backend.LIBRARY)  # every symbol is there, whether or not a GPU is
    cuda += ", its library loads"
print(f"torch {torch.__version__}, error {error:.0e}, built for CUDA {info['cuda']}, cuda: {cuda}")
"""
VERSION = "import ensurepip, platform; print(platform.python_version())"  # ensurepip: what venv needs


def run(
    *command: str | Path, folder: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["said nothing"])[-1]


def version_of(python: str) -> tuple[str | None, str]:
    """An interpreter's version, as 3.12.1, or None and why it cannot be had."""
    try:
        done = run(python, "-c", VERSION)
    except OSError as error:
        return None, f"{python}: {error.strerror}"
    if done.returncode != 0:
        return None, f"{python}: {(done.stderr.strip().splitlines() or ['said nothing'])[0]}"
    return done.stdout.strip(), ""


def classified() -> list[str]:
    """The commands of the Pythons that pyproject.toml names."""
    versions = re.findall(
        r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()
    )
    return [f"python{version}" for version in versions]


def ways(wheel: Path, version: str) -> list[list[str]]:
    """What metattn.host has to go by under a Python, as the smoke test's arguments."""
    module = f"metattn/_host.cpython-{''.join(version.split('.')[:2])}-"
    if any(name.startswith(module) for name in zipfile.ZipFile(wheel).namelist()):
        return [["pybind11"], ["ctypes", "hide"]]
    return [["ctypes"]]


def check(wheels: list[Path], python: str, version: str, torch: str) -> Iterator[tuple[str, bool, str]]:
    """Each wheel and way, whether it works, and what was said."""
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / "bin" / "python"
        wanted = f"torch=={torch}" if torch.count(".") > 1 else f"torch=={torch}.*"
        pip = (inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile")
        for step in ((python, "-m", "venv", folder), (*pip, wanted, "numpy")):
            done = run(*step)
            if done.returncode != 0:
                yield "its environment", False, last_line(done.stderr)
                return
        for wheel in wheels:
            done = run(*pip, "--no-deps", "--no-index", "--force-reinstall", wheel)
            if done.returncode != 0:
                yield wheel.name, False, last_line(done.stderr)
                continue
            for way in ways(wheel, version):
                done = run(inside, "-c", SMOKE, *way, folder=folder, METATTN_ISA="baseline")
                said = last_line(done.stderr if done.returncode else done.stdout)
                yield f"{wheel.name}, facts by {way[0]}", done.returncode == 0, said


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=["2.13.0"], help="versions, as 2.10 or 2.13.0")
    parser.add_argument("--python", nargs="*", default=classified(), help="commands of other Pythons")
    parser.add_argument("--wheels", type=Path, default=Path("dist"), help="their folder")
    args = parser.parse_args()
    wheels = sorted(args.wheels.resolve().glob("metattn-*.whl"))
    if not wheels:
        print(f"no wheels in {args.wheels}: make wheel", file=sys.stderr)
        return 2
    mine = platform.python_version()
    checks = [(sys.executable, mine, torch) for torch in args.torch]
    unchecked = []
    for python in args.python:
        version, why = version_of(python)
        if version is None:
            unchecked.append(why)
        elif version.split(".")[:2] != mine.split(".")[:2]:
            checks.append((python, version, args.torch[-1]))
    failed = 0
    for python, version, torch in checks:
        for what, worked, said in check(wheels, python, version, torch):
            failed += not worked
            mark = "ok" if worked else "FAILED"
            print(f"{mark:9} Python {version:7} torch {torch:6} {what}: {said}", flush=True)
    for why in unchecked:
        print(f"unchecked {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
