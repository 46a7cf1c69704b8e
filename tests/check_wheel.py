"""Installs each wheel of a folder beside each of several torch versions, and runs a smoke test there.

    python tests/check_wheel.py [--torch 2.10 2.13] [--wheels dist]

The same file must serve all of them. Prints a line for each pair, and ends with 1 if one failed. torch comes
from the package index that pip is set up with: its CUDA builds are gigabytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

SMOKE = """
import torch, metattn
q = torch.randn(1, 2, 70, 16, requires_grad=True)
def second(backend):
    o = metattn.attention(q, q, q, causal=True, backend=backend)
    (g,) = torch.autograd.grad(o.sin().sum(), q, create_graph=True)
    return torch.autograd.grad(g.square().sum(), q)[0]
found, right = second("cpu"), second("reference")
error = float((found - right).norm() / right.norm())
assert error < 1e-5, error

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
from metattn import _host
from metattn.backends import cuda as backend
cuda = metattn.available_backends()["cuda"] or "available"
if backend.LIBRARY.exists() and torch.version.cuda is not None:
    torch.ops.load_library(backend.LIBRARY)  # every symbol is there, whether or not a GPU is
    cuda += ", its library loads"
print(f"torch {torch.__version__}, CUDA {_host.build_info()['cuda']}, error {error:.1e}, cuda: {cuda}")
"""


def run(*command: str | Path, folder: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], cwd=folder, capture_output=True, text=True, check=False
    )


def check(wheels: list[Path], version: str) -> Iterator[tuple[Path, bool, str]]:
    """Each wheel, whether it works beside a torch version, and what was said."""
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "bin" / "python"
        wanted = f"torch=={version}" if version.count(".") > 1 else f"torch=={version}.*"
        pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        for step in ((sys.executable, "-m", "venv", folder), (*pip, wanted, "numpy")):
            done = run(*step)
            if done.returncode != 0:
                for wheel in wheels:
                    yield wheel, False, last_line(done.stderr)
                return
        for wheel in wheels:
            done = run(*pip, "--no-deps", "--no-index", "--force-reinstall", wheel)
            if done.returncode == 0:
                done = run(python, "-c", SMOKE, folder=folder)
            yield wheel, done.returncode == 0, last_line(done.stderr if done.returncode else done.stdout)


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["said nothing"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch", nargs="+", default=["2.13.0"], help="versions, as 2.10 or 2.13.0")
    parser.add_argument("--wheels", type=Path, default=Path("dist"), help="their folder")
    args = parser.parse_args()
    wheels = sorted(args.wheels.resolve().glob("metattn-*.whl"))
    if not wheels:
        print(f"no wheels in {args.wheels}: make wheel", file=sys.stderr)
        return 2
    failed = 0
    for version in args.torch:
        for wheel, worked, said in check(wheels, version):
            failed += not worked
            print(f"{'ok' if worked else 'FAILED'}  torch {version}  {wheel.name}: {said}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
