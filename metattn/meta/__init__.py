"""Meta-learners and inner loops, built on torch.func."""

from metattn.meta.adapt import adapt
from metattn.meta.compiled import Compiled
from metattn.meta.implicit import Implicit
from metattn.meta.inner import FirstOrder, Reverse
from metattn.meta.learner import AttentionMetaLearner
from metattn.meta.optimizers import SGD, Adam, InnerOptimizer, MetaSGD
from metattn.meta.stepwise import Checkpointed, Mixed
from metattn.meta.tasks import maml_loss, reptile_loss

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
    "Mixed",
    "Reverse",
    "adapt",
    "maml_loss",
    "reptile_loss",
]
