"""The Triton kernels in Triton's interpreter, and on a GPU where there is one: every option in all four maps.

The interpreter's tiles are 64 × 64. Calls up to that take the few-sample path, one program a (sequence,
key head); longer ones row and column passes over several blocks.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from four_maps import (
    LENGTHS,
    LONG,
    MAP_OPTIONS,
    ODD,
    OF_QKV,
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

import metattn
from metattn.backends import available_backends, reference, triton
from metattn.backends.triton import devices, interpreter, planner
from metattn.backends.triton.plans import Launch
from metattn.problem import Constants, Primals, Problem, Results

if available_backends()["triton"] is not None:
    pytest.skip(f"backend triton: {available_backends()['triton']}", allow_module_level=True)

import triton.language as tl

from metattn.kernels import configs, tiles

ON_DEVICE = Moved(triton, "cpu" if devices.interpreted() else "cuda")


interpreted = pytest.mark.skipif(not devices.interpreted(), reason="it compares CPU tensors")


def check(call: MapCall, terms: int = 1) -> None:
    """terms: how many of size 1 are summed to what may be 0."""
    relative = TOLERANCE[call.dtype]
    absolute = relative * 0.1 * terms**0.5
    assert_close(four_maps(ON_DEVICE, call), four_maps(reference, call, wide=True), relative, absolute)


@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", MAP_OPTIONS)
def test_four_maps(name: str, sizes: tuple[int, ...]) -> None:
    check(MapCall(sizes, torch.float32, **MAP_OPTIONS[name]))


@pytest.mark.parametrize("name", ODD)
def test_odd_sizes(name: str) -> None:
    check(MapCall(ODD[name], torch.float32))


@pytest.mark.parametrize("side", [16, 32, 64])
@pytest.mark.parametrize("options", [{"causal": "top-left"}, {"window": (3, 3)}], ids=["causal", "window"])
def test_as_long_as_the_tile(options: dict[str, Any], side: int) -> None:
    check(MapCall((1, 1, 1, side, side, 4, 4), torch.float32, **options))


@pytest.mark.parametrize("has", SHARED)
def test_shared_bias(has: tuple[int, ...]) -> None:
    check(MapCall((2, 2, 1, 20, 40, 4, 4), torch.float32, bias=has), terms=2 * 2 * 20 * 40)


@pytest.mark.parametrize("lengths", [SHORT_LENGTHS, LENGTHS], ids=["short", "long"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_packed(name: str, lengths: tuple[tuple[int, int], ...]) -> None:
    check(MapCall(SHORT, torch.float32, lengths=lengths, **MAP_OPTIONS[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_low_precision(name: str, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    check(MapCall(sizes, dtype, **MAP_OPTIONS[name]))


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums that are put aside after two blocks."""
    monkeypatch.setattr(tiles, "SPAN", tl.constexpr(2))
    monkeypatch.setattr(planner, "LONG", 3)
    planner.plan_of.cache_clear()
    yield
    planner.plan_of.cache_clear()


@interpreted
@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("sizes", [(1, 4, 2, 70, 330, 8, 12), (1, 2, 2, 200, 70, 80, 8)], ids=["k", "q"])
@pytest.mark.parametrize("name", ["plain", "bottom-right", "sinks-masked", "everything"])
def test_by_spans(name: str, sizes: tuple[int, ...]) -> None:
    check(MapCall(sizes, torch.float32, **MAP_OPTIONS[name]))


@interpreted
@pytest.mark.usefixtures("short_spans")
@pytest.mark.parametrize("name", ["plain", "bottom-right", "sinks-masked"])
def test_one_sweep_by_spans(name: str) -> None:
    call = MapCall((1, 2, 1, 70, 330, 8, 12), torch.float32, **MAP_OPTIONS[name])
    launched, found, exact = one_sweep(call)
    assert "double_rows" in launched
    assert_close(found, exact, TOLERANCE[call.dtype])


