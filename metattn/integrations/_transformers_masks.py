"""The masks of transformers' models, described instead of filled in.

transformers asks an attention implementation's mask function which keys each query of a call may see, and
hands the answer to a model, whose layers hand it on to the attention function. `mask` is that function: it
recognizes causal, sliding-window, chunked, packed and padded patterns, and returns a few numbers and a mask
of keys, a BandMask, where others fill in N×M entries.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel, masking_utils
from transformers.utils.import_utils import is_tracing

from metattn.problem import readable

MaskFunction = Callable[[Any, Any, Any, Any], Any]  # (batch, head, query, key) indices to "may attend"


@dataclass(frozen=True)
class Pattern:
    """Which keys a query may see: of its sequence, those at a distance j − i from low to high."""

    low: int | None = None  # None: no limit
    high: int | None = None
    sequences: Tensor | None = None  # [B, N] ids, never decreasing, where a row holds several
    chunk: tuple[int, Tensor] | None = None  # a chunk's size, and where each row's first one begins [B]
    remapped: bool = False  # distances are those of positions in a sequence, not of indices

    def and_(self, other: Pattern) -> Pattern | None:
        """Both; None where that has no such form."""
        for a, b in ((self.sequences, other.sequences), (self.chunk, other.chunk)):
            if a is not None and b is not None:
                return None
        return Pattern(
            low=max((x for x in (self.low, other.low) if x is not None), default=None),
            high=min((x for x in (self.high, other.high) if x is not None), default=None),
            sequences=other.sequences if self.sequences is None else self.sequences,
            chunk=other.chunk if self.chunk is None else self.chunk,
            remapped=self.remapped or other.remapped,
        )


def read(function: MaskFunction) -> Pattern | None:
    """The pattern of one of transformers' mask functions; None of any other, whose mask has to be filled in.

    Functions are told by identity, inner ones by their code: both exist once, whoever asked for them.
    """
    if function is masking_utils.causal_mask_function:
        return Pattern(high=0)
    if function is masking_utils.bidirectional_mask_function:
        return Pattern()
    code: Any = getattr(function, "__code__", None)
    if code not in _READERS:
        return None
    cells = getattr(function, "__closure__", None) or ()
    named = dict(zip(code.co_freevars, (cell.cell_contents for cell in cells), strict=True))
    return _READERS[code](named)


def _read_and(named: Mapping[str, Any]) -> Pattern | None:
    whole: Pattern | None = Pattern()
    for function in named["mask_functions"]:
        part = read(function)
        whole = None if part is None or whole is None else whole.and_(part)
    return whole


def _read_remap(named: Mapping[str, Any]) -> Pattern | None:
    inner = read(named["mask_function"])
    return None if inner is None or inner.chunk is not None else replace(inner, remapped=True)


_READERS: dict[Any, Callable[[Mapping[str, Any]], Pattern | None]] = {}


def _learn(
    maker: str, arguments: tuple[Any, ...], reader: Callable[[Mapping[str, Any]], Pattern | None]
) -> None:
    """How to read what one of masking_utils' makers makes, if this version has that."""
    if hasattr(masking_utils, maker):
        _READERS[getattr(masking_utils, maker)(*arguments).__code__] = reader


_ANY = torch.zeros(1, 1, dtype=torch.int64)
_learn("and_masks", (), _read_and)
_learn("remap_positions_for_packed_sequence", (masking_utils.causal_mask_function, _ANY), _read_remap)
_learn(
    "packed_sequence_mask_function", (_ANY,), lambda named: Pattern(sequences=named["packed_sequence_mask"])
)
_learn("sliding_window_overlay", (1,), lambda named: Pattern(low=1 - named["sliding_window"]))
_learn(
    "sliding_window_bidirectional_overlay",
    (1,),
    lambda named: Pattern(low=-named["sliding_window"], high=named["sliding_window"]),
)
_learn(
    "chunked_overlay",
    (1, _ANY),
    lambda named: Pattern(chunk=(named["chunk_size"], named["left_padding"])),
)


