"""Sizes that change under torch.compile and torch.export: one graph for the first, one for all others."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from helpers import Shape, finite, make_call
from torch import Tensor, nn
from torch.func import functional_call, grad

import metattn
from metattn.backends import available_backends
from metattn.nn import ISAB, PMA, AttentionPooling, CausalBlock, CrossAttentionBlock, MultiheadAttention

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SIZES = ((5, 6), (7, 8), (3, 11))  # of batch and length; the second makes both symbolic
MAIN = "cpu" if available_backends()["cpu"] is None else "reference"

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def compiled(function: Callable[..., Any], backend: str = "aot_eager") -> tuple[Callable[..., Any], Any]:
    """The function compiled whole, and the counter of its graphs."""
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def first_order(function: Callable[..., Any], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else [x for x in results if x is not None]
    return [*results, *torch.autograd.grad(sum(x.sin().sum() for x in results), leaves)]


@dataclass(frozen=True)
class Case:
    """A call of scaled_dot_product_attention for a batch of b and a length of n."""

    shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]  # of query, key and value; or of all three
    mask: Callable[[int, int], Tensor] | None = None
    is_causal: bool = False
    enable_gqa: bool = False

    def make(self, b: int, n: int) -> list[Tensor]:
        shapes = self.shapes(b, n)
        shapes = shapes if len(shapes) == 3 else shapes * 3
        return [*(randn(*shape) for shape in shapes), *([] if self.mask is None else [self.mask(b, n)])]

    def metattn(self, *tensors: Tensor) -> Tensor:
        return metattn.scaled_dot_product_attention(
            *tensors, is_causal=self.is_causal, enable_gqa=self.enable_gqa
        )

    def formula(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.enable_gqa:
            k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if self.is_causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return (scores if mask is None else scores + mask).softmax(-1) @ v


CASES = {
    "2-D": Case(lambda b, n: ((n, 4),)),
    "3-D": Case(lambda b, n: ((b, n, 4),)),
    "5-D": Case(lambda b, n: ((b, 3, 2, n, 4),)),
    "other lengths": Case(lambda b, n: ((b, n, 4), (b, 2 * n, 4), (b, 2 * n, 3))),
    "keys of one batch": Case(lambda b, n: ((b, 2, n, 4), (1, 2, n, 4), (1, 2, n, 4))),
    "one key head": Case(lambda b, n: ((b, 4, n, 4), (b, 1, n, 4), (b, 1, n, 4))),
    "keys of two dimensions": Case(lambda b, n: ((b, 4, n, 4), (n, 4), (n, 4))),
    "causal": Case(lambda b, n: ((b, n, 4),), is_causal=True),
    "grouped": Case(lambda b, n: ((b, 4, n, 4), (b, 2, n, 4), (b, 2, n, 4)), enable_gqa=True),
    "grouped unevenly": Case(lambda b, n: ((b, 4, n, 4), (b, 2, n, 4), (b, 1, n, 4)), enable_gqa=True),
    "grouped 5-D": Case(lambda b, n: ((b, 3, 4, n, 4), (b, 3, 2, n, 4), (b, 3, 2, n, 4)), enable_gqa=True),
    "mask 3-D": Case(lambda b, n: ((b, n, 4),), lambda b, n: randn(b, 1, n)),
    "mask 4-D": Case(lambda b, n: ((b, 2, n, 4),), lambda b, n: randn(b, 1, n, n)),
    "mask of one 5-D": Case(lambda b, n: ((b, 3, 2, n, 4),), lambda b, n: randn(1, 1, 1, n, n)),
    "mask 5-D": Case(lambda b, n: ((b, 3, 2, n, 4),), lambda b, n: randn(b, 1, 1, n, n)),
    "mask of heads for 5-D": Case(lambda b, n: ((b, 3, 2, n, 4),), lambda b, n: randn(2, n, n)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiled(case: Case) -> None:
    function, counter = compiled(case.metattn)
    for b, n in SIZES:
        tensors = case.make(b, n)
        for found, expected in zip(
            first_order(function, tensors), first_order(case.formula, tensors), strict=True
        ):
            torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_exported(case: Case) -> None:
    class Attends(nn.Module):
        def forward(self, tensors: list[Tensor]) -> Tensor:
            return case.metattn(*tensors)

    tensors, others = case.make(*SIZES[0]), case.make(*SIZES[1])
    symbolic = [
        {i: torch.export.Dim.DYNAMIC for i in range(x.ndim) if x.shape[i] != other.shape[i]}
        for x, other in zip(tensors, others, strict=True)
    ]
    program = torch.export.export(Attends(), (tensors,), dynamic_shapes=(symbolic,), strict=True).module()
    for given in (tensors, others):
        torch.testing.assert_close(program(given), case.formula(*given), **CLOSE)


def test_grouped_needs_three_dimensions() -> None:
    function, _ = compiled(lambda x: metattn.scaled_dot_product_attention(x, x, x, enable_gqa=True))
    with pytest.raises(Exception, match="enable_gqa: expected at least 3 dimensions"):
        function(randn(5, 4))


@pytest.mark.parametrize("name", ["mask", "bias_of_keys", "alibi", "sinks_of_batch", "dropout"])
def test_options(name: str) -> None:
    """attention()'s options of changing shapes; of dropout, the seed changes too."""

    def attend(inputs: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        o, lse = metattn.attention(**inputs, **options, return_lse=True, backend=MAIN)
        return o, finite(lse)

    function, counter = compiled(attend)
    for seed, (b, n) in enumerate(SIZES):
        call = make_call((name,), Shape(batch=b, n=n, m=n + 1), seed=seed)
        if name == "dropout":
            call.constants["dropout_seed"] = 2**40 + seed
        names, math_ = tuple(call.inputs), call.math

        def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return function(dict(zip(names, tensors, strict=True)), call.constants)  # noqa: B023

        def expect(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            o, lse = math_(*tensors)  # noqa: B023
            return o, finite(lse)

        leaves = list(call.tensors)
        for found, expected in zip(first_order(run, leaves), first_order(expect, leaves), strict=True):
            torch.testing.assert_close(found, expected, **CLOSE)
    assert counter.frame_count == 2


@dataclass(frozen=True)
class Inputs:
    """What a MultiheadAttention is given for a batch of b and a length of n."""

    batch_first: bool = True
    batched: bool = True
    padding: str = ""
    mask: str = ""
    need_weights: bool = False

    def make(self, b: int, n: int) -> tuple[Tensor, dict[str, Any]]:
        shape = (n, 8) if not self.batched else (b, n, 8) if self.batch_first else (n, b, 8)
        padding = torch.zeros((b, n) if self.batched else (n,), dtype=torch.bool)
        padding[..., -2:] = True
        mask = torch.ones(n, n, dtype=torch.bool).triu(1)
        blocks = 2 * b if self.batched else 2
        return randn(*shape), {
            "key_padding_mask": {"bool": padding, "float": randn(*padding.shape)}.get(self.padding),
            "attn_mask": {"bool": mask, "float": randn(n, n), "blocks": randn(blocks, n, n)}.get(self.mask),
        }


INPUTS = {
    "batch first": Inputs(),
    "weights": Inputs(need_weights=True),
    "batch second, weights": Inputs(batch_first=False, need_weights=True),
    "unbatched": Inputs(batched=False),
    "unbatched, all": Inputs(batched=False, padding="float", mask="blocks", need_weights=True),
    "both masks": Inputs(padding="bool", mask="bool", need_weights=True),
    "batch second, float masks": Inputs(batch_first=False, padding="float", mask="float"),
}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS.keys())
def test_multihead_attention(inputs: Inputs) -> None:
    """Against torch's module, asked for weights: its plain formula."""
    module = MultiheadAttention(8, 2, batch_first=inputs.batch_first, dtype=torch.float64)
    plain = nn.MultiheadAttention(8, 2, batch_first=inputs.batch_first, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    function, counter = compiled(
        lambda x, options: module(x, x, x, need_weights=inputs.need_weights, **options), backend="eager"
    )
    for b, n in SIZES:
        x, options = inputs.make(b, n)
        found = first_order(lambda x: function(x, options), [x])  # noqa: B023
        expected = first_order(
            lambda x: plain(x, x, x, **options)[: 2 if inputs.need_weights else 1],  # noqa: B023
            [x],
        )
        for a, b_ in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b_, **CLOSE)
    assert counter.frame_count == 2


BLOCKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "induced set": (lambda: ISAB(8, 2, 3, dtype=torch.float64), False),
    "pooled set": (lambda: PMA(8, 2, 2, dtype=torch.float64), False),
    "pooling": (lambda: AttentionPooling(8, dtype=torch.float64), False),
    "causal": (lambda: CausalBlock(8, 2, window=2, dtype=torch.float64), False),
    "cross": (lambda: CrossAttentionBlock(8, 2, dtype=torch.float64), True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str) -> None:
    """With a mask of points, against the block as it is, on the reference."""
    build, crosses = BLOCKS[name]
    module = build()
    function, counter = compiled(module, backend="eager")
    for b, n in SIZES:
        leaves = [randn(b, n, 8), randn(b, n + 3, 8)][: 2 if crosses else 1]
        mask = torch.arange(leaves[-1].shape[1]) < torch.arange(2, b + 2)[:, None]
        found = first_order(lambda *x: function(*x, mask), leaves)  # noqa: B023
        with metattn.use_backend("reference"):
            expected = first_order(lambda *x: module(*x, mask), leaves)  # noqa: B023
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, **CLOSE)
    assert counter.frame_count == 2


