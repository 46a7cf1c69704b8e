"""varlen_attention: packed sequences against each sequence alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from small_tensors import randn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import metattn


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
