"""What the tests of transformers' models and those of their masks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import masking_utils

from benchmarks.transformers_models import SMALL

N = SMALL.length
PACKED = torch.tensor([[*range(5), *range(8), *range(3)], [*range(2), *range(14)]])  # positions


def padding(side: str, length: int = N) -> Tensor:
    """[2, length] ones and zeros."""
    keep = torch.ones(2, length, dtype=torch.int64)
    if side in ("left", "both"):
        keep[0, :3] = 0
    if side in ("right", "both"):
        keep[1, -4:] = 0
    if side == "holes":
        keep[:, 1:4] = 0
        keep[1, 7] = 0
    return keep


def packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The mask function within each of PACKED's sequences, as this version of transformers puts it."""
    ids = masking_utils.find_packed_sequence_indices(PACKED)
    if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
        function = masking_utils.remap_positions_for_packed_sequence(function, PACKED)
    return masking_utils.and_masks(function, masking_utils.packed_sequence_mask_function(ids))


class Layer(nn.Module):
    """What an attention function is told of a layer."""

    def __init__(self, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.eval()


def textbook(
    q: Tensor, k: Tensor, v: Tensor, numbers: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """softmax(qkᵀ/√d + numbers) v; rows of lowest numbers alone give zeros."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if numbers is not None:
        scores = scores + numbers
    dead = (scores < -1e30).all(-1, keepdim=True)
    if sinks is not None:
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    return (scores.softmax(-1)[..., : k.shape[2]] @ v).masked_fill(dead, 0.0)
