"""metattn.nn.MultiheadAttention where torch.nn's is odd, and what either refuses.

`python tests/test_nn_parity.py` prints the table that docs/recipes/replacing-multiheadattention.md has.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script too

from metattn.nn import MultiheadAttention, replace_attention

PAGE = Path(__file__).resolve().parents[1] / "docs/recipes/replacing-multiheadattention.md"
E, HEADS, BATCH, L, S = 8, 2, 2, 5, 4
MHA = nn.MultiheadAttention


def pair(**options: Any) -> tuple[MHA, MHA]:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(E, HEADS, **{"batch_first": True, "dtype": torch.float64, **options})
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = copy.deepcopy(theirs)
    assert replace_attention(ours) == 1
    return theirs, ours


def x64(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


X = x64(BATCH, L, E)


def attend(module: MHA, *tensors: Tensor, **options: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return module(*(tensors or (X, X, X)), **options)


# What one of the two refuses.


@dataclass
class Wrong:
    """A call, and what torch.nn's and metattn.nn's answer: an error's name, or None."""

    call: Callable[[MHA], Any]
    torchs: str | None
    ours: str | None
    options: dict[str, Any] = field(default_factory=dict)


def in_inference(module: MHA, **options: Any) -> Any:
    module.eval()
    with torch.no_grad():
        return attend(module, need_weights=False, **options)


def without_bias_v(module: MHA) -> Any:
    module.bias_v = None
    return attend(module)


def of_three_heads(module: MHA) -> Any:
    module.num_heads = 3
    return attend(module)


CAUSAL = torch.ones(L, L, dtype=torch.bool).triu(1)
WRONG: dict[str, Wrong] = {
    "`query` of other than 2 or 3 dimensions": Wrong(
        lambda m: attend(m, X[None], X[None], X[None]), "AssertionError", "ValueError"
    ),
    "`key`, `value` of other dimensions than `query`": Wrong(
        lambda m: attend(m, X, X[0], X[0]), "AssertionError", "ValueError"
    ),
    "`query` of other features than `embed_dim`": Wrong(
        lambda m: attend(m, x64(BATCH, L, E + 1), X, X), "AssertionError", "ValueError"
    ),
    "`key` of other features than `kdim`": Wrong(
        lambda m: attend(m, X, x64(BATCH, S, E + 1), x64(BATCH, S, E)), "AssertionError", "ValueError"
    ),
    "`key`, `value` of different lengths": Wrong(
        lambda m: attend(m, X, x64(BATCH, S, E), X), "AssertionError", "ValueError"
    ),
    "`query`, `key` of different batches": Wrong(
        lambda m: attend(m, X, x64(3, S, E), x64(3, S, E)), "RuntimeError", "ValueError"
    ),
    "inputs of another dtype than the module's": Wrong(
        lambda m: attend(m, X.float(), X.float(), X.float()), "RuntimeError", "TypeError"
    ),
    "`key` that is no tensor": Wrong(
        lambda m: attend(m, X, None, None),  # type: ignore[arg-type]
        "AttributeError",
        "TypeError",
    ),
    "a mask that is no tensor": Wrong(lambda m: attend(m, attn_mask=[[True]]), "TypeError", "TypeError"),
    "a mask of integers": Wrong(lambda m: attend(m, attn_mask=CAUSAL.byte()), "AssertionError", "TypeError"),
    "`attn_mask` of other than 2 or 3 dimensions": Wrong(
        lambda m: attend(m, attn_mask=torch.tensor(True)), "AssertionError", "ValueError"
    ),
    "`attn_mask` of another shape": Wrong(
        lambda m: attend(m, attn_mask=torch.zeros(1, L, L, dtype=torch.bool)), "RuntimeError", "ValueError"
    ),
    "`key_padding_mask` of another shape": Wrong(
        lambda m: attend(m, key_padding_mask=torch.zeros(1, L, dtype=torch.bool)),
        "AssertionError",
        "ValueError",
    ),
    "`is_causal` without `attn_mask`": Wrong(
        lambda m: attend(m, is_causal=True), "RuntimeError", "ValueError"
    ),
    "`num_heads` changed to what does not divide": Wrong(of_three_heads, "AssertionError", "ValueError"),
    "`bias_k` left without `bias_v`": Wrong(
        without_bias_v, "AssertionError", "ValueError", {"add_bias_kv": True}
    ),
    "`embed_dim` that `num_heads` does not divide": Wrong(
        lambda m: type(m)(E, 3), "AssertionError", "ValueError"
    ),
    "`dropout` above 1, when constructed": Wrong(
        lambda m: type(m)(E, HEADS, dropout=1.5), None, "ValueError"
    ),
    "`is_causal` without `attn_mask`, in evaluation without gradients": Wrong(
        lambda m: in_inference(m, is_causal=True), None, "ValueError"
    ),
    "an `attn_mask` of another shape that `is_causal` leaves unread": Wrong(
        lambda m: attend(m, attn_mask=CAUSAL[:3, :3], is_causal=True, need_weights=False), None, "ValueError"
    ),
    "a float mask of another dtype than `query`": Wrong(
        lambda m: attend(m, attn_mask=torch.zeros(L, L)), "RuntimeError", None
    ),
    "a NestedTensor in training": Wrong(
        lambda m: attend(m, *[torch.nested.as_nested_tensor([X[0], X[1, :3]])] * 3),
        "AssertionError",
        "AssertionError",
    ),
    "a jagged NestedTensor": Wrong(
        lambda m: in_inference_of(m, torch.nested.as_nested_tensor([X[0], X[1, :3]], layout=torch.jagged)),
        "AssertionError",
        "AssertionError",
    ),
    "a sparse tensor": Wrong(lambda m: attend(m, *[X.to_sparse()] * 3), "RuntimeError", "TypeError"),
    "`out_proj` without a `weight`": Wrong(
        lambda m: with_out_proj(m, nn.Identity()), "AttributeError", "AttributeError"
    ),
}


