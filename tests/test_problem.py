"""The canonical form of what is accepted, and packed calls' own refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from problem_cases import DV, HKV, HQ, B, D, K, M, N, Q, V, qkv
from torch import Tensor

import metattn
from metattn import problem as problem_module
from metattn.problem import Options, Packing, Problem, check_head_groups, dense, packed


def test_numpys_numbers_and_tensors_of_one_are_numbers() -> None:
    given = Options(
        window=(np.int64(1), np.int32(2)),  # type: ignore[arg-type]
        scale=torch.tensor(0.5, dtype=torch.float64),
        softcap=torch.tensor(3),
        dropout_p=torch.tensor(0.25),
        dropout_seed=np.int64(7),  # type: ignore[arg-type]
    )
    meant = Options(window=(1, 2), scale=0.5, softcap=3.0, dropout_p=0.25, dropout_seed=7)
    (found, _, drawn), (problem, _, expected) = (dense(Q, K, V, options) for options in (given, meant))
    assert found == problem
    assert {type(side) for side in found.window} == {int}
    assert drawn.rng is not None
    assert expected.rng is not None
    assert torch.equal(drawn.rng, expected.rng)
    wide = dense(Q, K, V, Options(window=(np.int64(2**31), np.uint8(3))))[0]  # type: ignore[arg-type]
    assert wide.window == (-1, 3)
    with pytest.raises(TypeError, match="two integers"):
        dense(Q, K, V, Options(window=(np.bool_(True), 1)))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
def test_a_tensors_number_loses_no_derivative(name: str) -> None:
    """On whatever level it is asked for, and mapped ones are not one number."""
    number = torch.tensor(0.5)

    def call(number: Tensor) -> Tensor:
        return metattn.attention(Q, K, V, **{name: number})  # type: ignore[call-overload]

    for transform in (
        lambda: torch.func.grad(lambda x: call(x).sum())(number),
        lambda: torch.func.jvp(call, (number,), (number,)),
        lambda: torch.func.vmap(call)(torch.stack([number, number])),
        lambda: torch.func.grad(lambda q: torch.func.vmap(call)(torch.stack([number, q.sum()])).sum())(Q),
    ):
        with pytest.raises(NotImplementedError, match=f"{name}: expected a constant number"):
            transform()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=name):
        call(torch.autograd.forward_ad.make_dual(number, number))
    with torch.no_grad():
        assert call(number.clone().requires_grad_()).shape == (B, HQ, N, V.shape[-1])


class TestPacked:
    q, k, v = torch.ones(7, HQ, D), torch.ones(9, HKV, D), torch.ones(9, HKV, DV)
    cu_q, cu_k = torch.tensor([0, 3, 3, 7]), torch.tensor([0, 4, 8, 9])

    # id: (what is changed, the error, the message)
    REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "no-tensor": ({"cu_seqlens_q": [0, 7]}, TypeError, "cu_seqlens_q: expected a Tensor, got list"),
        "wrong-dtype": (
            {"cu_seqlens_q": cu_q.float()},
            TypeError,
            "cu_seqlens_q: expected int32 or int64, .*float32",
        ),
        "wrong-device": (
            {"cu_seqlens_k": cu_k.to("meta")},
            ValueError,
            "cu_seqlens_k: .*q's device, cpu, .*meta",
        ),
        "rank-2": (
            {"cu_seqlens_q": cu_q[None]},
            ValueError,
            r"cu_seqlens_q: expected shape \[sequences \+ 1\]",
        ),
        "no-entry": ({"cu_seqlens_q": cu_q[:0]}, ValueError, r"cu_seqlens_q: .*got \[0\]"),
        "lengths-differ": (
            {"cu_seqlens_k": torch.tensor([0, 4, 8, 8, 9])},
            ValueError,
            "cu_seqlens_k: expected as many .*4, got 5",
        ),
        "decreasing": (
            {"cu_seqlens_q": torch.tensor([0, 5, 3, 7])},
            ValueError,
            "cu_seqlens_q: .*no decreasing.*-2",
        ),
        "beyond-total": (
            {"cu_seqlens_q": torch.tensor([0, 3, 4, 8])},
            ValueError,
            "cu_seqlens_q: .*0 to 7, got 0 to 8",
        ),
        "short-of-total": (
            {"cu_seqlens_k": torch.tensor([0, 3, 4, 8])},
            ValueError,
            "cu_seqlens_k: .*0 to 9, got 0 to 8",
        ),
        "begins-late": (
            {"cu_seqlens_q": torch.tensor([1, 3, 4, 7])},
            ValueError,
            "cu_seqlens_q: .*got 1 to 7",
        ),
        "max-too-small": ({"max_seqlen_q": 3}, ValueError, "max_seqlen_q: expected at least .*4, got 3"),
        "max-negative": ({"max_seqlen_k": -1}, ValueError, "max_seqlen_k: expected a length"),
        "max-tensor": (
            {"max_seqlen_k": torch.tensor(4)},
            TypeError,
            "max_seqlen_k: expected an int, got Tensor",
        ),
        "4-dimensions": ({"q": Q}, ValueError, r"q, k, v: expected \[total_q, Hq, d\]"),
        "value-length": ({"v": v[:8]}, ValueError, "k and v alike in length"),
        "heads": ({"q": q[:, :3]}, ValueError, "q: expected as many heads"),
        "mask-shape": (
            {"mask": torch.ones(7, 9, dtype=torch.bool)},
            ValueError,
            r"mask: .*\[3, 4, 4, 4\], got \[7, 9\]",
        ),
    }

    def call(self, **changes: Any) -> dict[str, Any]:
        call = {"q": self.q, "k": self.k, "v": self.v, "cu_seqlens_q": self.cu_q, "cu_seqlens_k": self.cu_k}
        return {**call, "max_seqlen_q": 4, "max_seqlen_k": 4, **changes}

    @pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=[f"{x}" for x in REFUSED])
    def test_refused(self, changes: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            metattn.varlen_attention(**self.call(**changes))
        with pytest.raises(error, match=message):
            metattn.explain(**self.call(**changes))

    def test_canonical(self) -> None:
        packing = Packing(self.cu_q, self.cu_k, 4, 5)
        problem, primals, constants = packed(self.q, self.k, self.v, packing, Options(sinks=torch.ones(HQ)))
        assert (problem.max_q, problem.max_k) == (4, 5)
        assert [t.shape for t in primals[:3]] == [(1, HQ, 7, D), (1, HKV, 9, D), (1, HKV, 9, DV)]
        assert primals.q.data_ptr() == self.q.data_ptr()
        assert constants.cu_q is not None
        assert constants.cu_k is not None
        assert constants.cu_q.dtype == constants.cu_k.dtype == torch.int32

    def test_values_are_read_where_they_can_be(self) -> None:
        wrong = torch.tensor([0, 5, 3, 7])
        meta = {name: t.to("meta") for name, t in (("q", self.q), ("k", self.k), ("v", self.v))}
        o = metattn.varlen_attention(
            **self.call(**meta, cu_seqlens_q=wrong.to("meta"), cu_seqlens_k=self.cu_k.to("meta"))
        )
        assert o.shape == (7, HQ, DV)
        with torch._subclasses.FakeTensorMode() as mode:
            fake = {n: mode.from_tensor(t) if isinstance(t, Tensor) else t for n, t in self.call().items()}
            assert metattn.varlen_attention(**fake).shape == (7, HQ, DV)

    def test_values_that_were_read_are_not_read_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where reading waits for a GPU, until they change; another length is checked again."""
        monkeypatch.setattr(problem_module, "_checked", problem_module._Checked(("cpu",)))
        read: list[Tensor] = []
        tolist = Tensor.tolist
        monkeypatch.setattr(Tensor, "tolist", lambda t: read.append(t) or tolist(t))
        cu = self.cu_q.clone()

        def call(longest: int = 4) -> None:
            packed(self.q, self.k, self.v, Packing(cu, self.cu_k, longest, 5), Options())

        call()
        call()
        assert len(read) == 2
        with pytest.raises(ValueError, match="max_seqlen_q"):
            call(longest=1)
        call()
        assert len(read) == 3
        cu[1] = 6
        with pytest.raises(ValueError, match="no decreasing entry"):
            call()
        with torch.inference_mode():
            cu = torch.tensor([0, 3, 3, 7])
        call()
        call()
        assert len(read) == 6  # an inference tensor counts no changes

    def test_values_on_a_cpu_are_always_read(self) -> None:
        packing = Packing(self.cu_q.clone(), self.cu_k, 4, 5)
        packed(self.q, self.k, self.v, packing, Options())
        packing.cu_seqlens_q.numpy()[1] = 6  # which torch does not count
        with pytest.raises(ValueError, match="no decreasing entry"):
            packed(self.q, self.k, self.v, packing, Options())

    def test_dropout_has_a_row_for_each_sequence(self) -> None:
        packing = Packing(self.cu_q, self.cu_k, 4, 4)
        _, _, constants = packed(self.q, self.k, self.v, packing, Options(dropout_p=0.5, dropout_seed=3))
        assert constants.rng is not None
        assert constants.rng.tolist() == [[3, 0], [3, 1], [3, 2]]


