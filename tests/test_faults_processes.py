"""Known ways in which attention kernels fail (docs/faults.md): threads, processes, broken installations."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from faults import DEVICES, both_orders, in_interpreter, qkv, randn, seeds_for
from torch import Tensor

import metattn
from metattn import backends
from metattn.cli import doctor
from metattn.problem import Options, Primals, dense


def test_a_thousand_repeats_are_bit_equal(backend: str, request: pytest.FixtureRequest) -> None:
    """Each map by itself, on two threads, with sums over heads, rows and blocks."""
    shapes = ((1, 2, 70, 8), (1, 1, 67, 8), (1, 1, 67, 8), (70, 67), (2,), (2,))
    q, k, v, bias, sinks, slopes = (
        randn(*shape, seed=i).to(DEVICES[backend], torch.float32) for i, shape in enumerate(shapes)
    )
    options = Options(
        bias=bias, sinks=sinks, alibi_slopes=slopes, causal="bottom-right", dropout_p=0.1, dropout_seed=1
    )
    problem, primals, constants = dense(q, k, v, options)
    problem, module = problem.on(backend), backends.load(backend)
    needs, tangents = (True,) * 6, Primals(*(t.cos() for t in primals if t is not None))
    torch.set_num_threads(2 if backend == "cpu" else 1)
    first: tuple[Tensor, ...] = ()
    repeats = 3 if in_interpreter(backend) else 1000
    if backend == "cuda" and emulation.installed() and not request.config.getoption("--exhaustive"):
        repeats = 50
    for repeat in range(repeats):
        out = module.forward(problem, primals, constants)
        given = (problem, primals, constants, out)
        cotangents = out.o, out.lse[..., 1]
        gradients = module.vjp(*given, *cotangents, needs)
        out_t = module.jvp(*given, tangents)
        second = module.vjp_jvp(*given, *cotangents, tangents, out_t, needs)
        results = (*out[:2], *gradients, *out_t[:2], *second)
        first = first or results
        for index, (found, expected) in enumerate(zip(results, first, strict=True)):
            assert torch.equal(found, expected), f"result {index} of repeat {repeat}"


def run_python(code: str, timeout: int = 300, **environment: str) -> str:
    """What the code prints in a process of its own, where "cuda" is emulated if it is here."""
    emulate = "import emulation\nif emulation.installed():\n    emulation.install()\n"
    path = f"{Path(metattn.__file__).parents[1]}{os.pathsep}{Path(__file__).parent}"
    result = subprocess.run(
        [sys.executable, "-c", emulate + textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout.strip()


SECOND_ORDER = """
    import torch, metattn
    torch.manual_seed(0)
    leaves = [torch.randn(2, 3, 33, 17) for _ in range(3)]
    def second_order(**options):
        q, k, v = (t.clone().requires_grad_() for t in leaves)
        o = metattn.attention(q, k, v, causal=True, **options)
        first = torch.autograd.grad(o.square().sum(), (q, k, v), create_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), (q, k, v))
        return [t.detach() for t in (o, *first, *second)]
    def same(found, expected):
        return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
