"""metattn in place of torch.nn.functional.scaled_dot_product_attention, for code that calls that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812, the name everybody knows
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metattn.functional import scaled_dot_product_attention


class sdpa_override:  # noqa: N801, a context manager that reads as a function
    """Context manager: F.scaled_dot_product_attention is metattn's in this thread; `calls` counts them.

    So is the one inside torch.nn.MultiheadAttention (when it need not return weights) and torch's Transformer
    layers, which then leave out their fused call for evaluation. Inside a `sdpa_kernel(...)` entered within
    the override torch's own runs: a kernel was asked for. So it does for nested tensors, which metattn does
    not take, and for what does not pass through torch's function: torch.ops.aten's, a ScriptModule's.
    Derivatives may be taken outside; what is computed again there (torch.utils.checkpoint) is torch's, unless
    the override is entered there too. One object may be entered again, and in several threads, and counts
    them all. Raises what metattn.scaled_dot_product_attention raises.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._entered: list[_Override] = []

    def __enter__(self) -> sdpa_override:
        mode = _Override(self)
        mode.__enter__()
        self._entered.append(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(
            *error
        )  # whichever it is: a mode's exit takes this thread's last one away


class _Override(TorchFunctionMode):
    """One entry of an override, on the stack of modes that torch keeps for each thread."""

    def __init__(self, owner: sdpa_override) -> None:
        super().__init__()
        self._owner = owner
        self._kernels = _enabled_kernels()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            func = self._attend
        elif func is F.multi_head_attention_forward:
            func = _with_names(func, scaled_dot_product_attention=self._attend)
        elif func is torch.autograd.grad or func is torch.autograd.backward:
            func = _with_names(func, _engine_run_backward=self._run_backward)
        elif func is Tensor.backward:
            func = self._backward
        return func(*args, **(kwargs or {}))

    def _attend(self, *args: Any, **kwargs: Any) -> Tensor:
        if _enabled_kernels() != self._kernels or _any_nested(*args, **kwargs):
            return F.scaled_dot_product_attention(*args, **kwargs)
        self._owner.calls += 1
        return scaled_dot_product_attention(*args, **kwargs)

    def _run_backward(self, *args: Any, **kwargs: Any) -> Any:
        """A backward pass may attend too: checkpointed layers, autograd Functions."""
        with self:
            return torch.autograd.graph._engine_run_backward(*args, **kwargs)

    def _backward(self, tensor: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        backward = _with_names(torch.autograd.backward, _engine_run_backward=self._run_backward)
        backward(tensor, gradient, *args, **kwargs)


def _with_names(function: Callable[..., Any], **replaced: Callable[..., Any]) -> Callable[..., Any]:
    """torch's function with ours among its globals: a mode is off while it handles a function."""
    original = cast(FunctionType, function)
    names = {**original.__globals__, **replaced}
    bound = FunctionType(original.__code__, names, original.__name__, original.__defaults__)
    names[original.__name__] = bound  # what the function hands to the next mode, if any
    return bound


def _any_nested(*args: Any, **kwargs: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_nested for x in (*args, *kwargs.values()))


def _enabled_kernels() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


# Dynamo cannot trace the reading, but enters an sdpa_kernel while it traces: what is read then is right.
_enabled_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]
