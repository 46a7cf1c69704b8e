"""replace_norms and restore_norms there and back."""

from __future__ import annotations

import copy
import pickle
import re
import warnings

import pytest
import torch
from derivative_orders import X64, duals, forward_over_reverse, reverse_over_forward, reverse_twice
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.utils import parametrizations

import metattn
import metattn.nn as exact
from metattn.nn import replace_attention, replace_norms, restore_attention, restore_norms


class Convolutions(nn.Module):
    """One norm twice, one without parameters, one without a bias, GroupNorm and RMSNorm beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 4, 3)
        self.batch = nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm2d(4)
        self.group, self.rms = nn.GroupNorm(2, 4), nn.RMSNorm(6)
        self.shared = nn.LayerNorm(6, bias=False)
        self.again = self.shared
        self.plain = nn.LayerNorm(6, elementwise_affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.group(self.instance(self.batch(self.convolution(x)).tanh()).sin())
        return self.plain(self.again(self.rms(self.shared(x)).sin()).tanh())


def test_norms_there_and_back() -> None:
    torch.manual_seed(0)
    model = Convolutions().double()
    model.batch.eval()
    model.shared.weight.requires_grad_(False)
    x = torch.randn(2, 1, 8, 8, **X64)
    expected, parameters, state = model(x), list(model.parameters()), copy.deepcopy(model.state_dict())
    seen: list[str] = []
    handle = model.shared.register_forward_hook(lambda *_: seen.append("hook"))
    own = [(name, type(module)) for name, module in model.named_modules()]
    assert metattn.replace_norms(model) == 4
    assert replace_norms(model) == 0
    assert [type(m) for m in (model.batch, model.instance, model.shared, model.plain)] == [
        exact.BatchNorm2d,
        exact.InstanceNorm2d,
        exact.LayerNorm,
        exact.LayerNorm,
    ]
    assert model.again is model.shared
    assert not model.batch.training
    assert model.instance.training
    torch.testing.assert_close(model(x), expected)
    handle.remove()
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(copied(x), expected)
    assert seen == ["hook", "hook"]
    assert metattn.restore_norms(model) == 4
    assert restore_norms(model) == 0
    assert [(name, type(module)) for name, module in model.named_modules()] == own
    assert b"metattn" not in pickle.dumps(model.plain)
    assert all(mine is value for mine, value in zip(model.parameters(), parameters, strict=True))
    assert model.shared.weight.dtype == torch.float64
    assert not model.shared.weight.requires_grad
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert torch.equal(model(x), expected)


def test_norms_of_a_behaviour_of_their_own() -> None:
    class Own(nn.LayerNorm):
        pass

    class OursToo(exact.LayerNorm):
        pass

    replaced = nn.LayerNorm(3)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.ModuleDict(
        {"a": Own(3), "b": Own(3), "ours": OursToo(3), "sync": nn.SyncBatchNorm(3)}
        | {"lazy": nn.LazyBatchNorm1d(), "replaced": replaced, "plain": nn.LayerNorm(3)}
    )
    with pytest.warns(UserWarning, match=r"replace_norms: .* and was left as it is") as caught:
        assert replace_norms(model) == 1
    assert [re.sub(r" is a norm.*", "", str(w.message).partition(": ")[2]) for w in caught] == [
        "a (Own), as 1 more,",
        "sync (SyncBatchNorm)",
        "lazy (LazyBatchNorm1d)",
        "replaced (LayerNorm)",
    ]
    assert all(w.filename == __file__ for w in caught)
    with pytest.warns(UserWarning, match=r"restore_norms: ours \(OursToo\) is a norm .* left as it is"):
        assert restore_norms(model) == 1
    for call in (replace_norms, restore_norms):
        with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
            call([])  # type: ignore[arg-type]


def test_parametrized_norms_keep_their_properties() -> None:
    theirs = nn.BatchNorm1d(4, **X64)
    parametrizations.weight_norm(theirs, "weight", dim=None)
    ours = copy.deepcopy(theirs)
    x = torch.randn(5, 4, **X64)
    assert replace_norms(ours) == 1
    torch.testing.assert_close(ours(x), theirs(x))
    assert isinstance(ours, exact.BatchNorm1d)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert restore_norms(ours) == 1
    assert not isinstance(ours, exact.BatchNorm1d)
    torch.testing.assert_close(ours(x), theirs(x))


def encoder_layer(norm_first: bool = False) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first, **X64)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_converted_models_hessian(norm_first: bool) -> None:
    """In every order of modes, beside a difference quotient of the gradient."""
    model = encoder_layer(norm_first)
    assert replace_attention(model, norms=True) == 1
    x, t = torch.randn(2, 2, 4, 8, **X64)

    def f(x: Tensor) -> Tensor:
        return model(x).sin().sum()

    step = 1e-5
    quotient = (grad(f)(x + step * t) - grad(f)(x - step * t)) / (2 * step)
    for order in (reverse_twice, forward_over_reverse, reverse_over_forward, duals):
        assert (order(f, x, t) - quotient).norm() < 1e-6 * quotient.norm()

    weights = dict(model.named_parameters())  # and in the parameters, the norms' among them

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (x,)).sin().sum()

    along = {name: weight.detach().sin() for name, weight in weights.items()}
    over_forward = grad(lambda weights: jvp(loss, (weights,), (along,))[1])(weights)
    over_reverse = jvp(grad(loss), (weights,), (along,))[1]
    for name in weights:
        torch.testing.assert_close(over_forward[name], over_reverse[name], rtol=1e-9, atol=1e-9)


def test_norms_beside_attention_are_told_of() -> None:
    with pytest.warns(UserWarning, match=r"2 of torch's norms, norm1 \(LayerNorm\) the first") as caught:
        assert replace_attention(encoder_layer()) == 1
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        left, alone = encoder_layer(), nn.MultiheadAttention(4, 2)
        assert replace_attention(left, norms=False) == 1
        assert type(left.norm1) is nn.LayerNorm
        assert replace_attention(nn.ModuleList([alone, nn.RMSNorm(4)])) == 1
        model = encoder_layer()
        replace_norms(model)
        assert replace_attention(model) == 1
        assert restore_attention(model) == 1
        assert type(model.norm1) is exact.LayerNorm
        replace_attention(model)
        assert restore_attention(model, norms=True) == 1
        assert {type(model.self_attn), type(model.norm1)} == {nn.MultiheadAttention, nn.LayerNorm}


def test_torchscript_says_how_to_restore() -> None:
    for module in (exact.LayerNorm(3), exact.BatchNorm1d(3), exact.InstanceNorm1d(3)):
        with (
            pytest.warns(DeprecationWarning, match="jit"),
            pytest.raises(NotImplementedError, match=r"got a metattn\.nn.*Call metattn\.restore_norms"),
        ):
            torch.jit.script(nn.Sequential(module))
