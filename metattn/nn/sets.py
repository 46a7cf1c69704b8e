"""What all modules over sets ask of their input: [batch, points, features], and a mask of points."""

from __future__ import annotations

import torch
from torch import Tensor


def require_set(x: Tensor, name: str, features: int) -> None:
    """Refuse what is not [batch, points, features], and say why a matrix will not do."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(x).__name__}")
    if x.dim() == 2:
        raise ValueError(
            f"{name}: expected a set [batch, points, features], got a 2-D tensor {list(x.shape)}. Attention "
            "weighs the points of a set against each other; on [batch, features] a row's softmax would run "
            "over a single number, which gives 1 whatever the number: every weight would be 1. Pass "
            f"{name}.unsqueeze(0) if the rows are the points of one set, {name}.unsqueeze(1) if each "
            "is a set of one point."
        )
    if x.dim() != 3:
        raise ValueError(f"{name}: expected a set [batch, points, features], got {x.dim()}-D {list(x.shape)}")
    if x.shape[-1] != features:
        raise ValueError(f"{name}: expected {features} features in the last dimension, got {list(x.shape)}")


def masked_set(x: Tensor, mask: Tensor | None, name: str, features: int, mask_name: str = "mask") -> Tensor:
    """The set, checked, with zeros where the mask says there is no point.

    What stood there may be NaN, and 0·NaN would reach the gradients of parameters.
    """
    require_set(x, name, features)
    if mask is None:
        return x
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{mask_name}: expected a bool Tensor, True = a point, got {came}")
    if mask.shape != x.shape[:2]:
        raise ValueError(f"{mask_name}: expected shape {list(x.shape[:2])}, got {list(mask.shape)}")
    return x.masked_fill(~mask.unsqueeze(-1), 0.0)
