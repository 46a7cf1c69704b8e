"""The public functions: torch's signature, the choice of backend, the override, what import costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import metattn
from metattn import backends, functional

CLOSE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def some(*shape: int) -> Tensor:
    """A bool mask of which no row is empty."""
    mask = randn(*shape) > 0
    mask[..., :1] = True
    return mask


Q, K, V = randn(2, 3, 4, 8), randn(2, 3, 5, 8, seed=1), randn(2, 3, 5, 6, seed=2)

# id: (query, key, value, options): calls that torch takes
SAME: dict[str, tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = {
    "4-D": (Q, K, V, {}),
    "2-D": (Q[0, 0], K[0, 0], V[0, 0], {}),
    "3-D": (Q[0], K[0], V[0], {}),
    "5-D": (randn(2, 2, 3, 4, 8), randn(2, 2, 3, 5, 8), randn(2, 2, 3, 5, 6), {}),
    "6-D": (randn(2, 1, 2, 3, 4, 8), randn(2, 2, 2, 3, 5, 8), randn(1, 2, 2, 3, 5, 6), {}),
    "2-D-causal": (Q[0, 0], K[0, 0], V[0, 0], {"is_causal": True}),
    "3-D-mask": (Q[0], K[0], V[0], {"attn_mask": some(3, 4, 5)}),
    "5-D-mask": (
        randn(2, 2, 3, 4, 8),
        randn(2, 2, 3, 5, 8),
        randn(2, 2, 3, 5, 6),
        {"attn_mask": some(2, 1, 3, 4, 5)},
    ),
    "5-D-mask-of-4": (
        randn(2, 2, 3, 4, 8),
        randn(2, 2, 3, 5, 8),
        randn(2, 2, 3, 5, 6),
        {"attn_mask": some(2, 1, 4, 5)},
    ),
    "5-D-mask-of-ones": (
        randn(2, 2, 3, 4, 8),
        randn(2, 2, 3, 5, 8),
        randn(2, 2, 3, 5, 6),
        {"attn_mask": randn(1, 1, 3, 1, 5)},
    ),
    "key-batch-broadcast": (Q, K[:1], V[:1], {}),
    "query-batch-broadcast": (Q[:1], K, V, {}),
    "one-key-head": (Q, K[:, :1], V[:, :1], {}),
    "one-query-head": (Q[:, :1], K, V, {}),
    "key-and-value-broadcast-apart": (Q, K[:1], V[:, :1], {}),
    "query-without-batch": (Q[0], K, V, {}),
    "key-without-batch": (Q, K[0], V[0], {}),
    "key-without-heads": (Q, K[0, 0], V[0, 0], {}),
    "value-with-more-dimensions": (Q[0], K[0], V, {}),
    "value-with-more-dimensions-mask": (Q[0], K[0], V, {"attn_mask": some(3, 4, 5)}),
    "grouped": (randn(2, 6, 4, 8), K, V, {"enable_gqa": True}),
    "grouped-3-D": (randn(6, 4, 8), K[0], V[0], {"enable_gqa": True}),
    "grouped-5-D": (randn(2, 2, 6, 4, 8), randn(2, 2, 3, 5, 8), randn(2, 2, 3, 5, 6), {"enable_gqa": True}),
    "grouped-batch-broadcast": (randn(2, 6, 4, 8), K[:1], V[:1], {"enable_gqa": True}),
    "grouped-key-and-value-apart": (randn(2, 6, 4, 8), K, randn(2, 2, 5, 6), {"enable_gqa": True}),
    "grouped-mask": (randn(2, 6, 4, 8), K, V, {"enable_gqa": True, "attn_mask": some(2, 6, 4, 5)}),
    "grouped-ungrouped": (Q, K, V, {"enable_gqa": True}),
    "causal": (Q, K, V, {"is_causal": True}),
    "causal-tall": (randn(2, 3, 7, 8), K, V, {"is_causal": True}),
    "mask": (Q, K, V, {"attn_mask": some(2, 3, 4, 5)}),
    "mask-2-D": (Q, K, V, {"attn_mask": some(4, 5)}),
    "mask-of-keys": (Q, K, V, {"attn_mask": some(2, 1, 1, 5)}),
    "mask-empty-rows": (Q, K, V, {"attn_mask": torch.zeros(4, 5, dtype=torch.bool)}),
    "float-mask": (Q, K, V, {"attn_mask": randn(2, 1, 4, 5)}),
    "float-mask-infinite-rows": (Q, K, V, {"attn_mask": torch.full((4, 5), -torch.inf)}),
    "float-mask-lowest": (Q, K, V, {"attn_mask": torch.full((4, 5), torch.finfo(torch.float32).min)}),
    "float32-mask-float64": (Q.double(), K.double(), V.double(), {"attn_mask": randn(4, 5)}),
    "float64-mask": (Q.double(), K.double(), V.double(), {"attn_mask": randn(4, 5, dtype=torch.float64)}),
    "float32-mask-bfloat16": (Q.bfloat16(), K.bfloat16(), V.bfloat16(), {"attn_mask": randn(4, 5)}),
    "bfloat16-mask": (Q.bfloat16(), K.bfloat16(), V.bfloat16(), {"attn_mask": randn(4, 5).bfloat16()}),
    "half": (Q.half(), K.half(), V.half(), {}),
    "mask-and-causal": (Q, K, V[..., :5], {"attn_mask": some(4, 5), "is_causal": True}),
    "same-width": (Q, K, randn(2, 3, 5, 8), {"attn_mask": some(4, 5), "is_causal": True}),
    "float-mask-and-causal": (Q, K, randn(2, 3, 5, 8), {"attn_mask": randn(4, 5), "is_causal": True}),
    "mask-and-causal-2-D": (Q[0, 0], K[0, 0], V[0, 0], {"attn_mask": some(4, 5), "is_causal": True}),
    "broadcast": (Q, K[:1], V[:1], {"attn_mask": some(4, 5), "is_causal": True}),
    "dropout": (Q, K, V, {"attn_mask": some(4, 5), "is_causal": True, "dropout_p": 1.0}),
    "scale": (Q, K, V, {"scale": 0.3}),
    "scale-0": (Q, K, V, {"scale": 0.0}),
    "scale-negative": (Q, K, V, {"scale": -1.0}),
    "scale-1e4": (Q, K, V, {"scale": 1e4}),
    "scale-int": (Q, K, V, {"scale": 2}),
    "dropout-0": (Q, K, V, {"dropout_p": 0.0}),
    "dropout-1": (Q, K, V, {"dropout_p": 1.0}),
    "dropout-above-1": (Q, K, V, {"dropout_p": 1.1}),
    "no-batch": (Q[:0], K[:0], V[:0], {}),
    "no-query": (Q[:, :, :0], K, V, {}),
    "no-key": (Q, K[:, :, :0], V[:, :, :0], {}),
    "no-features": (Q[..., :0], K[..., :0], V, {}),
    "no-value-features": (Q, K, V[..., :0], {}),
    # what torch refuses
    "1-D": (Q[0, 0, 0], K[0, 0, 0], V[0, 0, 0], {}),
    "mask-beyond-scores": (Q[:1], K[:1], V[:1], {"attn_mask": some(2, 1, 4, 5)}),
    "mask-beyond-scores-but-not-value": (Q[:1], K[:1], V, {"attn_mask": some(2, 1, 4, 5)}),
    "mask-rank": (Q, K, V, {"attn_mask": some(1, 2, 3, 4, 5)}),
    "mask-shape": (Q, K, V, {"attn_mask": some(2, 4, 5)}),
    "mask-integer": (Q, K, V, {"attn_mask": torch.ones(4, 5, dtype=torch.int32)}),
    "mask-bfloat16-with-float32": (Q, K, V, {"attn_mask": randn(4, 5).bfloat16()}),
    "mask-float64-with-float32": (Q, K, V, {"attn_mask": randn(4, 5).double()}),
    "mask-half-with-bfloat16": (Q.bfloat16(), K.bfloat16(), V.bfloat16(), {"attn_mask": randn(4, 5).half()}),
    "heads-no-multiple": (
        randn(2, 6, 4, 8),
        randn(2, 4, 5, 8),
        randn(2, 4, 5, 6),
        {"enable_gqa": True},
    ),
    "heads-inverted": (Q, randn(2, 6, 5, 8), randn(2, 6, 5, 6), {"enable_gqa": True}),
    "grouped-without-flag": (randn(2, 6, 4, 8), K, V, {}),
    "grouped-key-3-D": (randn(1, 6, 4, 8), randn(1, 5, 8), randn(1, 5, 6), {"enable_gqa": True}),
    "grouped-key-3-D-of-a-batch": (randn(2, 6, 4, 8), randn(3, 5, 8), randn(3, 5, 6), {"enable_gqa": True}),
    "grouped-key-5-D": (
        randn(1, 6, 4, 8),
        randn(1, 3, 2, 5, 8),
        randn(1, 3, 2, 5, 6),
        {"enable_gqa": True, "attn_mask": some(4, 5)},
    ),
    "grouped-key-5-D-of-a-batch": (
        randn(2, 6, 4, 8),
        randn(3, 2, 2, 5, 8),
        randn(3, 1, 2, 5, 6),
        {"enable_gqa": True},
    ),
    "grouped-value-5-D": (randn(2, 6, 4, 8), randn(2, 2, 5, 8), randn(3, 2, 2, 5, 6), {"enable_gqa": True}),
    "scale-tensor": (Q, K, V, {"scale": torch.tensor(0.3)}),
    "scale-tensor-integer": (Q, K, V, {"scale": torch.tensor(2)}),
    "scale-tensor-1-D": (Q, K, V, {"scale": torch.tensor([0.3])}),
    "scale-tensor-differentiated": (Q, K, V, {"scale": torch.tensor(0.3, requires_grad=True)}),
    "dropout-tensor": (Q, K, V, {"dropout_p": torch.tensor(1.0)}),
    "scale-numpy": (Q, K, V, {"scale": np.float32(0.3)}),
    "nested": (torch.nested.nested_tensor([Q[0], Q[1]]), K, V, {}),
    "grouped-2-D": (Q[0, 0], K[0, 0], V[0, 0], {"enable_gqa": True}),
    "features-differ": (Q, randn(2, 3, 5, 7), V, {}),
    "mixed-dtypes": (Q, K.double(), V, {}),
    "integers": (Q.int(), K.int(), V.int(), {}),
    "complex": (Q.to(torch.complex64), K.to(torch.complex64), V.to(torch.complex64), {}),
    "mixed-devices": (Q, K.to("meta"), V, {}),
    "causal-int": (Q, K, V, {"is_causal": 1}),
}


@pytest.mark.parametrize(("query", "key", "value", "options"), SAME.values(), ids=SAME.keys())
def test_signature_is_torchs(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> None:
    try:
        theirs = F.scaled_dot_product_attention(query, key, value, **options)
    except (RuntimeError, TypeError, IndexError):
        with pytest.raises((TypeError, ValueError, NotImplementedError)):
            metattn.scaled_dot_product_attention(query, key, value, **options)
        return
    ours = metattn.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(ours, theirs, **CLOSE[query.dtype])


# What torch refuses by accident of a kernel, or computes wrongly, and its documentation allows or forbids.
def test_signature_beyond_torch() -> None:
    with sdpa_kernel(SDPBackend.MATH):
        for mask in (some(5), torch.tensor(True), randn(5), torch.tensor(0.3)):
            theirs = F.scaled_dot_product_attention(Q, K, V, mask)
            torch.testing.assert_close(
                metattn.scaled_dot_product_attention(Q, K, V, mask), theirs, **CLOSE[Q.dtype]
            )
    for message, call in (
        ("expected .*M, dv", lambda: metattn.scaled_dot_product_attention(Q, K, randn(2, 3, 6, 8))),
        ("dropout_p", lambda: metattn.scaled_dot_product_attention(Q, K, V, dropout_p=-0.1)),
        ("dropout_p", lambda: metattn.scaled_dot_product_attention(Q, K, V, dropout_p=float("nan"))),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_signature_positions_and_names() -> None:
    mask = some(4, 5)
    theirs = F.scaled_dot_product_attention(
        query=Q, key=K, value=V, attn_mask=mask, dropout_p=0.0, is_causal=False
    )
    for ours in (
        metattn.scaled_dot_product_attention(Q, K, V, mask, 0.0, False, scale=None, enable_gqa=False),
        metattn.scaled_dot_product_attention(query=Q, key=K, value=V, attn_mask=mask),
    ):
        torch.testing.assert_close(ours, theirs, **CLOSE[Q.dtype])
    with pytest.raises(TypeError):
        metattn.scaled_dot_product_attention(Q, K, V, mask, 0.0, False, 0.3)  # type: ignore[misc]


def test_signature_errors_name_torchs_arguments() -> None:
    for message, changes in (
        ("query: expected a Tensor", {"query": None}),
        ("query, key, value: expected one dtype", {"key": K.double()}),
        ("attn_mask: expected a Tensor", {"attn_mask": True}),
        (r"attn_mask: expected a shape that broadcasts to \[2, 3, 4, 5\], got \[6\]", {"attn_mask": some(6)}),
        ("enable_gqa=True", {"query": randn(2, 6, 4, 8)}),
        ("query: expected as many heads as key has", {"query": Q[:, :2], "enable_gqa": True}),
        ("enable_gqa: expected a bool", {"enable_gqa": 1}),
        ("causal: expected is_causal, got an argument that scaled_dot", {"causal": True}),
        ("mask: expected attn_mask, got", {"mask": some(4, 5)}),
        ("window: expected metattn.attention, which has window", {"window": (1, 1)}),
        ("colour: expected one of attn_mask, dropout_p", {"colour": 1}),
        (
            "is_causal: expected False with attn_mask",
            {"is_causal": True, "attn_mask": some(4, 5), "dropout_p": 0.5},
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            metattn.scaled_dot_product_attention(**{"query": Q, "key": K, "value": V, **changes})


@pytest.mark.parametrize("lengths", [(4, 4), (4, 6), (3, 5)])
def test_causal_bias(lengths: tuple[int, int]) -> None:
    n, m = lengths
    q, k, v = randn(2, 3, n, 8), randn(2, 3, m, 8), randn(2, 3, m, 8)
    for bias in (causal_upper_left(n, m), causal_lower_right(n, m)):
        theirs = F.scaled_dot_product_attention(q, k, v, bias)
        torch.testing.assert_close(
            metattn.scaled_dot_product_attention(q, k, v, bias), theirs, **CLOSE[q.dtype]
        )
        with pytest.raises(ValueError, match="is_causal"):
            metattn.scaled_dot_product_attention(q, k, v, bias, is_causal=True)
        with pytest.raises(ValueError, match="CausalBias of"):
            metattn.scaled_dot_product_attention(q[:, :, :1], k, v, bias)


BROADCAST = [
    "key-batch-broadcast",
    "one-key-head",
    "one-query-head",
    "6-D",
    "grouped-key-and-value-apart",
]


@pytest.mark.parametrize("case", [*BROADCAST, "value-with-more-dimensions", "2-D", "grouped"])
def test_broadcast_gradients_have_the_inputs_shapes(case: str) -> None:
    q, k, v, options = SAME[case]
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    cotangent = None
    results = []
    for function in (metattn.scaled_dot_product_attention, F.scaled_dot_product_attention):
        with sdpa_kernel(SDPBackend.MATH):
            o = function(*leaves, **options)
        cotangent = torch.randn_like(o) if cotangent is None else cotangent
        first = torch.autograd.grad(o, leaves, cotangent, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((*first, *second))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_as_torch_does(dtype: torch.dtype) -> None:
    masks = (
        None,
        some(4, 5),
        randn(4, 5),
        randn(4, 5).half(),
        torch.full((4, 5), torch.finfo(torch.float32).min),
    )
    with torch.autocast("cpu", dtype=dtype):
        for q, k, v in ((Q, K, V), (Q, K.bfloat16(), V.half()), (Q.double(), K.double(), V.double())):
            for mask in masks:
                if q.dtype == torch.float64 and mask is not None and mask.is_floating_point():
                    with pytest.raises(
                        TypeError, match="attn_mask"
                    ):  # as torch: the mask is cast, float64 is not
                        metattn.scaled_dot_product_attention(q, k, v, mask)
                    continue
                theirs = F.scaled_dot_product_attention(q, k, v, mask)
                ours = metattn.scaled_dot_product_attention(q, k, v, mask)
                torch.testing.assert_close(ours, theirs, **CLOSE[theirs.dtype])
        with pytest.raises(TypeError, match="attn_mask"):
            metattn.scaled_dot_product_attention(Q, K, V, randn(4, 5).double())


class TestVarlen:
    lengths_q, lengths_k = (3, 0, 5, 1), (4, 2, 0, 6)

    def packed(self) -> tuple[list[Tensor], dict[str, Any]]:
        tensors = [randn(9, 4, 8), randn(12, 2, 8, seed=1), randn(12, 2, 6, seed=2)]
        cu = [
            torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()]) for n in (self.lengths_q, self.lengths_k)
        ]
        names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
        return tensors, dict(zip(names, (*cu, 5, 6), strict=True))

    @pytest.mark.parametrize("causal", [False, "top-left", "bottom-right"])
    def test_is_attention_of_each_sequence(self, causal: bool | str) -> None:
        tensors, packing = self.packed()
        options: dict[str, Any] = {
            "causal": causal,
            "window": (2, 3),
            "alibi_slopes": torch.rand(4),
            "sinks": randn(4),
        }
        o, lse = metattn.varlen_attention(*tensors, **packing, **options, return_lse=True)
        assert o.shape == (9, 4, 6)
        assert lse.shape == (4, 9)
        start_q = start_k = 0
        for n, m in zip(self.lengths_q, self.lengths_k, strict=True):
            q, k, v = tensors[0][start_q : start_q + n], *(t[start_k : start_k + m] for t in tensors[1:])
            alone = [t.transpose(0, 1)[None] for t in (q, k, v)]
            o_alone, lse_alone = metattn.attention(*alone, **options, return_lse=True)
            torch.testing.assert_close(o[start_q : start_q + n], o_alone[0].transpose(0, 1))
            torch.testing.assert_close(lse[:, start_q : start_q + n], lse_alone[0])
            start_q, start_k = start_q + n, start_k + m

    def test_max_seqlen_may_exceed(self) -> None:
        tensors, packing = self.packed()
        o = metattn.varlen_attention(*tensors, **packing, causal="bottom-right")
        packing |= {"max_seqlen_q": 8, "max_seqlen_k": 64}
        torch.testing.assert_close(metattn.varlen_attention(*tensors, **packing, causal="bottom-right"), o)

    def test_int32_and_views(self) -> None:
        tensors, packing = self.packed()
        o = metattn.varlen_attention(*tensors, **packing)
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            packing[name] = packing[name].to(torch.int32)[:, None].expand(-1, 2)[:, 1]
        torch.testing.assert_close(metattn.varlen_attention(*tensors, **packing), o)

    def test_numpys_integers_are_lengths(self) -> None:
        tensors, packing = self.packed()
        o = metattn.varlen_attention(*tensors, **packing)
        packing |= {"max_seqlen_q": np.int64(5), "max_seqlen_k": np.int32(6)}
        assert torch.equal(metattn.varlen_attention(*tensors, **packing), o)
        with pytest.raises(TypeError, match="max_seqlen_q: expected an int, got float64"):
            metattn.varlen_attention(*tensors, **{**packing, "max_seqlen_q": np.float64(5)})

    def test_nested_tensors_of_torch(self) -> None:
        """The route that the refusal names, a jagged tensor's values and offsets: both orders in the values.

        torch has no second derivative of values().
        """
        lengths = (3, 1, 5)
        jagged = [
            torch.nested.nested_tensor(
                [torch.randn(n, 2, 4, dtype=torch.float64) for n in lengths], layout=torch.jagged
            )
            for _ in range(3)
        ]
        leaves = [x.values().detach().requires_grad_() for x in jagged]
        with pytest.raises(NotImplementedError, match=r"offsets\(\) as cu_seqlens"):
            metattn.attention(*(x.transpose(1, 2) for x in jagged))

        def of_each() -> Tensor:
            parts = zip(*(x.split(lengths) for x in leaves), strict=True)
            each = [F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in part)) for part in parts]
            return torch.cat([o.transpose(0, 1) for o in each])

        def packed() -> Tensor:
            offsets = [x.offsets() for x in jagged[:2]]
            return metattn.varlen_attention(*leaves, *offsets, max(lengths), max(lengths))

        results = []
        with sdpa_kernel(SDPBackend.MATH):
            for function in (packed, of_each):
                o = function()
                first = torch.autograd.grad(o.sin().sum(), leaves, create_graph=True)
                second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
                results.append([o, *first, *second])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)

    def test_no_sequence(self) -> None:
        q, k, v = randn(0, 4, 8), randn(0, 2, 8), randn(0, 2, 6)
        cu = torch.zeros(1, dtype=torch.int32)
        assert metattn.varlen_attention(q, k, v, cu, cu, 0, 0).shape == (0, 4, 6)


class TestLse:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_value_and_dtype(self, dtype: torch.dtype) -> None:
        q, k, v = Q.to(dtype), K.to(dtype), V.to(dtype)
        _, lse = metattn.attention(q, k, v, scale=0.7, return_lse=True)
        expected = (0.7 * q.double() @ k.double().mT).logsumexp(-1)
        assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)

    def test_differentiable_twice(self) -> None:
        def f(q: Tensor, k: Tensor) -> Tensor:
            return metattn.attention(q, k, V.double(), return_lse=True)[1]

        leaves = [t.double().requires_grad_() for t in (Q[:1, :1], K[:1, :1])]
        assert torch.autograd.gradgradcheck(
            lambda q, k: f(q.expand(2, 3, -1, -1), k.expand(2, 3, -1, -1)), leaves
        )


class TestBackends:
    def test_available_backends(self) -> None:
        reasons = metattn.available_backends()
        assert list(reasons) == ["reference", "cpu", "cuda", "triton"]
        assert reasons["reference"] is None
        assert all(reason is None or (isinstance(reason, str) and reason) for reason in reasons.values())

    @pytest.mark.parametrize("name", ["reference", "cpu", "cuda", "triton"])
    def test_named_works_or_raises_saying_why(self, name: str) -> None:
        reason = metattn.available_backends()[name]
        if reason is None and name in ("reference", "cpu"):
            assert metattn.explain(Q, K, V, backend=name).backend == name
            metattn.attention(Q, K, V, backend=name)
        elif reason is not None:
            for call in (metattn.attention, metattn.explain):
                with pytest.raises(NotImplementedError, match=f"backend: '{name}' .*{re.escape(reason)}"):
                    call(Q, K, V, backend=name)
            with metattn.use_backend(name), pytest.raises(NotImplementedError, match=re.escape(reason)):
                metattn.scaled_dot_product_attention(Q, K, V)

    def test_unsupported_call_goes_on_or_is_refused_when_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Row 11: over a backend's limit the automatic choice goes on, a name does not."""

        class Limited:
            unavailable_reason = staticmethod(lambda: None)
            unsupported = staticmethod(
                lambda problem, primals, constants: "head dimension 8 is over its limit of 4"
            )

        monkeypatch.setitem(backends._loaded, "cpu", Limited)
        monkeypatch.setitem(backends._reasons, "cpu", None)
        explanation = metattn.explain(Q, K, V)
        assert explanation.backend == "reference"
        assert explanation.reasons["cpu"] == "head dimension 8 is over its limit of 4"
        metattn.attention(Q, K, V)
        with pytest.raises(NotImplementedError, match="over its limit of 4"):
            metattn.attention(Q, K, V, backend="cpu")

    def test_meta_tensors_take_the_reference(self) -> None:
        q, k, v = (t.to("meta") for t in (Q, K, V))
        assert metattn.explain(q, k, v).backend == "reference"
        o, lse = metattn.attention(q, k, v, return_lse=True)
        assert (o.shape, lse.shape, o.device.type) == ((2, 3, 4, 6), (2, 3, 4), "meta")

    def test_use_backend_nests_and_is_restored(self) -> None:
        def chosen(**options: Any) -> str:
            return metattn.explain(Q, K, V, **options).backend

        automatic = chosen()
        with metattn.use_backend("reference"):
            assert chosen() == "reference"
            with metattn.use_backend(None):
                assert chosen() == automatic
                assert chosen(backend="reference") == "reference"
            assert chosen() == "reference"
        assert chosen() == automatic
        with pytest.raises(KeyError), metattn.use_backend("reference"):
            raise KeyError
        assert chosen() == automatic
        for wrong, error in (("gpu", ValueError), (3, TypeError)):
            with pytest.raises(error, match="backend: expected"), metattn.use_backend(wrong):  # type: ignore[arg-type]
                pass

    def test_use_backend_is_of_one_thread(self) -> None:
        seen: list[str | None] = []
        with metattn.use_backend("reference"):
            thread = threading.Thread(target=lambda: seen.append(backends.named()))
            thread.start()
            thread.join()
            assert backends.named() == "reference"
        assert seen == [None]

    def test_explain_reads_well(self) -> None:
        explanation = metattn.explain(Q, K, V, causal=True, return_lse=True, backend="reference")
        lines = str(explanation).splitlines()
        assert lines[0] == "backend reference"
        assert lines[1:] == [
            f"  not {name}: {explanation.reasons[name]}" for name in ("cpu", "cuda", "triton")
        ]
        assert set(explanation.reasons) == {"cpu", "cuda", "triton"}
        if metattn.available_backends()["cpu"] is None:
            assert explanation.reasons["cpu"] == "reference was asked for by name"
            assert metattn.explain(Q, K, V).reasons["reference"] == "cpu comes first for this call"

    def test_explain_of_a_packed_call(self) -> None:
        cu = torch.tensor([0, 4])
        q, k, v = randn(4, 2, 8), randn(4, 2, 8), randn(4, 2, 8)
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
        assert metattn.explain(q, k, v, **options).backend == metattn.explain(Q, K, V).backend
        for name in options:
            others = {other: value for other, value in options.items() if other != name}
            with pytest.raises(TypeError, match=f"^{name}: expected it with "):
                metattn.explain(q, k, v, **others)

    def test_explain_refuses_unknown_options(self) -> None:
        with pytest.raises(TypeError, match="is_causal: expected causal, got an argument"):
            metattn.explain(Q, K, V, is_causal=True)