def in_inference_of(module: MHA, x: Tensor) -> Any:
    module.eval()
    with torch.no_grad():
        return module(x, x, x, need_weights=False)


def with_out_proj(module: MHA, replaced: nn.Module) -> Any:
    module.out_proj = replaced  # type: ignore[assignment]
    return attend(module)


def table() -> list[str]:
    rows = ["| call | `torch.nn` | `metattn.nn` |", "|---|---|---|"]
    for text, wrong in WRONG.items():
        answers = (f"`{error}`" if error else "takes it" for error in (wrong.torchs, wrong.ours))
        rows.append(f"| {text} | " + " | ".join(answers) + " |")
    return rows


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_refusals(wrong: Wrong) -> None:
    for module, expected in zip(pair(**wrong.options), (wrong.torchs, wrong.ours), strict=True):
        if expected is None:
            wrong.call(module)
            continue
        with pytest.raises(Exception, match=r"\w") as error:
            wrong.call(module)
        assert type(error.value).__name__ == expected, error.value


def test_the_page_has_the_table() -> None:
    assert "\n".join(table()) in PAGE.read_text()


# What both take.


def out_proj_wrapped(module: MHA) -> Any:
    """An adapter around out_proj: torch reads its weight and bias, and never calls it."""

    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base = base
            self.change = nn.Parameter(x64(E, E, seed=5))

        @property
        def weight(self) -> Tensor:
            return self.base.weight + self.change

        @property
        def bias(self) -> Tensor:
            return self.base.bias

        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("called")

    return with_out_proj(module, Adapter(module.out_proj))


def narrower_output(module: MHA) -> Any:
    torch.manual_seed(5)
    return with_out_proj(module, nn.Linear(E, 3, dtype=torch.float64))


def other_heads(module: MHA) -> Any:
    """torch divides anew, and does not read head_dim."""
    module.num_heads = 4
    return attend(module)


