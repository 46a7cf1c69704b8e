"""Making metattn an attention implementation of transformers."""

from __future__ import annotations

import re

from transformers import AttentionInterface, AttentionMaskInterface

from metattn.integrations.transformers import masks
from metattn.integrations.transformers.attention import attend
from metattn.integrations.transformers.masks import mask

NAME = "metattn"


def register(name: str = NAME) -> str:
    """Makes `name` an attention implementation of transformers; returns the name. Again changes nothing.

    A model's attention is metattn's after `model.set_attn_implementation(name)`, or if it was made with
    attn_implementation=name: forward and gradients of both orders fused, higher ones by the reference, with
    grouped heads, softcap, sinks, position biases, dropout, windows, padding, packed sequences and caches.

    Raises:
        TypeError: a name that is no str.
        ValueError: a name that is taken, or that transformers would take for another implementation's.
        NotImplementedError: a version of transformers whose masks are not those that metattn knows.

    Source: transformers' AttentionInterface and AttentionMaskInterface.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected a str, got {type(name).__name__}")
    if not name.isidentifier() or re.search("flash|sdpa|flex|eager", name):
        raise ValueError(
            "name: expected an identifier without flash, sdpa, flex or eager, which transformers takes for "
            f"others, got {name!r}"
        )
    for interface, function in ((AttentionInterface(), attend), (AttentionMaskInterface(), mask)):
        if interface.get(name, function) is not function:
            raise ValueError(f"name: expected one that is free, got {name!r}, which is {interface[name]!r}")
    masks.check()
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask)
    return name