def made(call: MapCall) -> tuple[Problem, Primals, Primals, Constants, Tensor, Tensor, Results]:
    problem, primals, tangents, constants, do, dlse = call.make()
    return problem, primals, tangents, constants, do, dlse, triton.forward(problem, primals, constants)


@interpreted
@pytest.mark.parametrize("sizes", [SHORT, LONG], ids=["short", "long"])
def test_double_backward_is_jvp_and_vjp_jvp(sizes: tuple[int, ...]) -> None:
    call = MapCall(sizes, torch.float32, **MAP_OPTIONS["everything"])
    problem, primals, tangents, constants, do, dlse, results = made(call)
    needs = tuple(primal is not None for primal in primals)
    moved, second = triton.double_backward(problem, primals, constants, results, do, dlse, tangents, needs)
    moved_alone = triton.jvp(problem, primals, constants, results, tangents)
    alone = triton.vjp_jvp(problem, primals, constants, results, do, dlse, tangents, moved_alone, needs)
    for found, expected in zip((*moved[:2], *second), (*moved_alone[:2], *alone), strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


def one_sweep(call: MapCall) -> tuple[list[str], Outputs, Outputs]:
    """Kernels that a double backward launched, its outputs, and the same in float64."""
    problem, primals, tangents, constants, do, dlse = call.make()
    needs = tuple(primal is not None for primal in primals._replace(slopes=None))  # whose sums need τ and Dt
    ours, launched = ON_DEVICE, []
    results = ours.forward(problem, primals, constants)
    first = ours.vjp(problem, primals, constants, results, do, dlse, needs)
    start = triton.run

    def run(launch: Launch, *arguments: Any) -> None:
        launched.append(launch.kernel.fn.__name__)
        start(launch, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton, "run", run)
        rest = (results, do, dlse, tangents, needs, first.q)
        moved, second = ours.double_backward(problem, primals, constants, *rest)
    exact = four_maps(reference, call, wide=True)
    found: Outputs = {"ot": moved.o, "lt": moved.lse}
    found.update({f"d{name}t": x for name, x in second._asdict().items()})
    return launched, found, {name: exact[name] for name in found if name != "dslopest"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAP_OPTIONS)
def test_double_backward_in_one_sweep(name: str, dtype: torch.dtype) -> None:
    options = {**MAP_OPTIONS[name], **({"bias": (0, 1, 1, 1)} if "bias" in MAP_OPTIONS[name] else {})}
    if dtype == torch.float32 and not devices.interpreted():
        pytest.skip("float32 takes two sweeps on a GPU")
    launched, found, exact = one_sweep(MapCall((2, *LONG[1:]), dtype, **options))
    assert launched[:2] == ["double_rows", "vjp_jvp_keys"]
    terms = 2 * LONG[3] * LONG[4] if "bias" in options else 1
    absolute = TOLERANCE[dtype] * 0.1 * terms**0.5
    assert_close(found, exact, TOLERANCE[dtype], absolute)


def _clipped(gradient: Tensor) -> None:
    with torch.no_grad():
        gradient.mul_(0.5)


def _reduced(gradient: Tensor) -> None:
    """As a collective writes: into the memory, counted by nobody."""
    for each in torch.utils.dlpack.from_dlpack(gradient.detach()).unbind(0):
        each.zero_()


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda gradient: None,
    "clipped in place": _clipped,
    ".data": lambda gradient: gradient.data.mul_(100),
    "numpy": lambda gradient: gradient.detach().numpy().fill(7),
    "another view of the memory": _reduced,
}


