"""The public functions: validate, choose a backend, call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from metattn import backends
from metattn.autodiff import attend
from metattn.problem import (
    Causal,
    Number,
    Options,
    Packing,
    autocast,
    check_qkv,
    dense,
    packed,
)
from metattn.torch_arguments import causal_bias, check_attn_mask, mask_to_4d, to_4d, torch_combines


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: Causal = ...,
    window: Sequence[int] | None = ...,
    scale: Number | None = ...,
    softcap: Number | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: Number = ...,
    dropout_seed: int | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: Causal = ...,
    window: Sequence[int] | None = ...,
    scale: Number | None = ...,
    softcap: Number | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: Number = ...,
    dropout_seed: int | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: Sequence[int] | None = None,
    scale: Number | None = None,
    softcap: Number | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: Number = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """O = (softmax(S)∘Z) V,  S = softcap·tanh(scale·QKᵀ/softcap) + bias + alibi, -inf where masked.

    Differentiable in q, k, v, bias, sinks and alibi_slopes: twice by fused maps, to any order through the
    reference (with one HigherOrderWarning), under torch.func's transforms too. A row that attends to nothing
    gives o = 0, lse = -inf and no gradient.

    Args:
        q: [B, Hq, N, d] float64, float32, bfloat16 or float16; under autocast, cast to its dtype.
        k: [B, Hkv, M, d] like q; Hq a multiple of Hkv, query head h reads head h // (Hq // Hkv).
        v: [B, Hkv, M, dv] like q.
        mask: bool, broadcastable to [B, Hq, N, M]; True = attends.
        bias: any of the four dtypes, broadcastable to [B, Hq, N, M]; never expanded.
        causal: False, "top-left" (or True, j ≤ i) or "bottom-right" (j ≤ i + M - N).
        window: (left, right), -1 = no limit: -left ≤ j - (i + offset) ≤ right, offset causal's, or M - N.
        scale: a number, or a tensor that holds one and is no input to a derivative; 1/sqrt(d) unless given.
        softcap: c > 0 bounds the scores to (-c, c) before bias is added.
        alibi_slopes: [Hq] or [B, Hq]: adds -slope·abs(i + M - N - j).
        sinks: [Hq] or [B, Hq], a logit more in each row's softmax, that attends to nothing.
        dropout_p: probability of dropping a weight, always applied.
        dropout_seed: same seed, same mask, on every backend; None draws one from torch's generator.
        return_lse: also return the rows' log-sum-exp.
        backend: "reference", "cpu", "cuda", "triton": this or an error; None: the first that serves the call.

    Returns:
        o [B, Hq, N, dv] in q's dtype; with return_lse also lse [B, Hq, N], float32, or float64 for float64.

    Raises:
        TypeError, ValueError: an argument of wrong type, dtype, shape, device or value; nothing was computed.
        NotImplementedError: a layout that is not strided, nested tensors among them; scale, softcap or
            dropout_p whose derivative is asked for; a named backend that cannot serve the call.

    Source: Vaswani et al. 2017, arXiv 1706.03762; docs/math.md has the formulas of the derivatives.
    """
    if unknown:
        raise unexpected("attention", unknown)
    options = Options(
        mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    )
    problem, primals, constants = dense(q, k, v, options)
    o, lse = attend(backends.choose(problem, primals, constants, backend), primals, constants)
    return (o, _public_lse(lse, o)) if return_lse else o


@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: Causal = ...,
    window: Sequence[int] | None = ...,
    scale: Number | None = ...,
    softcap: Number | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: Number = ...,
    dropout_seed: int | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: Causal = ...,
    window: Sequence[int] | None = ...,
    scale: Number | None = ...,
    softcap: Number | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: Number = ...,
    dropout_seed: int | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: Causal = False,
    window: Sequence[int] | None = None,
    scale: Number | None = None,
    softcap: Number | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: Number = 0.0,
    dropout_seed: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
    **unknown: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """attention() of each of S packed sequences: rows cu_seqlens[s] to cu_seqlens[s+1] see one another only.

    Options and orders of differentiation are attention()'s, with S for B, max_seqlen_q for N and
    max_seqlen_k for M in the shapes of mask, bias, alibi_slopes and sinks; causal, window and ALiBi use each
    sequence's own lengths.

    Args:
        q: [total_q, Hq, d]
        k: [total_k, Hkv, d]
        v: [total_k, Hkv, dv]
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32 or int64 on q's device: 0, then each sequence's end, never
            decreasing, total last. The values are checked where they can be read.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's length.

    Returns:
        o [total_q, Hq, dv]; with return_lse also lse [Hq, total_q].

    Raises:
        TypeError, ValueError: as attention(); cu_seqlens that are not 1-D int32 or int64 or differ in length,
            or whose values do not go from 0 to the total without decreasing; a longest length too short.
        NotImplementedError: as attention(); cu_seqlens mapped by vmap.

    Source: the packed layout of Dao 2023, arXiv 2307.08691.
    """
    if unknown:
        raise unexpected("varlen_attention", unknown)
    options = Options(
        mask, bias, causal, window, scale, softcap, alibi_slopes, sinks, dropout_p, dropout_seed
    )
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    problem, primals, constants = packed(q, k, v, packing, options)
    o, lse = attend(backends.choose(problem, primals, constants, backend), primals, constants)
    o = o.squeeze(0).transpose(0, 1)
    return (o, _public_lse(lse.squeeze(0), o)) if return_lse else o


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: Number = 0.0,
    is_causal: bool = False,
    *,
    scale: Number | None = None,
    enable_gqa: bool = False,
    **unknown: Any,
) -> Tensor:
    """softmax(scale·QKᵀ + attn_mask) V: torch.nn.functional's function of this name, differentiable twice.

    Args:
        query: [..., N, d]; the leading dimensions of query, key and value broadcast.
        key: [..., M, d]
        value: [..., M, dv]
        attn_mask: broadcastable to [..., N, M]; bool (True = attends), float32 or query's dtype (added to the
            scores); or torch.nn.attention.bias's CausalBias.
        dropout_p: probability of dropping a weight, always applied.
        is_causal: each query i attends to keys j ≤ i. Together with attn_mask: as in torch, both hold where
            torch has a fused kernel for the call, else refused.
        scale: 1/sqrt(d) unless given.
        enable_gqa: grouped queries: key's and value's dimension -3 may be a divisor of query's.

    Returns:
        [..., N, dv] in query's dtype.

    Raises:
        TypeError, ValueError, NotImplementedError: where torch raises RuntimeError; see attention().

    Orders of differentiation as attention(). Source: torch.nn.functional.scaled_dot_product_attention.
    """
    if unknown:
        raise unexpected("scaled_dot_product_attention", unknown)
    names = ("query", "key", "value")
    for name, flag in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: expected a bool, got {type(flag).__name__}")
    causal: Causal = is_causal
    if type(attn_mask).__module__ == "torch.nn.attention.bias":
        causal, attn_mask = causal_bias(attn_mask, query, key, is_causal), None
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    check_qkv(query, key, value, names)
    for name, t in zip(names, (query, key, value), strict=True):
        if t.ndim < 2:
            raise ValueError(f"{name}: expected at least 2 dimensions, got shape {list(t.shape)}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ValueError(
            "query, key, value: expected [..., N, d], [..., M, d], [..., M, dv], "
            f"got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    batch, q, k, v = to_4d(query, key, value, enable_gqa)
    mask = bias = None
    if attn_mask is not None:
        check_attn_mask(attn_mask, query, key, enable_gqa)
        if is_causal and not torch_combines(
            query, key, value, attn_mask, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        ):
            raise ValueError(
                "is_causal: expected False with attn_mask, as torch has no fused kernel for this call; "
                "metattn.attention takes mask or bias together with causal"
            )
        canonical = mask_to_4d(attn_mask, batch)
        mask, bias = (canonical, None) if attn_mask.dtype == torch.bool else (None, canonical)
    o = attention(q, k, v, mask=mask, bias=bias, causal=causal, scale=scale, dropout_p=dropout_p)
    return o if len(batch) == 2 else o.reshape(*batch, o.shape[-2], o.shape[-1])


@dataclass(frozen=True)
class Explanation:
    """Which backend a call runs on, and why not each other one; str() is readable."""

    backend: str
    reasons: dict[str, str]  # of every other backend

    def __str__(self) -> str:
        others = (f"  not {name}: {reason}" for name, reason in self.reasons.items())
        return "\n".join((f"backend {self.backend}", *others))


def explain(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Explanation:
    """Which backend attention() runs on with these arguments, and why not the others; nothing is computed.

    With cu_seqlens_q among the options the call is varlen_attention's. Raises what the call would raise, and
    TypeError for an option that neither function has.
    """
    named = options.pop("backend", None)
    options.pop("return_lse", None)
    unknown = [name for name in options if name not in (*Options._fields, *Packing._fields)]
    if unknown:
        raise unexpected("attention", unknown)
    if options.get("dropout_seed") is None:
        options["dropout_seed"] = 0  # explaining a call draws nothing from torch's generator
    packing = {name: options.pop(name) for name in Packing._fields if name in options}
    if packing:
        for name in Packing._fields:
            if name not in packing:
                raise TypeError(f"{name}: expected it with {', '.join(packing)}, got nothing")
        problem, primals, constants = packed(q, k, v, Packing(**packing), Options(**options))
    else:
        problem, primals, constants = dense(q, k, v, Options(**options))
    chosen = backends.first(problem, primals, constants, named).backend
    named = named or backends.named()
    reasons = {}
    for name in backends.NAMES:
        if name != chosen:
            reason = backends.objection(name, problem, primals, constants)
            if reason is None:
                reason = f"{chosen} was asked for by name" if named else f"{chosen} comes first for this call"
            reasons[name] = reason
    return Explanation(chosen, reasons)


# What other libraries call it.
FAMILIAR = {
    **dict.fromkeys(("is_causal",), "causal"),
    **dict.fromkeys(
        ("attn_mask", "attention_mask"), "mask (bool, True = attends) or bias (numbers that are added)"
    ),
    **dict.fromkeys(
        ("key_padding_mask", "padding_mask"), "mask[:, None, None, :], True where a key is attended"
    ),
    **dict.fromkeys(("attn_bias", "position_bias", "score_mod"), "bias"),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "scale"),
    **dict.fromkeys(("window_size", "sliding_window", "local_window_size"), "window=(left, right)"),
    **dict.fromkeys(("dropout", "p_dropout", "p"), "dropout_p"),
    **dict.fromkeys(("seed",), "dropout_seed"),
    **dict.fromkeys(("logits_soft_cap", "soft_cap", "logit_cap"), "softcap"),
    **dict.fromkeys(("s_aux", "sink", "attention_sinks"), "sinks"),
    **dict.fromkeys(("slopes",), "alibi_slopes"),
    **dict.fromkeys(("return_softmax_lse", "return_attn_probs", "need_weights"), "return_lse"),
    **dict.fromkeys(("enable_gqa",), "nothing: grouped heads are seen by the shapes"),
}
TORCHS = {
    **dict.fromkeys(("causal",), "is_causal"),
    **dict.fromkeys(("mask", "bias", "attention_mask", "attn_bias"), "attn_mask"),
    **dict.fromkeys(("softmax_scale", "sm_scale", "scaling"), "scale"),
    **dict.fromkeys(("dropout", "p_dropout", "p"), "dropout_p"),
}
OF_PACKED = ("cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k")


def unexpected(function: str, names: Iterable[str]) -> TypeError:
    """The error for an argument that a function has not, with what it is called there."""
    name = next(iter(names))
    to_torch = function == "scaled_dot_product_attention"
    hint = (TORCHS if to_torch else FAMILIAR).get(name)
    if hint is None and name in OF_PACKED:
        hint = "varlen_attention's cu_seqlens_q, cu_seqlens_k, max_seqlen_q and max_seqlen_k"
    if hint is None and to_torch and name in Options._fields:
        hint = f"metattn.attention, which has {name}"
    if hint is None:
        options = (
            ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa") if to_torch else Options._fields
        )
        hint = f"one of {', '.join(options)}"
    return TypeError(f"{name}: expected {hint}, got an argument that {function}() does not have")


def _public_lse(lse: Tensor, o: Tensor) -> Tensor:
    """The maps' log-sum-exp, of two float64 parts, in the dtype that users see."""
    lse = lse.sum(-1)
    return lse if o.dtype == torch.float64 else lse.to(torch.float32)
