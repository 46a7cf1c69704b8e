"""torch's norms and metattn's: which derivatives are wrong, and that ours are not.

`python tests/test_norms.py` prints the table of docs/recipes/norms.md.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from derivative_orders import (
    X64,
    Formula,
    duals,
    forward_over_reverse,
    forward_twice,
    reverse_over_forward,
    reverse_thrice,
    reverse_twice,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script too

import metattn.nn as exact
from metattn.meta import SGD, maml_loss
from metattn.nn import replace_norms

PAGE = Path(__file__).resolve().parents[1] / "docs/recipes/norms.md"
B, C, L = 3, 4, 5
EPS = 1e-5


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


if __name__ == "__main__":
    print(f"torch {torch.__version__}\n\n{table()}")
