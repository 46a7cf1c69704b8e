"""A model's attention modules and norms become metattn's, or torch.nn's again."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from metattn.nn import norm
from metattn.nn.multihead import MultiheadAttention

Classes = Mapping[type[torch.nn.Module], type[torch.nn.Module]]

ATTENTION: Classes = {torch.nn.MultiheadAttention: MultiheadAttention}
NORMS: Classes = {
    torch.nn.LayerNorm: norm.LayerNorm,
    torch.nn.BatchNorm1d: norm.BatchNorm1d,
    torch.nn.BatchNorm2d: norm.BatchNorm2d,
    torch.nn.BatchNorm3d: norm.BatchNorm3d,
    torch.nn.InstanceNorm1d: norm.InstanceNorm1d,
    torch.nn.InstanceNorm2d: norm.InstanceNorm2d,
    torch.nn.InstanceNorm3d: norm.InstanceNorm3d,
}
# all that go through torch's operators with wrong derivatives: SyncBatchNorm and the lazy ones too
INEXACT = (torch.nn.LayerNorm, _BatchNorm, _InstanceNorm)
EXACT = tuple(NORMS.values())


def replace_attention(model: torch.nn.Module, *, norms: bool | None = None) -> int:
    """Make every torch.nn.MultiheadAttention in a model, the model itself too, metattn's; returns how many.

    The module objects stay the ones they were and only change their class, so that everything is kept: the
    very Parameter objects (an optimizer goes on as it was), device, dtype, training mode, requires_grad,
    hooks and their handles, parametrizations, and modules that several parents share. A second call returns
    0; :func:`restore_attention` undoes it.

    A subclass of torch.nn.MultiheadAttention (torch.ao's quantizable one, say), or one whose ``forward`` was
    replaced on the instance, has a behaviour of its own that would be lost: it is left as it is, with a
    warning that names it. Where nothing is found a warning says what looks like attention, and by which way
    metattn reaches that: :class:`sdpa_override` for modules that call F.scaled_dot_product_attention.

    torch's norms beside the attention have derivatives that are wrong in places (:func:`replace_norms`).
    ``norms=True`` exchanges them too; they are not counted. ``norms=False`` leaves them. Where neither is
    said and there are any, they are left with a warning.

    In evaluation without gradients torch.nn.TransformerEncoderLayer computes everything, attention included,
    in one fused call of its own and asks no attention module: a query that sees no key is NaN there, as in
    torch, and forward-mode derivatives find no formula (torch says so). After
    ``torch.backends.mha.set_fastpath_enabled(False)`` it asks its attention module always.

    Errors: TypeError for what is no torch.nn.Module.
    """
    exchanged = _exchange(model, ATTENTION, "replace_attention")
    if norms:
        _exchange(model, NORMS, "replace_attention")
    elif norms is None and exchanged:
        _warn_of_norms(model)
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


def restore_attention(model: torch.nn.Module, *, norms: bool = False) -> int:
    """Make every metattn.nn.MultiheadAttention in a model torch.nn's; returns how many.

    The way back from :func:`replace_attention`, which keeps as much: for a model that is pickled whole and
    loaded where there is no metattn, or handed to a tool that looks for torch's class, as torch.ao's
    quantization does. Modules that were built as metattn's are exchanged too; dropout draws torch's masks
    again. What has a behaviour of its own is left as there, with a warning. ``norms=True`` makes the norms
    torch.nn's too, as :func:`restore_norms` does; they are not counted.

    Errors: TypeError for what is no torch.nn.Module.
    """
    exchanged = _exchange(model, _turned(ATTENTION), "restore_attention")
    if norms:
        _exchange(model, _turned(NORMS), "restore_attention")
    return exchanged


def replace_norms(model: torch.nn.Module) -> int:
    """Make every torch.nn.LayerNorm, BatchNorm and InstanceNorm in a model metattn's; returns how many.

    torch's take the mean and the scale that they saved for constants. Second derivatives are wrong without
    a sign, by tens of percents, where reverse or forward mode goes over forward mode; third ones are so
    everywhere. :class:`metattn.nn.LayerNorm` and the like have derivatives that are exact to any order, and
    torch's fused operators where these are right. torch.nn.RMSNorm and GroupNorm are right and left alone.

    As with :func:`replace_attention` modules only change their class: parameters, buffers, state dict, hooks,
    training mode, device and dtype are kept, with or without weights and biases. A second call returns 0;
    :func:`restore_norms` undoes it. Subclasses, SyncBatchNorm, lazy modules before their first call, and
    instances whose ``forward`` was replaced are left as they are, with a warning that names them. What calls
    ``torch.nn.functional.layer_norm`` itself is not found.

    Errors: TypeError for what is no torch.nn.Module.
    """
    return _exchange(model, NORMS, "replace_norms")


def restore_norms(model: torch.nn.Module) -> int:
    """Make every LayerNorm, BatchNorm and InstanceNorm of metattn in a model torch.nn's; returns how many.

    The way back from :func:`replace_norms`, for what :func:`restore_attention` is for. Modules that were
    built as metattn's, the blocks' of metattn.nn too, are exchanged as well.

    Errors: TypeError for what is no torch.nn.Module.
    """
    return _exchange(model, _turned(NORMS), "restore_norms")


def _turned(classes: Classes) -> Classes:
    return {new: old for old, new in classes.items()}


def _exchange(model: torch.nn.Module, classes: Classes, caller: str) -> int:
    """Exchange what is of these very classes; warn of what is of others of the kind, once for a class."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    of_attention = MultiheadAttention in (*classes, *classes.values())
    ours = (MultiheadAttention,) if of_attention else EXACT
    theirs = (torch.nn.MultiheadAttention,) if of_attention else INEXACT
    from_ours = set(classes) == set(ours)
    exchanged = 0
    left: dict[type, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, theirs) or isinstance(module, ours) != from_ours:
            continue
        old = parametrize.type_before_parametrizations(module)
        if old in classes and "forward" not in vars(module):
            _set_class(module, classes[old])
            exchanged += 1
        else:
            left.setdefault(type(module), []).append(name or "the model")
    package = "metattn" if from_ours else "torch"
    kind = (
        f"a subclass of {package}.nn.MultiheadAttention" if of_attention else "a norm of a class of its own"
    )
    for cls, names in left.items():
        more = f", as {len(names) - 1} more," if len(names) > 1 else ""
        warnings.warn(
            f"{caller}: {names[0]} ({cls.__name__}){more} is {kind} or has its forward replaced, and was "
            "left as it is",
            stacklevel=3,
        )
    return exchanged


def _warn_of_norms(model: torch.nn.Module) -> None:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, INEXACT) and not isinstance(module, EXACT)
    ]
    if found:
        name, module = found[0]
        warnings.warn(
            f"replace_attention: the model has {len(found)} of torch's norms, {name or 'the model'} "
            f"({type(module).__name__}) the first. Their second derivatives are wrong in reverse or forward "
            "mode over forward mode, and their third ones in every mode; norms=True makes them exact, "
            "norms=False leaves them without this warning",
            stacklevel=3,
        )


def _set_class(module: torch.nn.Module, new: type[torch.nn.Module]) -> None:
    """Also where torch.nn.utils.parametrize gave the module a class of its own, with properties."""
    if parametrize.is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__")}
        new = type(type(module).__name__, (new,), own)
    module.__class__ = new
