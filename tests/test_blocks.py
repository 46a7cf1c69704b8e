"""The blocks against their formulas written out in torch, to second order; order, masks and refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

from metattn.nn import ISAB, MAB, PMA, SAB, AttentionPooling, CausalBlock, CrossAttentionBlock, LayerNorm
from metattn.nn.norm import layer_norm

DIM, HEADS, BATCH, N, M = 8, 2, 2, 5, 4
Weights = dict[str, Tensor]


def make(kind: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    block: nn.Module = {
        "mab": lambda: MAB(DIM, HEADS, dtype=torch.float64, **options),  # type: ignore[arg-type]
        "mab, no norm": lambda: MAB(DIM, HEADS, layer_norm=False, dtype=torch.float64),
        "sab": lambda: SAB(DIM, HEADS, dtype=torch.float64),
        "isab": lambda: ISAB(DIM, HEADS, 3, dtype=torch.float64),
        "pma": lambda: PMA(DIM, HEADS, 2, dtype=torch.float64),
        "cross": lambda: CrossAttentionBlock(DIM, HEADS, context_dim=6, dtype=torch.float64),
        "causal": lambda: CausalBlock(DIM, HEADS, dtype=torch.float64),
        "causal, window": lambda: CausalBlock(DIM, HEADS, window=2, hidden_dim=5, dtype=torch.float64),
    }[kind]()
    for parameter in block.parameters():  # weights of 1 and biases of 0 hide mistakes
        nn.init.normal_(parameter, std=0.4)
    return block


KINDS = ("mab", "mab, no norm", "sab", "isab", "pma", "cross", "causal", "causal, window")
SETS = ("sab", "isab", "pma")


def inputs_of(kind: str) -> list[Tensor]:
    torch.manual_seed(1)
    second = {"mab": (BATCH, M, DIM), "mab, no norm": (BATCH, M, DIM), "cross": (BATCH, M, 6)}
    shapes = [(BATCH, N, DIM)] + ([second[kind]] if kind in second else [])
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


# The formulas.


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Heads side by side in the last dimension; seen [n, m] or [batch, 1, m]."""
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if seen is not None:
        scores = scores.masked_fill(~(seen if seen.dim() == 2 else seen[:, None]), -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2)


