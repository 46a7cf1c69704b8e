"""What tests of the learner share: one of them, its tasks' sizes, its meta-gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metattn.meta import AttentionMetaLearner

TASKS, POINTS = 3, 6
Samples = tuple[Tensor, Tensor]


def learner(pooling: str | None = None, seed: int = 0) -> AttentionMetaLearner:
    torch.manual_seed(seed)
    return AttentionMetaLearner(2, 8, 3, num_heads=2, pooling=pooling, dtype=torch.float64)


def meta_gradient(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, values = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, values, materialize_grads=True), strict=True))
