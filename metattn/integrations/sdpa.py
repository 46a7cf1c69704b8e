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
from metattn.torch_internals import leave_uncompiled


class sdpa_override:  # noqa: N801, a context manager that reads as a function
    """Context manager: F.scaled_dot_product_attention is metattn's in this thread.

    So is the one inside torch.nn.MultiheadAttention (when it need not return weights) and torch's Transformer
    layers, which then leave out their fused call for evaluation. Inside a `sdpa_kernel(...)` entered within
    the override torch's own runs: a kernel was asked for. So it does for nested tensors, which metattn does
    not take, and for what does not pass through torch's function: torch.ops.aten's, a ScriptModule's.
    Derivatives may be taken outside; what is computed again there (torch.utils.checkpoint) is torch's, unless
    the override is entered there too. One object may be entered again, and in several threads. Raises what
    metattn.scaled_dot_product_attention and metattn.nn.MultiheadAttention raise.

    `calls` counts the attentions of eager code, in all threads. Code under torch.compile is compiled once for
    all overrides, entered around it or in it, and is not counted. It is compiled for the kernels that are
    enabled then: as with torch's own, a `sdpa_kernel(...)` entered around it later changes nothing.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._entered: list[_Override] = []

    def __enter__(self) -> sdpa_override:
        if not torch.compiler.is_compiling():
            leave_uncompiled(_Override.__torch_function__)
        mode = _Override(self)
        mode.__enter__()
        self._entered.append(mode)
        return self

    def __exit__(self, *error: Any) -> None:
        # whichever it is: a mode's exit takes this thread's last one away
        self._entered.pop().__exit__(*error)


# What torch's layers call in evaluation where there is no mode: with Dynamo, which tells them of none.
_FUSED = (
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
    torch._nested_tensor_from_mask_left_aligned,
)
# Of all that a mode hears of, most is nothing to this one.
_TAKEN = frozenset(
    (
        F.scaled_dot_product_attention,
        F.multi_head_attention_forward,
        torch.autograd.grad,
        torch.autograd.backward,
        Tensor.backward,
        *_FUSED,
    )
)


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
        kwargs = kwargs or {}
        traced = torch.compiler.is_dynamo_compiling()
        if traced:
            _let_dynamo_dispatch()
            if getattr(func, "__name__", "") == "unflatten":
                # the method's super() cannot be traced; of an input, it is not even Tensor.unflatten there
                return torch.unflatten(*args, **kwargs)
        if func not in _TAKEN:
            return func(*args, **kwargs)
        answer: Any = None
        if func is F.scaled_dot_product_attention:
            answer = self._attend(*args, **kwargs)
        elif func is F.multi_head_attention_forward:
            answer = self._multihead(*args, **kwargs)
        elif func in _FUSED:
            answer = self._fused(func, args, kwargs) if traced else None
        elif func is Tensor.backward:
            func = self._backward
        else:
            func = _with_names(func, _engine_run_backward=self._run_backward)
        return func(*args, **kwargs) if answer is None else answer

    def _takes(self, *tensors: Tensor) -> bool:
        """Whether metattn attends here, which counts."""
        if _enabled_kernels() != self._kernels or any(t.is_nested for t in tensors):
            return False
        if not torch.compiler.is_dynamo_compiling():  # Dynamo would guard the count: compile at every call
            self._owner.calls += 1
        return True

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if not self._takes(query, key, value):
            return None
        return scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def _multihead(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim_to_check: int,
        num_heads: int,
        in_proj_weight: Tensor | None,
        in_proj_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout_p: float,
        out_proj_weight: Tensor,
        out_proj_bias: Tensor | None,
        training: bool = True,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        use_separate_proj_weight: bool = False,
        q_proj_weight: Tensor | None = None,
        k_proj_weight: Tensor | None = None,
        v_proj_weight: Tensor | None = None,
        static_k: Tensor | None = None,
        static_v: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None] | None:
        """F.multi_head_attention_forward without weights; None where it is torch's."""
        from metattn.nn.multihead import (
            InputLayout,
            Parameters,
            check,
            multihead,
        )  # `import metattn` leaves nn out

        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        in_proj: Any = separate if use_separate_proj_weight else in_proj_weight
        if need_weights or static_k is not None or static_v is not None or not self._takes(query, key, value):
            return None
        parameters = Parameters(in_proj, in_proj_bias, out_proj_weight, out_proj_bias, bias_k, bias_v)
        # what torch.nn transposed for batch_first is transposed back: products of whole rows are quicker
        batch_first = query.dim() == 3 and not query.is_contiguous()
        layout = InputLayout(num_heads, batch_first, add_zero_attn)
        if batch_first:
            query, key, value = _transposed(query, key, value)
        masks, causal = (attn_mask, key_padding_mask), is_causal and key_padding_mask is None
        check(query, key, value, masks, is_causal, embed_dim_to_check, layout, parameters)
        dropout_p = dropout_p if training else 0.0
        output, _ = multihead(query, key, value, masks, causal, dropout_p, layout, parameters)
        # [L, B, E] in memory, as torch's own
        return output.transpose(0, 1).contiguous() if batch_first else output, None

    def _fused(self, func: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """For one of _FUSED, what stands in its place; None for what stays torch's."""
        if func is torch._native_multi_head_attention:
            return self._native_multihead(*args, **kwargs)
        if func is torch._transformer_encoder_layer_fwd:
            return self._native_layer(*args, **kwargs)
        if func is torch._nested_tensor_from_mask_left_aligned:
            return False  # torch.nn.TransformerEncoder then makes no nested tensor
        return None

    def _native_multihead(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        embed_dim: int,
        num_heads: int,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        mask: Tensor | None = None,
        need_weights: bool = True,
        average_attn_weights: bool = True,
        mask_type: int | None = None,
    ) -> tuple[Tensor, None] | None:
        """torch._native_multi_head_attention [B, L, E] without weights; mask_type 1 pads keys."""
        from metattn.nn.multihead import InputLayout, Parameters, multihead

        if need_weights or not self._takes(query, key, value):
            return None
        attn_mask, padding = (None, mask) if mask_type == 1 else (mask, None)
        if attn_mask is not None and attn_mask.dim() == 4:
            attn_mask = attn_mask.flatten(0, 1)
        parameters = Parameters(qkv_weight, qkv_bias, proj_weight, proj_bias, None, None)
        layout = InputLayout(num_heads, True, False)
        output, _ = multihead(query, key, value, (attn_mask, padding), False, 0.0, layout, parameters)
        return output, None

    def _native_layer(
        self,
        src: Tensor,
        embed_dim: int,
        num_heads: int,
        qkv_weight: Tensor,
        qkv_bias: Tensor,
        proj_weight: Tensor,
        proj_bias: Tensor,
        use_gelu: bool,
        norm_first: bool,
        eps: float,
        norm_weight_1: Tensor,
        norm_bias_1: Tensor,
        norm_weight_2: Tensor,
        norm_bias_2: Tensor,
        ffn_weight_1: Tensor,
        ffn_bias_1: Tensor,
        ffn_weight_2: Tensor,
        ffn_bias_2: Tensor,
        mask: Tensor | None = None,
        mask_type: int | None = None,
    ) -> Tensor | None:
        """torch._transformer_encoder_layer_fwd, which torch.nn.TransformerEncoderLayer is in evaluation."""

        def attend(x: Tensor) -> Tensor | None:
            projections = (embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias)
            found = self._native_multihead(x, x, x, *projections, mask, False, True, mask_type)
            return None if found is None else found[0]

        def feed(x: Tensor) -> Tensor:
            hidden = F.linear(x, ffn_weight_1, ffn_bias_1)
            return F.linear(F.gelu(hidden) if use_gelu else F.relu(hidden), ffn_weight_2, ffn_bias_2)

        def norm_1(x: Tensor) -> Tensor:
            return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

        def norm_2(x: Tensor) -> Tensor:
            return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

        attended = attend(norm_1(src) if norm_first else src)
        if attended is None:
            return None
        if norm_first:
            hidden = src + attended
            return hidden + feed(norm_2(hidden))
        hidden = norm_1(src + attended)
        return norm_2(hidden + feed(hidden))

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


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[L, B, E] → [B, L, E]; what was one tensor stays one, for one projection."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    return q, k, k if value is key else value.transpose(0, 1)


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


def _let_dynamo_dispatch() -> None:
    """Have modes hear of the fused calls under Dynamo too, which asks a list that lacks them."""
    from torch._dynamo.variables import torch as dynamo  # there is no public way to add to it

    dynamo.get_overridable_functions().update(_FUSED)
    leave_uncompiled(_Override.__torch_function__)


# Called while Dynamo traces: whoever compiles has imported it.
_let_dynamo_dispatch._dynamo_marked_constant = True  # type: ignore[attr-defined]
