"""torch's normalisations whose derivatives are wrong in places, with derivatives right to any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from metattn.nn.traced import refuse_script, traced_call
from metattn.problem import has_autocast
from metattn.torch_internals import recorded_below, transformed

Dims = tuple[int, ...]
Statistics = tuple[Tensor, Tensor | None]  # running mean and variance


class _Unscripted(nn.Module):
    """What all of these share."""

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self, "restore_norms")


class LayerNorm(_Unscripted, nn.LayerNorm):
    """torch.nn.LayerNorm with exact derivatives of any order, in reverse and forward mode and under vmap.

    torch's own is wrong, and says nothing, in the second derivative where reverse or forward mode goes over
    forward mode, or where autograd goes back through a gradient that vmap took (pytorch/functorch#534), and
    in the third. Forward and first backward are torch's fused ones here too; what is differentiated further
    or by torch.func, compiled, exported or in several dtypes is made of elementary operations.
    Arguments, parameters and state dict are torch's; torch.jit.script takes torch's class only.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[…, *normalized_shape] → the same. Errors: torch's, or ValueError and TypeError for them."""
        if isinstance(input, torch.fx.Proxy):  # a leaf of the graph, as torch's is
            leaf: Tensor = traced_call(self, (input,), {})
            return leaf
        shape = self.normalized_shape
        if input.is_nested:
            return super().forward(input)
        mixed = any(t is not None and t.dtype != input.dtype for t in (self.weight, self.bias))
        if elementary() or mixed or autocasts(input):
            return layer_norm(input, shape, self.weight, self.bias, self.eps)
        if not differentiated(input, self.weight, self.bias):
            return super().forward(input)
        normed: Tensor = Fused.apply(input, shape, self.weight, self.bias, self.eps)
        return normed


class _ByBatch(_Unscripted, _BatchNorm):
    """What the exact batch normalisations share."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C] or [B, C, …] → the same. Errors: torch's, or ValueError and TypeError for them."""
        if isinstance(input, torch.fx.Proxy):
            leaf: Tensor = traced_call(self, (input,), {})
            return leaf
        weight, bias = self.weight, self.bias
        exactly = elementary()
        by_running_statistics = not self.training and self.running_mean is not None
        is_torchs = by_running_statistics or input.numel() == 0
        if is_torchs or not (exactly or differentiated(input, weight, bias)):
            return super().forward(input)
        self._check_input_dim(input)
        check_channels(input, self.num_features, weight, bias, input.numel() // max(input.shape[1], 1))
        statistics, momentum = None, self.momentum
        if self.training and self.track_running_stats and self.running_mean is not None:
            statistics = self.running_mean, self.running_var
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                if momentum is None:  # the plain average of all batches
                    momentum = 1 / float(self.num_batches_tracked)
        return batch_norm(input, weight, bias, statistics, momentum or 0.0, self.eps, exactly)


class BatchNorm1d(_ByBatch, nn.BatchNorm1d):
    """torch.nn.BatchNorm1d with exact derivatives of any order, in reverse and forward mode and under vmap.

    Where a batch's own statistics serve, torch's is wrong as its LayerNorm is (:class:`LayerNorm`); what is
    right there, by running statistics, is torch's here too. Running statistics are updated as torch does;
    under torch.func's transforms that is refused, as by torch.
    Arguments, parameters, buffers and state dict are torch's; torch.jit.script takes torch's class only.
    """


class BatchNorm2d(_ByBatch, nn.BatchNorm2d):
    """torch.nn.BatchNorm2d with exact derivatives of any order: see :class:`BatchNorm1d`."""


class BatchNorm3d(_ByBatch, nn.BatchNorm3d):
    """torch.nn.BatchNorm3d with exact derivatives of any order: see :class:`BatchNorm1d`."""


class _ByInstance(_Unscripted, _InstanceNorm):
    """What the exact instance normalisations share."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, …] or [C, …] → the same. Errors: torch's, or ValueError and TypeError for them."""
        if isinstance(input, torch.fx.Proxy):
            leaf: Tensor = traced_call(self, (input,), {})
            return leaf
        weight, bias = self.weight, self.bias
        exactly = elementary()
        by_running_statistics = not self.training and self.track_running_stats
        is_torchs = by_running_statistics or input.numel() == 0
        if is_torchs or not (exactly or differentiated(input, weight, bias)):
            return super().forward(input)
        self._check_input_dim(input)
        batch = input if input.dim() > self._get_no_batch_dim() else input[None]
        statistics = (self.running_mean, self.running_var) if self.running_mean is not None else None
        channels = batch.shape[1] if weight is None and statistics is None else self.num_features
        check_channels(batch, channels, weight, bias, math.prod(batch.shape[2:]))
        normed = instance_norm(batch, weight, bias, statistics, self.momentum or 0.0, self.eps, exactly)
        return normed if batch is input else normed[0]


class InstanceNorm1d(_ByInstance, nn.InstanceNorm1d):
    """torch.nn.InstanceNorm1d with exact derivatives of any order: see :class:`BatchNorm1d`."""


class InstanceNorm2d(_ByInstance, nn.InstanceNorm2d):
    """torch.nn.InstanceNorm2d with exact derivatives of any order: see :class:`BatchNorm1d`."""


class InstanceNorm3d(_ByInstance, nn.InstanceNorm3d):
    """torch.nn.InstanceNorm3d with exact derivatives of any order: see :class:`BatchNorm1d`."""


def elementary() -> bool:
    """Whether derivatives may be asked for that fused operators do not have."""
    return (
        torch.compiler.is_compiling()  # or exporting, for derivatives that are taken where it runs
        or recorded_below()
        or transformed()
        or forward_ad._current_level >= 0
    )


def differentiated(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


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
        others = tuple(range(x.dim() - len(ctx.shape)))
        dx, dw, db = differentiable_vjp(gradient, x, weight, bias, dims, others, ctx.eps, wanted)
        return dx, None, dw, db, None


class FusedByBatch(Function):
    """The same for normalisation by a batch's statistics, which also updates the running ones."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Statistics | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        output: Tensor
        mean, variance = statistics or (None, None)
        with torch._C.DisableTorchFunction():
            output, mean, scale = torch.native_batch_norm(
                x, weight, bias, mean, variance, True, momentum, eps
            )
        ctx.save_for_backward(x, weight, bias, mean, scale)
        ctx.eps = eps
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, scale = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if not torch.is_grad_enabled():
            dx, dw, db = torch.ops.aten.native_batch_norm_backward(
                gradient, x, weight, None, None, mean, scale, True, ctx.eps, wanted
            )
            return dx, dw if wanted[1] else None, db if wanted[2] else None, None, None, None
        dims = (0, *range(2, x.dim()))
        weight = None if weight is None else by_channel(weight, x.dim())
        dx, dw, db = differentiable_vjp(gradient, x, weight, bias, dims, dims, ctx.eps, wanted)
        return dx, dw, db, None, None, None


def differentiable_vjp(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dims: Dims,
    others: Dims,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients in x, weight and bias of weight·standardized(x) + bias, made of elementary operations.

    The weight broadcasts against x; its gradient and the bias's are sums over the dimensions `others`.
    """
    normed, scale = standardized(x, dims, eps)
    gradient = widened(gradient)

    def summed(t: Tensor) -> Tensor:
        return t.sum(others) if others else t

    dx = dw = db = None
    if wanted[0]:
        g = gradient if weight is None else gradient * weight
        dx = scale * (g - g.mean(dims, keepdim=True) - normed * (g * normed).mean(dims, keepdim=True))
        dx = dx.to(x.dtype)
    if weight is not None and wanted[1]:
        dw = summed(gradient * normed).to(weight.dtype)
    if bias is not None and wanted[2]:
        db = summed(gradient).to(bias.dtype)
    return dx, dw, db


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


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics | None,
    momentum: float,
    eps: float,
    elementary: bool,
) -> Tensor:
    """[B, C, …] normalised by its own mean and variance over all but C; updates the running ones."""
    if not elementary:
        fused: Tensor = FusedByBatch.apply(x, weight, bias, statistics, momentum, eps)
        return fused
    dims = (0, *range(2, x.dim()))
    if statistics is not None:
        update(functional.batch_norm, x, statistics, momentum)
    normed, _ = standardized(x, dims, eps)
    weight, bias = (None if t is None else by_channel(t, x.dim()) for t in (weight, bias))
    return as_laid_out(affine(normed, weight, bias).to(x.dtype))


def instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics | None,
    momentum: float,
    eps: float,
    elementary: bool,
) -> Tensor:
    """[B, C, …] normalised by the mean and variance of each sample and channel; updates the running ones."""
    dims = tuple(range(2, x.dim()))
    if statistics is not None:
        update(functional.instance_norm, x, statistics, momentum)
    if elementary or x.dtype.itemsize == 2:  # to be rounded once
        normed, _ = standardized(x, dims, eps)
    else:  # each channel of each sample is a channel of one sample
        rows = x.reshape(1, -1, *x.shape[2:])
        normed = FusedByBatch.apply(rows, None, None, None, 0.0, eps).reshape(x.shape)
    weight, bias = (None if t is None else by_channel(t, x.dim()) for t in (weight, bias))
    return affine(normed, weight, bias).to(x.dtype).contiguous()


def update(norm: Callable[..., Tensor], x: Tensor, statistics: Statistics, momentum: float) -> None:
    """Let torch's function update the running statistics, and refuse where it does.

    In the inner loops of metattn.meta it is one that leaves them alone.
    """
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        norm(x.detach(), *statistics, None, None, True, momentum)


def check_channels(x: Tensor, channels: int, weight: Tensor | None, bias: Tensor | None, values: int) -> None:
    """Refuse what torch's functions refuse; `values` have a mean and a variance of their own."""
    if not x.is_floating_point():
        raise TypeError(f"input: expected a floating dtype, got {x.dtype}")
    if x.shape[1] != channels:
        raise ValueError(f"input: expected shape [B, {channels}, …], got {list(x.shape)}")
    if values == 1:
        raise ValueError(f"input: expected more than 1 value per channel when training, got {list(x.shape)}")
    dtypes = (x.dtype, torch.float32) if x.dtype.itemsize == 2 else (x.dtype,)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and tuple(t.shape) != (channels,):
            raise ValueError(f"{name}: expected shape [{channels}], got {list(t.shape)}")
        if t is not None and t.dtype not in dtypes:
            raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {t.dtype}")


def by_channel(t: Tensor, dims: int) -> Tensor:
    """[C] → [C, 1, …], which broadcasts against [B, C, …]."""
    return t.view(-1, *(1,) * (dims - 2))


def as_laid_out(x: Tensor) -> Tensor:
    """Contiguous, or channels last, as torch's operators leave their outputs."""
    if x.dim() in (4, 5) and not transformed():  # vmap has no word for channels last
        last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
        if x.is_contiguous(memory_format=last):
            return x
    return x.contiguous()


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
