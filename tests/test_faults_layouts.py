"""Known ways in which attention kernels fail (docs/faults.md): sizes, strides, offsets, packed sequences."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from faults import DEVICES, Layout, check, in_interpreter, mask_of, plain, qkv, randn
from torch import Tensor

import metattn
from metattn import backends
from metattn.problem import Options, dense

LENGTHS = [1, 31, 33, 127, 129, 257]


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("m", LENGTHS)
def test_lengths(backend: str, n: int, m: int) -> None:
    # of one key the weight is 1: what q and k get through o cancels, beside terms of size 1
    vanishing = ("dq", "dk", "second dq", "second dk") if m == 1 else ()
    if n == 1:  # one number a head, a sum of terms of size 1 that is 0.006 in one
        vanishing += ("second dlse",)
    check(backend, qkv(batch=1, n=n, m=m), vanishing=vanishing)


DIMENSIONS = [1, 3, 16, 40, 59, 80, 96, 111, 128, 203, 256]


@pytest.mark.parametrize(
    ("d", "dv"), [*zip(DIMENSIONS, reversed(DIMENSIONS), strict=True), (64, 64), (16, 1)]
)
def test_head_dimensions(backend: str, d: int, dv: int) -> None:
    check(backend, qkv(batch=1, n=9, m=35, d=d, dv=dv))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [16, 59, 128])
def test_head_dimensions_in_low_precision(backend: str, d: int, dtype: torch.dtype) -> None:
    check(backend, qkv(n=33, m=65, d=d), dtype, causal=True)


@pytest.mark.parametrize("d", [257, 300, 512])
def test_wide_heads(backend: str, d: int) -> None:
    """Right, or refused by name and left to the next backend: never wrong."""
    leaves = {name: t.to(DEVICES[backend], torch.float32) for name, t in qkv(d=d).items()}
    call = dense(*leaves.values(), Options())
    if backends.objection(backend, *call) is None:
        check(backend, qkv(d=d))
    else:
        with pytest.raises(NotImplementedError, match="cannot serve this call"):
            metattn.attention(**leaves, backend=backend)
        assert metattn.explain(**leaves).backend != backend


def last_stride_2(name: str, t: Tensor) -> Tensor:
    return torch.stack((t, torch.full_like(t, -7)), -1)[..., 0] if t.dtype != torch.bool else t


def negated_view(name: str, t: Tensor) -> Tensor:
    return torch.complex(torch.zeros_like(t), -t).conj().imag if t.dtype == torch.float32 else t


LAYOUTS: dict[str, Layout] = {
    "heads-after-rows": lambda name, t: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t,
    "features-before-rows": lambda name, t: t.mT.contiguous().mT if t.ndim > 1 else t,
    "batch-last": lambda name, t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "last-stride-2": last_stride_2,
    "inside-a-larger-one": lambda name, t: torch.nn.functional.pad(t, (3, 2) * t.ndim)[
        (slice(3, -2),) * t.ndim
    ],
    "negative-bit": negated_view,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend: str, layout: Layout, dtype: torch.dtype) -> None:
    leaves = qkv(n=33, m=35) | {"bias": randn(2, 2, 33, 35)}
    check(backend, leaves, dtype, layout=layout, mask=mask_of(2, 2, 33, 35), alibi_slopes=torch.rand(2, 2))


def test_expanded_keys_and_values(backend: str) -> None:
    leaves = qkv(kv_heads=2)
    leaves["k"] = leaves["k"][:1, :1].expand(2, 2, -1, -1)
    leaves["v"] = leaves["v"][:, :, :1].expand(-1, -1, 7, -1)

    def expanded(name: str, t: Tensor) -> Tensor:
        if name == "k":
            return t[:1, :1].expand_as(t)
        return t[:, :, :1].expand_as(t) if name == "v" else t

    check(backend, leaves, layout=expanded)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 1, 7), (1, 2, 5, 1), (5, 7), (7,), ()], ids=str)
@pytest.mark.parametrize("expanded", [False, True], ids=["of-size-1", "expanded"])
def test_broadcast_masks_and_biases(backend: str, shape: tuple[int, ...], expanded: bool) -> None:
    bias, mask = randn(*shape), torch.ones(shape, dtype=torch.bool)
    if shape and shape[-1] == 7:
        mask[..., 2] = False
    # alike for all keys, a bias moves lse alone: its second derivatives are sums that cancel
    unchecked = () if shape and shape[-1] == 7 else ("second dbias",)
    full = (2, 2, 5, 7)
    narrow = tuple(slice(size) for size in (1,) * (4 - len(shape)) + shape)

    def broadcast(name: str, t: Tensor) -> Tensor:
        return t[narrow].expand(full) if name in ("bias", "mask") else t

    if expanded:
        leaves = qkv() | {"bias": bias.expand(full)}
        check(backend, leaves, layout=broadcast, mask=mask.expand(full))
    else:
        result = check(backend, qkv() | {"bias": bias}, unchecked=unchecked, mask=mask)
        assert not unchecked or result["second dbias"].abs().max() < 1e-5


def test_expanded_cotangents(backend: str) -> None:
    leaves = [t.to(DEVICES[backend], torch.float32).requires_grad_() for t in qkv().values()]
    o = metattn.attention(*leaves, backend=backend)
    ours = torch.autograd.grad(o.sum(), leaves, retain_graph=True)
    dense_cotangent = torch.autograd.grad(o, leaves, torch.ones_like(o))
    for expanded, contiguous in zip(ours, dense_cotangent, strict=True):
        assert torch.equal(expanded, contiguous)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_unaligned_pointers(backend: str, dtype: torch.dtype) -> None:
    def shifted(name: str, t: Tensor) -> Tensor:
        return torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)

    if dtype == torch.float64 and backend == "triton":
        pytest.skip("it computes in float32")
    leaves = qkv(n=17, m=19, d=16) | {"bias": randn(17, 19)}
    check(backend, leaves, dtype, layout=shifted, mask=mask_of(17, 19))


@pytest.mark.parametrize(("batch", "heads"), [(65_536, 1), (1, 65_537), (4_097, 16)])
def test_many_heads(backend: str, batch: int, heads: int) -> None:
    if in_interpreter(backend):
        pytest.skip("the interpreter would take hours for so many programs")
    check(backend, qkv(batch=batch, heads=heads, n=2, m=2, d=2))


def sparse(backend: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A view that spans far more than it holds; only the pages it touches take memory."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if DEVICES[backend] == "cpu":
        pages = mmap.mmap(-1, elements * dtype.itemsize)
        return torch.frombuffer(pages, dtype=dtype).as_strided(shape, strides)
    return torch.zeros(elements, dtype=dtype, device=DEVICES[backend]).as_strided(shape, strides)


FAR = 2**31 + 64


@pytest.mark.parametrize(
    ("name", "strides"),
    [
        ("q", (FAR, 40, 8, 1)),
        ("q", (20, 10, FAR // 4, 1)),
        ("k", (8, FAR, 16, 1)),
        ("v", (16, 8, FAR // 6, 1)),
        ("do", (16, 8, FAR // 4, 1)),
        ("bias", (FAR, 35, 7, 1)),
        ("mask", (10, 5, 1, FAR // 6)),
    ],
    ids=["q-batch", "q-row", "k-head", "v-row", "do-row", "bias-batch", "mask-key"],
)
def test_offsets_past_2_31(backend: str, name: str, strides: tuple[int, ...]) -> None:
    leaves, options = qkv() | {"bias": randn(2, 2, 5, 7)}, {"mask": mask_of(2, 2, 5, 7)}

    def far(which: str, t: Tensor) -> Tensor:
        if which != name:
            return t
        return sparse(backend, tuple(t.shape), strides, t.dtype).copy_(t)

    check(backend, leaves, torch.float16, layout=far, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(65, 5), (27, 1), (6, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_heads(backend: str, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    check(backend, qkv(batch=1, heads=heads, kv_heads=kv_heads, n=33, m=17), dtype, causal=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_gpu_while_the_first_is_current(backend: str) -> None:
    leaves = [t.float().to("cuda:1") for t in qkv().values()]
    if DEVICES[backend] == "cuda":
        expected = plain(metattn.attention, q=leaves[0], k=leaves[1], v=leaves[2])
        torch.testing.assert_close(metattn.attention(*leaves, backend=backend), expected)


def test_inputs_between_bands_of_nan(backend: str) -> None:
    """What lies around an input is neither read nor written."""
    bands: list[tuple[Tensor, Tensor]] = []

    def banded(name: str, t: Tensor) -> Tensor:
        fill = math.nan if t.is_floating_point() else True
        whole = torch.full((t.numel() + 512,), fill, dtype=t.dtype, device=t.device)
        inner = whole[256:-256].view(t.shape).copy_(t)
        bands.append((whole, whole.clone()))
        return inner

    leaves = qkv(n=33, m=35, d=17, dv=13) | {"bias": randn(2, 1, 33, 35), "sinks": randn(2)}
    check(backend, leaves, layout=banded, mask=mask_of(2, 1, 33, 35), alibi_slopes=torch.rand(2))
    assert len(bands) == 8  # q, k, v, bias, sinks, mask, slopes and the cotangent of o
    for now, before in bands:
        assert torch.equal(now.nan_to_num(7.0), before.nan_to_num(7.0))


SEQUENCES = {
    "with-empty-ones": ([0, 3, 3, 8, 8], [0, 0, 4, 9, 9]),
    "all-empty": ([0, 0, 0], [0, 0, 0]),
    "no-keys": ([0, 3, 5], [0, 0, 0]),
    "one": ([0, 9], [0, 11]),
    "4096": (list(range(0, 4096 * 2 + 1, 2)), list(range(4097))),
}


@pytest.mark.parametrize(("ends_q", "ends_k"), SEQUENCES.values(), ids=SEQUENCES.keys())
@pytest.mark.parametrize("causal", [False, "bottom-right"])
def test_packed_sequences(backend: str, ends_q: list[int], ends_k: list[int], causal: bool | str) -> None:
    if in_interpreter(backend) and len(ends_q) > 100:
        pytest.skip("the interpreter would take hours for so many programs")
    cu_q, cu_k = torch.tensor(ends_q, dtype=torch.int32), torch.tensor(ends_k, dtype=torch.int32)
    max_q, max_k = int(cu_q.diff().max()), int(cu_k.diff().max())
    leaves = {
        "q": randn(ends_q[-1], 4, 3),
        "k": randn(ends_k[-1], 2, 3, seed=1),
        "v": randn(ends_k[-1], 2, 5, seed=2),
    }
    if len(ends_q) < 100:
        leaves |= {"bias": randn(len(ends_q) - 1, 1, max_q, max_k), "sinks": randn(4)}
    check(
        backend,
        leaves,
        function=metattn.varlen_attention,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        causal=causal,
        window=(3, 2),
        dropout_p=0.2,
        dropout_seed=5,
    )