def no_in_proj_bias(module: MHA) -> Any:
    module.in_proj_bias = None  # type: ignore[assignment]
    return attend(module)


def pickled_by_torch_1_1(module: MHA) -> Any:
    state = dict(vars(module))
    del state["_qkv_same_embed_dim"]
    loaded = type(module).__new__(type(module))
    loaded.__setstate__(state)
    return attend(loaded)


def replica(module: MHA) -> Any:
    """As DataParallel makes them: parameters have become plain attributes."""
    copied = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
    for name, parameter in module._parameters.items():
        if parameter is None:
            copied._parameters[name] = None
        else:
            setattr(copied, name, parameter * 1)
    return attend(copied)


def checkpointed(module: MHA) -> Any:
    x = X.clone().requires_grad_()
    output, weights = checkpoint(module, x, x, x, use_reentrant=False)
    return output, weights, torch.autograd.grad(output.sin().sum() + weights.sin().sum(), x)[0]


def mask_gradients(module: MHA) -> Any:
    """Masks of rank 2 and of padding that are learned, to second order; −inf in them."""
    mask = x64(L, L, seed=2).masked_fill(CAUSAL, -torch.inf).requires_grad_()
    padding = x64(BATCH, L, seed=3).requires_grad_()
    output, weights = attend(module, attn_mask=mask, key_padding_mask=padding)
    first = torch.autograd.grad(
        (output.sin().sum() + weights.sin().sum()), (mask, padding), create_graph=True
    )
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (mask, padding))  # type: ignore[arg-type]
    return output, weights, *first, *second


def unread_mask(module: MHA) -> Any:
    """With is_causal and neither weights nor padding torch does not look at the mask: no gradient comes."""
    mask = torch.zeros(L, L, dtype=torch.float64, requires_grad=True)
    output, _ = attend(module, attn_mask=mask, is_causal=True, need_weights=False)
    (gradient,) = torch.autograd.grad(output.sum(), mask, allow_unused=True)
    assert gradient is None
    return (output,)


def read_mask(module: MHA) -> Any:
    """With weights the hint is not used and the mask is read, whatever it is."""
    return attend(module, attn_mask=CAUSAL.T, is_causal=True)


def transposed_inputs(module: MHA) -> Any:
    x = x64(E, BATCH, L).permute(1, 2, 0)
    return attend(module, x, x.clone(), x[:, ::1])


def subclass(module: MHA) -> Any:
    class Marked(Tensor):
        pass

    x = X.as_subclass(Marked)
    results = attend(module, x, x, x)
    assert [type(result) for result in results] == [Marked, Marked]
    return tuple(result.as_subclass(Tensor) for result in results)


def without_weights(module: MHA) -> Any:
    output, weights = attend(module, need_weights=False, average_attn_weights=False)
    assert weights is None
    return (output,)


def empty(*shape: int, key: tuple[int, ...] | None = None) -> Callable[[MHA], Any]:
    def call(module: MHA) -> Any:
        query, keys = x64(*shape), x64(*(key or shape))
        return attend(module, query, keys, keys)

    return call


ALIKE: dict[str, tuple[Callable[[MHA], Any], dict[str, Any]]] = {
    "out_proj wrapped": (out_proj_wrapped, {}),
    "narrower output": (narrower_output, {}),
    "other heads": (other_heads, {}),
    "no in_proj_bias": (no_in_proj_bias, {}),
    "pickled by torch 1.1": (pickled_by_torch_1_1, {}),
    "replica": (replica, {"add_bias_kv": True}),
    "checkpointed": (checkpointed, {}),
    "mask gradients": (mask_gradients, {}),
    "mask gradients, added keys": (mask_gradients, {"add_bias_kv": True, "add_zero_attn": True}),
    "unread mask": (unread_mask, {}),
    "read mask": (read_mask, {}),
    "transposed inputs": (transposed_inputs, {}),
    "subclass": (subclass, {}),
    "without weights": (without_weights, {}),
    "no batch": (empty(0, L, E), {}),
    "no queries": (empty(BATCH, 0, E, key=(BATCH, S, E)), {}),
    "no keys": (empty(BATCH, L, E, key=(BATCH, 0, E)), {}),
    "nothing at all": (empty(0, 0, E), {}),
    "no keys but the added": (empty(BATCH, L, E, key=(BATCH, 0, E)), {"add_bias_kv": True}),
    "no keys, unbatched": (empty(L, E, key=(0, E)), {}),
    "length first, no keys": (empty(L, BATCH, E, key=(0, BATCH, E)), {"batch_first": False}),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("call", "options"), ALIKE.values(), ids=ALIKE.keys())
