"""What the public functions do before the maps is compiled without a graph break."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_tensors import K, Q, V, randn
from torch import Tensor

import metattn
from metattn import backends


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
