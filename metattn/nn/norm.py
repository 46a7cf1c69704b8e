"""Layer normalisation whose derivatives are right to any order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad

from metattn.nn.traced import traced_call
from metattn.problem import has_autocast

Dims = tuple[int, ...]


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm with exact derivatives of any order, in reverse and forward mode and under vmap.

    torch's own is wrong, and says nothing, in its third derivative, and in its second where autograd goes
    back through a gradient that vmap took (pytorch/functorch#534). Forward and first backward are torch's
    fused ones here too; what is differentiated further or by torch.func, compiled, exported or in several
    dtypes is made of elementary operations.
    Arguments, parameters and state dict are torch's; torch.jit.script takes torch's class only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[…, *normalized_shape] → the same. Errors: torch's, or ValueError and TypeError for them."""
        if isinstance(input, torch.fx.Proxy):  # a leaf of the graph, as torch's is
            leaf: Tensor = traced_call(self, (input,), {})
            return leaf
        shape = self.normalized_shape
        given = [t for t in (input, self.weight, self.bias) if t is not None]
        if input.is_nested:
            return super().forward(input)
        if (
            torch.compiler.is_compiling()  # or exporting, for derivatives that are taken where it runs
            or torch._C._get_tracing_state() is not None  # torch.jit.trace
            or torch._C._are_functorch_transforms_active()
            or forward_ad._current_level >= 0
            or any(t.dtype != input.dtype for t in given)
            or autocasts(input)
        ):
            return layer_norm(input, shape, self.weight, self.bias, self.eps)
        if not torch.is_grad_enabled() or not any(t.requires_grad for t in given):
            return super().forward(input)
        normed: Tensor = Fused.apply(input, shape, self.weight, self.bias, self.eps)
        return normed


class Fused(Function):
    """torch's forward and first backward; a backward that is differentiated is one of its formula."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shape: Dims, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        output: Tensor
        with torch._C.DisableTorchFunction():  # metattn.meta's inner loops refuse it, made by others
            output, mean, scale = torch.native_layer_norm(x, shape, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.shape, ctx.eps = shape, eps
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[place] for place in (0, 2, 3)]
        if not torch.is_grad_enabled():
            dx, dw, db = torch.ops.aten.native_layer_norm_backward(
                gradient, x, ctx.shape, mean, scale, weight, bias, wanted
            )
            return dx, None, dw, db, None
        dims = tuple(range(-len(ctx.shape), 0))
        normed, scale = standardized(x, dims, ctx.eps)
        gradient = widened(gradient)
        others = tuple(range(x.dim() - len(ctx.shape)))

        def summed(t: Tensor) -> Tensor:
            return t.sum(others) if others else t

        dx = dw = db = None
        if wanted[0]:
            g = gradient if weight is None else gradient * weight
            dx = scale * (g - g.mean(dims, keepdim=True) - normed * (g * normed).mean(dims, keepdim=True))
            dx = dx.to(x.dtype)
        if wanted[1]:
            dw = summed(gradient * normed).to(weight.dtype)
        if wanted[2]:
            db = summed(gradient).to(bias.dtype)
        return dx, None, dw, db, None


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch.nn.functional.layer_norm of elementary operations, rounded once.

    Raises: ValueError for shapes, TypeError for dtypes that torch refuses.
    """
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[-len(shape) :]) != shape:
        raise ValueError(f"input: expected shape [*, {str(list(shape))[1:-1]}], got {list(input.shape)}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected a floating dtype, got {input.dtype}")
    casts = autocasts(input)
    dtypes = (input.dtype, torch.float32) if input.dtype.itemsize == 2 else (input.dtype,)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(f"{name}: expected shape {list(shape)}, got {list(t.shape)}")
        if t is not None and t.dtype not in dtypes and not casts:
            raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {t.dtype}")
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"bias: expected {weight.dtype} as weight, got {bias.dtype}")
    normed, _ = standardized(input, tuple(range(-len(shape), 0)), eps)
    return affine(normed, weight, bias).to(torch.float32 if casts else input.dtype).contiguous()


def autocasts(x: Tensor) -> bool:
    """Whether autocast computes a norm in float32; on the CPU it leaves norms alone."""
    device = x.device.type
    return (
        device != "cpu"
        and x.dtype != torch.float64
        and has_autocast(device)
        and torch.is_autocast_enabled(device)
    )


def widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def standardized(x: Tensor, dims: Dims, eps: float) -> tuple[Tensor, Tensor]:
    """(x − mean)·scale over some dimensions and the scale, 1 / √(variance + eps), in float32 or float64."""
    x = widened(x)
    centred = x - x.mean(dims, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(dims, keepdim=True) + eps)
    return centred * scale, scale


def affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """weight·x + bias, where there are any."""
    x = x if weight is None else x * weight
    return x if bias is None else x + bias
