"""Attention pooling: a set becomes one vector, by weights that a linear layer scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metattn.functional import attention
from metattn.nn.sets import masked_set


class AttentionPooling(nn.Module):
    """Weighted mean of a set's points: w = softmax over points of Linear(features, 1)(x), out = Σ_p w_p x_p.

    That is attention with one learned query, the points as keys and values and scale 1, and it is computed
    so. The linear layer has no bias: the same number added to every score leaves a softmax as it is.

    Arguments: features, the size of a point; device, dtype, those of the weight ``score.weight``.
    """

    def __init__(
        self, features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.score = nn.Linear(features, 1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [batch, points, features] → [batch, features], twice differentiable.

        mask: bool [batch, points], True where there is a point; a set without any gives zeros.
        Errors: TypeError for an x that is no Tensor or a mask that is not bool; ValueError for another number
        of features, a mask that does not fit, and an x that is not 3-D: on [batch, features] the softmax
        over dimension 1 of the scores [batch, 1] would normalise a single number, so that every weight is 1
        and nothing is pooled.
        """
        x = masked_set(x, mask, "x", self.score.in_features)
        query = self.score.weight.expand(x.shape[0], 1, 1, -1)  # [batch, 1 head, 1 query, features]
        points = x.unsqueeze(1)  # [batch, 1 head, points, features]
        allowed = None if mask is None else mask[:, None, None, :]
        return attention(query, points, points, mask=allowed, scale=1.0)[:, 0, 0]

    def extra_repr(self) -> str:
        return f"features={self.score.in_features}"
