"""What Inductor calls in place of an operator: its bare twin, without derivatives.

Where Inductor's code runs, the derivatives were taken when its graph was made. The operator would look for
them again at every call, in Python. The twin in the namespace NAME_bare is the same kernel.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from metattn.layout import MAPS

_prepared: set[str] = set()


def bare(namespace: str) -> str:
    """The namespace of the twins."""
    return f"{namespace}_bare"


def prepare(namespace: str) -> None:
    """Tells Inductor, once it is there: asked whenever an operator is traced, for its import takes seconds.

    Its table of lowerings is not public. Without it the operators are called themselves, and the results are
    the same. Replaced by: a lowering that torch.library registers.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if namespace in _prepared or not hasattr(lowering, "fallback_handler"):
        return
    _prepared.add(namespace)
    for name in MAPS:
        operator = getattr(getattr(torch.ops, namespace), name).default
        twin = getattr(getattr(torch.ops, bare(namespace)), name).default
        handler = lowering.fallback_handler(twin, add_to_fallback_set=False)  # type: ignore[union-attr]
        lowering.lowerings[operator] = _unchecked(handler)  # type: ignore[union-attr]


def _unchecked(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The same call without Inductor's checks of its results' strides and alignment.

    In small calls they can be felt, and what they check is tested: fakes have the real strides.
    """

    def lowered(*arguments: Any, **more: Any) -> Any:
        results = handler(*arguments, **more)
        for result in tree_leaves(results):
            output: Any = getattr(getattr(result, "data", None), "data", None)
            if hasattr(output, "skip_size_stride_alignment_checks"):
                output.skip_size_stride_alignment_checks = True
        return results

    return lowered
