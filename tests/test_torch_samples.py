"""torch's own samples (ModuleInfo, OpInfo) of its attention modules and function, run through ours.

Values and both orders of derivatives are compared with torch's on all of them, in float64. gradcheck and
gradgradcheck are of all with `--exhaustive`, otherwise of a part.
`python tests/test_torch_samples.py` prints the counts.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleInfo, ModuleInput, module_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # as a script too

import metattn

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
(FUNCTION,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")
RTOL, ATOL = 1e-9, 1e-10


def samples_of(info: ModuleInfo, training: bool) -> list[ModuleInput]:
    torch.manual_seed(0)
    found: list[ModuleInput] = info.module_inputs_func(
        info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
    )
    return found


def pair(info: ModuleInfo, sample: ModuleInput, training: bool) -> tuple[nn.Module, nn.Module]:
    """torch's module, and a copy of it with our attention inside."""
    torch.manual_seed(0)
    given = copy.deepcopy((sample.constructor_input.args, sample.constructor_input.kwargs))
    theirs = info.module_cls(*given[0], **given[1]).double().train(training)
    for parameter in theirs.parameters():  # biases start at 0, where a mistake in their use would not show
        nn.init.normal_(parameter, std=0.4)
    ours = copy.deepcopy(theirs)
    assert metattn.replace_attention(ours) > 0
    return theirs, ours


def new_leaves(given: Any) -> tuple[Any, list[Tensor]]:
    """The arguments, and the float tensors among them that require a gradient, as new leaves."""
    flat, spec = tree_flatten(given)
    leaves: list[Tensor] = []
    for place, value in enumerate(flat):
        if isinstance(value, Tensor) and value.requires_grad:
            flat[place] = value.detach().requires_grad_()
            leaves.append(flat[place])
    return tree_unflatten(flat, spec), leaves


def two_orders(outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    total = sum(((w * x.sin()).sum() for w, x in zip(weights, outputs, strict=True)), start=torch.zeros(()))
    first = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
    second = torch.autograd.grad(
        sum((g.square().sum() for g in first), start=torch.zeros(())), leaves, materialize_grads=True
    )
    return [*outputs, *first, *second]


def compare(
    theirs: Callable[..., Any],
    ours: Callable[..., Any],
    make: Callable[[], Any],
    params: tuple[list[Tensor], ...],
) -> str | None:
    """What is not alike in values and both orders of derivatives, or None. make: arguments, their leaves."""
    results = []
    for function, weights in zip((theirs, ours), params, strict=True):
        (args, kwargs), leaves = make()
        with sdpa_kernel(SDPBackend.MATH):
            outputs = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor)]
            results.append(two_orders(outputs, [*leaves, *weights]))
    expected, found = results
    if len(found) != len(expected):
        return f"{len(found)} outputs and derivatives in place of {len(expected)}"
    for x, y in zip(found, expected, strict=True):
        if not torch.allclose(x, y, rtol=RTOL, atol=ATOL, equal_nan=True):
            return "NaN in torch's" if y.isnan().any() and not x.isnan().any() else "another value"
    return None


def check_derivatives(function: Callable[..., Any], arguments: Any) -> None:
    flat, spec = tree_flatten(arguments)
    places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = list(flat)
        for place, tensor in zip(places, tensors, strict=True):
            given[place] = tensor
        args, kwargs = tree_unflatten(given, spec)
        torch.manual_seed(0)  # the same dropout every time
        return tuple(x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, Tensor))

    leaves = [flat[place] for place in places]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def module_differences(name: str, training: bool, *, derivatives: bool) -> tuple[int, dict[int, str]]:
    """How many samples there are, and what differs in which."""
    info, differ = MODULES[name], {}
    samples = samples_of(info, training)
    for index, sample in enumerate(samples):
        theirs, ours = pair(info, sample, training)
        given = (sample.forward_input.args, sample.forward_input.kwargs)
        parameters = (list(theirs.parameters()), list(ours.parameters()))
        different = compare(theirs, ours, lambda given=given: new_leaves(given), parameters)
        if different is not None:
            differ[index] = different
        if derivatives:
            check_derivatives(ours, new_leaves(given)[0])
    return len(samples), differ


def function_differences(*, derivatives: bool) -> tuple[int, dict[int, str]]:
    """The same of scaled_dot_product_attention. With dropout no values are compared: the masks are others."""
    differ = {}
    torch.manual_seed(0)
    samples = list(FUNCTION.reference_inputs("cpu", torch.float64, requires_grad=True))
    for index, sample in enumerate(samples):
        given = ((sample.input, *sample.args), sample.kwargs)
        if not sample.kwargs["dropout_p"]:
            theirs, ours = nn.functional.scaled_dot_product_attention, metattn.scaled_dot_product_attention
            different = compare(theirs, ours, lambda given=given: new_leaves(given), ([], []))
            if different is not None:
                differ[index] = different
        if derivatives:
            check_derivatives(metattn.scaled_dot_product_attention, new_leaves(given)[0])
    return len(samples), differ


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, training: bool, request: pytest.FixtureRequest) -> None:
    derivatives = request.config.getoption("--exhaustive") or (name == "MultiheadAttention" and training)
    samples, differ = module_differences(name, training, derivatives=derivatives)
    assert samples > 30
    assert not differ


def test_function() -> None:
    samples, differ = function_differences(derivatives=True)
    assert samples >= 25
    assert not differ


def main() -> None:
    print("| samples of torch's | mode | samples | differ |")
    print("|---|---|---:|---:|")
    for name in MODULES:
        for training in (True, False):
            samples, differ = module_differences(name, training, derivatives=True)
            print(f"| `{name}` | {'training' if training else 'evaluation'} | {samples} | {len(differ)} |")
    samples, differ = function_differences(derivatives=True)
    print(f"| `scaled_dot_product_attention` | | {samples} | {len(differ)} |")


if __name__ == "__main__":
    main()