class TestCanonical:
    def test_defaults(self) -> None:
        problem, primals, constants = dense(Q, K, V, Options())
        assert problem == Problem(1 / math.sqrt(D), None, None, (-1, -1), 0.0, 0, 0, "reference")
        assert primals[0] is Q
        assert set(primals[3:]) == {None}
        assert set(constants) == {None}
        assert hash(problem) == hash(problem.on("reference"))
        assert problem.on("cpu").backend == "cpu"

    @pytest.mark.parametrize(
        ("causal", "expected"),
        [(False, None), (True, "top-left"), ("top-left", "top-left"), ("bottom-right", "bottom-right")],
    )
    def test_causal(self, causal: bool | str, expected: str | None) -> None:
        assert dense(Q, K, V, Options(causal=causal))[0].causal == expected

    @pytest.mark.parametrize(
        "shape", [(), (M,), (N, 1), (HQ, 1, M), (B, 1, 1, 1), (1, HQ, N, M), (B, HQ, N, M)]
    )
    def test_mask_and_bias_are_views_never_expanded(self, shape: tuple[int, ...]) -> None:
        mask, bias = torch.ones(shape, dtype=torch.bool), torch.ones(shape)
        _, primals, constants = dense(Q, K, V, Options(mask, bias))
        for given, canonical in ((mask, constants.mask), (bias, primals.bias)):
            assert canonical is not None
            assert canonical.shape == (1,) * (4 - len(shape)) + shape
            assert canonical.data_ptr() == given.data_ptr()

    @pytest.mark.parametrize("shape", [(HQ,), (1, HQ), (B, HQ)])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    def test_sinks_and_slopes_come_in_the_compute_dtype(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        options = Options(sinks=torch.ones(shape, dtype=dtype), alibi_slopes=torch.ones(shape, dtype=dtype))
        for inputs, compute in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
            _, primals, _ = dense(*qkv(inputs), options)
            for t in (primals.sinks, primals.slopes):
                assert t is not None
                assert t.dtype == compute
                assert t.shape == (shape if len(shape) == 2 else (1, HQ))

    def test_bias_keeps_its_dtype(self) -> None:
        for dtype in (torch.float64, torch.float16):
            bias = dense(Q, K, V, Options(bias=torch.ones(N, M, dtype=dtype)))[1].bias
            assert bias is not None
            assert bias.dtype == dtype

    @pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63)])
    def test_seed(self, seed: int) -> None:
        rng = dense(Q, K, V, Options(dropout_p=0.5, dropout_seed=seed))[2].rng
        assert rng is not None
        assert rng.tolist() == [[seed, 0], [seed, 1]]

    def test_seed_is_drawn_from_torchs_generator_only_for_dropout(self) -> None:
        def drawn(p: float) -> Tensor | None:
            torch.manual_seed(5)
            return dense(Q, K, V, Options(dropout_p=p))[2].rng

        first, second = drawn(0.5), drawn(0.5)
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)
        assert first[0, 0] == first[1, 0]
        state = torch.get_rng_state()
        assert dense(Q, K, V, Options(dropout_p=0.0, dropout_seed=1))[2].rng is None
        metattn.explain(Q, K, V, dropout_p=0.5)
        assert torch.equal(torch.get_rng_state(), state)

    def test_numbers_of_other_kinds(self) -> None:
        numpy = pytest.importorskip("numpy")
        problem, _, _ = dense(
            Q, K, V, Options(scale=numpy.float32(0.5), softcap=2, dropout_p=1, dropout_seed=0)
        )
        assert (problem.scale, problem.softcap, problem.dropout_p) == (0.5, 2.0, 1.0)
        assert all(type(x) is float for x in (problem.scale, problem.softcap, problem.dropout_p))

    def test_window_may_be_a_list(self) -> None:
        assert dense(Q, K, V, Options(window=[2, -1]))[0].window == (2, -1)

    def test_window_side_beyond_any_length_is_no_limit(self) -> None:
        for given, canonical in (
            ((2**31 - 1, 0), (2**31 - 1, 0)),
            ((2**31, 0), (-1, 0)),
            ((2**63 - 1, -1), (-1, -1)),
            ((0, 2**63), (0, -1)),
        ):
            assert dense(Q, K, V, Options(window=given))[0].window == canonical

    def test_no_features(self) -> None:
        assert dense(Q[..., :0], K[..., :0], V, Options())[0].scale == 1.0


