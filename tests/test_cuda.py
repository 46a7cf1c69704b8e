"""The CUDA kernels, on a GPU or emulated on the CPU: every option in all four maps.

The emulation runs the sources that nvcc compiles, but for tensor cores and shuffles; a thread stands for a
warp, and shared memory starts as NaN.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from four_maps import (
    LENGTHS,
    LONG,
    MAP_OPTIONS,
    ODD,
    SHARED,
    SHORT,
    SHORT_LENGTHS,
    TOLERANCE,
    MapCall,
    Moved,
    Outputs,
    assert_close,
    four_maps,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

import metattn
from metattn.backends import available_backends, cuda, reference
from metattn.problem import Constants, Primals, Problem

if available_backends()["cuda"] is not None:
    pytest.skip(f"backend cuda: {available_backends()['cuda']}", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
emulated = pytest.mark.skipif(not emulation.installed(), reason="it is about the emulation")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


ON_DEVICE = Moved(cuda, "cpu" if emulation.installed() else "cuda")


def check(call: MapCall, terms: int = 1) -> None:
    """terms: how many of size 1 are summed to what may be 0."""
    relative = TOLERANCE[call.dtype]
    found, exact = four_maps(ON_DEVICE, call), four_maps(reference, call, wide=True)
    assert_close(found, exact, relative, relative * 0.1 * terms**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", MAP_OPTIONS)
def test_four_maps(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check(MapCall(sizes, dtype, **MAP_OPTIONS[name]))


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_odd_sizes(name: str, dtype: torch.dtype) -> None:
    check(MapCall(ODD[name], dtype))


def test_no_features() -> None:
    check(MapCall((1, 2, 1, 20, 40, 0, 0), torch.float32, **MAP_OPTIONS["bias"]))


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_tile(name: str, width: int, dtype: torch.dtype) -> None:
    """Not in float32: at these widths the calls' scores are so large that its own rounding shows."""
    check(MapCall((1, 2, 1, 70, 75, width, width), dtype, **MAP_OPTIONS[name]))