@interpreted
@pytest.mark.parametrize("change", CHANGES)
def test_one_sweep_uses_the_gradient_as_it_was(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is used again is a copy: a caller may change a gradient in place, counted by autograd or not."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, do, *along = (torch.randn(1, 1, 70, 8, generator=generator) for _ in range(7))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    launched, start = [], triton.run

    def run(launch: Launch, *arguments: Any) -> None:
        launched.append(launch.kernel.fn.__name__)
        start(launch, *arguments)

    def second(backend: str) -> tuple[Tensor, ...]:
        o = metattn.attention(*leaves, backend=backend)
        first = torch.autograd.grad(o, leaves, do, create_graph=True)
        loss = sum((x * y).sum() for x, y in zip(first, along, strict=True))
        CHANGES[change](first[0])
        launched.clear()
        return torch.autograd.grad(loss, leaves)

    monkeypatch.setattr(triton, "run", run)
    found = second("triton")
    assert launched[0] == "double_rows"
    for x, y in zip(found, second("reference"), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@interpreted
def test_an_unknown_interpreter_is_refused_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes bfloat16 for bits: float16's results have a part in bfloat16 too."""
    from triton.runtime import interpreter as theirs

    with monkeypatch.context() as patch:
        patch.delattr(theirs.InterpreterBuilder, "create_dot")
        reason = interpreter.mend()
    assert reason is not None
    assert "create_dot" in reason
    monkeypatch.setattr(triton, "UNMENDED", reason)
    q = torch.randn(1, 1, 4, 8)
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(NotImplementedError, match="takes bfloat16 for bits"):
            metattn.attention(*[q.to(dtype)] * 3, backend="triton")
    o = metattn.attention(q, q, q, backend="triton")
    torch.testing.assert_close(o, (q @ q.mT / 8**0.5).softmax(-1) @ q)


@interpreted
def test_other_kernels_meet_the_interpreter_as_it_is() -> None:
    """A launch of ours ends with what it changed: it is for its own functions alone."""
    q = torch.randn(1, 1, 4, 8, dtype=torch.bfloat16)
    metattn.attention(q, q, q, backend="triton")
    assert interpreter._patched is None


@interpreted
def test_no_gradient_is_kept_for_nothing() -> None:
    """Where two sweeps are taken anyway, or the bias' own entries are asked for, there is no copy."""
    kept = []
    for n, d, bias in ((70, 8, False), (16, 8, False), (70, 8, True)):
        x = [torch.randn(1, 1, n, d, requires_grad=True) for _ in range(3)]
        options = {"bias": torch.randn(1, 1, n, n, requires_grad=True)} if bias else {}
        o = metattn.attention(*x, **options, backend="triton")
        first = torch.autograd.grad(o.sum(), (*x, *options.values()), create_graph=True)
        kept.append(first[0].grad_fn.saved_tensors[-1] is not None)
    assert kept == [True, False, False]


@interpreted
def test_gradient_in_inference_mode() -> None:
    q = torch.ones(1, 1, 5, 4, requires_grad=True)
    o = metattn.attention(q, q, q, backend="triton")
    with torch.inference_mode():
        (found,) = torch.autograd.grad(o, q, torch.ones_like(o))
    assert found.is_inference()
    torch.testing.assert_close(found.clone(), torch.ones_like(q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("what", ["keys", "values", "cotangent", "tangents", "peaked"])
def test_one_sweep_where_terms_cancel(what: str) -> None:
    """Inputs whose mean is large beside their spread: what is subtracted is not left to rounding."""
    call = MapCall(LONG, torch.bfloat16)
    problem, primals, tangents, constants, do, dlse = call.make()
    shift = torch.full((), 20.0)
    if what == "keys":
        primals = primals._replace(k=(primals.k + shift).bfloat16())
    elif what == "values":
        primals = primals._replace(v=(primals.v + shift).bfloat16())
    elif what == "cotangent":
        do = (do + shift).bfloat16()
    elif what == "tangents":
        tangents = Primals(*(None if t is None else (t + shift).bfloat16() for t in tangents))  # type: ignore[arg-type]
    else:
        problem = replace(problem, scale=4.0)
    needs = OF_QKV

    def errors(backend: Any, wide: bool = False) -> Any:
        p, t, y = primals, tangents, do
        if wide:
            p, t = (Primals(*(None if x is None else x.double() for x in y)) for y in (primals, tangents))  # type: ignore[arg-type]
            y = do.double()
        results = backend.forward(problem, p, constants)
        if wide:
            moved = backend.jvp(problem, p, constants, results, t)
            return moved, backend.vjp_jvp(problem, p, constants, results, y, dlse, t, moved, needs)
        first = backend.vjp(problem, p, constants, results, y, dlse, needs)
        moved = backend.jvp(problem, p, constants, results, t)
        two = moved, backend.vjp_jvp(problem, p, constants, results, y, dlse, t, moved, needs)
        return two, backend.double_backward(problem, p, constants, results, y, dlse, t, needs, first.q)

    two, one = errors(ON_DEVICE)
    exact = errors(reference, wide=True)

    def distance(found: Any, index: int, name: str) -> float:
        right = getattr(exact[index], name)
        return float((getattr(found[index], name).double() - right).norm() / right.norm())

    for index, name in ((0, "o"), (1, "q"), (1, "k"), (1, "v")):
        assert distance(one, index, name) <= max(1.5 * distance(two, index, name), 4e-3), name


@pytest.mark.parametrize("sizes", [(1, 2, 1, 9, 11, 4, 4), (1, 1, 1, 9, 70, 4, 4)], ids=["short", "long"])
def test_each_part_alone(sizes: tuple[int, ...]) -> None:
    """One gradient wanted, one tangent or cotangent there: what is absent is left out, not zero by luck."""
    call = MapCall(sizes, torch.float32, bias=(1, 1, 1, 1), sinks=True, slopes=True, softcap=2.0)
    problem, primals, tangents, constants, do, dlse = call.make()
    ours = ON_DEVICE
    results = ours.forward(problem, primals, constants)
    truth = reference.forward(problem, primals, constants)
    for index in range(len(primals)):
        needs = tuple(i == index for i in range(len(primals)))
        alone = Primals(*(t if i == index else None for i, t in enumerate(tangents)))  # type: ignore[arg-type]
        moved = ours.jvp(problem, primals, constants, results, alone)
        exact = reference.jvp(problem, primals, constants, truth, alone)
        assert_close({"ot": moved.o, "lt": moved.lse}, {"ot": exact.o, "lt": exact.lse}, 5e-6, 1e-6)
        for cotangents in ((do, None), (None, dlse)):
            found = [
                ours.vjp(problem, primals, constants, results, *cotangents, needs),
                ours.vjp_jvp(problem, primals, constants, results, *cotangents, alone, moved, needs),
            ]
            expected = [
                reference.vjp(problem, primals, constants, truth, *cotangents, needs),
                reference.vjp_jvp(problem, primals, constants, truth, *cotangents, alone, exact, needs),
            ]
            for mine, theirs in zip(found, expected, strict=True):
                for i, (x, y) in enumerate(zip(mine, theirs, strict=True)):
                    assert (x is None) == (i != index)
                    if x is not None:
                        right = torch.zeros_like(x) if y is None else y
                        torch.testing.assert_close(x, right, rtol=1e-4, atol=1e-5)


@interpreted
def test_same_bits_again() -> None:
    call = MapCall(LONG, torch.float32, **{**MAP_OPTIONS["everything"], "bias": (0, 1, 1, 1)})
    first, again = four_maps(triton, call), four_maps(triton, call)
    assert all(torch.equal(x, again[name]) for name, x in first.items() if x is not None)  # type: ignore[arg-type]


@interpreted
def test_dropout_mask_is_the_references() -> None:
    """q = 0, v = 1/M: o counts the kept keys of each row, whatever the tile."""
    n, m, p = 70, 131, 0.4
    q, k = torch.zeros(1, 2, n, 4), torch.zeros(1, 2, m, 4)
    call = replace(MapCall((1, 2, 2, n, m, 4, m), torch.float32), dropout_p=p)
    problem, _, _, constants, _, _ = call.make()
    v = torch.eye(m).expand(1, 2, m, m).contiguous()
    o = triton.forward(problem, Primals(q, k, v, None, None, None), constants).o
    assert constants.rng is not None
    kept = reference.dropout_keep(constants.rng, p, 2, n, m)
    assert torch.equal(o > 0, kept)


class TestConfigurations:
    def test_parts_hold_the_features(self) -> None:
        for features in range(257):
            whole, main, rest = configs.parts(features)
            assert whole == features <= main + rest
            assert main in (16, 32, 64, 128, 256)
            assert rest in (0, 16, 32, 64)
        assert configs.parts(80) == (80, 64, 16)
        assert configs.parts(96) == (96, 64, 32)
        assert configs.parts(64) == (64, 64, 0)
        assert configs.parts(203) == (203, 256, 0)

    @pytest.mark.parametrize("architecture", configs.TABLE)
    def test_every_kernel_has_a_tile(self, architecture: str) -> None:
        for kernel, by_dtype in configs.TABLE[architecture].items():
            for itemsize in (2, 4):
                assert len(by_dtype[0 if itemsize == 2 else 1]) == len(configs.WIDTHS)
                for features in (1, 64, 80, 256):
                    config = configs.choose(architecture, kernel, features, itemsize, 7, 4096)
                    assert config.rows == configs.SMALLEST
                    assert config.keys & (config.keys - 1) == 0
                    assert config.warps in (1, 2, 4, 8)

    def test_the_few_sample_regime(self) -> None:
        assert configs.is_whole("sm90", 64, 2, 128, 128)
        assert not configs.is_whole("sm90", 64, 2, 129, 128)
        assert not configs.is_whole("sm90", 80, 2, 64, 64)
        assert not configs.is_whole("sm90", 64, 4, 65, 64)
        for kernel in configs.WHOLE:
            for m in (1, 16, 17, 100, 128):
                assert configs.choose_whole(kernel, 2, 64, m).keys >= m

    def test_architectures(self) -> None:
        named = {80: "sm80", 86: "sm86", 89: "sm86", 90: "sm90", 100: "sm100", 103: "sm100", 120: "sm86"}
        assert {capability: devices.architecture_of(capability) for capability in named} == named
        assert devices.architecture_of(75) is None


def test_compilers_front_end() -> None:
    """Kernels with anything absent, or alone, for a GPU: the interpreter lets more pass than the compiler."""
    folder = Path(__file__).resolve().parent
    done = subprocess.run(
        [sys.executable, folder / "front_end.py"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        | {"PYTHONPATH": str(folder.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = re.search(r": (\d+) kernels read, 0 failed$", done.stdout.strip())
    assert found is not None, done.stdout
    assert int(found[1]) > 80


class TestAvailability:
    def script(self, code: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment},
            cwd=Path(__file__).resolve().parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    REASON = "import metattn; print(metattn.available_backends()['triton'])"

    def test_disabled(self) -> None:
        assert self.script(self.REASON, METATTN_DISABLE_TRITON="1") == "METATTN_DISABLE_TRITON is set"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
    def test_no_gpu(self) -> None:
        assert self.script(self.REASON).startswith("no GPU that torch can use")

    def test_import_leaves_triton_alone(self) -> None:
        assert self.script("import metattn, sys; print('triton' in sys.modules)") == "False"

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"dtype": torch.float64}, "it computes in float32, these tensors are float64"),
            ({"sizes": (1, 1, 1, 2, 2, 257, 8)}, "a head dimension of at most 256, got 257"),
        ],
    )
    def test_refusals(self, change: dict[str, Any], said: str) -> None:
        problem, primals, _, constants, _, _ = replace(
            MapCall((1, 1, 1, 2, 2, 8, 8), torch.float32), **change
        ).make()
        primals = Primals(*map(ON_DEVICE.move, primals))
        assert triton.unsupported(problem, primals, constants) == said
