"""metattn's attention function, called as transformers calls its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metattn.functional import attention, varlen_attention
from metattn.integrations.transformers.band_mask import BandMask, is_changed
from metattn.problem import readable


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(softcap(scaling·QKᵀ) + position_bias, masked) V, as transformers' attention functions give it.

    Differentiable in query, key, value, position_bias, s_aux, sinks and a mask of numbers, as attention().

    Args:
        module: whose `training` says whether dropout applies; whose `is_causal`, unless that is given, says
            whether a call without a mask is causal.
        query: [B, Hq, N, d]; a batch of 1 broadcasts.
        key: [B, Hkv, M, d]
        value: [B, Hkv, M, dv]
        attention_mask: [B, 1, N, M] as `mask` gives it; or any that broadcasts, bool, or numbers to add.
        s_aux: [Hq] attention sinks.
        sinks: [B, Hq, N, 1] sinks of each query, or as s_aux.
        position_bias: broadcastable to [B, Hq, N, M], added to the scores.
        indices: [B, N, any number], the keys that an indexer chose for each query: it sees no others.

    Returns:
        [B, N, Hq, dv], and None in place of the weights.

    Raises:
        TypeError, ValueError: as attention(); a mask for other lengths; no mask for a causal call of several
            queries and another number of keys: which of these they see would be a guess.
        NotImplementedError: attention weights asked for; blocks chosen by an indexer; sequences packed
            by cu_seq_lens_q alone.
    """
    _check(attention_mask, indices, query, key, kwargs)
    batch = max(query.shape[0], key.shape[0])
    query, key, value = (
        t if t.shape[0] == batch else t.expand(batch, -1, -1, -1) for t in (query, key, value)
    )
    sinks = _arranged(s_aux if sinks is None else sinks, batch, query.shape[1], query.shape[2])
    call = _Call(query, key, value, position_bias, sinks)
    call.options = {
        "scale": scaling,
        "softcap": softcap,
        "dropout_p": float(dropout) if module.training else 0.0,
    }
    n, m = query.shape[2], key.shape[2]
    if isinstance(attention_mask, BandMask) and is_changed(attention_mask):
        attention_mask = attention_mask + 0  # an ordinary tensor, in the graph of what was written to it
    if indices is not None:
        chosen = torch.zeros(batch, 1, n, m, dtype=torch.bool, device=query.device)
        chosen = chosen.scatter(-1, indices.long().unsqueeze(1), True)
        if isinstance(attention_mask, BandMask):
            attention_mask = attention_mask.alive()
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask = attention_mask & chosen
        call.options["mask"] = chosen  # beside a mask of numbers, or none
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        if is_causal and n > 1:
            if n != m:
                raise ValueError(
                    "attention_mask: expected a mask where a causal call has several queries and another "
                    f"number of keys, got None for {n} queries and {m} keys"
                )
            call.options["causal"] = True
    elif isinstance(attention_mask, BandMask):
        if attention_mask.starts is not None and call.can_be_packed(attention_mask):
            return call.by_sequences(attention_mask), None
        call.limit(attention_mask)
    elif attention_mask.dtype == torch.bool:
        call.options["mask"] = attention_mask
    else:
        call.bias = attention_mask if call.bias is None else call.bias + attention_mask
    return call.attend().transpose(1, 2).contiguous(), None


def _check(
    attention_mask: Tensor | None,
    indices: Tensor | None,
    query: Tensor,
    key: Tensor,
    kwargs: Mapping[str, Any],
) -> None:
    """Refuse what would come out wrong."""
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions: expected False, as metattn computes no attention weights, got True; "
            "set_attn_implementation('eager') gives them"
        )
    if kwargs.get("block_indices") is not None:
        raise NotImplementedError(
            "block_indices: expected None, got blocks chosen by an indexer; use 'eager'"
        )
    batch, heads, n, m = max(query.shape[0], key.shape[0]), *query.shape[1:3], key.shape[2]
    if indices is not None:
        if not isinstance(indices, Tensor) or indices.is_floating_point() or indices.dtype == torch.bool:
            came = indices.dtype if isinstance(indices, Tensor) else type(indices).__name__
            raise TypeError(f"indices: expected a Tensor of integers, got {came}")
        if indices.shape[:-1] != (batch, n):
            raise ValueError(f"indices: expected shape [{batch}, {n}, any], got {list(indices.shape)}")
        if (
            indices.device.type == "cpu"
            and readable(indices)
            and indices.numel()
            and not 0 <= indices.min() <= indices.max() < m
        ):
            low, high = int(indices.min()), int(indices.max())
            raise ValueError(f"indices: expected keys from 0 to {m - 1}, got {low} to {high}")
    if attention_mask is None:
        if kwargs.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(
                "cu_seq_lens_q: expected it beside an attention_mask, got it alone; 'sdpa' knows continuous "
                "batching"
            )
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask: expected a Tensor or None, got {type(attention_mask).__name__}")
    if attention_mask.dtype != torch.bool and not attention_mask.is_floating_point():
        raise TypeError(f"attention_mask: expected bool or floating numbers, got {attention_mask.dtype}")
    shape, whole = tuple(attention_mask.shape), (batch, heads, n, m)
    if isinstance(attention_mask, BandMask) and shape[2:] != (n, m):
        raise ValueError(
            f"attention_mask: expected a mask for {n} queries and {m} keys, got shape {list(shape)}"
        )
    if len(shape) > len(whole) or any(
        a not in (1, b) for a, b in zip(reversed(shape), reversed(whole), strict=False)
    ):
        raise ValueError(
            f"attention_mask: expected a shape that broadcasts to {list(whole)}, got {list(shape)}"
        )