def multihead(w: Weights, name: str, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
    if f"{name}.in_proj_weight" in w:
        matrices = w[f"{name}.in_proj_weight"].chunk(3)
    else:
        matrices = tuple(w[f"{name}.{letter}_proj_weight"] for letter in "qkv")
    biases = w[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = (z @ a.T + b for z, a, b in zip((x, y, y), matrices, biases, strict=True))
    seen = None if mask is None else mask[:, None, :]
    return linear(w, f"{name}.out_proj", softmax_attention(q, k, v, seen))


def mab(w: Weights, x: Tensor, y: Tensor, mask: Tensor | None = None, prefix: str = "") -> Tensor:
    normed = f"{prefix}attention_norm.weight" in w
    hidden = x + multihead(w, f"{prefix}attention", x, y, mask)
    hidden = norm(w, f"{prefix}attention_norm", hidden) if normed else hidden
    hidden = hidden + torch.relu(linear(w, f"{prefix}feed_forward.0", hidden))
    return norm(w, f"{prefix}feed_forward_norm", hidden) if normed else hidden


def mlp(w: Weights, x: Tensor) -> Tensor:
    hidden = linear(w, "mlp.1", norm(w, "mlp.0", x))
    return linear(w, "mlp.3", 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))


def written_out(kind: str, w: Weights, xs: list[Tensor], mask: Tensor | None = None) -> Tensor:
    x = xs[0]
    if mask is not None and kind in (*SETS, "causal", "causal, window"):
        x = x.masked_fill(~mask[..., None], 0.0)
    if kind.startswith("mab"):
        return mab(w, x, xs[1], mask)
    if kind == "sab":
        return mab(w, x, x, mask)
    if kind == "isab":
        inducing = w["inducing"].expand(len(x), -1, -1)
        return mab(w, x, mab(w, inducing, x, mask, "inducing_block."), None, "point_block.")
    if kind == "pma":
        seeds = w["seeds"].expand(len(x), -1, -1)
        return mab(w, seeds, torch.relu(linear(w, "feed_forward.0", x)), mask, "block.")
    if kind == "cross":
        seen = norm(w, "context_norm", xs[1])
        hidden = x + multihead(w, "attention", norm(w, "norm", x), seen, mask)
        return hidden + mlp(w, hidden)
    q, k, v = linear(w, "qkv", norm(w, "norm", x)).chunk(3, -1)
    distance = torch.arange(N)[:, None] - torch.arange(N)
    seen = (distance >= 0) & (distance <= (2 if kind == "causal, window" else N))
    seen = seen if mask is None else seen & mask[:, None, :]
    hidden = x + linear(w, "project", softmax_attention(q, k, v, seen))
    return hidden + mlp(w, hidden)


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("kind", KINDS)
def test_formula_to_second_order(kind: str, masked: bool) -> None:
    block, xs = make(kind), inputs_of(kind)
    mask = torch.arange(xs[-1].shape[1]) < torch.tensor([[xs[-1].shape[1]], [3]]) if masked else None
    weights = dict(block.named_parameters())
    leaves = [*xs, *weights.values()]
    results = []
    for output in (block(*xs, mask) if masked else block(*xs), written_out(kind, weights, xs, mask)):
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)  # type: ignore[arg-type]
        results.append([output, *first, *second])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_under_torch_func(kind: str) -> None:
    """vmap over weights of grad, and jvp of grad, as meta-learning takes them."""
    block, xs = make(kind), [x.detach() for x in inputs_of(kind)]
    weights = {name: value.detach() for name, value in block.named_parameters()}
    many = {name: torch.stack([value, 0.7 * value]) for name, value in weights.items()}
    direction = {name: torch.randn_like(value) for name, value in weights.items()}

    def loss(weights: Weights) -> Tensor:
        output: Tensor = functional_call(block, weights, tuple(xs))
        return output.sin().sum()

    def plain(weights: Weights) -> Tensor:
        return written_out(kind, weights, xs).sin().sum()

    both: list[Callable[[Weights], Tensor]] = [loss, plain]
    found = [jvp(grad(each), (weights,), (direction,)) for each in both]
    for values in zip(*((*each[0].values(), *each[1].values()) for each in found), strict=True):
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-9)
    for values in zip(*(vmap(grad(each))(many).values() for each in both), strict=True):
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", [*SETS, "mab", "cross", "causal"])
def test_meta_gradient_through_vmap(kind: str) -> None:
    """A gradient for every task under vmap, and autograd back through it: where torch's norms go wrong."""
    block, xs = make(kind), [x.detach() for x in inputs_of(kind)]
    weights = dict(block.named_parameters())
    rates = torch.tensor([0.1, 0.3], dtype=torch.float64)

    def adapted(run: Callable[[Weights], Tensor], w: Weights, rate: Tensor) -> Tensor:
        step = grad(run)(w)
        return run({name: value - rate * step[name] for name, value in w.items()})

    def ours(w: Weights) -> Tensor:
        return functional_call(block, w, tuple(xs)).sin().sum()

    def plain(w: Weights) -> Tensor:
        return written_out(kind, w, xs).sin().sum()

    meta = vmap(lambda rate: adapted(ours, weights, rate))(rates).sum()
    expected = torch.stack([adapted(plain, weights, rate) for rate in rates]).sum()
    found, truth = (torch.autograd.grad(loss, list(weights.values())) for loss in (meta, expected))
    for values in zip((meta, *found), (expected, *truth), strict=True):
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-9)