def test_alike(call: Callable[[MHA], Any], options: dict[str, Any], training: bool) -> None:
    expected, found = (call(module.train(training)) for module in pair(**options))
    assert len(found) == len(expected)
    for x, y in zip(found, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)
            assert x.requires_grad == y.requires_grad


@pytest.mark.parametrize("masks", [{}, {"attn_mask": CAUSAL}, {"key_padding_mask": CAUSAL[:2]}], ids=str)
@pytest.mark.parametrize("need_weights", [True, False])
def test_torchs_inference_path(masks: dict[str, Tensor], need_weights: bool) -> None:
    """In evaluation without gradients torch.nn takes a fused path of its own: ours agrees with that too."""
    expected, found = (in_inference_with(module, masks, need_weights) for module in pair())
    for x, y in zip(found, expected, strict=True):
        if y is not None:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


def in_inference_with(module: MHA, masks: dict[str, Tensor], need_weights: bool) -> Any:
    module.eval()
    with torch.no_grad():
        return module(X, X, X, need_weights=need_weights, **masks)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_take_torchs_path() -> None:
    nested = torch.nested.as_nested_tensor([X[0], X[1, :3]])
    expected, found = (in_inference_of(module, nested)[0] for module in pair())
    for x, y, z in zip(found.unbind(), expected.unbind(), (X[:1], X[1:, :3]), strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, in_inference_of(pair()[1], z)[0][0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
def test_memory_of_the_output(batch_first: bool) -> None:
    """torch's is contiguous with the length first, ours in either order."""
    theirs, ours = (attend(module)[0] for module in pair(batch_first=batch_first))
    assert ours.is_contiguous()
    assert theirs.is_contiguous() != batch_first


def test_without_data() -> None:
    """On the meta device, and as fake tensors, which know shapes alone."""
    for module in pair():
        x = torch.empty(BATCH, L, E, device="meta", dtype=torch.float64)
        output, weights = copy.deepcopy(module).to("meta")(x, x, x)
        assert (output.shape, weights.shape, output.device.type) == (X.shape, (BATCH, L, L), "meta")
    with FakeTensorMode():
        module = MultiheadAttention(E, HEADS, batch_first=True)
        x = torch.empty(BATCH, L, E)
        output, weights = module(x, x, x, average_attn_weights=False)
        assert (output.shape, weights.shape) == (X.shape, (BATCH, HEADS, L, L))


@pytest.mark.parametrize("how", ["traced", "exported", "exported, strict", "exported, any length"])
def test_programs(how: str) -> None:
    """torch.jit.trace and torch.export of the module: the same values on other inputs."""
    _, module = pair()
    module.eval()
    other = x64(BATCH, L, E, seed=7)
    if how == "traced":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.jit.trace(module, (X, X, X))
    elif how == "exported, any length":
        sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        program = torch.export.export(
            module, (X, X, X), dynamic_shapes={n: sizes for n in ("query", "key", "value")}
        ).module()
        other = x64(3, 7, E, seed=7)
    else:
        program = torch.export.export(module, (X, X, X), strict="strict" in how).module()
    for found, expected in zip(program(other, other, other), module(other, other, other), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


if __name__ == "__main__":
    print("\n".join(table()))
