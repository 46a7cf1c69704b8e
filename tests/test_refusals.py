"""What is refused before anything is computed, and what is said."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problem_cases import HKV, HQ, ON_META, B, D, K, M, N, Q, V, of_shape

import metattn

# id: (what is changed in the call, the error, its message: the argument, what was expected, what came)
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "q-no-tensor": ({"q": [1.0]}, TypeError, r"q: expected a Tensor, got list"),
    "v-none": ({"v": None}, TypeError, r"v: expected a Tensor, got NoneType"),
    "3-dimensions": ({"q": Q[0]}, ValueError, r"q, k, v: expected \[B, Hq, N, d\].*got \[4, 3, 8\]"),
    "batch-differs": ({"k": K[:1], "v": V[:1]}, ValueError, r"one batch size.*\[1, 2, 5, 8\]"),
    "feature-differs": ({"k": K[..., :7]}, ValueError, r"k's last dimension equal to q's.*\[2, 2, 5, 7\]"),
    "key-length-differs": ({"v": V[:, :, :4]}, ValueError, r"k and v alike.*\[2, 2, 4, 6\]"),
    "value-heads-differ": ({"v": V[:, :1]}, ValueError, r"k and v alike.*\[2, 1, 5, 6\]"),
    "heads-no-multiple": (
        {"q": Q[:, :3]},
        ValueError,
        r"q: expected as many heads as k and v have, 2, .*got 3",
    ),
    "mixed-dtypes": (
        {"k": K.double()},
        TypeError,
        r"q, k, v: expected one dtype, got .*float32, .*float64",
    ),
    "integers": (
        {n: t.int() for n, t in zip("qkv", (Q, K, V), strict=True)},
        TypeError,
        r"q: expected float64.*got .*int32",
    ),
    "complex": (
        {n: t.to(torch.complex64) for n, t in zip("qkv", (Q, K, V), strict=True)},
        TypeError,
        r"q: expected float64, .*complex64",
    ),
    "float8": (
        {n: t.to(torch.float8_e4m3fn) for n, t in zip("qkv", (Q, K, V), strict=True)},
        TypeError,
        r"q: expected float64, .*float8",
    ),
    "integer-mask": (
        {"mask": torch.ones(N, M, dtype=torch.int32)},
        TypeError,
        r"mask: expected bool, .*int32",
    ),
    "float-mask": ({"mask": torch.ones(N, M)}, TypeError, r"mask: expected bool, got .*float32"),
    "bool-bias": (
        {"bias": torch.ones(N, M, dtype=torch.bool)},
        TypeError,
        r"bias: expected float32 or .*bool",
    ),
    "complex-bias": ({"bias": torch.ones(N, M, dtype=torch.complex64)}, TypeError, r"bias: .*complex64"),
    "mask-no-tensor": ({"mask": True}, TypeError, r"mask: expected a Tensor or None, got bool"),
    "mixed-devices": (
        {"k": K.to("meta")},
        ValueError,
        r"q, k, v: expected one device, got cpu, meta and cpu",
    ),
    "bias-elsewhere": (
        {"bias": ON_META},
        ValueError,
        r"bias: expected a tensor on q's device, cpu, .* meta",
    ),
    "mask-shape": (
        {"mask": torch.ones(N, M + 1, dtype=torch.bool)},
        ValueError,
        r"mask: .*\[2, 4, 3, 5\], got \[3, 6\]",
    ),
    "mask-heads": (
        {"mask": torch.ones(HKV, 1, M, dtype=torch.bool)},
        ValueError,
        r"mask: .*got \[2, 1, 5\]",
    ),
    "bias-rank": ({"bias": of_shape(1, B, HQ, N, M)}, ValueError, r"bias: .*got \[1, 2, 4, 3, 5\]"),
    "bias-transposed": ({"bias": of_shape(M, N)}, ValueError, r"bias: .*broadcasts to .*got \[5, 3\]"),
    "slopes-shape": (
        {"alibi_slopes": of_shape(HKV)},
        ValueError,
        r"alibi_slopes: expected shape \[4\].*got \[2\]",
    ),
    "sinks-shape": (
        {"sinks": of_shape(1, 1, HQ)},
        ValueError,
        r"sinks: expected shape \[4\] or \[2, 4\]",
    ),
    "slopes-integer": (
        {"alibi_slopes": torch.ones(HQ, dtype=torch.int64)},
        TypeError,
        r"alibi_slopes: .*int64",
    ),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p: .*between 0 and 1, got -0.1"),
    "dropout-above-1": ({"dropout_p": 1.1}, ValueError, r"dropout_p: .*got 1.1"),
    "dropout-nan": ({"dropout_p": math.nan}, ValueError, r"dropout_p: .*got nan"),
    "dropout-text": ({"dropout_p": "0.1"}, TypeError, r"dropout_p: expected a number, got str"),
    "seed-float": (
        {"dropout_p": 0.1, "dropout_seed": 1.5},
        TypeError,
        r"dropout_seed: expected an int or None",
    ),
    "seed-65-bits": (
        {"dropout_p": 0.1, "dropout_seed": 2**64},
        ValueError,
        r"dropout_seed: expected a 64-bit",
    ),
    "causal-unknown": (
        {"causal": "bottom"},
        ValueError,
        r"causal: expected False, True, 'top-left' .*'bottom'",
    ),
    "causal-none": ({"causal": None}, ValueError, r"causal: .*got None"),
    "window-int": ({"window": 3}, TypeError, r"window: expected \(left, right\) or None, got 3"),
    "window-floats": ({"window": (1.0, 2.0)}, TypeError, r"window: expected two integers"),
    "window-below": ({"window": (-2, 0)}, ValueError, r"window: expected sides of at least -1.*\(-2, 0\)"),
    "scale-tensor": ({"scale": of_shape(1)}, TypeError, r"scale: expected a number, got a tensor of .*\[1\]"),
    "scale-bool": ({"scale": torch.tensor(True)}, TypeError, r"scale: .* dtype torch.bool"),
    "scale-differentiated": (
        {"scale": torch.tensor(1.0, requires_grad=True)},
        NotImplementedError,
        r"scale: expected a constant number, .*multiply q by a scale",
    ),
    "dropout-differentiated": (
        {"dropout_p": torch.tensor(0.1, requires_grad=True)},
        NotImplementedError,
        r"dropout_p: expected a constant number",
    ),
    "scale-nan": ({"scale": math.nan}, ValueError, r"scale: expected a finite number, got nan"),
    "scale-infinite": ({"scale": math.inf}, ValueError, r"scale: expected a finite number"),
    "softcap-zero": (
        {"softcap": 0.0},
        ValueError,
        r"softcap: expected a positive finite number or None, got 0.0",
    ),
    "softcap-negative": ({"softcap": -1.0}, ValueError, r"softcap: .*got -1.0"),
    "sparse": (
        {"q": torch.ones(B, HQ, N, D).to_sparse()},
        NotImplementedError,
        r"q: expected a strided tensor",
    ),
    "nested": (
        {"q": torch.nested.nested_tensor([torch.ones(HQ, N, D)] * B, layout=torch.jagged)},
        NotImplementedError,
        r"q: expected a strided tensor",
    ),
    "nested-strided": (
        {"k": torch.nested.nested_tensor([torch.ones(HKV, M, D)] * B)},
        NotImplementedError,
        r"k: expected a strided tensor, got a nested one; .*offsets\(\).*varlen_attention",
    ),
    "nested-mask": (
        {"mask": torch.nested.nested_tensor([torch.ones(N, M, dtype=torch.bool)] * B)},
        NotImplementedError,
        r"mask: expected a strided tensor, got a nested one",
    ),
    "nested-jagged-bias": (
        {"bias": torch.nested.nested_tensor([torch.ones(N, M)] * B, layout=torch.jagged)},
        NotImplementedError,
        r"bias: expected a strided tensor, got a nested one",
    ),
    "backend-unknown": (
        {"backend": "gpu"},
        ValueError,
        r"backend: expected None or one of reference, .*'gpu'",
    ),
    "backend-number": ({"backend": 1}, TypeError, r"backend: expected None or one of .*got 1"),
}


@pytest.mark.parametrize(("changes", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call: dict[str, Any] = {"q": Q, "k": K, "v": V, **changes}
    with pytest.raises(error, match=message):
        metattn.attention(**call)
    with pytest.raises(error, match=message):
        metattn.explain(**call)


class Reads(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused_before_anything_runs(name: str) -> None:
    changes, error, message = REFUSED[name]
    with Reads() as reads, pytest.raises(error, match=message):
        metattn.attention(**{"q": Q, "k": K, "v": V, **changes})
    assert reads.operators == []


FAMILIAR = {
    "is_causal": "causal",
    "attn_mask": r"mask \(bool, True = attends\) or bias",
    "key_padding_mask": r"mask\[:, None, None, :\]",
    "attn_bias": "bias",
    "softmax_scale": "scale",
    "sm_scale": "scale",
    "window_size": r"window=\(left, right\)",
    "dropout": "dropout_p",
    "soft_cap": "softcap",
    "s_aux": "sinks",
    "return_softmax_lse": "return_lse",
    "enable_gqa": "nothing: grouped heads",
    "cu_seqlens": "varlen_attention's",
    "colour": "one of mask, bias, causal, .*dropout_seed",
}


@pytest.mark.parametrize("name", FAMILIAR)
def test_familiar_names_are_answered_with_the_right_one(name: str) -> None:
    message = rf"^{name}: expected {FAMILIAR[name]}.*, got an argument that {{}}\(\) does not have"
    with pytest.raises(TypeError, match=message.format("attention")):
        metattn.attention(Q, K, V, **{name: True})  # type: ignore[call-overload]
    with pytest.raises(TypeError, match=message.format("attention")):
        metattn.explain(Q, K, V, **{name: True})
    cu = torch.tensor([0, N])
    with pytest.raises(TypeError, match=message.format("varlen_attention")):
        metattn.varlen_attention(Q[0], K[0], V[0], cu, cu, N, N, **{name: True})  # type: ignore[call-overload]
