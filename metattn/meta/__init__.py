"""Meta-learners and inner loops, built on torch.func."""

from metattn.meta.adapt import adapt
from metattn.meta.checkpointed import Checkpointed
from metattn.meta.compiled import Compiled
from metattn.meta.implicit import Implicit
from metattn.meta.inner_loop import FirstOrder, Reverse
from metattn.meta.learner import AttentionMetaLearner
from metattn.meta.losses import maml_loss, reptile_loss
from metattn.meta.optimizers import SGD, Adam, InnerOptimizer, MetaSGD

__all__ = [
    "SGD",
    "Adam",
    "AttentionMetaLearner",
    "Checkpointed",
    "Compiled",
    "FirstOrder",
    "Implicit",
    "InnerOptimizer",
    "MetaSGD",
    "Reverse",
    "adapt",
    "maml_loss",
    "reptile_loss",
]
