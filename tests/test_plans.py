"""Plans of Triton launches: when a call finds one that was made for another, and what is passed then."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import metattn
from metattn.backends import available_backends
from metattn.backends.triton import devices, planner, plans, tuned

needs_triton = pytest.mark.skipif(
    available_backends()["triton"] is not None, reason=f"backend triton: {available_backends()['triton']}"
)


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    planner.plan_of.cache_clear()
    yield
    planner.plan_of.cache_clear()


def made() -> int:
    """Plans that were made so far."""
    return planner.plan_of.cache_info().misses


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    where = devices.device_at_hand()
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(where, dtype)


def check(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> None:
    """Forward and gradients against the reference."""
    found, expected = [], []
    for backend, into in (("triton", found), ("reference", expected)):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = metattn.attention(*leaves, backend=backend, **options)
        into += [o, *torch.autograd.grad(o.square().sum(), leaves)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_triton
class TestWhenPlansAreShared:
    def test_calls_that_are_alike_share_one(self) -> None:
        for seed in range(3):
            check(*(normal(1, 2, 5, 4, seed=3 * seed + i) for i in range(3)))
        assert made() == 2  # forward and vjp

    def test_one_tensor_thrice_or_three_tensors(self) -> None:
        """The plan of attention(x, x, x) serves three tensors, and the other way round."""
        x = normal(1, 2, 5, 4)
        check(x, x, x)
        check(normal(1, 2, 5, 4, seed=1), normal(1, 2, 5, 4, seed=2), x)
        check(x, x, x)
        assert made() == 2

    @pytest.mark.parametrize(
        "change",
        [
            dict(causal=True), dict(scale=0.7), dict(softcap=2.0), dict(window=(2, 0)), dict(dropout_p=0.5),
        ],
        ids=str,
    )  # fmt: skip
    def test_another_option(self, change: dict[str, Any]) -> None:
        q, k, v = (normal(1, 2, 5, 4, seed=i) for i in range(3))
        if "dropout_p" in change:
            change = change | {"dropout_seed": 1}
        check(q, k, v)
        check(q, k, v, **change)
        check(q, k, v)
        assert made() == 4

    def test_another_shape_and_layout(self) -> None:
        q, k, v = (normal(1, 2, 5, 4, seed=i) for i in range(3))
        check(q, k, v)
        check(q, k[:, :, :3], v[:, :, :3])
        check(q.mT.contiguous().mT, k, v)
        check(q.expand(2, 2, 5, 4), k.expand(2, 2, 5, 4), v.expand(2, 2, 5, 4))
        assert made() >= 7

    def test_another_alignment(self) -> None:
        """Kernels are compiled for tensors whose addresses are multiples of 16, or are not."""
        space = normal(41)
        aligned, moved = space[:40].view(1, 2, 5, 4), space[1:].view(1, 2, 5, 4)
        assert (aligned.data_ptr() % 16, moved.data_ptr() % 16) == (0, 4)
        for x in (aligned, moved):
            metattn.attention(x, x, x, backend="triton")
        assert made() == 2

    def test_a_negative_bit(self) -> None:
        """A plan takes addresses: what torch holds as the negative of its data is negated first."""
        x = normal(1, 2, 5, 8)
        q = torch.view_as_complex(x.unflatten(-1, (4, 2))).conj().imag
        assert q.is_neg()
        check(q.resolve_neg().clone(), q.resolve_neg().clone(), q.resolve_neg().clone())
        o = metattn.attention(q, q, q, backend="triton")
        torch.testing.assert_close(o, metattn.attention(q, q, q, backend="reference"), rtol=1e-5, atol=1e-6)

    def test_what_torch_allows_of_float32(self) -> None:
        device, of_torch = devices.device_at_hand(), torch.backends.cuda.matmul
        before, precision = planner.setting(device), of_torch.fp32_precision
        of_torch.fp32_precision = "tf32"
        try:
            assert planner.setting(device) == before._replace(tf32=True) != before
        finally:
            of_torch.fp32_precision = precision

    def test_other_tuned_tiles(self) -> None:
        x = normal(1, 2, 5, 4)
        metattn.attention(x, x, x, backend="triton")
        tuned.table.cache_clear()
        metattn.attention(x, x, x, backend="triton")
        assert made() == 2

    def test_gradients_that_are_needed(self) -> None:
        q, k, v = (normal(1, 2, 5, 4, seed=i).requires_grad_() for i in range(3))
        for leaves in ((q,), (k,), (v,), (q, k, v)):
            o = metattn.attention(*(x if any(x is y for y in leaves) else x.detach() for x in (q, k, v)),
                                  backend="triton")  # fmt: skip
            found = torch.autograd.grad(o.sum(), leaves)
            assert [x.shape for x in found] == [x.shape for x in leaves]
        assert made() == 5  # one forward and four vjps


class Pair(NamedTuple):
    tensor: Any
    number: Any


class Many(NamedTuple):
    first: Any
    pair: Any
    nothing: Any
    number: Any


class Compiled:
    """Stands for what Triton compiled: launches are noted."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        self.log = log

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.log.append(("compiled", grid, *arguments))