class TestOverride:
    def test_calls_are_ours_and_counted(self) -> None:
        q = Q.clone().requires_grad_()
        with metattn.sdpa_override() as override:
            o = F.scaled_dot_product_attention(q, K, V, is_causal=True)
            torch.nn.functional.scaled_dot_product_attention(query=q, key=K, value=V, attn_mask=some(4, 5))
        F.scaled_dot_product_attention(Q, K, V)
        assert override.calls == 2
        (gradient,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), q)
        assert second.any()

    def test_named_kernels_inside_are_torchs(self) -> None:
        with metattn.sdpa_override() as override:
            with sdpa_kernel(SDPBackend.MATH):
                inside = F.scaled_dot_product_attention(Q, K, V)
                with metattn.sdpa_override() as innermost:
                    F.scaled_dot_product_attention(Q, K, V)
            assert (override.calls, innermost.calls) == (0, 1)
            F.scaled_dot_product_attention(Q, K, V)
            assert override.calls == 1
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.equal(inside, F.scaled_dot_product_attention(Q, K, V))
            with metattn.sdpa_override() as override:
                F.scaled_dot_product_attention(Q, K, V)
            assert override.calls == 1

    def test_override_is_entered_again(self) -> None:
        override = metattn.sdpa_override()
        with override, override:
            F.scaled_dot_product_attention(Q, K, V)
        with override:
            F.scaled_dot_product_attention(Q, K, V)
        assert override.calls == 2

    @pytest.mark.parametrize("other", [None, torch.device("cpu")], ids=["alone", "with-another-mode"])
    def test_torchs_modules_are_reached(self, other: Any) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        attention = nn.MultiheadAttention(8, 2, batch_first=True)
        x = randn(2, 5, 8)
        for module, call in (
            (layer, lambda: layer(x)),
            (attention, lambda: attention(x, x, x, need_weights=False)[0]),
        ):
            for training in (True, False):
                module.train(training)
                expected = call()
                with metattn.sdpa_override() as override:
                    if other is None:
                        o = call()
                    else:
                        with other:
                            o = call()
                assert override.calls == 1
                torch.testing.assert_close(o, expected, **CLOSE[x.dtype])

    def test_override_is_of_one_thread(self) -> None:
        with metattn.sdpa_override() as override:
            thread = threading.Thread(target=F.scaled_dot_product_attention, args=(Q, K, V))
            thread.start()
            thread.join()
        assert override.calls == 0

    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
    def test_nested_tensors_go_to_torch(self, layout: torch.layout) -> None:
        if layout is torch.jagged:
            nested = torch.nested.nested_tensor([randn(3, 2, 8), randn(5, 2, 8)], layout=layout)
            nested = nested.transpose(1, 2)
        else:
            nested = torch.nested.nested_tensor([randn(2, 3, 8), randn(2, 5, 8)], layout=layout)
        expected = F.scaled_dot_product_attention(nested, nested, nested)
        with metattn.sdpa_override() as override:
            o = F.scaled_dot_product_attention(nested, nested, value=nested)
        assert override.calls == 0
        for found, exact in zip(o.unbind(), expected.unbind(), strict=True):
            assert torch.equal(found, exact)

    def test_causal_bias_inside(self) -> None:
        expected = F.scaled_dot_product_attention(Q, K, V, causal_lower_right(4, 5))
        with metattn.sdpa_override() as override:
            o = F.scaled_dot_product_attention(Q, K, V, causal_lower_right(4, 5))
        assert override.calls == 1
        torch.testing.assert_close(o, expected, **CLOSE[Q.dtype])

    def test_under_transforms(self) -> None:
        def loss(q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, K, V).square().sum()

        with metattn.sdpa_override() as override:
            ours = torch.func.hessian(loss)(Q[:1, :1, :2])
        assert override.calls == 1
        theirs = torch.func.hessian(loss)(Q[:1, :1, :2])
        torch.testing.assert_close(ours, theirs, **CLOSE[Q.dtype])


