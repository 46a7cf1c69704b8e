"""The public functions: torch's signature, broadcasting, autocast, lse, the override."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_tensors import K, Q, V, randn
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import metattn

CLOSE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-12},
    torch.float32: {"rtol": 1e-4, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 4e-3, "atol": 4e-3},
}


def some(*shape: int) -> Tensor:
    """A bool mask of which no row is empty."""
    mask = randn(*shape) > 0
    mask[..., :1] = True
    return mask


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
