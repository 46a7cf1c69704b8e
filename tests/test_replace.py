"""replace_attention and restore_attention there and back: values, parameters, optimizer, hooks, copies."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations, parametrize, prune

import metattn
from metattn.nn import MultiheadAttention, replace_attention, restore_attention

E, HEADS = 8, 2
X64: dict[str, Any] = {"dtype": torch.float64}


class ViT(nn.Module):
    """A Vision Transformer as people write it: patches, a class token, blocks with the norm in front."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp_norm = nn.LayerNorm(E, **X64), nn.LayerNorm(E, **X64)
            self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True, **X64)
            self.mlp = nn.Sequential(nn.Linear(E, 16, **X64), nn.GELU(), nn.Linear(16, E, **X64))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            attended, _ = self.attention(h, h, h, need_weights=False)
            x = x + attended
            return x + self.mlp(self.mlp_norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, E, 4, stride=4, **X64)
        self.token = nn.Parameter(torch.randn(1, 1, E, **X64))
        self.positions = nn.Parameter(torch.randn(1, 5, E, **X64))
        self.blocks = nn.Sequential(ViT.Block(), ViT.Block())
        self.head = nn.Linear(E, 3, **X64)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(images), -1, -1), patches], 1) + self.positions
        return self.head(self.blocks(x)[:, 0])


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(E, HEADS, 16, 0.0, batch_first=True, **X64)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, HEADS, 16, 0.0, norm_first=True, **X64), 2)


def transformer() -> nn.Module:
    return nn.Transformer(E, HEADS, 1, 1, 16, 0.0, batch_first=True, **X64)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
MODELS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], dict[str, Any], int]] = {
    "encoder": (encoder, [(3, 5, E)], {"mask": CAUSAL, "is_causal": True}, 2),
    "decoder": (decoder, [(5, 3, E), (4, 3, E)], {"tgt_mask": CAUSAL}, 4),
    "transformer": (transformer, [(3, 4, E), (3, 5, E)], {"tgt_mask": CAUSAL}, 3),
    "vit": (ViT, [(3, 1, 8, 8)], {}, 2),
}


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor], list[Tensor], int]:
    """The model, a call of one, the call's inputs, how many attention modules there are."""
    make, shapes, options, count = MODELS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
    xs = [torch.randn(shape, requires_grad=True, **X64) for shape in shapes]

    def call(model: nn.Module) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            output: Tensor = model(*xs, **options)
            return output

    return model, call, xs, count


def attentions(model: nn.Module) -> list[nn.MultiheadAttention]:
    return [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]


def types(model: nn.Module) -> set[type]:
    return {type(module) for module in attentions(model)}


