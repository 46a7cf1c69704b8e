"""The CUDA kernels, on a GPU or emulated on the CPU: every option in all four maps.

The emulation runs the sources that nvcc compiles, but for tensor cores and shuffles; a thread stands for a
warp, and shared memory starts as NaN.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import emulation
import pytest
import torch
from four_maps import (
    LENGTHS,
    LONG,
    ODD,
    OPTIONS,
    SHARED,
    SHORT,
    SHORT_LENGTHS,
    TOLERANCE,
    Call,
    Moved,
    assert_close,
    four_maps,
)

import metattn
from metattn.backends import available_backends, cuda, reference

if available_backends()["cuda"] is not None:
    pytest.skip(f"backend cuda: {available_backends()['cuda']}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
emulated = pytest.mark.skipif(not emulation.installed(), reason="it is about the emulation")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


ON_DEVICE = Moved(cuda, "cpu" if emulation.installed() else "cuda")


def check(call: Call, terms: int = 1) -> None:
    """terms: how many of size 1 are summed to what may be 0."""
    relative = TOLERANCE[call.dtype]
    found, exact = four_maps(ON_DEVICE, call), four_maps(reference, call, wide=True)
    assert_close(found, exact, relative, relative * 0.1 * terms**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", OPTIONS)
def test_four_maps(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Call(sizes, dtype, **OPTIONS[name]))


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(name: str, dtype: torch.dtype) -> None:
    check(Call(ODD[name], dtype))


def test_no_features() -> None:
    check(Call((1, 2, 1, 20, 40, 0, 0), torch.float32, **OPTIONS["bias"]))


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_tile(name: str, width: int, dtype: torch.dtype) -> None:
    """Not in float32: at these widths the calls' scores are so large that its own rounding shows."""
    check(Call((1, 2, 1, 70, 75, width, width), dtype, **OPTIONS[name]))


@pytest.mark.parametrize("has", SHARED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_shared_bias(has: tuple[int, ...], dtype: torch.dtype) -> None:
    check(Call((2, 2, 1, 20, 40, 4, 4), dtype, bias=has), terms=2 * 2 * 20 * 40)


@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LENGTHS], ids=["short", "long"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_packed(name: str, lengths: tuple[tuple[int, int], ...]) -> None:
    check(Call(SHORT, torch.float32, lengths=lengths, **OPTIONS[name]))


@pytest.fixture
def shared_memory(request: pytest.FixtureRequest) -> Iterator[int]:
    emulation.library().metattn_emulate_shared_memory(request.param)
    yield request.param
    emulation.library().metattn_emulate_shared_memory(emulation.SHARED_MEMORY)


@emulated
@pytest.mark.parametrize("shared_memory", [64 * 1024], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [64, 128])
def test_smaller_blocks(width: int, dtype: torch.dtype, shared_memory: int) -> None:
    """As compute capability 7.5 has it: fewer warps a block, smaller tiles."""
    check(Call((1, 2, 1, 70, 75, width, width), dtype, **OPTIONS["bottom-right"]))


@pytest.fixture
def before_80() -> Iterator[None]:
    emulation.library().metattn_emulate_from_80(0)
    yield
    emulation.library().metattn_emulate_from_80(1)


@emulated
@pytest.mark.usefixtures("before_80")
@pytest.mark.parametrize("shared_memory", [64 * 1024], indirect=True)
@pytest.mark.parametrize("width", [32, 128, 200])
def test_bfloat16_without_tensor_cores(width: int, shared_memory: int) -> None:
    """One shape of tile serves every call, without options too."""
    check(Call((1, 2, 1, 70, 75, width, width), torch.bfloat16))


@emulated
@pytest.mark.parametrize("shared_memory", [64 * 1024], indirect=True)
def test_what_does_not_fit_is_refused(shared_memory: int) -> None:
    expected = r"does not fit the shared memory of this GPU \(d = 256, dv = 256, torch.float32\)"
    reason = cuda.too_large(torch.float32, 256, 256, shared_memory)
    assert reason is not None
    assert reason.endswith(expected.replace("\\", ""))
    assert cuda.too_large(torch.bfloat16, 256, 256, shared_memory) is None
    with pytest.raises(RuntimeError, match="does not fit the shared memory"):
        four_maps(ON_DEVICE, Call((1, 1, 1, 3, 4, 256, 256)))


@emulated
def test_refuses_by_name() -> None:
    q = torch.zeros(1, 1, 2, 512)
    with pytest.raises(NotImplementedError, match=r"'cuda' was asked for by name.*does not fit"):
        metattn.attention(q, q, q, backend="cuda")


def test_reruns_give_the_same_bits() -> None:
    call = Call(LONG, torch.bfloat16, **OPTIONS["everything"])
    first, second = (four_maps(ON_DEVICE, call) for _ in range(2))
    for name, x in first.items():
        y = second[name]
        assert x is not None
        assert y is not None
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), name


def test_a_library_that_cannot_be_loaded(tmp_path: Path) -> None:
    """Made for another machine, or another torch: a reason to read, and the package goes on without it."""
    library = tmp_path / "libmetattn_cuda.so"
    library.write_bytes(b"\x7fELF" + bytes(64))
    script = f"""
import pathlib, torch, metattn
from metattn.backends import cuda
cuda.LIBRARY = pathlib.Path({str(library)!r})
torch.version.cuda, torch.cuda.is_available = "13.0", lambda: True
print(metattn.available_backends()["cuda"])
q = torch.ones(1, 1, 2, 2)
print(metattn.attention(q, q, q).shape)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    reason, shape = done.stdout.splitlines()
    assert reason.startswith(f"libmetattn_cuda.so cannot be loaded into torch {torch.__version__}")
    assert shape == "torch.Size([1, 1, 2, 2])"