class TestCompiled:
    """No graph break in what stands before the maps; the maps themselves are in test_compile.py."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        torch._dynamo.reset()

    @staticmethod
    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")  # type: ignore[no-any-return]

    CALLS: dict[str, Callable[[Tensor], Tensor]] = {
        "sdpa": lambda q: metattn.scaled_dot_product_attention(q, K, V, is_causal=True),
        "sdpa-3-D": lambda q: metattn.scaled_dot_product_attention(q[0], K[0], V[0]),
        "sdpa-broadcast": lambda q: metattn.scaled_dot_product_attention(
            q, K[:1, :1], V[:1, :1], torch.ones(4, 5)
        ),
        "sdpa-mask-and-causal": lambda q: metattn.scaled_dot_product_attention(
            q, K, K, torch.ones(4, 5, dtype=torch.bool), is_causal=True
        ),
        "options": lambda q: metattn.attention(
            q,
            K,
            V,
            mask=torch.ones(4, 5, dtype=torch.bool),
            bias=torch.ones(4, 1),
            causal="bottom-right",
            window=(2, 1),
            scale=0.3,
            softcap=4.0,
            alibi_slopes=torch.ones(3),
            sinks=torch.ones(3),
            dropout_p=0.2,
            dropout_seed=5,
        ),
        "lse": lambda q: metattn.attention(q, K, V, return_lse=True)[1],
        "named": lambda q: metattn.attention(q, K, V, backend="reference"),
    }

    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
    @pytest.mark.parametrize("differentiated", [False, True])
    def test_no_graph_break(self, call: Callable[[Tensor], Tensor], differentiated: bool) -> None:
        q = Q.clone().requires_grad_(differentiated)
        torch.testing.assert_close(self.compiled(call)(q), call(q))

    def test_packed(self) -> None:
        def call(q: Tensor, cu: Tensor) -> Tensor:
            return metattn.varlen_attention(q, q, q, cu, cu, 5, 5, causal=True)

        q, cu = randn(8, 3, 8).requires_grad_(), torch.tensor([0, 3, 8], dtype=torch.int32)
        torch.testing.assert_close(self.compiled(call)(q, cu), call(q, cu))

    def test_use_backend_is_guarded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def call(q: Tensor) -> Tensor:
            return metattn.attention(q, K, V)

        def inside(q: Tensor) -> Tensor:
            with metattn.use_backend("reference"):
                return metattn.attention(q, K, V)

        compiled = self.compiled(call)
        expected = call(Q)
        torch.testing.assert_close(compiled(Q), expected)
        with metattn.use_backend("reference"):
            torch.testing.assert_close(compiled(Q), expected)
        with monkeypatch.context() as patch:
            patch.setitem(backends._reasons, "cuda", "it is not here")
            with metattn.use_backend("cuda"), pytest.raises(Exception, match="it is not here"):
                compiled(Q)
        torch.testing.assert_close(compiled(Q), expected)
        torch.testing.assert_close(self.compiled(inside)(Q), expected)
        assert backends.named() is None

    def test_autocast(self) -> None:
        def call(q: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return metattn.attention(q, K, V)

        o = self.compiled(call)(Q)
        assert o.dtype == torch.bfloat16
        torch.testing.assert_close(o, call(Q))

    def test_lengths_and_scale_may_vary(self) -> None:
        def call(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            return metattn.attention(q, k, v, scale=scale, causal="bottom-right")

        compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
        for n, m, scale in ((4, 5, 0.1), (7, 5, 0.2), (3, 9, 0.4)):
            arguments = (randn(2, 3, n, 8), randn(2, 3, m, 8), randn(2, 3, m, 6), scale)
            torch.testing.assert_close(compiled(*arguments), call(*arguments))


def python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return result.stdout.strip()


class TestImport:
    def test_imports_neither_triton_nor_a_compiler_nor_the_extension(self) -> None:
        code = (
            "import sys, torch; before = set(sys.modules); import metattn; "
            "new = set(sys.modules) - before; "
            "print(sorted(m for m in new if m.split('.')[0] != 'metattn'), "
            "[m for m in sys.modules if m.startswith(('triton', 'metattn.nn', 'metattn.meta'))], "
            "'metattn.backends.cpu' in sys.modules)"
        )
        third_party = python(code)
        assert third_party.endswith("[] False"), third_party
        assert not re.search(r"'(torch\._dynamo|torch\._inductor|numpy|sympy)", third_party), third_party

    def test_takes_under_0_3_seconds_on_top_of_torch(self) -> None:
        code = "import time, torch; t = time.perf_counter(); import metattn; print(time.perf_counter() - t)"
        assert min(float(python(code)) for _ in range(3)) < 0.3

    def test_submodules_come_when_asked_for(self) -> None:
        code = "import metattn as m; print(m.nn.__name__, m.meta.__name__, m.replace_attention.__name__)"
        assert python(code) == "metattn.nn metattn.meta replace_attention"
        assert set(dir(metattn)) == set(metattn.__all__)
        assert all(hasattr(metattn, name) for name in metattn.__all__)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            _ = metattn.nothing


def test_dispatch_takes_under_30_microseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation and choice, without the maps; the fastest of many repeats, as machines are busy."""
    o = torch.zeros(2, 3, 4, 6)
    monkeypatch.setattr(functional, "attend", lambda problem, primals, constants: (o, o))
    seconds = min(timeit.repeat(lambda: metattn.attention(Q, K, V), number=50, repeat=400)) / 50
    assert seconds < 30e-6
