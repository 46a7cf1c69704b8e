"""Meta-learners and inner loops, built on torch.func."""

from metattn.meta.learner import AttentionMetaLearner
from metattn.meta.maml import adapt, maml_loss

__all__ = ["AttentionMetaLearner", "adapt", "maml_loss"]
