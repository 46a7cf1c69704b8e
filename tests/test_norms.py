"""torch's norms and metattn's: which derivatives are wrong, and that ours are not.

`python tests/test_norms.py` prints the table of docs/recipes/norms.md.
"""

from __future__ import annotations

import copy
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.nn.utils import parametrizations

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script too

import metattn
import metattn.nn as exact
from metattn.meta import SGD, maml_loss
from metattn.nn import replace_attention, replace_norms, restore_attention, restore_norms

PAGE = Path(__file__).resolve().parents[1] / "docs/recipes/norms.md"
X64: dict[str, Any] = {"dtype": torch.float64}
B, C, L = 3, 4, 5
EPS = 1e-5
Formula = Callable[[Tensor], Tensor]


def standard(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred * centred).mean(dims, keepdim=True).add(EPS).sqrt()


def by_group(x: Tensor) -> Tensor:
    return standard(x.reshape(B, 2, -1), (2,)).view(x.shape)


# name → the module and what it computes
KINDS: dict[str, tuple[Callable[[], nn.Module], Formula]] = {
    "LayerNorm": (lambda: nn.LayerNorm(L, elementwise_affine=False), lambda x: standard(x, (2,))),
    "BatchNorm, by the batch": (
        lambda: nn.BatchNorm1d(C, affine=False, track_running_stats=False),
        lambda x: standard(x, (0, 2)),
    ),
    "BatchNorm, by running statistics": (
        lambda: nn.BatchNorm1d(C, affine=False).eval(),
        lambda x: x / (1 + EPS) ** 0.5,
    ),
    "SyncBatchNorm, in one process": (
        lambda: nn.SyncBatchNorm(C, affine=False, track_running_stats=False),
        lambda x: standard(x, (0, 2)),
    ),
    "InstanceNorm": (lambda: nn.InstanceNorm1d(C), lambda x: standard(x, (2,))),
    "GroupNorm": (lambda: nn.GroupNorm(2, C, affine=False), by_group),
    "RMSNorm": (
        lambda: nn.RMSNorm(L, eps=EPS, elementwise_affine=False),
        lambda x: x / x.square().mean(2, keepdim=True).add(EPS).sqrt(),
    ),
}


