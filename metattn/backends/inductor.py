"""What Inductor calls in place of an operator: its bare twin, without derivatives.

Where Inductor's code runs, the derivatives were taken when its graph was made. The operator would look for
them again at every call, in Python. The twin in the namespace NAME_bare is the same kernel; a plain call
(metattn.backends.plain) has a twin of fewer arguments.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.compiler import config as compiler_config
from torch.utils._pytree import tree_leaves

from metattn import installation
from metattn.backends import plain
from metattn.layout import MAPS, Layout

Lowering = Callable[..., Any]
# An operator's arguments as its plain twin takes them; None where the call has options.
Shorten = Callable[[Layout, Sequence[Any]], "tuple[Any, ...] | None"]

_prepared: set[str] = set()


def bare(namespace: str) -> str:
    """The namespace of the twins."""
    return f"{namespace}_bare"


def tag_caches() -> None:
    """Adds the digest to the key: at import, before a compile begins, and where somebody took it off."""
    tag = f"metattn {installation.digest()};"
    if tag not in compiler_config.cache_key_tag:
        compiler_config.cache_key_tag += tag


def prepare(namespace: str, shorten: Shorten) -> None:
    """Tells Inductor, once it is there: asked whenever an operator is traced, for its import takes seconds.

    Its table of lowerings is not public. Without it the operators are called themselves, and the results are
    the same. Replaced by: a lowering that torch.library registers.
    """
    tag_caches()
    lowering: Any = sys.modules.get("torch._inductor.lowering")
    if namespace in _prepared or not hasattr(lowering, "fallback_handler"):
        return
    _prepared.add(namespace)
    twins = getattr(torch.ops, bare(namespace))

    def lowering_of(name: str) -> Lowering:
        twin = getattr(twins, name).default
        return _unchecked(lowering.fallback_handler(twin, add_to_fallback_set=False))

    for name, layout in MAPS.items():
        lowered = lowering_of(name)
        if namespace == plain.NAMESPACE:
            lowered = _shortened(layout, lowered, lowering_of(plain.PREFIX + name), shorten)
        lowering.lowerings[getattr(getattr(torch.ops, namespace), name).default] = lowered


def _unchecked(handler: Lowering) -> Lowering:
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


def _shortened(layout: Layout, full: Lowering, short: Lowering, shorten: Shorten) -> Lowering:
    """The plain twin's call where it serves, else the full one's."""
    places = set(plain.PLACES[layout.name])

    def lowered(*arguments: Any, **more: Any) -> Any:
        graph = sys.modules["torch._inductor.virtualized"].V.graph
        q = arguments[0]
        serves = (
            not more
            and q.get_device().type == "cpu"
            and q.get_dtype() in plain.DTYPES
            and not graph.cpp_wrapper  # what is packaged calls operators of public schemas alone
            and _used(graph.current_node) <= places
        )
        shortened = shorten(layout, arguments) if serves else None
        if shortened is None:
            return full(*arguments, **more)
        return plain.spread(layout, short(*shortened))

    return lowered


def _used(node: torch.fx.Node) -> set[Any]:
    """Which of a call's results the graph uses; None among them where it uses all at once."""
    return {user.args[1] if user.target is operator.getitem else None for user in node.users}
