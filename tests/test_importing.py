"""Importing metattn is quick, starts no process and needs nothing but torch."""

from __future__ import annotations

import importlib.metadata
import re
import sys

from test_packaging import ROOT, installed, run


def test_import_is_quick() -> None:
    """Under 0.3 s after torch's own import; the best of three, for other processes may hold the processor."""
    code = "import torch, time; t = time.perf_counter(); import metattn; print(time.perf_counter() - t)"
    best = min(float(run(sys.executable, "-c", code, cwd=ROOT).stdout) for _ in range(3))
    assert best < 0.3


# Every installed distribution is hidden but torch and what torch requires; started processes are noted.
ALONE = """
import importlib.abc, sys
hidden = set(sys.argv[1].split(","))
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(f"{name} is hidden", name=name)
sys.meta_path.insert(0, Hide())
import torch
started = []
starts = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
sys.addaudithook(lambda event, arguments: started.append(event) if event in starts else None)
before = set(sys.modules)
import metattn
assert not started, started
assert not [name for name in sys.modules if name.partition(".")[0] in ("triton", "numpy")]
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new <= {"metattn", "torch"}, new
import metattn.meta, metattn.nn
for backend, reason in metattn.available_backends().items():
    if reason is None:
        q = torch.randn(1, 2, 5, 4, requires_grad=True)
        o = metattn.attention(q, q, q, backend=backend)
        (g,) = torch.autograd.grad(o.sin().sum(), q, create_graph=True)
        g.sum().backward()
assert not started, started
from metattn.cli import main
assert main(["doctor"]) in (0, 1)
code = main(["bench", "--quick"])
assert code == 1, code
"""


def test_works_with_nothing_but_torch() -> None:
    needed, queue = {"torch"}, ["torch"]
    while queue:
        for requirement in importlib.metadata.requires(queue.pop()) or ():
            found = re.match(r"[\w.-]+", requirement)
            assert found is not None
            name = found[0].lower().replace("_", "-")
            if "extra ==" not in requirement and name not in needed and installed(name):
                needed.add(name)
                queue.append(name)
    hidden = [
        top
        for top, distributions in importlib.metadata.packages_distributions().items()
        if not {name.lower().replace("_", "-") for name in distributions} & {*needed, "metattn"}
    ]
    assert {"numpy", "rich"} <= set(hidden)
    done = run(sys.executable, "-c", ALONE, ",".join(hidden), cwd=ROOT)
    assert "bench needs rich: pip install matplotlib rich" in done.stderr
