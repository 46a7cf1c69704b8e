"""torch's own samples (ModuleInfo, OpInfo) of its attention modules and functions, run through ours.

Values and both orders of derivatives are compared with torch's math path in float64 on every sample; values
in the lower precisions that torch lists by the rule for errors, and in evaluation without gradients, where
torch takes fused paths of its own. gradcheck and gradgradcheck take every fourth sample in training, every
fourth other in evaluation, or all with `--exhaustive`. torch 2.13 has error inputs for none of these.
`python tests/test_torch_samples.py` runs everything and prints the tables of docs/recipes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, module_db
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script too

from helpers import FLOORS, relative_error

import metattn

RECIPES = Path(__file__).resolve().parents[1] / "docs/recipes"
MODULES = {
    info.module_cls.__name__: info
    for info in module_db
    if info.module_cls
    in (
        nn.MultiheadAttention,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
        nn.TransformerEncoder,
        nn.Transformer,
    )
}
FUNCTIONS = {
    op.name.removeprefix("nn.functional."): op
    for op in op_db
    if op.name in ("nn.functional.scaled_dot_product_attention", "nn.functional.multi_head_attention_forward")
}
MODES = ("training", "evaluation")
LOWER = ((torch.float32,), (torch.float32, torch.bfloat16, torch.float16))  # of modules, of functions
RTOL, ATOL = 1e-9, 1e-10

# What differs, by (module or function, mode): sample → why. What is here and agrees fails too.
DROPOUT = "dropout: other weights are dropped"
DEVIATIONS: dict[tuple[str, str], dict[int, str]] = {
    ("scaled_dot_product_attention", "training"): dict.fromkeys(
        (2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23), DROPOUT
    ),
    ("multi_head_attention_forward", "training"): dict.fromkeys(range(1, 192, 2), DROPOUT),
}


@dataclass
class Sample:
    """A call of torch's and one of ours with the same arguments and parameters, in float64."""

    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    parameters: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))

    def to(self, dtype: torch.dtype) -> Sample:
        """The same numbers, rounded."""

        def cast(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        theirs, ours = (
            copy.deepcopy(call).to(dtype) if isinstance(call, nn.Module) else call
            for call in (self.theirs, self.ours)
        )
        return Sample(theirs, ours, tree_map(cast, self.arguments))

    def results(self, which: int, orders: int = 2) -> list[Tensor]:
        """Outputs, then the derivatives of a functional of them in all inputs and parameters, then theirs."""
        leaves: list[Tensor] = []

        def leaf(x: Any) -> Any:
            if isinstance(x, Tensor) and x.is_floating_point():
                leaves.append(x := x.detach().requires_grad_(orders > 0))
            return x

        args, kwargs = tree_map(leaf, self.arguments)
        torch.manual_seed(0)
        outputs = tensors((self.theirs, self.ours)[which](*args, **kwargs))
        if not orders:
            return outputs
        leaves += self.parameters[which]
        generator = torch.Generator().manual_seed(5)

        def functional(xs: list[Tensor]) -> Tensor:
            weights = (torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in xs)
            return sum(((w * x).sum() for w, x in zip(weights, xs, strict=True)), torch.zeros(()))

        first = torch.autograd.grad(functional(outputs), leaves, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(functional(list(first)), leaves, materialize_grads=True)
        return [*outputs, *first, *second]


def tensors(outputs: Any) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def samples_of(name: str, mode: str) -> Iterator[Sample]:
    torch.manual_seed(0)
    if name in FUNCTIONS:
        yield from function_samples(name)
    else:
        yield from module_samples(MODULES[name], mode)


def module_samples(info: ModuleInfo, mode: str) -> Iterator[Sample]:
    training = mode == "training"
    for sample in info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    ):
        given = copy.deepcopy((sample.constructor_input.args, sample.constructor_input.kwargs))
        theirs = info.module_cls(*given[0], **given[1]).double().train(training)
        for (
            parameter
        ) in theirs.parameters():  # biases start at 0, where a mistake in their use would not show
            nn.init.normal_(parameter, std=0.4)
        ours = copy.deepcopy(theirs)
        assert metattn.replace_attention(ours) > 0
        arguments = (sample.forward_input.args, sample.forward_input.kwargs)
        yield Sample(theirs, ours, arguments, (list(theirs.parameters()), list(ours.parameters())))


def function_samples(name: str) -> Iterator[Sample]:
    """Of the larger function those that torch draws without gradients, which are more; without weights, which
    are made by torch's own formula inside the override too. Drawn between −9 and 9 and projected, they make a
    step of the softmax, without derivatives: they are divided by 9.
    """
    of_modules = name == "multi_head_attention_forward"
    for sample in FUNCTIONS[name].reference_inputs("cpu", torch.float64, requires_grad=not of_modules):
        arguments = tree_map(
            lambda x: (
                (x.detach() / (9 if of_modules else 1)).requires_grad_() if isinstance(x, Tensor) else x
            ),
            ((sample.input, *sample.args), sample.kwargs | ({"need_weights": False} if of_modules else {})),
        )
        theirs = getattr(nn.functional, name)
        ours = overridden(theirs) if of_modules else metattn.scaled_dot_product_attention
        yield Sample(theirs, ours, arguments)


def overridden(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with metattn.sdpa_override() as override:
            outputs = function(*args, **kwargs)
        assert override.calls == 1
        return outputs

    return call


def differs(sample: Sample, orders: int = 2) -> str | None:
    with sdpa_kernel(SDPBackend.MATH):
        expected = sample.results(0, orders)
    found = sample.results(1, orders)
    if len(found) != len(expected):
        return f"{len(found)} outputs and derivatives in place of {len(expected)}"
    for x, y in zip(found, expected, strict=True):
        if x.shape != y.shape or not torch.allclose(x, y, rtol=RTOL, atol=ATOL):
            return "another value"
    return None


def check_rounded(sample: Sample, dtype: torch.dtype) -> None:
    """Our error in a lower precision, by the rule for errors: beside that of torch's math path."""
    rounded = sample.to(dtype)
    factor, floor = FLOORS[dtype]
    with sdpa_kernel(SDPBackend.MATH):
        truth, baseline = rounded.to(torch.float64).results(0, orders=0), rounded.results(0, orders=0)
    for x, y, exact in zip(rounded.results(1, orders=0), baseline, truth, strict=True):
        error, allowed = (relative_error(z, exact)[0] for z in (x, y))
        assert error <= max(factor * allowed, floor), (error, allowed)


def check_derivatives(sample: Sample) -> None:
    inputs = [x for x in tree_leaves(sample.arguments) if isinstance(x, Tensor) and x.requires_grad]
    leaves = [x.detach().requires_grad_() for x in inputs]

    def run(*given: Tensor) -> tuple[Tensor, ...]:
        places = {id(x): y for x, y in zip(inputs, given, strict=True)}
        args, kwargs = tree_map(lambda x: places.get(id(x), x), sample.arguments)
        torch.manual_seed(0)  # the same dropout every time
        return tuple(tensors(sample.ours(*args, **kwargs)))

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


@dataclass
class Count:
    samples: int = 0
    differ: dict[int, str] = field(default_factory=dict)


def count(name: str, mode: str, *, exhaustive: bool) -> Count:
    """Runs every sample; what differs by its index."""
    found = Count()
    for index, sample in enumerate(samples_of(name, mode)):
        found.samples += 1
        different = differs(sample, orders=0 if dropped(sample) else 2)
        if different is None and mode == "evaluation":
            with torch.no_grad():
                different = differs(sample, orders=0)
        if different is not None:
            found.differ[index] = DROPOUT if dropped(sample) else different
        quick = name in MODULES and index % 4 == 2 * MODES.index(mode)
        if exhaustive or quick or name == "scaled_dot_product_attention":
            check_derivatives(sample)
        if dropped(sample) and name == "scaled_dot_product_attention":
            check_dropout(sample)
        elif not dropped(sample):
            for dtype in LOWER[name in FUNCTIONS]:
                check_rounded(sample, dtype)
    return found


def dropped(sample: Sample) -> bool:
    options = sample.arguments[1]
    return bool(options.get("dropout_p", 0.0) or options.get("training", False))


def check_dropout(sample: Sample) -> None:
    """The weights, which values of one coordinate each tell, are torch's ones divided by 1 − p, or zero."""
    (q, k, v), options = sample.arguments
    p, one = options["dropout_p"], torch.eye(k.shape[-2], dtype=k.dtype).expand(*k.shape[:-1], k.shape[-2])
    torch.manual_seed(0)
    weights = sample.ours(q, k, one, **options)
    with sdpa_kernel(SDPBackend.MATH):
        whole = sample.theirs(q, k, one, **{**options, "dropout_p": 0.0})
    assert 0 < (weights == 0).sum() < weights.numel()
    torch.testing.assert_close(weights, torch.where(weights == 0, 0.0, whole / (1 - p)), rtol=RTOL, atol=ATOL)
    torch.testing.assert_close(sample.results(1, orders=0)[0], weights @ v, rtol=RTOL, atol=ATOL)


CASES = [(name, mode) for name in MODULES for mode in MODES] + [(name, "training") for name in FUNCTIONS]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_samples(name: str, mode: str, request: pytest.FixtureRequest) -> None:
    found = count(name, mode, exhaustive=request.config.getoption("--exhaustive"))
    assert found.samples >= 25
    assert found.differ == DEVIATIONS.get((name, mode), {})


def rows(names: dict[str, Any]) -> list[str]:
    """A table of what test_samples has found to be so."""
    lines = ["| torch's samples of | in | samples | alike | differ |", "|---|---|---:|---:|---|"]
    for name, mode in CASES:
        if name in names:
            samples, differ = len(list(samples_of(name, mode))), DEVIATIONS.get((name, mode), {})
            reasons = ", ".join(f"{len(differ)}: {why}" for why in sorted(set(differ.values()))) or "0"
            where = mode if name in MODULES else "evaluation and training" if "multi" in name else ""
            lines.append(f"| `{name}` | {where} | {samples} | {samples - len(differ)} | {reasons} |")
    return lines


PAGES = {"replacing-multiheadattention.md": MODULES, "sdpa-override.md": FUNCTIONS}


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="the pages have torch 2.13's samples")
@pytest.mark.parametrize("page", PAGES)
def test_the_pages_have_the_counts(page: str) -> None:
    assert "\n".join(rows(PAGES[page])) in (RECIPES / page).read_text()


if __name__ == "__main__":
    for case in CASES:
        found = count(*case, exhaustive=True)
        assert found.differ == DEVIATIONS.get(case, {}), (case, found)
    for page, names in PAGES.items():
        print(page, *rows(names), sep="\n")