def three_orders(output: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of a number, of the sum of their squares, and of that of these."""
    total, found = output.sin().sum(), []
    for _ in range(3):
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        found += gradients
        total = torch.stack([g.square().sum() for g in gradients]).sum()
    return found


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(shape: tuple[int, ...], affine: bool) -> None:
    """The numbers and the state of torch's, derivatives of three orders."""
    ours, theirs = (
        kind(shape, elementwise_affine=affine, dtype=torch.float64) for kind in (LayerNorm, nn.LayerNorm)
    )
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)
    leaves = [x, *ours.parameters()]

    def formula(x: Tensor) -> Tensor:
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        scaled = centred / (centred.square().mean(dims, keepdim=True) + 1e-5).sqrt()
        return scaled * ours.weight + ours.bias if affine else scaled

    for values in zip(three_orders(ours(x), leaves), three_orders(formula(x), leaves), strict=True):
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("way", ["itself", "exported", "traced", "compiled"])
def test_layer_norm_to_third_order_in_programs(way: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), LayerNorm(5)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    program: nn.Module = {
        "itself": lambda: model,
        "exported": lambda: torch.export.export(model, (x.detach(),)).module(),
        "traced": lambda: torch.jit.trace(model, (x,)),
        "compiled": lambda: torch.compile(model, backend="eager", fullgraph=True),
    }[way]()
    weights = dict(model.named_parameters())

    def formula(x: Tensor) -> Tensor:
        return norm(weights, "1", linear(weights, "0", x))

    for values in zip(three_orders(program(x), [x]), three_orders(formula(x), [x]), strict=True):
        torch.testing.assert_close(*values, rtol=1e-8, atol=1e-9)


def test_torchs_layer_norm_is_wrong_to_third_order() -> None:
    """What ours is for: where this fails, torch has been mended."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    found, exact = (three_orders(kind(5).double()(x), [x]) for kind in (nn.LayerNorm, LayerNorm))
    for ours, theirs in zip(exact[:2], found[:2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert (found[2] - exact[2]).norm() > 0.01 * exact[2].norm()


def test_layer_norm_in_few_bits() -> None:
    """bfloat16 is rounded once, at the end; another shape or dtype is refused as by torch."""
    ours = LayerNorm(256, dtype=torch.bfloat16)
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    x = (3 + torch.randn(4, 256)).bfloat16()
    wide = nn.functional.layer_norm(x.double(), (256,), ours.weight.double(), ours.bias.double())
    assert ours(x).dtype == torch.bfloat16
    # half a unit in the last place, and float32's errors
    torch.testing.assert_close(ours(x).double(), wide, rtol=2**-8, atol=1e-5)
    for wrong in (x[:, 1:], x.int(), x.double()):
        for norm in (ours, nn.LayerNorm(256, dtype=torch.bfloat16)):
            with pytest.raises((RuntimeError, TypeError)):
                norm(wrong)


def test_layer_norm_wherever_torchs_goes() -> None:
    """Traced, compiled, batched, dual, without gradients, in mixed dtypes: torch's numbers and layout."""
    ours, theirs = LayerNorm(6), nn.LayerNorm(6)
    nn.init.normal_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 6, 3).transpose(1, 2)
    expected = theirs(x)

    def dual(norm: nn.Module) -> Tensor:
        return jvp(norm, (x,), (x.sin(),))[1]

    with torch.no_grad():
        assert torch.equal(ours(x), expected)
    ways = {
        "gradients": ours,
        "fx": torch.fx.symbolic_trace(nn.Sequential(ours)),
        "compile": torch.compile(ours, backend="aot_eager", fullgraph=True),
        "trace": torch.jit.trace(ours, (x,)),
        "vmap": vmap(ours),
    }
    for name, way in ways.items():
        output = way(x)
        torch.testing.assert_close(output, expected, msg=name)
        assert output.is_contiguous() == expected.is_contiguous(), name
    torch.testing.assert_close(dual(ours), dual(theirs))
    with torch.autograd.forward_ad.dual_level():
        rate = torch.autograd.forward_ad.unpack_dual(
            ours(torch.autograd.forward_ad.make_dual(x, x.sin()))
        ).tangent
    torch.testing.assert_close(rate, dual(theirs))
    assert ours(x.bfloat16()).dtype == theirs(x.bfloat16()).dtype == torch.bfloat16
    gradients = [
        torch.autograd.grad(norm(x.bfloat16()).float().sin().sum(), norm.weight) for norm in (ours, theirs)
    ]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)], layout=torch.jagged)
    torch.testing.assert_close(ours(nested).values(), theirs(nested).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x.bfloat16()).dtype == theirs(x.bfloat16()).dtype
    with pytest.raises(TypeError, match=r"bias: expected torch.float32 as weight, got torch.bfloat16"):
        layer_norm(x.bfloat16(), (6,), ours.weight, ours.bias.bfloat16())
    rejected = [(x[..., 1:], ValueError), (x.int(), TypeError), (x.double(), TypeError)]
    for wrong, error in rejected:  # the same where torch's is not asked
        with pytest.raises(error):
            vmap(ours)(wrong)
    ours.weight = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"weight: expected shape \[6\], got \[1\]"):
        vmap(ours)(x)


