"""replace_attention, restore_attention: a model's attention modules become metattn's, or torch.nn's again."""

from __future__ import annotations

import re
import warnings

import torch
from torch.nn.utils import parametrize

from metattn.nn.multihead import MultiheadAttention


def replace_attention(model: torch.nn.Module) -> int:
    """Make every torch.nn.MultiheadAttention in a model, the model itself too, metattn's; returns how many.

    The module objects stay the ones they were and only change their class, so that everything is kept: the
    very Parameter objects (an optimizer goes on as it was), device, dtype, training mode, requires_grad,
    hooks and their handles, parametrizations, and modules that several parents share. A second call returns
    0; :func:`restore_attention` undoes it.

    A subclass of torch.nn.MultiheadAttention (torch.ao's quantizable one, say), or one whose ``forward`` was
    replaced on the instance, has a behaviour of its own that would be lost: it is left as it is, with a
    warning that names it. Where nothing is found a warning says what looks like attention, and by which way
    metattn reaches that: :class:`sdpa_override` for modules that call F.scaled_dot_product_attention.

    In evaluation without gradients torch.nn.TransformerEncoderLayer computes everything, attention included,
    in one fused call of its own and asks no attention module: a query that sees no key is NaN there, as in
    torch, and forward-mode derivatives find no formula (torch says so). After
    ``torch.backends.mha.set_fastpath_enabled(False)`` it asks its attention module always.

    Errors: TypeError for what is no torch.nn.Module.
    """
    exchanged = _exchange(model, torch.nn.MultiheadAttention, MultiheadAttention, "replace_attention")
    if exchanged == 0 and not any(isinstance(each, torch.nn.MultiheadAttention) for each in model.modules()):
        warnings.warn(_seen(model), stacklevel=2)
    return exchanged


def _seen(model: torch.nn.Module) -> str:
    """What a model without torch.nn.MultiheadAttention has of attention, and how to reach that."""
    said = f"replace_attention: {type(model).__name__} has no torch.nn.MultiheadAttention"
    if hasattr(model, "set_attn_implementation"):
        return (
            f"{said}; it is a model of transformers: register() of metattn.integrations.transformers, then "
            "model.set_attn_implementation('metattn')"
        )
    calling, named = (
        [(name, each) for name, each in model.named_modules() if test(each)]
        for test in (_calls_sdpa, _is_named)
    )
    if calling:
        return (
            f"{said}; {_list(calling)} call F.scaled_dot_product_attention: run them within sdpa_override()"
        )
    if named:
        return f"{said}; {_list(named)} have a formula of their own: call metattn.attention in it"
    return f"{said}, nor anything called attention"


def _calls_sdpa(module: torch.nn.Module) -> bool:
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    return "scaled_dot_product_attention" in names


def _is_named(module: torch.nn.Module) -> bool:
    return re.search("attention|attn", type(module).__name__, re.IGNORECASE) is not None


def _list(modules: list[tuple[str, torch.nn.Module]]) -> str:
    first = [f"{name or 'the model'} ({type(module).__name__})" for name, module in modules[:3]]
    return ", ".join(first) + (f" and {len(modules) - 3} more" if len(modules) > 3 else "")


def restore_attention(model: torch.nn.Module) -> int:
    """Make every metattn.nn.MultiheadAttention in a model torch.nn's; returns how many.

    The way back from :func:`replace_attention`, which keeps as much: for a model that is pickled whole and
    loaded where there is no metattn, or handed to a tool that looks for torch's class, as torch.ao's
    quantization does. Modules that were built as metattn's are exchanged too; dropout draws torch's masks
    again. What has a behaviour of its own is left as there, with a warning.

    Errors: TypeError for what is no torch.nn.Module.
    """
    return _exchange(model, MultiheadAttention, torch.nn.MultiheadAttention, "restore_attention")


def _exchange(
    model: torch.nn.Module,
    old: type[torch.nn.MultiheadAttention],
    new: type[torch.nn.MultiheadAttention],
    caller: str,
) -> int:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    exchanged = 0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.MultiheadAttention):
            continue
        if isinstance(module, MultiheadAttention) != (old is MultiheadAttention):
            continue
        if parametrize.type_before_parametrizations(module) is old and "forward" not in vars(module):
            _set_class(module, new)
            exchanged += 1
        else:
            package = "metattn" if old is MultiheadAttention else "torch"
            warnings.warn(
                f"{caller}: {name or 'the model'} ({type(module).__name__}) is a subclass of "
                f"{package}.nn.MultiheadAttention or has its forward replaced, and was left as it is",
                stacklevel=3,
            )
    return exchanged


def _set_class(module: torch.nn.Module, new: type[torch.nn.MultiheadAttention]) -> None:
    """Also where torch.nn.utils.parametrize gave the module a class of its own, with properties."""
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        new = type(type(module).__name__, (new,), own)
    module.__class__ = new