class Kernel:
    """Stands for a Triton function with two arguments and two constants."""

    arg_names = ("x", "y", "LAST", "TILE")

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Compiled:
            self.log.append(("searched", grid, arguments, constants))
            return Compiled(self.log)

        return launch


def test_a_launch_is_searched_for_once() -> None:
    """Later ones go to what was found, which takes the constants too, in the kernel's order."""
    kernel = Kernel()
    launch = plans.Launch(kernel, 7, {"TILE": 16, "LAST": "x", "num_warps": 4})
    launch(1, 2)
    launch(3, 4)
    launch(5, 6)
    assert kernel.log == [
        ("searched", (7,), (1, 2), {"TILE": 16, "LAST": "x", "num_warps": 4}),
        ("compiled", (7, 1, 1), 3, 4, "x", 16),
        ("compiled", (7, 1, 1), 5, 6, "x", 16),
    ]


def test_a_plan_fills_its_places() -> None:
    """Given, allocated and made tensors, in tuples of tuples; what is None or a number stays."""
    given = [torch.empty(3, device="meta"), None, torch.empty(2, device="meta")]
    room, zeros = torch.empty(4, device="meta"), torch.empty(2, 2, device="meta")
    result = zeros.sum(0)
    arguments = (Many(given[0], Pair(room, 3), None, 5), given[2], Pair(None, 1), 9, ())
    launch = plans.Launch(Kernel(), 1, {})
    plan = plans.Plan(
        given,
        [(room, False), (zeros, True)],
        [(launch, arguments)],
        [plans.Made(result, zeros, lambda t: t.sum(0))],
        (Pair(room, None), Pair(result, None)),
    )
    seen: list[tuple[Any, ...]] = []
    x, y = torch.arange(3.0), torch.arange(2.0)
    first, second = plan.run([x, None, y], torch.device("cpu"), lambda *call: seen.append(call))
    ((started, many, alone, empty_pair, number, nothing),) = seen
    assert started is launch
    assert many.first is x
    assert many.pair.tensor is first.tensor
    assert many.pair.number == 3
    assert (many.nothing, many.number, number, nothing) == (None, 5, 9, ())
    assert alone is y
    assert empty_pair == Pair(None, 1)
    assert isinstance(many, Many)
    assert isinstance(many.pair, Pair)
    assert isinstance(first, Pair)
    assert first.tensor.shape == (4,)
    assert first.number is None
    assert second.tensor.tolist() == [0.0, 0.0]


def test_a_plan_keeps_no_tensor() -> None:
    """Neither its stand-ins nor a call's tensors."""
    given = torch.empty(3, device="meta")
    plan = plans.Plan(
        [given], [], [(plans.Launch(Kernel(), 1, {}), (Many(given, Pair(given, 1), given, 1),))], [], ()
    )
    tensor = torch.zeros(3)
    plan.run([tensor], torch.device("cpu"), lambda *call: None)
    left = weakref.ref(given), weakref.ref(tensor)
    del given, tensor
    gc.collect()
    assert [each() for each in left] == [None, None]
