"""vmap of a map: the mapped dimension is folded into the batch, and comes back in what the map gives.

Dense tensors: [X, B, …] → [X·B, …]. Packed sequences: [1, H, total, …] mapped → [1, H, X·total, …], and X
times as many sequences. Nothing is copied that lies in memory as the folded tensor would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metattn.layout import Arguments, Cotangents, Layout, Needs
from metattn.problem import Constants, Primals, Results

PER_HEAD = ("bias", "sinks", "slopes")  # these have a batch dimension of 1 where one serves all


class Fold:
    """The tensors of a call of which some have a dimension in front that is mapped over, `size` long.

    dims: the mapped dimension of each tensor, None where it has none. Raises NotImplementedError for
    cu_seqlens that are mapped.
    """

    def __init__(
        self, layout: Layout, size: int, tensors: Sequence[Any], dims: Sequence[Any], needs: Needs | None
    ) -> None:
        self.size = size
        self.layout = layout
        self.dims: Any = layout.split(dims)
        given = layout.split(tensors)
        if self.dims.constants.cu_q is not None or self.dims.constants.cu_k is not None:
            raise NotImplementedError(
                "cu_seqlens: expected the same for every example of a vmap, got mapped ones"
            )
        self.packed = given.constants.cu_q is not None
        self.axis = 2 if self.packed else 0
        shapes: list[Any] = [
            _example_shape(*each) for each in zip(given.primals, self.dims.primals, strict=True)
        ]
        self.primals = Primals(*shapes)  # of one example
        cu_q = given.constants.cu_q
        self.batch: Any = self.primals.q[0] if cu_q is None else cu_q.shape[0] - 1
        self.needs = dict(zip(Primals._fields, needs or (False,) * len(Primals._fields), strict=True))
        self.given = self._folded(given)

    def _folded(self, given: Arguments) -> Arguments:
        dims = self.dims
        # one bias, or row of sinks or slopes, stays one where it serves all; a gradient or a tangent needs
        # each its own
        alone = {
            name: not self.needs[name]
            and all(
                x is None or (dim is None and x.shape[0] == 1)
                for x, dim in (
                    (getattr(given.primals, name), getattr(dims.primals, name)),
                    (getattr(given.tangents, name), getattr(dims.tangents, name)),
                )
            )
            for name in PER_HEAD
        }
        return Arguments(
            self._primals(given.primals, dims.primals, alone),
            self._constants(given.constants, dims.constants),
            Results(*map(self._row, given.results, dims.results)),  # type: ignore[arg-type]
            Cotangents(*map(self._row, given.cotangents, dims.cotangents)),
            self._primals(given.tangents, dims.tangents, alone),
            Results(*map(self._row, given.results_t, dims.results_t)),  # type: ignore[arg-type]
        )

    def _primals(self, primals: Primals, dims: Primals, alone: dict[str, bool]) -> Primals:
        return Primals(
            *map(self._row, primals[:3], dims[:3]),  # type: ignore[arg-type]
            **{  # type: ignore[arg-type]
                name: self._shared(getattr(primals, name), getattr(dims, name), alone[name])
                for name in PER_HEAD
            },
        )

    def _constants(self, constants: Constants, dims: Any) -> Constants:
        mask, rng, cu_q, cu_k = constants
        return Constants(
            self._shared(mask, dims.mask, _serves_all(mask, dims.mask)),
            self._shared(rng, dims.rng, False),
            self._sequences(cu_q, self.primals.q),
            self._sequences(cu_k, self.primals.k),
        )

    def _row(self, x: Tensor | None, dim: int | None) -> Tensor | None:
        """q, k, v, o, lse and what is shaped like them."""
        if x is None:
            return None
        if dim is not None:
            in_place = x if dim == self.axis else x.movedim(dim, self.axis)
            return _merged(in_place, self.axis)
        tokens_first = x.movedim(
            self.axis, 0
        )  # in memory, where it has to be copied: as packed callers have it
        return _merged(tokens_first.expand(self.size, *tokens_first.shape), 0).movedim(0, self.axis)

    def _shared(self, x: Tensor | None, dim: int | None, alone: bool) -> Tensor | None:
        """bias, sinks, slopes, mask, rng: the first dimension is the batch or 1."""
        if x is None or alone:
            return x
        x = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
        if x.shape[0] == x.shape[1] == 1:  # one for all examples: no copy
            return x[0].expand(self.size * self.batch, *x.shape[2:])
        return _merged(x.expand(self.size, self.batch, *x.shape[2:]), 0)

    def _sequences(self, cu: Tensor | None, example: Any) -> Tensor | None:
        """The offsets of every example's sequences, one example after the other."""
        if cu is None:
            return None
        tokens = example[2]
        first = torch.arange(self.size, device=cu.device, dtype=cu.dtype) * tokens
        end = torch.full((1,), self.size * tokens, device=cu.device, dtype=cu.dtype)
        return torch.cat([_merged(cu[:-1] + first.unsqueeze(1), 0), end])

    def unfold(self, found: Sequence[Tensor]) -> tuple[list[Tensor], list[int | None]]:
        """What the map's operator gave, with the mapped dimension back, and where that is.

        Tensors without elements that stand for nothing have none.
        """
        tensors: list[Tensor] = list(found)
        places: list[int | None] = [None] * len(found)
        start = 0
        if self.layout.gives_results:
            for index in range(3):
                if tensors[index].dim() > 1:
                    tensors[index], places[index] = self._result(index, tensors[index])
            start = 3
        if self.layout.gives_gradients:
            for index, (name, example) in enumerate(self.primals._asdict().items(), start):
                if not self.needs[name]:
                    continue
                if name in PER_HEAD:
                    tensors[index], places[index] = self._of_shared(tensors[index], example), 0
                else:
                    tensors[index], places[index] = self._rows(tensors[index], example), self.axis
        return tensors, places

    def _result(self, index: int, x: Tensor) -> tuple[Tensor, int]:
        """o, lse or o_lo; each example's laid out as by a call of its own, as forward mode asks."""
        rows = self._rows(x, self.primals.q)
        # not laid out as q, but contiguous
        if self.packed and (index == 1 or list(x.shape[3:]) != self.primals.q[3:]):
            return rows.movedim(self.axis, 0).contiguous(), 0
        return rows, self.axis

    def _rows(self, x: Tensor, example: Any) -> Tensor:
        return _parted(x, self.axis, self.size, example[self.axis])

    def _of_shared(self, x: Tensor, example: Any) -> Tensor:
        x = _parted(x, 0, self.size, self.batch)
        return x.sum(1, keepdim=True) if example[0] == 1 and self.batch != 1 else x


# Torch's older vmap, which may be around this one, has rules for reshape, none for flatten and unflatten.


def _merged(x: Tensor, dim: int) -> Tensor:
    """Two neighbouring dimensions as one."""
    shape = x.shape
    return x.reshape(*shape[:dim], shape[dim] * shape[dim + 1], *shape[dim + 2 :])


def _parted(x: Tensor, dim: int, outer: Any, inner: Any) -> Tensor:
    """A dimension as two."""
    return x.reshape(*x.shape[:dim], outer, inner, *x.shape[dim + 1 :])


def _example_shape(x: Tensor | None, dim: Any) -> Any:
    if x is None:
        return None
    shape = list(x.shape)
    if dim is not None:
        del shape[dim]
    return shape


def _serves_all(x: Tensor | None, dim: int | None) -> bool:
    return x is None or (dim is None and x.shape[0] == 1)