@pytest.mark.parametrize("kind", SETS)
def test_order_of_points(kind: str) -> None:
    block, (x,) = make(kind), inputs_of(kind)
    order = torch.randperm(N)
    output = block(x)
    torch.testing.assert_close(block(x[:, order]), output if kind == "pma" else output[:, order])


@pytest.mark.parametrize("fill", [1e6, torch.nan, torch.inf])
@pytest.mark.parametrize("kind", [*SETS, "mab", "cross", "causal"])
def test_sets_of_several_sizes(kind: str, fill: float) -> None:
    """What stands in the padding is of no consequence to outputs and gradients; an empty set's are finite."""
    block = make(kind)
    *others, last = inputs_of(kind)
    mask = torch.arange(last.shape[1]) < torch.tensor([[3], [0]])
    rows = slice(None) if kind in ("pma", "mab", "cross") else slice(3)
    leaves = [*others, *block.parameters()]

    def both_orders(output: Tensor) -> list[Tensor]:
        first = torch.autograd.grad(output[:, rows].sin().sum(), leaves, create_graph=True)
        total = torch.stack([g.square().sum() for g in first]).sum()
        return [output[:, rows], *first, *torch.autograd.grad(total, leaves)]

    found = both_orders(block(*others, last, mask))
    worse = both_orders(block(*others, last.masked_fill(~mask[..., None], fill), mask))
    for values in zip(found, worse, strict=True):
        assert values[0].isfinite().all()
        torch.testing.assert_close(*values, rtol=0, atol=0)
    torch.testing.assert_close(found[0][:1], block(*(x[:1] for x in others), last[:1, :3])[:, rows])


def test_pooling_of_several_sizes() -> None:
    pooling = AttentionPooling(DIM, dtype=torch.float64)
    x = torch.randn(BATCH, N, DIM, dtype=torch.float64)
    mask = torch.arange(N) < torch.tensor([[3], [0]])
    pooled = pooling(x.masked_fill(~mask[..., None], torch.nan), mask)
    torch.testing.assert_close(pooled[:1], pooling(x[:1, :3]))
    assert not pooled[1].any()
    (gradient,) = torch.autograd.grad(pooled.sin().sum(), pooling.score.weight)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("window", [None, 0, 2])
def test_causal(window: int | None) -> None:
    torch.manual_seed(0)
    block = CausalBlock(DIM, HEADS, window=window, dtype=torch.float64)
    (x,) = inputs_of("causal")
    output = block(x)
    for position in range(N):
        (gradient,) = torch.autograd.grad(output[0, position].sum(), x, retain_graph=True)
        seen = [0 <= position - j <= (N if window is None else window) for j in range(N)]
        assert (gradient[0].norm(dim=-1) > 0).tolist() == seen
        assert not gradient[1].any()


@pytest.mark.parametrize("window", [None, 1])
def test_causal_padding(window: int | None) -> None:
    """In front or behind, the padding is not seen; what sees nothing gets the projection's bias."""
    torch.manual_seed(0)
    block = CausalBlock(DIM, HEADS, window=window, dtype=torch.float64)
    (x,) = inputs_of("causal")
    alone = block(x[:, :3])
    behind = block(x, torch.arange(N).expand(BATCH, N) < 3)
    torch.testing.assert_close(behind[:, :3], alone)
    shifted = torch.cat([torch.full((BATCH, N - 3, DIM), 1e6, dtype=torch.float64), x[:, :3]], 1)
    in_front = block(shifted, torch.arange(N).expand(BATCH, N) >= N - 3)
    torch.testing.assert_close(in_front[:, N - 3 :], alone)
    hidden = shifted.masked_fill(shifted == 1e6, 0.0) + block.project.bias
    torch.testing.assert_close(in_front[:, : N - 3], (hidden + block.mlp(hidden))[:, : N - 3])