def test_head_groups() -> None:
    for q_heads, kv_heads in ((4, 4), (4, 1), (65, 5), (0, 0), (0, 3)):
        check_head_groups(q_heads, kv_heads)
    for q_heads, kv_heads in ((4, 3), (2, 4), (3, 0)):
        with pytest.raises(ValueError, match="heads"):
            check_head_groups(q_heads, kv_heads)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_inputs_are_cast_as_torch_casts_them(self, dtype: torch.dtype) -> None:
        with torch.autocast("cpu", dtype=dtype):
            for call in (qkv(), qkv(torch.float64), (Q.bfloat16(), K, V.half())):
                ours = metattn.attention(*call)
                theirs = torch.nn.functional.scaled_dot_product_attention(*call, enable_gqa=True)
                assert ours.dtype == theirs.dtype
            with pytest.raises(TypeError, match="one dtype"):
                metattn.attention(Q.double(), K, V)

    def test_gradients_come_in_the_inputs_dtype(self) -> None:
        leaves = [t.clone().requires_grad_() for t in (Q, K, V)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o = metattn.attention(*leaves)
        gradients = torch.autograd.grad(o.float().square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves)
        assert o.dtype == torch.bfloat16
        assert {g.dtype for g in (*gradients, *second)} == {torch.float32}

    def test_bias_and_lse_keep_their_precision(self) -> None:
        bias = torch.full((N, M), torch.finfo(torch.float32).min)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            o, lse = metattn.attention(Q, K, V, bias=bias, return_lse=True)
        assert lse.dtype == torch.float32
        assert o.isfinite().all()
        assert o.any()

    def test_other_devices_are_left_alone(self) -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert metattn.attention(*qkv(device="meta")).dtype == torch.float32
