"""A mask described by a few numbers and a mask of keys, which is a filled-in tensor to everybody else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves, tree_map_only

from metattn.problem import readable


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