@pytest.mark.parametrize("has", SHARED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_shared_bias(has: tuple[int, ...], dtype: torch.dtype) -> None:
    check(MapCall((2, 2, 1, 20, 40, 4, 4), dtype, bias=has), terms=2 * 2 * 20 * 40)


@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LENGTHS], ids=["short", "long"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_packed(name: str, lengths: tuple[tuple[int, int], ...]) -> None:
    check(MapCall(SHORT, torch.float32, lengths=lengths, **MAP_OPTIONS[name]))


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
    check(MapCall((1, 2, 1, 70, 75, width, width), dtype, **MAP_OPTIONS["bottom-right"]))


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
    check(MapCall((1, 2, 1, 70, 75, width, width), torch.bfloat16))


@emulated
@pytest.mark.parametrize("shared_memory", [64 * 1024], indirect=True)
def test_what_does_not_fit_is_refused(shared_memory: int) -> None:
    expected = r"does not fit the shared memory of this GPU \(d = 256, dv = 256, torch.float32\)"
    reason = cuda.too_large(torch.float32, 256, 256, shared_memory)
    assert reason is not None
    assert reason.endswith(expected.replace("\\", ""))
    assert cuda.too_large(torch.bfloat16, 256, 256, shared_memory) is None
    with pytest.raises(RuntimeError, match="does not fit the shared memory"):
        four_maps(ON_DEVICE, MapCall((1, 1, 1, 3, 4, 256, 256)))


@emulated
def test_refuses_by_name() -> None:
    q = torch.zeros(1, 1, 2, 512)
    with pytest.raises(NotImplementedError, match=r"'cuda' was asked for by name.*does not fit"):
        metattn.attention(q, q, q, backend="cuda")


def assert_same_bits(first: Outputs, second: Outputs) -> None:
    for name, x in first.items():
        y = second[name]
        assert (x is None) == (y is None), name
        assert x is None or y is None or torch.equal(x.nan_to_num(), y.nan_to_num()), name


def test_reruns_give_the_same_bits() -> None:
    call = MapCall(LONG, torch.bfloat16, **MAP_OPTIONS["everything"])
    assert_same_bits(four_maps(ON_DEVICE, call), four_maps(ON_DEVICE, call))


# Products in TF32, where torch allows them.

FULL = 5e-6  # what results in full float32 may be off by, relative
TF32 = 2e-3  # and in TF32, at least: metattn.tuning lets two results of TF32 lie twice that apart
UNEVEN = (1, 2, 1, 71, 131, 13, 20)
in_tf32 = pytest.mark.skipif(
    not emulation.installed() and torch.cuda.get_device_capability() < (8, 0),
    reason="TF32 is there from compute capability 8.0 on",
)


@contextmanager
def precision(name: str) -> Iterator[None]:
    """torch's setting for float32 products."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = name
    try:
        yield
    finally:
        matmul.fp32_precision = before


def to_tf32(x: Tensor) -> Tensor:
    """Rounded to ten bits behind the point, of two the larger magnitude."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).to(x.dtype)


class RoundedProducts(TorchFunctionMode):
    """Operands of products are rounded to TF32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.matmul:
            args = tuple(map(to_tf32, args))
        return func(*args, **(kwargs or {}))


def relative_errors(found: Outputs, exact: Outputs) -> dict[str, float]:
    """‖found − exact‖ / ‖exact‖ of each output that is not 0; what is −inf must be so in both."""
    errors = {}
    for name, right in exact.items():
        mine = found[name]
        assert (mine is None) == (right is None), name
        if mine is None or right is None:
            continue
        assert torch.equal(torch.isneginf(mine), torch.isneginf(right)), name
        dead = torch.isneginf(right)
        size = float(right.double().masked_fill(dead, 0.0).norm())
        error = float((mine.double() - right.double()).masked_fill(dead, 0.0).norm())
        assert size or not error, name
        if size:
            errors[name] = error / size
    return errors


def check_tf32(call: MapCall) -> None:
    """No further off than 1.5 times what rounding the same products' operands costs the formulas."""
    exact = four_maps(reference, call, wide=True)
    with RoundedProducts():
        rounded = relative_errors(four_maps(reference, call, wide=True), exact)
    with precision("tf32"):
        found = relative_errors(four_maps(ON_DEVICE, call), exact)
    assert found["o"] > 20 * FULL
    for name, error in found.items():
        assert error <= max(1.5 * rounded[name], TF32), f"{name}: {error}, of the formulas {rounded[name]}"


@in_tf32
@pytest.mark.parametrize("sizes", [SHORT, UNEVEN], ids=["short", "uneven"])
@pytest.mark.parametrize("name", MAP_OPTIONS)
def test_tf32(name: str, sizes: tuple[int, ...]) -> None:
    check_tf32(MapCall(sizes, torch.float32, **MAP_OPTIONS[name]))


@in_tf32
@pytest.mark.parametrize("width", [32, 64, 96, 128, 192])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_every_tile_in_tf32(name: str, width: int) -> None:
    check_tf32(MapCall((1, 2, 1, 70, 75, width, width), torch.float32, **MAP_OPTIONS[name]))


@emulated
@pytest.mark.parametrize(
    ("width", "shared_memory"), [(203, 99 * 1024), (50, 28 * 1024)], indirect=["shared_memory"]
)
def test_what_does_not_fit_in_tf32(width: int, shared_memory: int) -> None:
    """float32's smallest tiles are smaller: they take all maps of such heads, those too that would fit."""
    call = MapCall((1, 2, 1, 33, 40, width, width), torch.float32)
    before = four_maps(ON_DEVICE, call)
    with precision("tf32"):
        assert_same_bits(before, four_maps(ON_DEVICE, call))


@in_tf32
@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LENGTHS], ids=["short", "long"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_packed_in_tf32(name: str, lengths: tuple[tuple[int, int], ...]) -> None:
    check_tf32(MapCall(SHORT, torch.float32, lengths=lengths, **MAP_OPTIONS[name]))


@dataclass(frozen=True)
class RoundedCall(MapCall):
    """A call whose products have nothing left to round, but for weights."""

    def make(self) -> tuple[Problem, Primals, Primals, Constants, Tensor, Tensor]:
        problem, primals, tangents, constants, do, dlse = super().make()
        primals, tangents = (
            x._replace(q=to_tf32(x.q), k=to_tf32(x.k), v=to_tf32(x.v)) for x in (primals, tangents)
        )
        return problem, primals, tangents, constants, to_tf32(do), dlse


@in_tf32
@pytest.mark.parametrize("sizes", [SHORT, UNEVEN, (1, 2, 1, 70, 75, 128, 96)], ids=str)
@pytest.mark.parametrize(
    "options", [{}, MAP_OPTIONS["everything"], {"bias": (0, 1, 1, 0)}], ids=["plain", "everything", "bias"]
)
def test_every_operand_is_rounded(options: dict[str, Any], sizes: tuple[int, ...]) -> None:
    """The same bits where they were rounded before: tensor cores would cut off, where nobody rounds."""
    with precision("tf32"):
        found = four_maps(ON_DEVICE, MapCall(sizes, torch.float32, **options))
        assert_same_bits(found, four_maps(ON_DEVICE, RoundedCall(sizes, torch.float32, **options)))


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_full_precision_unless_allowed(name: str) -> None:
    call = MapCall(UNEVEN, torch.float32, **MAP_OPTIONS[name])
    with precision("ieee"):
        errors = relative_errors(four_maps(ON_DEVICE, call), four_maps(reference, call, wide=True))
    assert max(errors.values()) <= FULL, errors


@emulated
@pytest.mark.usefixtures("before_80")
def test_full_precision_before_80() -> None:
    call = MapCall(UNEVEN, torch.float32)
    before = four_maps(ON_DEVICE, call)
    with precision("tf32"):
        assert_same_bits(before, four_maps(ON_DEVICE, call))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_tf32_is_for_float32(dtype: torch.dtype) -> None:
    call = MapCall(SHORT, dtype)
    before = four_maps(ON_DEVICE, call)
    with precision("tf32"):
        assert_same_bits(before, four_maps(ON_DEVICE, call))


@in_tf32
def test_both_orders_of_autograd_follow_the_setting() -> None:
    def orders(backend: str, dtype: torch.dtype, device: str) -> Outputs:
        generator = torch.Generator().manual_seed(0)
        x = [
            torch.randn(1, 2, n, 24, generator=generator).to(device, dtype).requires_grad_()
            for n in (37, 45, 45)
        ]
        o = metattn.attention(*x, causal=True, backend=backend)
        first = torch.autograd.grad(o.sin().sum(), x, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), x)
        named = {"o": o, **dict(zip(("dq", "dk", "dv"), first, strict=True))}
        named |= dict(zip(("ddq", "ddk", "ddv"), second, strict=True))
        return {name: t.detach().cpu() for name, t in named.items()}

    exact = orders("reference", torch.float64, "cpu")
    for name, low, high in (("ieee", 0.0, FULL), ("tf32", 20 * FULL, 2 * TF32)):
        with precision(name):
            errors = relative_errors(orders("cuda", torch.float32, ON_DEVICE.device), exact)
        assert all(low < error <= high for error in errors.values()), errors


@in_tf32
def test_compiled_calls_follow_the_setting() -> None:
    """Dynamo's guards know torch's setting: a call is compiled again, and without a break."""
    torch._dynamo.reset()
    x = torch.randn(1, 2, 33, 8, device=ON_DEVICE.device)

    def call(q: Tensor) -> Tensor:
        return metattn.attention(q, q, q, backend="cuda")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for name in ("ieee", "tf32", "ieee"):
        with precision(name):
            assert torch.equal(compiled(x), call(x))


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