def test_device_and_dtype() -> None:
    """Both reach every parameter."""
    kinds = {
        "mab": lambda **o: MAB(DIM, HEADS, **o),
        "sab": lambda **o: SAB(DIM, HEADS, **o),
        "isab": lambda **o: ISAB(DIM, HEADS, 2, **o),
        "pma": lambda **o: PMA(DIM, HEADS, **o),
        "cross": lambda **o: CrossAttentionBlock(DIM, HEADS, **o),
        "causal": lambda **o: CausalBlock(DIM, HEADS, **o),
    }
    for kind, new in kinds.items():
        block = new(device="meta", dtype=torch.bfloat16)
        for name, parameter in block.named_parameters():
            assert (parameter.device.type, parameter.dtype) == ("meta", torch.bfloat16), (kind, name)


def test_refusals() -> None:
    x = torch.zeros(3, DIM)
    for kind in SETS:
        with pytest.raises(ValueError, match="x: expected a set"):
            make(kind)(x.double())
    with pytest.raises(ValueError, match="y: expected a set"):
        MAB(DIM, HEADS)(x[None], x)
    with pytest.raises(ValueError, match="x: expected a set"):
        CausalBlock(DIM, HEADS)(x)
    f64 = {"dtype": torch.float64}
    for block in (*map(make, SETS), CausalBlock(DIM, HEADS, **f64), AttentionPooling(DIM, **f64)):
        with pytest.raises(ValueError, match=r"^mask: expected shape \[1, 3\], got \[1, 2\]"):
            block(x[None].double(), torch.ones(1, 2, dtype=torch.bool))
        with pytest.raises(
            TypeError, match=r"^mask: expected a bool Tensor, True = a point, got torch\.float"
        ):
            block(x[None].double(), torch.ones(1, 3))
        with pytest.raises(TypeError, match="mask: expected a bool Tensor, True = a point, got list"):
            block(x[None].double(), [[True] * 3])
        with pytest.raises(ValueError, match=r"^mask: expected shape \[2, 3\], got \[2, 1\]"):
            block(x.expand(2, 3, DIM).double(), torch.ones(2, 1, dtype=torch.bool))
        with pytest.raises(
            ValueError, match=r"^x: expected 8 features in the last dimension, got \[1, 3, 7\]"
        ):
            block(x[None, :, 1:].double())
        with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
            block([[1.0]])
    with pytest.raises(
        ValueError, match=r"context: expected 6 features in the last dimension, got \[1, 3, 8\]"
    ):
        CrossAttentionBlock(DIM, HEADS, context_dim=6)(x[None], x[None])
    with pytest.raises(ValueError, match="context: expected a set"):
        CrossAttentionBlock(DIM, HEADS)(x[None], x)
    with pytest.raises(ValueError, match="num_inducing: expected an integer of 1 or more, got 0"):
        ISAB(DIM, HEADS, 0)
    with pytest.raises(ValueError, match=r"num_seeds: expected an integer of 1 or more, got 1\.5"):
        PMA(DIM, HEADS, 1.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="embed_dim: expected a multiple of num_heads=3"):
        SAB(DIM, 3)
    with pytest.raises(ValueError, match="dim: expected a multiple of num_heads=3, got dim=8"):
        CausalBlock(DIM, 3)
    with pytest.raises(ValueError, match="window: expected None or an integer of 0 or more, got -1"):
        CausalBlock(DIM, HEADS, window=-1)
    with pytest.raises(ValueError, match=r"window: expected None or an integer of 0 or more, got 1\.5"):
        CausalBlock(DIM, HEADS, window=1.5)  # type: ignore[arg-type]