def reverse_twice(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return grad(lambda x: (grad(f)(x) * t).sum())(x)


def forward_over_reverse(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return jvp(grad(f), (x,), (t,))[1]  # type: ignore[no-any-return]


def reverse_over_forward(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return grad(lambda x: jvp(f, (x,), (t,))[1])(x)


def forward_twice(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    return jacfwd(lambda x: jvp(f, (x,), (t,))[1])(x)


def duals(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    """Reverse over forward without torch.func."""
    x = x.clone().requires_grad_()
    with forward_ad.dual_level():
        rate = forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent
    assert rate is not None
    return torch.autograd.grad(rate, x)[0]


def reverse_thrice(f: Formula, x: Tensor, t: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(x), x, create_graph=True)
    (second,) = torch.autograd.grad((first * t).sum(), x, create_graph=True)
    return torch.autograd.grad((second * t).sum(), x)[0]


ORDERS: dict[str, Callable[[Formula, Tensor, Tensor], Tensor]] = {
    "reverse over reverse": reverse_twice,
    "forward over reverse": forward_over_reverse,
    "reverse over forward": reverse_over_forward,
    "forward over forward": forward_twice,
    "third, reverse": reverse_thrice,
    "duals": duals,
}


def error(order: str, module: nn.Module, formula: Formula) -> float:
    """The relative error of one order of differentiation, in float64."""
    torch.manual_seed(0)
    x, t = torch.randn(2, B, C, L, **X64)
    value, right = (ORDERS[order](lambda x, f=f: f(x).sin().sum(), x, t) for f in (module, formula))  # type: ignore[misc]
    return float((value - right).norm() / right.norm())


def said(order: str, module: nn.Module, formula: Formula) -> str:
    try:
        found = error(order, module, formula)
    except RuntimeError:
        return "raises"
    return "right" if found < 1e-9 else f"wrong by {found:.0%}"


def table() -> str:
    shown = [order for order in ORDERS if order != "duals"]
    lines = [f"| torch's | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    for name, (make, formula) in KINDS.items():
        module = make().double()
        lines.append(f"| {name} | {' | '.join(said(order, module, formula) for order in shown)} |")
    return "\n".join(lines)


def test_what_torch_gives() -> None:
    """Where this fails, torch has been mended, or has broken another."""
    assert table() in PAGE.read_text()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "Sync" not in kind])
def test_every_order_of_ours(kind: str) -> None:
    make, formula = KINDS[kind]
    model = nn.Sequential(make().double())
    assert replace_norms(model) == (kind not in ("GroupNorm", "RMSNorm"))
    assert max(error(order, model, formula) for order in ORDERS) < 1e-12


# ---- the modules


NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    # how to make it, the inputs' shape, the dimensions of a mean
    "LayerNorm": (lambda **o: nn.LayerNorm(4, **o), (3, 2, 4), (-1,)),
    "LayerNorm 2": (lambda **o: nn.LayerNorm((2, 4), **o), (3, 2, 4), (-2, -1)),
    "BatchNorm1d": (lambda **o: nn.BatchNorm1d(4, **o), (6, 4), (0,)),
    "BatchNorm1d 3": (lambda **o: nn.BatchNorm1d(2, **o), (3, 2, 4), (0, 2)),
    "BatchNorm2d": (lambda **o: nn.BatchNorm2d(2, **o), (3, 2, 2, 3), (0, 2, 3)),
    "BatchNorm3d": (lambda **o: nn.BatchNorm3d(2, **o), (2, 2, 2, 1, 3), (0, 2, 3, 4)),
    "InstanceNorm1d": (lambda **o: nn.InstanceNorm1d(2, **o), (3, 2, 4), (2,)),
    "InstanceNorm2d": (lambda **o: nn.InstanceNorm2d(2, **o), (3, 2, 2, 3), (2, 3)),
    "InstanceNorm3d": (lambda **o: nn.InstanceNorm3d(2, **o), (2, 2, 2, 1, 3), (2, 3, 4)),
}


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """torch's module, ours of the same values, an input."""
    torch.manual_seed(0)
    make, shape, _ = NORMS[name]
    affine = options.pop("affine", True)
    options["elementwise_affine" if "Layer" in name else "affine"] = affine
    theirs = make(**options, **X64)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    assert replace_norms(ours) == 1
    return theirs, ours, 2 + torch.randn(shape, **X64)


def derivatives(f: Formula, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The output and three orders of gradients, in the input and the parameters."""
    leaves = [x, *parameters]
    output = f(x)
    found, total = [output], output.sin().sum()
    for _ in range(3):
        gradients = torch.autograd.grad(total, leaves, create_graph=True)
        found += gradients
        total = torch.stack([g.square().sum() for g in gradients]).sum()
    return found


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_three_orders(name: str, affine: bool) -> None:
    """Values and first gradients are torch's, without gradients to the bit; all are the formula's."""
    theirs, ours, x = pair(name, affine=affine)
    dims = NORMS[name][2]

    def formula(x: Tensor) -> Tensor:
        normed = standard(x, dims)
        if not affine:
            return normed
        weight, bias = ours.weight, ours.bias
        if "Layer" in name:
            return normed * weight + bias
        channels = (-1,) + (1,) * (x.dim() - 2)
        return normed * weight.view(channels) + bias.view(channels)

    x.requires_grad_()
    parameters = list(ours.parameters())
    found = derivatives(ours, x, parameters)
    for value, right in zip(found, derivatives(formula, x, parameters), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found[0], theirs(x), rtol=1e-13, atol=1e-13)
    with torch.no_grad():
        assert torch.equal(ours(x), theirs(x))
    plain = [torch.autograd.grad(m(x).sin().sum(), [x, *m.parameters()]) for m in (ours, theirs)]
    for value, right in zip(*plain, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-12, atol=1e-12)


STATISTICS = [name for name in NORMS if "Layer" not in name]


def twice_forward(module: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.sin()))).primal


@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("name", STATISTICS)
def test_running_statistics(name: str, momentum: float | None) -> None:
    """The same in training by autograd, with dual numbers and without gradients; they serve in evaluation."""
    theirs, ours, x = pair(name, track_running_stats=True, momentum=momentum)
    calls: list[Callable[[nn.Module, Tensor], Tensor]] = [
        lambda module, x: module(x.requires_grad_()),
        twice_forward,
        lambda module, x: torch.no_grad()(module)(x),
    ]
    for i, call in enumerate(calls):
        mine, right = (call(module, x.detach() * (i + 1)) for module in (ours, theirs))
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        for value, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            assert forward_ad.unpack_dual(value) == (value, None) if i == 1 else not value.requires_grad
    ours.eval(), theirs.eval()
    assert torch.equal(ours(x), theirs(x))
    ours.train()
    theirs.train()
    x = x.detach()
    for module in (ours, theirs):  # transforms would lose what a batch norm writes
        if "Batch" in name:
            with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
                grad(lambda x: module(x).sum())(x)  # noqa: B023
        else:
            grad(lambda x: module(x).sum())(x)  # noqa: B023
        with pytest.raises(RuntimeError, match="Batch norm got a batched tensor"):
            vmap(module)(x[None])
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("name", ["BatchNorm2d", "InstanceNorm2d", "BatchNorm1d"])
def test_wherever_torchs_goes(name: str) -> None:
    """Traced, compiled, exported, batched; few bits beside float32 weights; layouts; wrong input."""
    theirs, ours, x = pair(name)
    theirs.train(), ours.train()
    expected = theirs(x)
    exported = torch.export.export(ours, (x,)).module()
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "fx": torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(ours))),
        "compile": torch.compile(copy.deepcopy(ours), backend="aot_eager", fullgraph=True),
        "export": exported,
        "trace": torch.jit.trace(copy.deepcopy(ours), (x,), check_trace=False),
    }
    for way, call in ways.items():
        torch.testing.assert_close(call(x), expected, msg=way)
    for value, right in zip(exported.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(value, right)
    theirs, ours, x = pair(name, track_running_stats=False)
    theirs(x), ours(x)
    torch.testing.assert_close(vmap(ours)(x[None])[0], theirs(x))
    (slope,) = torch.autograd.grad(ours(y := x.clone().requires_grad_()).sin().sum(), y, create_graph=True)
    seeds = torch.randn(2, *x.shape, **X64)
    (batched,) = torch.autograd.grad(slope, y, seeds, is_grads_batched=True, retain_graph=True)
    for one, seed in zip(batched, seeds, strict=True):
        torch.testing.assert_close(one, torch.autograd.grad(slope, y, seed, retain_graph=True)[0])
    theirs.float(), ours.float()
    for few in (x.bfloat16(), x.bfloat16().requires_grad_()):
        assert ours(few).dtype == theirs(few).dtype
        torch.testing.assert_close(ours(few), theirs(few), rtol=2**-8, atol=2**-9)
        torch.testing.assert_close(vmap(ours)(few[None])[0], theirs(few), rtol=2**-8, atol=2**-9)
    if x.dim() == 4:
        for laid_out in (x.float().to(memory_format=torch.channels_last), x.float().transpose(2, 3)):
            strides = theirs(laid_out).stride()
            assert ours(laid_out.requires_grad_()).stride() == strides
            assert twice_forward(ours, laid_out).stride() == strides
    single, other = x.float()[:1, :, :1, :1] if x.dim() == 4 else x.float()[:1], x.float()[:, :1]
    for wrong, error in ((single, ValueError), (other, (ValueError, RuntimeError)), (x.long(), Exception)):
        for call in (ours, theirs, vmap(ours)):
            with pytest.raises(error):
                call(wrong[None] if call not in (ours, theirs) else wrong.clone())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("LayerNorm", (0, C)),
        ("BatchNorm1d", (0, C)),
        ("BatchNorm1d", (2, C, 0)),
        ("BatchNorm2d", (0, C, 2, 2)),
        ("InstanceNorm1d", (0, C, 3)),
        ("InstanceNorm2d", (2, C, 5, 0)),
    ],
)
def test_nothing_to_normalise(name: str, shape: tuple[int, ...]) -> None:
    for module in (getattr(exact, name)(C), getattr(nn, name)(C)):
        x = torch.randn(shape, requires_grad=True)
        y = module(x)
        (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
        assert y.shape == gradient.shape == second.shape == shape


def test_inner_loops_leave_running_statistics_alone() -> None:
    """As with torch's own in metattn.meta: a converted model learns there as one that is not."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()
    ours = copy.deepcopy(theirs)
    replace_norms(ours)
    support, query = ((torch.randn(2, 6, 2, **X64), torch.randn(2, 6, 1, **X64)) for _ in range(2))
    found = []
    for model in (ours, theirs):
        before = [buffer.clone() for buffer in model.buffers()]
        params = dict(model.named_parameters())
        loss = maml_loss(model, params, nn.functional.mse_loss, support, query, optimizer=SGD(0.1), steps=2)
        found.append(torch.autograd.grad(loss, params.values()))
        assert all(map(torch.equal, model.buffers(), before))
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right)


# ---- replace_norms, restore_norms


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


if __name__ == "__main__":
    print(f"torch {torch.__version__}\n\n{table()}")