def check() -> None:
    """Refuse a version of transformers whose mask functions mean anything else than what is read out of them.

    Raises NotImplementedError.
    """
    try:
        same = "q_offset" in inspect.signature(masking_utils.sdpa_mask).parameters and all(
            _means_what_is_read(function, length) for function, length in _examples().items()
        )
    except AttributeError:  # a function that there was not
        same = False
    if not same:
        raise NotImplementedError(
            "transformers: expected a version whose masks metattn knows, 5.20 or later, "
            f"got {transformers.__version__}"
        )


def _examples() -> dict[MaskFunction, int]:
    """One of each sort, and a number of keys to try it on."""
    known = masking_utils
    ids, positions = torch.tensor([[0, 0, 0, 1, 1, 1, 1]]), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    packed = known.sliding_window_causal_mask_function(2)
    if hasattr(known, "remap_positions_for_packed_sequence"):
        packed = known.remap_positions_for_packed_sequence(packed, positions)
    return {
        known.causal_mask_function: 9,
        known.bidirectional_mask_function: 9,
        known.sliding_window_causal_mask_function(3): 9,
        known.sliding_window_bidirectional_mask_function(2): 9,
        known.chunked_causal_mask_function(3, torch.tensor([1])): 7,
        known.and_masks(packed, known.packed_sequence_mask_function(ids)): 7,
    }


def _means_what_is_read(function: MaskFunction, length: int) -> bool:
    pattern = read(function)
    said = None if pattern is None else describe(pattern, (1, 1, 7, length))
    zero = torch.tensor(0)
    meant = function(zero, zero, torch.arange(7)[:, None], torch.arange(length)).expand(7, length)
    return said is not None and torch.equal(said.alive()[0, 0], meant)