def test_there_and_back(name: str) -> None:
    """Values and both orders are the same in between, the very bits after; nothing but the class changes."""
    model, call, xs, count = build(name)
    parameters = dict(model.named_parameters())
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def all_of() -> list[Tensor]:
        output = call(model)
        leaves = [*xs, *parameters.values()]
        first = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        penalty = sum((g.square().sum() for g in first), start=torch.zeros((), **X64))
        return [output, *first, *torch.autograd.grad(penalty, leaves, materialize_grads=True)]

    before = all_of()
    assert replace_attention(model) == count
    assert types(model) == {MultiheadAttention}
    for found, expected in zip(all_of(), before, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    for exchange, expected_types in ((None, MultiheadAttention), (restore_attention, nn.MultiheadAttention)):
        if exchange is not None:
            assert exchange(model) == count
            assert exchange(model) == 0
        assert types(model) == {expected_types}
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
        now = dict(model.named_parameters())
        assert list(now) == list(parameters)
        assert all(now[key] is value for key, value in parameters.items())
    assert all(torch.equal(found, expected) for found, expected in zip(all_of(), before, strict=True))
    assert metattn.restore_attention is restore_attention


def test_training_goes_on(name: str) -> None:
    """Adam over a replacement and a restoration: the same course, by the same state."""
    model, call, _, _ = build(name)
    other = copy.deepcopy(model)
    courses = []
    for each, exchanges in (
        (model, [None, None, None, None]),
        (other, [None, replace_attention, None, restore_attention]),
    ):
        optimizer = torch.optim.Adam(each.parameters(), 1e-2)
        held: list[int] = []
        for exchange in exchanges:
            if exchange is not None:
                assert exchange(each) > 0
            optimizer.zero_grad()
            call(each).square().mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            moments = [id(state["exp_avg"]) for state in optimizer.state.values()]
            assert held in ([], moments)
            held = moments
        courses.append([*each.parameters()])
    for ours, theirs in zip(*courses, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # Adam divides by what may be small


def test_hooks(name: str) -> None:
    model, call, _, count = build(name)
    seen: list[str] = []
    handles = []
    for module in attentions(model):
        handles += [
            module.register_forward_pre_hook(lambda *_: seen.append("before")),
            module.register_forward_hook(lambda *_: seen.append("after")),
            module.register_full_backward_hook(lambda *_: seen.append("backward")),
            module.register_state_dict_post_hook(lambda *_: seen.append("state")),
        ]
    for exchange in (replace_attention, restore_attention):
        assert exchange(model) == count
        seen.clear()
        call(model).sum().backward()  # type: ignore[no-untyped-call]
        model.state_dict()
        assert {what: seen.count(what) for what in seen} == dict.fromkeys(
            ("before", "after", "backward", "state"), count
        )
    for handle in handles:
        handle.remove()
    replace_attention(model)
    seen.clear()
    call(model)
    assert not seen


def test_copies_and_pickles(name: str) -> None:
    model, call, _, count = build(name)
    expected = call(model)
    for exchange, kind in (
        (replace_attention, MultiheadAttention),
        (restore_attention, nn.MultiheadAttention),
    ):
        exchange(model)
        saved = io.BytesIO()
        torch.save(model, saved)
        saved.seek(0)
        pickled = pickle.dumps(model)
        assert (b"metattn" in pickled) == (kind is MultiheadAttention)
        for copied in (
            copy.deepcopy(model),
            pickle.loads(pickled),
            torch.load(saved, weights_only=False),
        ):
            assert types(copied) == {kind}
            torch.testing.assert_close(call(copied), expected, rtol=1e-9, atol=1e-10)
            undo = restore_attention if kind is MultiheadAttention else replace_attention
            assert undo(copied) == count
            torch.testing.assert_close(call(copied), expected, rtol=1e-9, atol=1e-10)


def test_restored_models_are_torchs_to_every_tool(name: str) -> None:
    """TorchScript takes torch's class alone, and says which to restore otherwise."""
    model, call, _, _ = build(name)
    expected = call(model)
    replace_attention(model)
    with (
        pytest.warns(DeprecationWarning, match="jit"),
        pytest.raises(NotImplementedError, match="restore_att"),
    ):
        torch.jit.script(model)
    assert types(model) == {MultiheadAttention}  # TorchScript put nothing in its place
    restored = copy.deepcopy(model)
    restore_attention(restored)
    with pytest.warns(DeprecationWarning, match="jit"):
        torch.testing.assert_close(call(torch.jit.script(restored)), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(call(model), expected, rtol=1e-9, atol=1e-10)


def test_modules_built_as_ours_are_restored_too() -> None:
    shared = MultiheadAttention(E, HEADS)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([shared, nn.MultiheadAttention(E, HEADS)])})
    assert restore_attention(model) == 1
    assert type(shared) is nn.MultiheadAttention
    assert restore_attention(shared) == 0
    assert replace_attention(shared) == 1


def test_restore_leaves_behaviour_of_others() -> None:
    class Own(MultiheadAttention):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return "own"

    class Theirs(nn.MultiheadAttention):
        pass

    instance = MultiheadAttention(E, HEADS)
    instance.forward = lambda *_: "replaced"  # type: ignore[method-assign,assignment]
    model = nn.ModuleDict(
        {
            "own": Own(E, HEADS),
            "theirs": Theirs(E, HEADS),
            "instance": instance,
            "plain": MultiheadAttention(E, HEADS),
        }
    )
    with pytest.warns(UserWarning, match=r"restore_attention: .* of metattn\.nn.* left as it is") as caught:
        assert restore_attention(model) == 1
    assert ["own (Own)" in str(w.message) for w in caught] == [True, False]
    assert model["own"]() == "own"
    assert model["instance"]() == "replaced"
    assert type(model["theirs"]) is Theirs
    with pytest.warns(UserWarning, match="left as it is") as caught:
        assert replace_attention(model) == 1  # the plain one
    assert ["theirs (Theirs)" in str(w.message) for w in caught] == [True]


def test_restore_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        restore_attention([])  # type: ignore[arg-type]


def test_quantizable_attention_is_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = torch.ao.nn.quantizable.MultiheadAttention(E, HEADS)
    with pytest.warns(UserWarning, match=r"the model \(MultiheadAttention\) is a subclass of torch\.nn"):
        assert replace_attention(module) == 0
    assert type(module) is torch.ao.nn.quantizable.MultiheadAttention


def weights_of_norms(module: nn.Module) -> None:
    parametrizations.weight_norm(module, "in_proj_weight")
    parametrizations.orthogonal(module.out_proj, "weight")


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "in_proj_weight", 0.5)
    prune.l1_unstructured(module.out_proj, "weight", 0.5)


