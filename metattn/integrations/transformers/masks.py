"""The mask function that metattn registers with transformers: descriptions instead of N×M entries.

transformers asks it which keys each query of a call may see, and hands the answer to a model, whose layers
hand it on to the attention function. What a call means it asks transformers' own `sdpa_mask`, a block of rows
at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel, masking_utils
from transformers.utils.import_utils import is_tracing

from metattn.integrations.transformers import patterns
from metattn.integrations.transformers.band_mask import BandMask
from metattn.problem import readable

MaskFunction = Callable[[Any, Any, Any, Any], Any]  # (batch, head, query, key) indices to "may attend"


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: MaskFunction = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """The mask [B, 1, N, M] of a call, as a BandMask.

    Where a graph is traced, in which none can be made, and for steps of a static cache: all entries; or None
    for a plain causal or full pattern of a model that knows torch's attention: its layers know which.

    Args:
        q_offset, kv_offset: the places of the first query and the first key in the text.
        attention_mask: bool [B, any], False = padding; of the text, which it may be shorter than.
        others: what else transformers says, for its own functions.

    Raises:
        ValueError: a model that has attention of its own, and would never call metattn's.
    """
    kind = kind_of_model(type(config))
    if kind == "by itself":
        raise ValueError(
            f"attn_implementation: expected 'eager' or 'sdpa' for {type(config).__name__}, whose model has "
            "attention of its own beside transformers' AttentionInterface, got metattn's"
        )
    arguments: dict[str, Any] = {
        **others,
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": None if attention_mask is None else attention_mask.bool(),
        "device": device,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
    }
    fixed = isinstance(q_offset, int)
    filled: Tensor
    if is_tracing(attention_mask) and kind == "sdpa":
        if attention_mask is None and fixed and q_offset == kv_offset:
            if mask_function is masking_utils.bidirectional_mask_function:
                return None
            if mask_function is masking_utils.causal_mask_function and q_length == kv_length:
                return None
        filled = masking_utils.sdpa_mask(**arguments)
        return filled
    # a static cache's later steps may be compiled, once for all offsets: of each a description would differ
    if is_tracing(attention_mask) or not (fixed or (q_length > 1 and bool(q_offset == 0))):
        filled = masking_utils.eager_mask(dtype=dtype, **arguments)
        return filled
    arguments["q_offset"] = int(q_offset)
    pattern = _of_known(mask_function, arguments["q_offset"] - kv_offset, kv_length)
    if pattern is None:
        pattern = patterns.find(_rows(arguments), batch_size, q_length, kv_length)
    shape = (batch_size, 1, q_length, kv_length)
    if pattern is None:
        filled = masking_utils.sdpa_mask(**arguments)
        return BandMask(filled.new_ones(()).expand(1, kv_length), shape, dtype, entries=filled)
    keys = _keys(arguments)
    numbers: dict[str, Any] = {"low": pattern.low, "high": pattern.high, "padded": keys is not None}
    if pattern.sequences is not None:
        sequences = pattern.sequences.expand(batch_size, -1)
        begins = pad(sequences.diff(dim=1) != 0, (1, 0), value=True)
        starts = pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel())
        numbers |= {
            "sequences": sequences.to(device),
            "starts": starts.to(device),
            "longest": int(starts.diff().max()),
        }
    if keys is None:
        keys = torch.ones((), dtype=torch.bool, device=device).expand(1, kv_length)
    return BandMask(keys, shape, dtype, **numbers)


def _of_known(function: MaskFunction, offset: int, keys: int) -> patterns.Pattern | None:
    """The pattern of transformers' own full or causal mask, whose rows need no look; None of another.

    offset: the first query's place among the keys.
    """
    if function is masking_utils.bidirectional_mask_function:
        return patterns.Pattern(None, None)
    if function is masking_utils.causal_mask_function:
        return patterns.Pattern(None, offset if offset < keys - 1 else None)
    return None


def _rows(arguments: dict[str, Any]) -> Callable[[int, int], Tensor]:
    """For patterns.find: the rows of a call's mask, but for its padding."""

    def rows(start: int, count: int) -> Tensor:
        part = {"q_length": count, "q_offset": arguments["q_offset"] + start, "attention_mask": None}
        filled: Tensor = masking_utils.sdpa_mask(**{**arguments, **part})[:, 0]
        return filled if filled.stride(0) else filled[:1]  # expanded: it is the same in all of the batch

    return rows


def _keys(arguments: dict[str, Any]) -> Tensor | None:
    """bool [B, M], False = padding; None if none is."""
    if arguments["attention_mask"] is None:
        return None
    part = {"q_length": 1, "mask_function": masking_utils.bidirectional_mask_function}
    keys: Tensor = masking_utils.sdpa_mask(**{**arguments, **part})[:, 0, 0].clone()
    return None if readable(keys) and bool(keys.all()) else keys


def check() -> None:
    """Refuse a version of transformers in which this mask function would give other masks than its own.

    Raises NotImplementedError.
    """
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[0, :3] = keep[1, 6] = False

    def comes_out_alike(function: MaskFunction, offset: int) -> bool:
        arguments = {"batch_size": 2, "q_length": 4, "kv_length": 6, "q_offset": offset, "kv_offset": 2}
        ours = mask(**arguments, mask_function=function, attention_mask=keep)  # type: ignore[arg-type]
        theirs = masking_utils.eager_mask(**arguments, mask_function=function, attention_mask=keep)
        return isinstance(ours, BandMask) and ours.entries is None and torch.equal(ours.dense(), theirs)

    try:
        window = masking_utils.sliding_window_causal_mask_function(3)
        same = (
            "q_offset" in inspect.signature(masking_utils.sdpa_mask).parameters
            and hasattr(PreTrainedModel, "_can_set_attn_implementation")
            and all(comes_out_alike(masking_utils.causal_mask_function, offset) for offset in (2, 4))
            and all(comes_out_alike(window, offset) for offset in (2, 4))
        )
    except (AttributeError, TypeError):  # a function that there was not, or with other arguments
        same = False
    if not same:
        raise NotImplementedError(
            "transformers: expected a version whose mask functions take what those of 5.20 take, "
            f"got {transformers.__version__}"
        )


Kind = Literal["sdpa", "interface", "by itself"]


def kind_of_model(config: type) -> Kind:
    """How the models of a configuration class attend.

    "sdpa": masks of bool, or none, mean to them what they mean to torch's attention. "interface": they need
    masks of numbers. "by itself": they never call an attention function.
    """
    if config in _KINDS:
        return _KINDS[config]
    models = [model for model in _subclasses(PreTrainedModel) if model.config_class is config]
    theirs = all(model.__module__.startswith("transformers.models.") for model in models)
    kind: Kind = "interface"
    if models and theirs and not any(model._can_set_attn_implementation() for model in models):
        kind = "by itself"
    elif any(model._supports_sdpa for model in models):
        kind = "sdpa"
    if models:  # without any, theirs may only not be imported yet
        _KINDS[config] = kind
    return kind


def _subclasses(of: Any) -> Iterator[Any]:
    for each in of.__subclasses__():
        yield each
        yield from _subclasses(each)


_KINDS: dict[type, Kind] = {}
# Dynamo cannot trace the search, and need not: classes stay what they are.
kind_of_model._dynamo_marked_constant = True  # type: ignore[attr-defined]
