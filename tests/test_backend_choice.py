"""Which backend serves a call: by name, by itself, and what explain says of it."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
import torch
from small_tensors import K, Q, V, randn

import metattn
from metattn import backends


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
        """Over a backend's limit the automatic choice goes on, a name does not."""

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