@pytest.mark.parametrize("change", [weights_of_norms, pruned])
@pytest.mark.parametrize("first", ["changed", "replaced"])
def test_parametrized_and_pruned(first: str, change: Callable[[nn.Module], None]) -> None:
    """In either order; a parametrized module, which has a class of its own, keeps its properties."""
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, **X64)
    ours = copy.deepcopy(theirs)
    torch.manual_seed(1)
    change(theirs)
    for step in ("changed", "replaced") if first == "changed" else ("replaced", "changed"):
        if step == "replaced":
            assert replace_attention(ours) == 1
            assert replace_attention(ours) == 0
        else:
            torch.manual_seed(1)
            change(ours)
    x = torch.randn(2, 5, E, **X64)
    results = []
    # a pruned weight is no leaf, which torch does not copy
    for module in (theirs, ours) if change is pruned else (theirs, ours, copy.deepcopy(ours)):
        leaves = [p for p in module.parameters() if p.requires_grad]
        output = module(x, x, x)[0]
        first_order = torch.autograd.grad(output.sin().sum(), leaves, create_graph=True)
        penalty = sum((g.square().sum() for g in first_order), start=torch.zeros((), **X64))
        results.append([output, *first_order, *torch.autograd.grad(penalty, leaves)])
    assert isinstance(ours, MultiheadAttention)
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    if change is weights_of_norms:
        parametrize.remove_parametrizations(ours, "in_proj_weight")
        assert type(ours) is MultiheadAttention
        parametrizations.weight_norm(ours, "in_proj_weight")
    assert restore_attention(ours) == 1
    assert not isinstance(ours, MultiheadAttention)
    torch.testing.assert_close(ours(x, x, x)[0], results[0][0], rtol=1e-9, atol=1e-10)


def test_leaf_of_a_traced_graph() -> None:
    """torch.fx goes into users' modules and not into torch.nn's; a replaced one stays a node."""
    model = ViT()
    x = torch.randn(2, 1, 8, 8, **X64)
    plain = [str(node) for node in torch.fx.symbolic_trace(model.blocks).graph.nodes]
    replace_attention(model)
    traced = torch.fx.symbolic_trace(model.blocks)
    assert [str(node) for node in traced.graph.nodes] == plain
    assert types(traced) == {MultiheadAttention}
    tokens = model.patches(x).flatten(2).transpose(1, 2)
    assert torch.equal(traced(tokens), model.blocks(tokens))


class Calling(nn.Module):
    """As timm's Attention does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class OwnAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


class OfTransformers(nn.Linear):
    def set_attn_implementation(self, name: str) -> None: ...


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            nn.Sequential(Calling(), nn.Linear(2, 2)),
            r"0 \(Calling\) call F\.scaled.*: run them within sdpa_override",
        ),
        (nn.Sequential(*(Calling() for _ in range(5))), r"2 \(Calling\) and 2 more call"),
        (OwnAttention(), r"the model \(OwnAttention\) have a formula of their own: call metattn\.attention"),
        (OfTransformers(2, 2), r"set_attn_implementation\('metattn'\)"),
        (nn.Linear(2, 2), "Linear has no torch.nn.MultiheadAttention, nor anything called attention"),
    ],
    ids=["calls", "many", "own", "transformers", "none"],
)
def test_nothing_found_says_what_was_seen(model: nn.Module, said: str) -> None:
    with pytest.warns(UserWarning, match=said) as caught:
        assert replace_attention(model) == 0
    assert [w.filename for w in caught] == [__file__]


def test_what_it_points_to_works() -> None:
    x = torch.randn(1, 2, 5, 4, requires_grad=True, **X64)
    with metattn.sdpa_override() as override:
        o = Calling()(x)
    assert override.calls == 1
    (first,) = torch.autograd.grad(o.sin().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(((x @ x.mT / 2).softmax(-1) @ x).sin().sum(), x, create_graph=True)
    for ours, right in zip(
        *(torch.autograd.grad(each.sin().sum(), x) for each in (first, expected)), strict=True
    ):
        torch.testing.assert_close(ours, right)
