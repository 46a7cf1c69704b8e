"""The modules against torch.nn's, values and both orders of derivatives."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metattn.nn import AttentionPooling, MultiheadAttention

E, HEADS, BATCH, L, S = 12, 3, 2, 5, 7

CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 4, "vdim": 6},
    "kdim alone, no bias": {"kdim": 4, "bias": False},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
}


def pair(seed: int = 0, **options: Any) -> tuple[nn.MultiheadAttention, MultiheadAttention]:
    """torch's module and ours, drawn from the same seed."""
    modules = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(seed)
        modules.append(kind(E, HEADS, dtype=torch.float64, **options))
    theirs, ours = modules
    for parameter in theirs.parameters():  # biases start at 0, where a mistake in their use would not show
        nn.init.normal_(parameter, std=0.4)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def inputs(module: nn.MultiheadAttention, *, seed: int = 1) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = [(L, BATCH, E), (S, BATCH, module.kdim), (S, BATCH, module.vdim)]
    if module.batch_first:
        shapes = [(batch, length, size) for length, batch, size in shapes]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def two_orders(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Derivatives of a fixed random functional of the outputs, and those of a functional of these."""
    generator = torch.Generator().manual_seed(5)

    def functional(tensors: list[Tensor]) -> Tensor:
        return sum(
            ((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in tensors),
            start=torch.zeros((), dtype=torch.float64),
        )

    first = torch.autograd.grad(functional(outputs), leaves, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(functional([g.square() for g in first]), leaves, materialize_grads=True)
    return [*first, *second]


def agree(theirs: list[Tensor], ours: list[Tensor]) -> None:
    assert len(theirs) == len(ours)
    for a, b in zip(theirs, ours, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


def masks(kind: str, module: nn.MultiheadAttention) -> dict[str, Tensor]:
    """Masks of every form; no row loses all its keys, which torch answers with NaN."""
    torch.manual_seed(3)
    hidden = {
        "2-D": torch.rand(L, S) < 0.4,
        "3-D": torch.rand(BATCH * HEADS, L, S) < 0.4,
        "padding": torch.arange(S) >= torch.tensor([[S], [S - 3]]),
    }
    for mask in hidden.values():
        mask[..., 0] = False
    found = {}
    for name in kind.split(" + "):
        form, dtype = name.split(" ")
        mask = hidden[form]
        if dtype == "float":
            mask = torch.randn(mask.shape, dtype=torch.float64).masked_fill(mask, -torch.inf).requires_grad_()
        found["key_padding_mask" if form == "padding" else "attn_mask"] = mask
    return found


MASKS = [
    "2-D bool",
    "2-D float",
    "3-D bool",
    "3-D float",
    "padding bool",
    "padding float",
    "2-D bool + padding bool",
    "2-D float + padding float",
    "3-D bool + padding bool",
    "3-D float + padding float",
]


def run(module: nn.MultiheadAttention, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    with sdpa_kernel(SDPBackend.MATH):
        output, weights = module(*tensors, **options)
    return [output] if weights is None else [output, weights]


def leaves_of(module: nn.MultiheadAttention, tensors: list[Tensor], options: dict[str, Any]) -> list[Tensor]:
    floats = [x for x in options.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*tensors, *module.parameters(), *floats]


def test_constructor_signature_is_torchs() -> None:
    ours, theirs = (
        inspect.signature(kind.__init__).parameters for kind in (MultiheadAttention, nn.MultiheadAttention)
    )
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]
    ours, theirs = (
        inspect.signature(kind.forward).parameters for kind in (MultiheadAttention, nn.MultiheadAttention)
    )
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_same_seed_same_weights_and_state_dict(options: dict[str, Any]) -> None:
    states = []
    for kind in (nn.MultiheadAttention, MultiheadAttention):
        torch.manual_seed(7)
        states.append(kind(E, HEADS, **options).state_dict())
    theirs, ours = states
    assert list(theirs) == list(ours)
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_state_dict_loads_either_way(options: dict[str, Any]) -> None:
    theirs, ours = nn.MultiheadAttention(E, HEADS, **options), MultiheadAttention(E, HEADS, **options)
    for source, target in ((theirs, ours), (ours, theirs)):
        for parameter in source.parameters():
            nn.init.normal_(parameter)
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("options", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_constructor_options_to_second_order(
    options: dict[str, Any], batch_first: bool, need_weights: bool
) -> None:
    theirs, ours = pair(batch_first=batch_first, **options)
    tensors = inputs(theirs)
    mask = {"attn_mask": masks("2-D float", theirs)["attn_mask"], "need_weights": need_weights}
    a, b = run(theirs, tensors, **mask), run(ours, tensors, **mask)
    agree(a, b)
    agree(
        two_orders(a, leaves_of(theirs, tensors, mask)),
        two_orders(b, leaves_of(ours, tensors, mask)),
    )


@pytest.mark.parametrize("need_weights", ["averaged", "per head", "none"])
@pytest.mark.parametrize("kind", MASKS)
def test_masks_to_second_order(kind: str, need_weights: str) -> None:
    theirs, ours = pair(batch_first=True, add_zero_attn=kind.startswith("3-D"))
    tensors = inputs(theirs)
    options: dict[str, Any] = masks(kind, theirs)
    options |= {"need_weights": need_weights != "none", "average_attn_weights": need_weights == "averaged"}
    a, b = run(theirs, tensors, **options), run(ours, tensors, **options)
    agree(a, b)
    agree(
        two_orders(a, leaves_of(theirs, tensors, options)),
        two_orders(b, leaves_of(ours, tensors, options)),
    )


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("padded", [True, False], ids=["padding", "no padding"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}], ids=["plain", "bias_kv"])
def test_is_causal(options: dict[str, Any], padded: bool, need_weights: bool) -> None:
    theirs, ours = pair(batch_first=True, **options)
    x = inputs(theirs)[0]
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    arguments: dict[str, Any] = {"attn_mask": causal, "is_causal": True, "need_weights": need_weights}
    if padded:
        arguments["key_padding_mask"] = torch.zeros(BATCH, L, dtype=torch.float64)
        arguments["key_padding_mask"][1, -1] = -torch.inf
    a, b = run(theirs, [x, x, x], **arguments), run(ours, [x, x, x], **arguments)
    agree(a, b)
    agree(two_orders(a, [x, *theirs.parameters()]), two_orders(b, [x, *ours.parameters()]))


@pytest.mark.parametrize("sharing", ["self", "key is value", "query is key"])
def test_tensors_shared_between_roles(sharing: str) -> None:
    theirs, ours = pair(batch_first=True)
    a = torch.randn(BATCH, L, E, dtype=torch.float64, requires_grad=True)
    b = torch.randn(BATCH, L, E, dtype=torch.float64, requires_grad=True)
    tensors = {"self": [a, a, a], "key is value": [b, a, a], "query is key": [a, a, b]}[sharing]
    leaves = [a] if sharing == "self" else [a, b]
    expected, got = run(theirs, tensors, need_weights=False), run(ours, tensors, need_weights=False)
    agree(expected, got)
    agree(
        two_orders(expected, [*leaves, *theirs.parameters()]), two_orders(got, [*leaves, *ours.parameters()])
    )


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("average", [True, False], ids=["averaged", "per head"])
def test_one_example_without_batch(average: bool, batch_first: bool) -> None:
    theirs, ours = pair(batch_first=batch_first, add_bias_kv=True)
    q, k, v = (torch.randn(n, E, dtype=torch.float64) for n in (L, S, S))
    for attn_mask in (None, torch.rand(L, S) < 0.3, torch.rand(HEADS, L, S) < 0.3):
        options = {
            "key_padding_mask": torch.arange(S) >= S - 2,
            "attn_mask": attn_mask,
            "average_attn_weights": average,
        }
        agree(run(theirs, [q, k, v], **options), run(ours, [q, k, v], **options))


def test_bool_mask_beside_float_padding() -> None:
    """torch deprecates it but computes it."""
    theirs, ours = pair(batch_first=True)
    tensors = inputs(theirs)
    options = {**masks("2-D bool", theirs), **masks("padding float", theirs)}
    with pytest.warns(UserWarning, match="deprecated"):
        expected = run(theirs, tensors, **options)
    agree(expected, run(ours, tensors, **options))


def test_weights_are_twice_differentiable() -> None:
    _, ours = pair(batch_first=True)
    tensors = tuple(x[:1, :2].detach().requires_grad_() for x in inputs(ours))

    def weights(*tensors: Tensor) -> Tensor:
        result: Tensor = ours(*tensors)[1]
        return result

    assert torch.autograd.gradcheck(weights, tensors)
    assert torch.autograd.gradgradcheck(weights, tensors)


def test_a_query_without_keys_gives_the_output_bias() -> None:
    _, ours = pair(batch_first=True)
    tensors = inputs(ours)
    padding = torch.tensor([[False] * S, [True] * S])
    output, weights = ours(*tensors, key_padding_mask=padding)
    torch.testing.assert_close(output[1], ours.out_proj.bias.expand(L, E))
    assert weights[1].count_nonzero() == 0
    for gradient in two_orders([output, weights], [*tensors, *ours.parameters()]):
        assert gradient.isfinite().all()


def test_nan_in_padding_does_not_spread() -> None:
    _, ours = pair(batch_first=True)
    query, key, _ = (x.detach() for x in inputs(ours))
    padding = (torch.arange(S) >= S - 2).expand(BATCH, S)
    key[:, -2:] = torch.nan
    key.requires_grad_()
    causal = torch.ones(L, S, dtype=torch.bool).triu(3)
    output, weights = ours(query, key, key, key_padding_mask=padding, attn_mask=causal)
    assert output.isfinite().all()
    assert weights.isfinite().all()


def test_dropout_of_weights_and_output_is_the_same_mask() -> None:
    torch.manual_seed(0)
    module = MultiheadAttention(E, HEADS, dropout=0.4, batch_first=True, dtype=torch.float64)
    x = torch.randn(4, 50, E, dtype=torch.float64)
    output, weights = module(x, x, x, average_attn_weights=False)
    values = nn.functional.linear(x, module.in_proj_weight[2 * E :], module.in_proj_bias[2 * E :])
    heads = weights @ values.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    torch.testing.assert_close(output, module.out_proj(heads.transpose(1, 2).flatten(-2)))
    kept = (weights != 0).double().mean().item()
    assert abs(kept - 0.6) < 4 * (0.24 / weights.numel()) ** 0.5
    torch.testing.assert_close(weights.sum(-1).mean().item(), 1.0, atol=0.02, rtol=0)

    torch.manual_seed(1)
    first = module(x, x, x, need_weights=False)[0]
    other = module(x, x, x, need_weights=False)[0]
    torch.manual_seed(1)
    assert torch.equal(first, module(x, x, x, need_weights=False)[0])
    assert not torch.equal(first, other)

    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    assert (module(x, x, x)[1] > 0).all()


@pytest.mark.parametrize(
    ("change", "error", "argument"),
    [
        ({"query": torch.zeros(BATCH, E)[0]}, ValueError, "query"),
        ({"query": torch.zeros(1, BATCH, L, E)}, ValueError, "query"),
        ({"query": torch.zeros(BATCH, L, E + 1)}, ValueError, "query"),
        ({"query": torch.zeros(BATCH + 1, L, E)}, ValueError, "query, key"),
        ({"key": torch.zeros(S, E)}, ValueError, "key"),
        ({"key": torch.zeros(BATCH, S, E + 1)}, ValueError, "key"),
        ({"key": torch.zeros(BATCH, S + 1, E)}, ValueError, "key, value"),
        ({"value": torch.zeros(BATCH, S, E - 1)}, ValueError, "value"),
        ({"attn_mask": torch.zeros(L, S + 1)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.zeros(BATCH, L, S)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, TypeError, "attn_mask"),
        ({"key_padding_mask": torch.zeros(S)}, ValueError, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(BATCH, L)}, ValueError, "key_padding_mask"),
        ({"key_padding_mask": torch.zeros(BATCH, S, dtype=torch.uint8)}, TypeError, "key_padding_mask"),
        ({"is_causal": True}, ValueError, "is_causal"),
        ({"query": None}, TypeError, "query"),
        ({"query": [[0.0] * E]}, TypeError, "query"),
        ({"key": None}, TypeError, "key"),
        ({"value": 1.0}, TypeError, "value"),
        ({"query": torch.zeros(BATCH, L, E, dtype=torch.float64)}, TypeError, "query"),
        ({"key": torch.zeros(BATCH, S, E, dtype=torch.bfloat16)}, TypeError, "key"),
        ({"value": torch.zeros(BATCH, S, E, dtype=torch.int64)}, TypeError, "value"),
        ({"query": torch.zeros(BATCH, L, E).to_sparse()}, TypeError, "query"),
        ({"attn_mask": [[True]]}, TypeError, "attn_mask"),
        ({"key_padding_mask": True}, TypeError, "key_padding_mask"),
    ],
)
def test_refusals_name_the_argument(change: dict[str, Any], error: type[Exception], argument: str) -> None:
    module = MultiheadAttention(E, HEADS, batch_first=True)
    arguments: dict[str, Any] = {
        "query": torch.zeros(BATCH, L, E),
        "key": torch.zeros(BATCH, S, E),
        "value": torch.zeros(BATCH, S, E),
    }
    with pytest.raises(error, match=f"^{argument}: expected .* got "):
        module(**{**arguments, **change})


def test_constructor_refusals() -> None:
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of num_heads=5, got embed_dim=12"):
        MultiheadAttention(12, 5)
    with pytest.raises(ValueError, match="num_heads"):
        MultiheadAttention(12, 0)
    for dropout in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="dropout: expected a probability between 0 and 1, got"):
            MultiheadAttention(12, 3, dropout=dropout)


def test_transforms_of_torch_func() -> None:
    """A stack of modules by vmap, its Hessian, and forward over reverse, against one module at a time."""
    modules = [pair(seed)[1] for seed in range(3)]
    params = torch.func.stack_module_state(modules)[0]  # type: ignore[arg-type]
    x = torch.randn(L, BATCH, E, dtype=torch.float64)

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(modules[0], params, (x, x, x))[0].square().sum()

    stacked = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(0, None))(params, x)
    for index, module in enumerate(modules):
        single = x.clone().requires_grad_()
        module(single, single, single)[0].square().sum().backward()
        torch.testing.assert_close(stacked[1][index], single.grad)
        torch.testing.assert_close(stacked[0]["in_proj_weight"][index], module.in_proj_weight.grad)

    own = {name: value.detach() for name, value in modules[0].named_parameters()}
    tangent = torch.randn_like(x)
    _, forward_over_reverse = torch.func.jvp(torch.func.grad(lambda x: loss(own, x)), (x,), (tangent,))
    hessian = torch.func.hessian(lambda x: loss(own, x))(x)
    torch.testing.assert_close(
        forward_over_reverse, torch.einsum("abcdef,def->abc", hessian, tangent), rtol=1e-9, atol=1e-9
    )


def test_autocast_and_low_precision() -> None:
    module = MultiheadAttention(E, HEADS, batch_first=True, add_bias_kv=True)
    x = torch.randn(BATCH, L, E, requires_grad=True)
    exact = module(x, x, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, weights = module(x, x, x)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    torch.testing.assert_close(output.float(), exact[0], atol=0.03, rtol=0.03)
    torch.testing.assert_close(weights.float(), exact[1], atol=0.03, rtol=0.03)


def test_copies_and_pickles() -> None:
    module = MultiheadAttention(E, HEADS, kdim=4)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(copied) is MultiheadAttention
        arguments = torch.randn(L, 1, E), torch.randn(S, 1, 4), torch.randn(S, 1, E)
        assert torch.equal(copied(*arguments)[0], module(*arguments)[0])


# AttentionPooling


def test_pooling_is_the_softmax_weighted_mean() -> None:
    torch.manual_seed(0)
    pooling = AttentionPooling(6, dtype=torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)

    def formula(x: Tensor) -> Tensor:
        return (torch.softmax(pooling.score(x), dim=1) * x).sum(1)

    agree([formula(x)], [pooling(x)])
    leaves = [x, pooling.score.weight]
    agree(two_orders([formula(x)], leaves), two_orders([pooling(x)], leaves))


def test_pooling_of_sets_of_several_sizes() -> None:
    pooling = AttentionPooling(6, dtype=torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [2], [0]])
    pooled = pooling(x, mask)
    torch.testing.assert_close(pooled[1:2], pooling(x[1:2, :2]))
    assert pooled[2].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(4, 6), (6,), (2, 3, 4, 6)])
def test_pooling_refuses_what_is_no_set(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^x: expected a set \[batch, points, features\], got"):
        AttentionPooling(6)(torch.zeros(shape))
