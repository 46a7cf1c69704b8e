"""MultiheadAttention: torch.nn's module with metattn's attention inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own abbreviation)

from metattn import backends
from metattn.autodiff import attend
from metattn.backends import reference
from metattn.nn import symbolic
from metattn.nn.traced import refuse_script, traced_call
from metattn.problem import CanonicalCall, Options, dense, has_autocast
from metattn.torch_internals import transformed


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention that can be differentiated twice through fused attention.

    MultiHead(Q, K, V) = Concat(head_1 … head_h) Wᴼ,  head_i = attention(Q W_iQ, K W_iK, V W_iV)

    Constructor, parameter names, state_dict, initial values and ``forward`` are torch.nn's (it is a
    subclass), so checkpoints load either way. The differences:

    * attention goes through :func:`metattn.attention`, in training and in evaluation: O(N·d) memory and two
      orders of derivatives, under autograd and torch.func. ``need_weights=True`` works so too, but the
      weights asked for are an N×M matrix for each head, made eagerly beside the output: ask with
      ``need_weights=False`` for memory.
    * a query that may attend to nothing gets zeros (before the output projection) and weights of zero, where
      torch with ``need_weights=True`` gives NaN.
    * dropout draws its own mask from torch's generator; the same seed drops other entries than in torch.
    * what is refused raises ValueError or TypeError, naming the argument.
    * a NestedTensor takes torch's own inference path, which has no derivatives (torch.nn.TransformerEncoder
      makes such tensors in evaluation without gradients).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_heads > 0 and embed_dim % num_heads:
            raise ValueError(
                f"embed_dim: expected a multiple of num_heads={num_heads}, got embed_dim={embed_dim}"
            )
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout: expected a probability between 0 and 1, got {dropout}")
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from query to key and value, as torch.nn.MultiheadAttention.forward.

        Arguments (L queries, S keys, B batches, E = embed_dim):
            query: [L, B, E], or [B, L, E] with batch_first, or [L, E] for one example alone.
            key, value: likewise [S, B, kdim] and [S, B, vdim], or [S, kdim] and [S, vdim].
            key_padding_mask: [B, S] ([S] for one example); bool, True = ignored, or float, added to the
                scores.
            need_weights: also return the attention weights (dropout applied), twice differentiable; L×S
                memory.
            attn_mask: [L, S] or [B·num_heads, L, S]; bool, True = may not attend, or float, added to the
                scores.
            average_attn_weights: weights averaged over the heads, not one matrix a head.
            is_causal: a promise that attn_mask is the causal mask, which must be given too; without weights
                and key_padding_mask the mask is then not read, and what lies above the diagonal is never
                computed.

        Returns (output of query's shape, weights): weights [B, L, S], or [B, num_heads, L, S] without
        averaging (no B for one example alone), or None. With add_bias_kv and add_zero_attn S counts their
        keys too.
        Dtypes: those of :func:`metattn.attention`, parameters and inputs alike (or autocast).
        Differentiable twice in every float argument and parameter, masks included; beyond that slowly.
        Errors: ValueError for shapes that do not fit and for is_causal without attn_mask; TypeError for what
        is no tensor or not strided, inputs of another dtype than the module's (outside autocast), and a mask
        that is neither bool nor float.
        """
        arguments: dict[str, Any] = {
            "key_padding_mask": key_padding_mask,
            "need_weights": need_weights,
            "attn_mask": attn_mask,
            "average_attn_weights": average_attn_weights,
            "is_causal": is_causal,
        }
        if isinstance(query, torch.fx.Proxy):  # a leaf of the graph, as torch.nn's modules are
            leaf: tuple[Tensor, Tensor | None] = traced_call(self, (query, key, value), arguments)
            return leaf
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
        if query.is_nested or key.is_nested or value.is_nested:
            nested: tuple[Tensor, Tensor | None] = super().forward(query, key, value, **arguments)
            return nested
        layout = InputLayout(self.num_heads, self.batch_first, self.add_zero_attn)
        parameters = self._parameters_of_attention()
        masks = (attn_mask, key_padding_mask)
        check(query, key, value, masks, is_causal, self.embed_dim, layout, parameters)
        # torch reads the hint only where no masks have to be merged and no weights are asked for
        causal = is_causal and key_padding_mask is None and not need_weights
        dropout_p = self.dropout if self.training else 0.0
        output, call = multihead(query, key, value, masks, causal, dropout_p, layout, parameters)
        weights = None
        if need_weights:
            weights = reference.weights(*call)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if query.dim() == 3 else weights.squeeze(0)
        return output, weights

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self, "restore_attention")

    def _parameters_of_attention(self) -> Parameters:
        packed = self._qkv_same_embed_dim
        in_proj = (
            self.in_proj_weight if packed else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        out_proj = self.out_proj
        return Parameters(
            in_proj, self.in_proj_bias, out_proj.weight, out_proj.bias, self.bias_k, self.bias_v
        )


class InputLayout(NamedTuple):
    """How multihead attention reads its inputs."""

    num_heads: int
    batch_first: bool
    add_zero_attn: bool


class Parameters(NamedTuple):
    """Those of multihead attention."""

    in_proj: Tensor | tuple[Tensor, Tensor, Tensor]  # packed, or for query, key and value
    in_bias: Tensor | None
    out_proj: Tensor
    out_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None


Masks = tuple[Tensor | None, Tensor | None]  # attn_mask, key_padding_mask


def multihead(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    causal: bool,
    dropout_p: float,
    layout: InputLayout,
    parameters: Parameters,
) -> tuple[Tensor, CanonicalCall]:
    """The output for inputs that were checked, and the call to attention inside.

    With `causal` the attn_mask is not read.
    """
    attn_mask, key_padding_mask = masks
    batched, batch_first = query.dim() == 3, layout.batch_first or query.dim() == 2
    q, k, v = _project(query, key, value, parameters)
    if not batched:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    if not batch_first:
        q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
    batch = q.shape[0]
    if parameters.bias_k is not None and parameters.bias_v is not None:
        k = torch.cat([k, parameters.bias_k.to(k.dtype).expand(batch, 1, -1)], dim=1)
        v = torch.cat([v, parameters.bias_v.to(v.dtype).expand(batch, 1, -1)], dim=1)
    if layout.add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    # [B, L|S, E] → [B, H, L|S, E/H], a view
    q, k, v = (x.unflatten(-1, (layout.num_heads, -1)).transpose(1, 2) for x in (q, k, v))

    mask, bias = _merge(None if causal else attn_mask, key_padding_mask, q, k.shape[2])
    problem, primals, constants = dense(q, k, v, Options(mask, bias, causal, dropout_p=dropout_p))
    o, _ = attend(backends.choose(problem, primals, constants, None), primals, constants)
    o = o.transpose(1, 2).flatten(-2)  # [B, L, E]
    if not batch_first:
        o = o.transpose(0, 1)
    linear, _ = _products()
    output = linear(o, parameters.out_proj, parameters.out_bias)
    return output if batched else output.squeeze(0), (problem, primals, constants)


def _project(
    query: Tensor, key: Tensor, value: Tensor, parameters: Parameters
) -> tuple[Tensor, Tensor, Tensor]:
    """The projected query, key and value; one product for those that are the same tensor."""
    weight, bias = parameters.in_proj, parameters.in_bias
    linear, chunk = _products()
    if isinstance(weight, Tensor):
        size = weight.shape[1]
        if query is key and key is value:
            q, k, v = chunk(linear(query, weight, bias), 3, dim=-1)
            return q, k, v
        if key is value:
            q = linear(query, weight[:size], None if bias is None else bias[:size])
            k, v = chunk(linear(key, weight[size:], None if bias is None else bias[size:]), 2, dim=-1)
            return q, k, v
        w_q, w_k, w_v = chunk(weight, 3)
    else:
        w_q, w_k, w_v = weight
    b_q, b_k, b_v = (None, None, None) if bias is None else chunk(bias, 3)
    return linear(query, w_q, b_q), linear(key, w_k, b_k), linear(value, w_v, b_v)


def _products() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
    """linear and chunk; those for sizes that are symbols where a transform is being compiled."""
    if torch.compiler.is_compiling() and transformed():
        return symbolic.linear, symbolic.chunk
    return F.linear, torch.chunk


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Masks,
    is_causal: bool,
    embed_dim: int,
    layout: InputLayout,
    parameters: Parameters,
) -> None:
    """Refuse what does not fit together, before anything is computed."""
    num_heads, batch_first, _ = layout
    if num_heads < 1 or embed_dim % num_heads:
        raise ValueError(f"num_heads: expected a divisor of embed_dim={embed_dim}, got {num_heads}")
    if (parameters.bias_k is None) != (parameters.bias_v is None):
        given, missing = ("bias_k", "bias_v") if parameters.bias_v is None else ("bias_v", "bias_k")
        raise ValueError(f"{missing}: expected a parameter beside {given}, got None")
    dtype, device = parameters.out_proj.dtype, query.device.type
    casts = has_autocast(device) and torch.is_autocast_enabled(device)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: expected a strided tensor, got layout {tensor.layout}")
        if tensor.dtype != dtype and not (casts and tensor.is_floating_point()):
            raise TypeError(f"{name}: expected the module's dtype, {dtype}, got {tensor.dtype}")
    if query.dim() not in (2, 3):
        raise ValueError(f"query: expected 2 or 3 dimensions, got {query.dim()}: {list(query.shape)}")
    weight = parameters.in_proj
    kdim, vdim = (embed_dim,) * 2 if isinstance(weight, Tensor) else (w.shape[1] for w in weight[1:])
    for name, tensor, size in (("key", key, kdim), ("value", value, vdim)):
        if tensor.dim() != query.dim():
            raise ValueError(
                f"{name}: expected as many dimensions as query, {query.dim()}, got {list(tensor.shape)}"
            )
        if tensor.shape[-1] != size:
            raise ValueError(f"{name}: expected {size} features, got {list(tensor.shape)}")
    if query.shape[-1] != embed_dim:
        raise ValueError(f"query: expected {embed_dim} features, got {list(query.shape)}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            "key, value: expected the same shape but for the features, "
            f"got {list(key.shape)}, {list(value.shape)}"
        )
    batch_dim, length_dim = (0, -2) if batch_first or query.dim() == 2 else (1, 0)
    batch: tuple[int, ...] = () if query.dim() == 2 else (query.shape[batch_dim],)
    if batch and key.shape[batch_dim] != batch[0]:
        raise ValueError(
            f"query, key: expected the same batch size, got {list(query.shape)}, {list(key.shape)} "
            f"with batch_first={batch_first}"
        )
    scores = (query.shape[length_dim], key.shape[length_dim])
    blocks = (num_heads * (batch[0] if batch else 1), *scores)
    for name, mask, shapes in (
        ("key_padding_mask", masks[1], [(*batch, scores[1])]),
        ("attn_mask", masks[0], [scores, blocks]),
    ):
        if mask is None:
            continue
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name}: expected a Tensor or None, got {type(mask).__name__}")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise TypeError(f"{name}: expected bool or a floating-point dtype, got {mask.dtype}")
        if tuple(mask.shape) not in shapes:
            expected = " or ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"{name}: expected shape {expected}, got {list(mask.shape)}")
    if is_causal and masks[0] is None:
        raise ValueError(
            "is_causal: expected the causal mask as attn_mask beside this hint, got attn_mask=None"
        )


def _merge(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, keys: int
) -> tuple[Tensor | None, Tensor | None]:
    """torch.nn's two masks (True = ignored) as metattn's mask (True = attends) and bias, neither expanded."""
    if attn_mask is not None:
        attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (q.shape[0], q.shape[1]))
        if (
            attn_mask.dtype == torch.bool
            and key_padding_mask is not None
            and key_padding_mask.dtype == torch.bool
        ):
            # two bool masks would have to be combined at [B, H, L, S]: one of them can be a bias instead
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(attn_mask, -torch.inf)
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    mask: Tensor | None = None
    bias: Tensor | None = None
    for given in (attn_mask, key_padding_mask):
        if given is None:
            continue
        padded = F.pad(given, (0, keys - given.shape[-1]))  # the keys that the module adds are never ignored
        if padded.dtype == torch.bool:
            mask = ~padded
        else:
            bias = padded if bias is None else bias + padded
    return mask, bias