class BandMask(Tensor):
    """The mask [B, 1, N, M] that eager attention adds to its scores, without its entries.

    Query i sees key j if low ≤ j − i ≤ high (None: no limit), keys[:, j], and, where a row holds several
    sequences, i and j are of one; or if entries say so. metattn sees that. Anything else sees a tensor of
    zeros and lowest numbers, as models expect it: operations on it take all N×M, and give ordinary tensors.
    What is written to it or to a view of it stays, as all its entries do from the first such operation on;
    but compiled code may not write to it.
    """

    keys: Tensor  # bool [1 or B, M]
    low: int | None
    high: int | None
    padded: bool  # whether keys may be False anywhere
    sequences: Tensor | None  # int64 [B, N] ids, never decreasing
    starts: Tensor | None  # int64 [sequences + 1]: where each starts among all B·N queries, and B·N
    longest: int  # of the sequences
    entries: Tensor | None  # bool [B, 1, N, M] of a pattern that is no band
    written: list[Tensor]  # [B, 1, N, M], where views may have been written to; one list for all aliases

    @staticmethod
    def __new__(
        cls, keys: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype, **numbers: Any
    ) -> BandMask:
        _, heads, n, m = shape
        made = Tensor._make_wrapper_subclass(
            cls, shape, strides=(heads * n * m, n * m, m, 1), dtype=dtype, device=keys.device
        )
        assert isinstance(made, BandMask)
        return made

    def __init__(
        self,
        keys: Tensor,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        *,
        low: int | None = None,
        high: int | None = None,
        padded: bool = False,
        sequences: Tensor | None = None,
        starts: Tensor | None = None,
        longest: int = 0,
        entries: Tensor | None = None,
        filled: Tensor | None = None,
    ) -> None:
        self.keys, self.low, self.high, self.padded = keys, low, high, padded
        self.sequences, self.starts, self.longest, self.entries = sequences, starts, longest, entries
        self.written = [] if filled is None else [filled]

    @property
    def filled(self) -> Tensor | None:
        return self.written[0] if self.written else None

    def __setitem__(self, index: Any, value: Any) -> None:
        _refuse_in_compiled_code("__setitem__")  # which writes to a view, where nothing shows it any more
        super().__setitem__(index, value)

    def alive(self) -> Tensor:
        """bool [B, 1, N, M], True = attends."""
        if self.entries is not None:
            return self.entries
        n, m = self.shape[2:]
        # counted, not arange(): where tensors are fake, what is made of one of them is fake as well
        i, j = (self.keys.new_ones(size, dtype=torch.int64).cumsum(0) - 1 for size in (n, m))
        distance = j - i[:, None]
        alive = self.keys[:, None, None, :]
        if self.low is not None:
            alive = alive & (distance >= self.low)
        if self.high is not None:
            alive = alive & (distance <= self.high)
        if self.sequences is not None:
            alive = alive & (self.sequences[:, None, :, None] == self.sequences[:, None, None, :])
        return alive.expand(self.shape)

    def dense(self) -> Tensor:
        """The numbers [B, 1, N, M]."""
        return self.written[0] if self.written else self._described()

    def _described(self) -> Tensor:
        alive = self.alive()
        zeros = torch.zeros_like(alive, dtype=self.dtype)
        return zeros.masked_fill(~alive, torch.finfo(self.dtype).min)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        said = f"{self.low} ≤ j − i ≤ {self.high}" if self.entries is None else "entries"
        if is_changed(self):
            return f"BandMask({list(self.shape)}, numbers)"
        several = "" if self.starts is None else f", {self.starts.numel() - 1} sequences"
        return f"BandMask({list(self.shape)}, {said}, padded={self.padded}{several})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        aten = torch.ops.aten
        if func in (aten.detach.default, aten.alias.default):
            return args[0]._alias()
        if func is aten.clone.default:
            return args[0]._to(args[0].device, args[0].dtype)
        if func is aten._to_copy.default and set(kwargs) <= {"device", "dtype", "layout", "non_blocking"}:
            dtype = kwargs.get("dtype") or args[0].dtype
            if dtype.is_floating_point:
                return args[0]._to(kwargs.get("device") or args[0].device, dtype)
        in_parts = func.decompose(*args, **kwargs)  # .to(), .contiguous() and such arrive in inference mode
        if in_parts is not NotImplemented:
            return in_parts
        written = []
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None:
                continue
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            masks = [leaf for leaf in tree_leaves(given) if isinstance(leaf, BandMask)]
            if masks and argument.alias_info.is_write:
                _refuse_in_compiled_code(str(func))
                if torch.Tag.inplace_view in func.tags:
                    raise RuntimeError(f"{func}: a BandMask cannot change its shape in place")
                written += masks
            for mask in masks:
                mask._fill()
        dense = tree_map_only(BandMask, BandMask.dense, (args, kwargs))
        result = func(*dense[0], **dense[1])
        return next((mask for mask in written if mask.filled is result), result)

    def _fill(self) -> None:
        """From here on, what is written to the entries or to views of them is not lost."""
        if self.written or torch.compiler.is_compiling():
            return
        with torch.inference_mode(self.is_inference()):
            dense = self._described()
        if type(dense) is Tensor:
            self.written.append(dense)

    def _alias(self) -> BandMask:
        """Another name of the same mask."""
        names, context = self.__tensor_flatten__()
        alias = self.__tensor_unflatten__(
            {name: getattr(self, name) for name in names}, context, self.shape, None
        )
        alias.written = self.written
        return alias

    def _to(self, device: torch.device, dtype: torch.dtype) -> BandMask:
        """A mask of its own."""
        names, context = self.__tensor_flatten__()
        inner = {name: getattr(self, name).to(device) for name in names}
        if not _has_other_values(self):
            inner.pop("filled", None)
        if "filled" in inner:
            inner["filled"] = inner["filled"].to(dtype, copy=True)
        context = tuple({**dict(context), "dtype": dtype}.items())
        return self.__tensor_unflatten__(inner, context, self.shape, None)

    # What torch.compile takes apart when a mask was made outside of what it compiles.

    def __tensor_flatten__(self) -> tuple[list[str], tuple[tuple[str, Any], ...]]:
        tensors = ("keys", "sequences", "starts", "entries", "filled")
        numbers = ("dtype", "low", "high", "padded", "longest")
        present = [name for name in tensors if getattr(self, name) is not None]
        return present, tuple((name, getattr(self, name)) for name in numbers)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: tuple[tuple[str, Any], ...], size: Any, stride: Any
    ) -> BandMask:
        everything: dict[str, Any] = {"shape": tuple(size), **inner, **dict(context)}
        return BandMask(**everything)