def _arranged(sinks: Tensor | None, batch: int, heads: int, n: int) -> Tensor | None:
    """Sinks [Hq], or of each query, four dimensions that broadcast to [B, Hq, N, 1]."""
    if sinks is None or sinks.shape == (heads,):
        return sinks
    if sinks.shape == (1, heads, 1, 1):
        return sinks.flatten()
    whole = (batch, heads, n, 1)
    if sinks.ndim == len(whole) and all(a in (1, b) for a, b in zip(sinks.shape, whole, strict=True)):
        return sinks
    raise ValueError(f"sinks: expected shape {[heads]} or {list(whole)}, got {list(sinks.shape)}")


@dataclass
class _Call:
    """A call of attention() in the making."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sinks: Tensor | None

    def __post_init__(self) -> None:
        self.options: dict[str, Any] = {}

    @property
    def sinks_of_queries(self) -> bool:
        return self.sinks is not None and self.sinks.ndim > 1

    def can_be_packed(self, mask: BandMask) -> bool:
        """Whether nothing is given that has the order of queries and keys, and each query may see itself."""
        sees_itself = (mask.low is None or mask.low <= 0) and (mask.high is None or mask.high >= 0)
        return self.bias is None and not self.sinks_of_queries and sees_itself

    def limit(self, mask: BandMask) -> None:
        """Sets causal, window and mask, and leaves away keys that no query sees."""
        n, m = mask.shape[2:]
        last = m if mask.high is None else max(min(m, n + mask.high), 0)
        first = 0 if mask.low is None else min(max(mask.low, 0), last)
        low, high = (None if side is None else side - first for side in (mask.low, mask.high))
        offset = last - first - n  # of the last query to the last key that is left
        # a limit that excludes nothing is none
        left = None if low is None or low <= 1 - n else offset - low
        right = None if high is None or high >= last - first - 1 else high - offset
        past_all_keys = any(side is not None and side < 0 for side in (left, right))
        if mask.entries is not None or mask.starts is not None or past_all_keys:
            self.options["mask"] = mask.alive()
            return
        if last - first < m:
            self.k, self.v = self.k[:, :, first:last], self.v[:, :, first:last]
            if self.bias is not None and self.bias.shape[-1] == m:
                self.bias = self.bias[..., first:last]
        if right == 0:
            self.options["causal"] = "bottom-right"
            right = None
        if left is not None or right is not None:
            self.options["window"] = tuple(-1 if side is None else side for side in (left, right))
        if mask.padded:
            self.options["mask"] = mask.keys[:, None, None, first:last]

    def attend(self) -> Tensor:
        """[B, Hq, N, dv]"""
        if self.sinks is not None and self.sinks_of_queries:
            # a sink takes exp(sink) of a row's exp(lse) + exp(sink): the rest stays with the keys
            o, lse = attention(self.q, self.k, self.v, bias=self.bias, return_lse=True, **self.options)
            kept: Tensor = o * torch.sigmoid(lse.unsqueeze(-1) - self.sinks).to(o.dtype)
            return kept
        o = attention(self.q, self.k, self.v, bias=self.bias, sinks=self.sinks, **self.options)
        assert isinstance(o, Tensor)
        return o

    def by_sequences(self, mask: BandMask) -> Tensor:
        """[B, N, Hq, dv] of rows that hold several sequences, each of which attends to itself."""
        batch, _, n, _ = mask.shape
        starts, longest = mask.starts, mask.longest
        assert starts is not None
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (self.q, self.k, self.v))
        options = dict(self.options)
        options["window"] = (
            -1 if mask.low is None else -mask.low,
            -1 if mask.high is None else mask.high,
        )
        if mask.padded:
            lengths = starts.diff()
            row = torch.repeat_interleave(lengths)
            column = torch.arange(batch * n, device=row.device) - starts[row]
            keys = torch.zeros(len(lengths), longest, dtype=torch.bool, device=row.device)
            keys[row, column] = mask.keys.expand(batch, n).flatten()
            options["mask"] = keys[:, None, None, :]
        o = varlen_attention(q, k, v, starts, starts, longest, longest, sinks=self.sinks, **options)
        rows: Tensor = o.unflatten(0, (batch, n))
        return rows