"""


def test_heap_checked_by_the_c_library(backend: str) -> None:
    """Every block that a kernel allocates has guard bytes behind it, looked at when it is freed."""
    library = next(Path("/").glob("lib/*/libc_malloc_debug.so.0"), None)
    if backend == "triton" or DEVICES[backend] != "cpu" or library is None:
        pytest.skip("needs CPU tensors and glibc's libc_malloc_debug")
    code = (
        SECOND_ORDER
        + f"""
    for shape in ((1, 1, 1, 1), (1, 3, 31, 5), (2, 1, 33, 17), (1, 2, 129, 59)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            leaves = [torch.randn(shape, dtype=dtype) for _ in range(3)]
            second_order(backend="{backend}", bias=torch.randn(shape[2], shape[2]))
    print("intact")
    """
    )
    tunables = {"LD_PRELOAD": str(library), "GLIBC_TUNABLES": "glibc.malloc.check=3:glibc.malloc.perturb=165"}
    assert run_python(code, **tunables) == "intact"


def test_after_fork(backend: str) -> None:
    if DEVICES[backend] != "cpu":
        pytest.skip("CUDA cannot be used after a fork")
    code = (
        SECOND_ORDER
        + f"""
    import os
    # torch's own products hang in a child of a process that ran them on several threads
    torch.set_num_threads({1 if backend == "reference" else 2})
    expected = second_order(backend="{backend}")
    child = os.fork()
    if not child:
        os._exit(0 if same(second_order(backend="{backend}"), expected) else 1)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), same(second_order(backend="{backend}"), expected))
    """
    )
    assert run_python(code) == "0 True"


def test_eight_threads_on_a_cold_cache(backend: str) -> None:
    if backend == "triton":
        pytest.skip("it computes in float32, this test's process in float64")
    code = (
        SECOND_ORDER
        + f"""
    import threading
    leaves = [t.to("{DEVICES[backend]}") for t in leaves]
    start, results = threading.Barrier(8), [None] * 8
    def work(index):
        start.wait()
        results[index] = second_order(backend="{backend}")
    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    expected = second_order(backend="{backend}")
    print(all(result is not None and same(result, expected) for result in results))
    """
    )
    assert run_python(code) == "True"


def test_in_a_dataloader_worker(backend: str) -> None:
    if DEVICES[backend] != "cpu":
        pytest.skip("CUDA cannot be used after a fork")
    code = (
        SECOND_ORDER
        + f"""
    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 4
        def __getitem__(self, index):
            return second_order(backend="{backend}")
    expected = second_order(backend="{backend}")
    loader = torch.utils.data.DataLoader(Data(), num_workers=2, batch_size=None)
    print(all(same(item, expected) for item in loader))
    """
    )
    assert run_python(code) == "True"


def test_one_thread_gives_the_same_bits(backend: str) -> None:
    leaves = {
        name: t.to(DEVICES[backend], torch.float32)
        for name, t in qkv(batch=1, heads=1, n=300, m=290, d=16).items()
    }
    call = partial(metattn.attention, return_lse=True, backend=backend)
    o, lse = (t.detach() for t in call(**leaves))
    seeds, before, results = seeds_for(leaves, o, lse), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(both_orders(call, leaves, seeds))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, t in other.items():
            if backend == "reference":  # torch's own products are not bit-equal for every number of threads
                torch.testing.assert_close(t, results[0][name])
            else:
                assert torch.equal(t, results[0][name]), name


def test_threads_in_one_process(backend: str) -> None:
    one_head = {"batch": 1, "heads": 1} if in_interpreter(backend) else {}
    leaves = {name: t.to(DEVICES[backend], torch.float32) for name, t in qkv(n=65, m=67, **one_head).items()}
    call = partial(metattn.attention, causal=True, return_lse=True, backend=backend)
    o, lse = (t.detach() for t in call(**leaves))
    seeds = seeds_for(leaves, o, lse)
    expected = both_orders(call, leaves, seeds)
    failures: list[str] = []

    def work() -> None:
        for _ in range(1 if in_interpreter(backend) else 5):
            try:
                found = both_orders(call, leaves, seeds)
            except Exception as error:  # a thread's is nobody's
                failures.append(repr(error))
                raise
            failures.extend(name for name, t in found.items() if not torch.equal(t, expected[name]))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


class TestBrokenExtension:
    """A library that is missing, corrupt or made for another torch is a reason to read, not a crash."""

    FAILURES = {
        "missing": "was not built",
        "corrupt": "cannot be loaded into torch",
        "other-torch": "undefined symbol: aoti_torch_of_tomorrow",
    }

    @pytest.fixture(params=FAILURES)
    def reason(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
        native = backends.load("cpu")
        library = tmp_path / "libmetattn_cpu.so"
        if request.param != "missing":
            library.write_bytes(b"\x7fELF" + bytes(64))
        if request.param == "other-torch":

            def load_library(path: Any) -> None:
                raise OSError(f"{path}: undefined symbol: aoti_torch_of_tomorrow")

            monkeypatch.setattr(torch.ops, "load_library", load_library)
        monkeypatch.setattr(native, "LIBRARY", library)
        monkeypatch.setattr(native, "unavailable_reason", native.unavailable_reason.__wrapped__)
        monkeypatch.delitem(backends._reasons, "cpu", raising=False)
        expected: str = self.FAILURES[request.param]
        return expected

    def test_automatic_choice_goes_on(self, reason: str) -> None:
        leaves = [t.float() for t in qkv().values()]
        explanation = metattn.explain(*leaves)
        assert explanation.backend == "reference"
        assert reason in explanation.reasons["cpu"]
        assert metattn.attention(*leaves).isfinite().all()

    def test_named_backend_says_why(self, reason: str) -> None:
        leaves = [t.float() for t in qkv().values()]
        with pytest.raises(NotImplementedError, match=f"'cpu' was asked for by name.*{reason}"):
            metattn.attention(*leaves, backend="cpu")

    def test_doctor_says_why(self, reason: str) -> None:
        report = doctor.text(doctor.examine())
        assert reason in report


def test_without_the_extension_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "metattn.backends.cpu", None)
    monkeypatch.delitem(backends._loaded, "cpu", raising=False)
    monkeypatch.delitem(backends._reasons, "cpu", raising=False)
    reason = metattn.available_backends()["cpu"]
    assert reason is not None
    assert "metattn.backends.cpu" in reason


def test_memory_is_poisoned_during_the_suite(backend: str) -> None:
    assert torch.empty(1000, device=DEVICES[backend]).isnan().all()
    leaves = {
        name: t.to(DEVICES[backend], torch.float32).requires_grad_()
        for name, t in qkv(n=33, m=35, d=17).items()
    }
    o, lse = metattn.attention(**leaves, return_lse=True, backend=backend)
    first = torch.autograd.grad((o.sum(), lse.sum()), list(leaves.values()), create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), list(leaves.values()))
    assert all(t.isfinite().all() for t in (o, lse, *first, *second))