def _refuse_in_compiled_code(name: str) -> None:
    if torch.compiler.is_compiling():
        raise RuntimeError(f"{name}: a BandMask cannot be written to in compiled code; make a mask of it + 0")


def is_changed(mask: BandMask) -> bool:
    """Whether the description may not be true any more, or its numbers have derivatives."""
    if mask.requires_grad or _has_other_values(mask):
        return True
    dual = not torch.compiler.is_compiling() and forward_ad._current_level >= 0
    return dual and forward_ad.unpack_dual(mask).tangent is not None


def _has_other_values(mask: BandMask) -> bool:
    """In compiled code any that was written to or looked at."""
    if mask.filled is None:
        return False
    return not (readable(mask.filled) and torch.equal(mask.filled, mask._described()))


def describe(
    pattern: Pattern,
    shape: tuple[int, int, int, int],
    first_query: int = 0,
    first_key: int = 0,
    padding: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> BandMask | None:
    """The mask of a pattern; None where it has no such form.

    first_query, first_key: their places in the text. padding: bool [B, M], False = not to be seen.
    """
    batch, _, n, m = shape
    sequences = pattern.sequences
    if sequences is not None or pattern.chunk is not None:
        if n != m or first_query or first_key:
            return None
    elif pattern.remapped:
        return None
    if pattern.chunk is not None:
        size, first = pattern.chunk
        sequences = torch.div(torch.arange(n, device=device) - first[:, None], size, rounding_mode="floor")
    starts, longest = None, 0
    if sequences is not None:
        if not readable(sequences):
            return None
        sequences = sequences.to(device).expand(batch, n)
        changes = torch.ones_like(sequences, dtype=torch.bool)
        changes[:, 1:] = sequences.diff(dim=1) != 0
        starts = nn.functional.pad(changes.flatten().nonzero().flatten(), (0, 1), value=batch * n)
        longest = int(starts.diff().max())
        if len(starts) == batch + 1:
            sequences = starts = None
    padded = padding is not None and not (readable(padding) and bool(padding.all()))
    keys = padding if padded else torch.ones((), dtype=torch.bool, device=device).expand(1, m)
    assert keys is not None
    offset = first_query - first_key
    low, high = (None if side is None else side + offset for side in (pattern.low, pattern.high))
    return BandMask(
        keys,
        shape,
        dtype,
        low=low,
        high=high,
        padded=padded,
        sequences=sequences,
        starts=starts,
        longest=longest,
    )


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
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **_: Any,
) -> Tensor | None:
    """The mask [B, 1, N, M] of a call, as a BandMask.

    Where a graph is traced, in which none can be made, and for steps of a static cache: all entries; or None
    for a plain causal or full pattern of a model that knows torch's attention: its layers know which.

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
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
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
    pattern = read(mask_function)
    padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length].to(device, torch.bool, copy=True)
    found, shape = None, (batch_size, 1, q_length, kv_length)
    if pattern is not None and (padding is None or padding.shape[0] == batch_size):
        found = describe(pattern, shape, int(q_offset), kv_offset, padding, device, dtype)
    if found is None:
        filled = masking_utils.sdpa_mask(**arguments)
        every_key = filled.new_ones(()).expand(1, kv_length)
        found = BandMask(every_key, shape, dtype, entries=filled)
    return found


Kind = Literal["sdpa", "interface", "by itself"]


def kind_of_model(config: type) -> Kind:
    """How the models of a configuration class attend.

    "sdpa": masks of bool, or none, mean to them what they mean to torch's attention. "interface": they need
    masks of numbers. "by itself": they never call an attention function.
    """
    if config in _KINDS:
        return _KINDS[config]
    package = config.__module__.rpartition(".")[0] + ".modeling_"
    loaded = [module for name, module in sys.modules.items() if name.startswith(package)]
    models = [model for model in _subclasses(PreTrainedModel) if model.config_class is config]
    has_attention = any(
        isinstance(thing, type) and issubclass(thing, nn.Module) and "Attention" in name
        for module in loaded
        for name, thing in vars(module).items()
    )
    kind: Kind = "interface"
    if (
        package.startswith("transformers.models.")
        and has_attention
        and not any("ALL_ATTENTION_FUNCTIONS" in vars(module) for module in loaded)
    ):
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