def test_functional_call_and_grad_inside() -> None:
    module = MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    plain = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def gradients(module: nn.Module, need_weights: bool, x: Tensor) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            options = {"need_weights": need_weights}
            return functional_call(module, parameters, (x, x, x), options)[0].sin().sum()

        return grad(loss)(parameters)

    function, counter = compiled(lambda x: gradients(module, False, x))
    for _ in range(2):
        x = randn(3, 5, 8)
        torch.testing.assert_close(function(x), gradients(plain, True, x), **CLOSE)
    assert counter.frame_count == 1


def test_a_step_drops_the_same_weights_in_its_backward() -> None:
    """The output is linear in v: ⟨o, w⟩ = ⟨v, vᵀ-gradient⟩ where both have one mask, which each run draws."""
    function, _ = compiled(lambda q, v: metattn.scaled_dot_product_attention(q, q, v, dropout_p=0.5))
    q, v = randn(3, 6, 4), randn(3, 6, 4).requires_grad_()
    outputs = []
    for _ in range(3):
        o, w = function(q, v), randn(3, 6, 4)
        (gradient,) = torch.autograd.grad(o, v, w)
        torch.testing.assert_close((o * w).sum(), (v * gradient).sum(), **CLOSE)
        outputs.append(o)
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_a_modules_dropout_is_drawn_at_every_step() -> None:
    module = MultiheadAttention(8, 2, dropout=0.5, batch_first=True, dtype=torch.float64)
    function, counter = compiled(lambda x: module(x, x, x, need_weights=False)[0])
    x = randn(3, 6, 8)
    assert not torch.equal(function(x), function(x))
    assert counter.frame_count == 1
