"""What torch's own signature allows: any leading dimensions, masks of both kinds, biases that say causal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metattn.problem import check_head_groups


def to_4d(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Sequence[int], Tensor, Tensor, Tensor]:
    """The leading shape, and query, key and value as [B, Hq, N, d], [B, Hkv, M, d] and [B, Hkv, M, dv]."""
    q_batch, k_batch, v_batch = query.shape[:-2], key.shape[:-2], value.shape[:-2]
    if len(q_batch) == 2 and q_batch == k_batch == v_batch:
        return q_batch, query, key, value
    if enable_gqa:
        if min(len(q_batch), len(k_batch), len(v_batch)) == 0:  # Dynamo takes no truth of a Size
            raise ValueError(
                f"enable_gqa: expected at least 3 dimensions, got query of shape {list(query.shape)}, "
                f"key of {list(key.shape)}, value of {list(value.shape)}"
            )
        heads = q_batch[-1]
        check_head_groups(heads, k_batch[-1], ("query", "key has"))
        check_head_groups(heads, v_batch[-1], ("query", "value has"))
        if len(q_batch) == len(k_batch) == 2 and k_batch == v_batch and q_batch[0] == k_batch[0]:
            return q_batch, query, key, value
        if k_batch[-1] != v_batch[-1]:
            key = key.repeat_interleave(heads // k_batch[-1], -3)
            value = value.repeat_interleave(heads // v_batch[-1], -3)
        lead = _broadcast(q_batch[:-1], k_batch[:-1], v_batch[:-1])
        batch, kv_batch = (*lead, heads), (*lead, key.shape[-3])
    else:
        batch = kv_batch = _broadcast(q_batch, k_batch, v_batch)
        if len(batch) > 0 and all(len(b) == 0 or b[-1] == 1 for b in (k_batch, v_batch)):
            kv_batch = (*batch[:-1], 1)  # one key head for all queries: a group, nothing expanded
    return batch, _flatten(query, batch), _flatten(key, kv_batch), _flatten(value, kv_batch)


def _broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """torch.broadcast_shapes, at a tenth of its time."""
    rank = max(len(shape) for shape in shapes)
    sizes = [1] * rank
    for shape in shapes:
        for i, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                if sizes[i] not in (1, size):
                    raise ValueError(
                        "query, key, value: expected leading dimensions that broadcast (grouped heads need "
                        f"enable_gqa=True), got {', '.join(str(list(shape)) for shape in shapes)}"
                    )
                sizes[i] = size
    return tuple(sizes)


def _flatten(t: Tensor, batch: Sequence[int]) -> Tensor:
    """t expanded to the leading shape, which becomes two dimensions: all but its last, and its last."""
    rows, features = t.shape[-2:]
    if tuple(t.shape[:-2]) != tuple(batch):
        t = t.expand(*batch, rows, features)
    if len(batch) == 2:
        return t
    return t.reshape(math.prod(batch[:-1]), batch[-1] if len(batch) > 0 else 1, rows, features)


def mask_to_4d(attn_mask: Tensor, batch: Sequence[int]) -> Tensor:
    """attn_mask with leading dimensions as _flatten leaves them; broadcast ones stay 1 where they can."""
    if len(batch) <= 2 or attn_mask.ndim <= 3:
        return attn_mask
    lead, last = attn_mask.shape[:-3], attn_mask.shape[-3:]
    if all(size == 1 for size in lead):
        return attn_mask.reshape(1, *last)
    return attn_mask.expand(*batch[:-1], *last).reshape(math.prod(batch[:-1]), *last)


def check_attn_mask(attn_mask: Tensor, query: Tensor, key: Tensor, enable_gqa: bool) -> None:
    """Torch's rules: bool, float32 or query's dtype; a shape that broadcasts into the scores', not beyond."""
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask: expected a Tensor or None, got {type(attn_mask).__name__}")
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        raise TypeError(
            f"attn_mask: expected bool, float32 or query's dtype, {query.dtype}, got {attn_mask.dtype}"
        )
    k_batch = (*key.shape[:-3], 1) if enable_gqa else key.shape[:-2]
    batch = query.shape[:-2]
    scores = (*(batch if batch == k_batch else _broadcast(batch, k_batch)), query.shape[-2], key.shape[-2])
    sizes = zip(reversed(attn_mask.shape), reversed(scores), strict=False)
    if attn_mask.ndim > len(scores) or any(size not in (1, full) for size, full in sizes):
        raise ValueError(
            f"attn_mask: expected a shape that broadcasts to {list(scores)}, got {list(attn_mask.shape)}"
        )


def causal_bias(
    attn_mask: Any, query: Tensor, key: Tensor, is_causal: bool
) -> Literal["top-left", "bottom-right"]:
    """The alignment that a torch.nn.attention.bias.CausalBias stands for."""
    if is_causal:
        raise ValueError("is_causal: expected False with a CausalBias as attn_mask")
    lengths = (attn_mask.seq_len_q, attn_mask.seq_len_kv)
    if lengths != (query.shape[-2], key.shape[-2]):
        raise ValueError(
            f"attn_mask: expected a CausalBias of {query.shape[-2]} by {key.shape[-2]}, got one of "
            f"{lengths[0]} by {lengths[1]}"
        )
    return "top-left" if attn_mask.variant.name == "UPPER_LEFT" else "bottom-right"


def torch_combines(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor,
    *,
    dropout_p: Any,
    scale: Any,
    enable_gqa: bool,
) -> bool:
    """Whether torch has a fused kernel for attn_mask with is_causal: its math path refuses them together."""
    if torch.compiler.is_compiling():
        return True  # the choice cannot be traced; where torch refuses, both hold too
    try:
        choice = torch._fused_sdp_choice(
            query, key, value, attn_mask, dropout_p, True, scale=scale, enable_gqa=enable_gqa
        )
    except RuntimeError:  # functorch's wrappers have no such choice, torch decomposes into math there
        return False
    return choice > 0
