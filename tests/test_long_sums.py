"""Sums of very many terms in float32, beside the plain formula's in float32."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import metattn
from metattn.backends import available_backends, cpu

if cpu.unavailable_reason() is not None:
    pytest.skip(f"backend cpu: {cpu.unavailable_reason()}", allow_module_level=True)


def plain(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def assert_as_exact(names: str, found: list[Tensor], theirs: list[Tensor], right: list[Tensor]) -> None:
    """Twice the plain formula's error at most; below a few units in the last place nothing is asked."""
    for name, x, y, z in zip(names.split(), found, theirs, right, strict=True):
        mine, other = (((t.double() - z).norm() / z.norm()).item() for t in (x, y))
        assert mine <= max(2 * other, 6e-7), f"{name}: {mine:.1e}, the plain formula {other:.1e}"


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [((1, 1, 1, 64), (8, 8, 512, 64)), ((1, 1, 128, 64), (256, 2, 128, 64))],
    ids=["262144-rows", "512-pairs"],
)
def test_gradients_of_a_bias_that_many_share(
    shape: tuple[int, ...], sizes: tuple[int, int, int, int]
) -> None:
    torch.manual_seed(0)
    batch, heads, n, m = sizes
    q, k, v = (torch.randn(batch, heads, length, 8) for length in (n, m, m))
    bias, do = torch.randn(shape), torch.randn(batch, heads, n, 8) + 1

    def gradient(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaf = bias.to(dtype, copy=True).requires_grad_()
        o = attend(*(t.to(dtype) for t in (q, k, v)), bias=leaf)
        return list(torch.autograd.grad(o, leaf, do.to(dtype)))

    fused = partial(metattn.attention, backend="cpu")
    assert_as_exact(
        "dbias",
        gradient(fused, torch.float32),
        gradient(plain, torch.float32),
        gradient(plain, torch.float64),
    )


@pytest.mark.parametrize(("backend", "terms"), [("cpu", 1_000_000), ("cuda", 200_000)])
@pytest.mark.parametrize("of_keys", [True, False], ids=["keys", "rows"])
def test_both_orders_of_long_sums(of_keys: bool, backend: str, terms: int) -> None:
    """Values and cotangents of one sign: what a running sum loses does not average out."""
    if available_backends()[backend] is not None:
        pytest.skip(f"backend {backend}: {available_backends()[backend]}")
    n, m = (2, terms) if of_keys else (terms, 2)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 1, n, 8), torch.randn(1, 1, m, 8), torch.rand(1, 1, m, 8) + 0.5
    do = torch.rand(1, 1, n, 8)
    tangents = [torch.rand_like(t) for t in (q, k, v)]

    def both_orders(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        o = attend(*leaves)
        first = torch.autograd.grad(o, leaves, do.to(dtype), create_graph=True)
        second = torch.autograd.grad(first, leaves, [t.to(dtype) for t in tangents])
        return [o, *first, *second]

    assert_as_exact(
        "o dq dk dv d2q d2k d2v",
        both_orders(partial(metattn.attention, backend=backend), torch.float32),
        both_orders(plain, torch.float32),
        both_orders(plain, torch.float64),
    )


PEAK = """
import resource, torch, metattn
torch.set_num_threads(8)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
q, k, v = (torch.randn(1, 1, length, 16) for length in (1536, 100_000, 100_000))
metattn.attention(q[:, :, :2], k[:, :, :8], v[:, :, :8])
before = peak()
metattn.attention(q, k, v)
print(peak() - before)
"""


def test_threads_do_not_copy_all_keys() -> None:
    """Keys and values of 12 MiB once took as much of each thread."""
    found = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(found.stdout) < 16
