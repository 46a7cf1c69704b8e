"""replace_attention: every torch.nn.MultiheadAttention of a model becomes metattn's, in place."""

from __future__ import annotations

import warnings

import torch

from metattn.nn.multihead import MultiheadAttention


def replace_attention(model: torch.nn.Module) -> int:
    """Make every torch.nn.MultiheadAttention in a model, the model itself too, metattn's; returns how many.

    The module objects stay the ones they were and only change their class, so that everything is kept: the
    very Parameter objects (an optimizer goes on as it was), device, dtype, training mode, requires_grad,
    hooks and their handles, and modules that several parents share. A second call returns 0.

    A subclass of torch.nn.MultiheadAttention, or one whose ``forward`` was replaced on the instance, has a
    behaviour of its own that would be lost: it is left as it is, with a warning that names it.

    In evaluation without gradients torch.nn.TransformerEncoderLayer computes everything, attention included,
    in one fused call of its own and asks no attention module; nothing is to be differentiated then. Only
    forward-mode derivatives find no formula there (torch says so): call
    ``torch.backends.mha.set_fastpath_enabled(False)`` for them.

    Errors: TypeError for what is no torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    swapped = 0
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention) or not isinstance(module, torch.nn.MultiheadAttention):
            continue
        if type(module) is torch.nn.MultiheadAttention and "forward" not in vars(module):
            module.__class__ = MultiheadAttention
            swapped += 1
        else:
            warnings.warn(
                f"replace_attention: {name or 'the model'} ({type(module).__name__}) is a subclass of "
                "torch.nn.MultiheadAttention or has its forward replaced, and was left as it is",
                stacklevel=2,
            )
    return swapped
