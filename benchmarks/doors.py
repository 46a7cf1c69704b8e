"""Every door through which torch reaches a second derivative of attention, and whose is right behind it.

    python -m benchmarks.doors [--out benchmarks/results/doors] [--page docs/recipes/compile.md]

Each door is tried with each contestant's attention beside another way to the output: a lost share of a
gradient raises no error by itself. What came out is compared with what is right, in float64. Writes a JSON
file and a table. FlexAttention has no backward on CPUs, so no door.
"""

from __future__ import annotations

import argparse
import functools
import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.functional import hessian, jacobian
from torch.func import functionalize, grad, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from benchmarks.publish import publish
from metattn.measure import machine

FEATURES = 3

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * FEATURES**-0.5
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def sloped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same with ALiBi slopes, which are a function of q: they have derivatives too."""
    n, m = q.shape[-2], k.shape[-2]
    distance = (torch.arange(n)[:, None] + m - n - torch.arange(m)).abs()
    scores = q @ k.mT * FEATURES**-0.5 - slopes_of(q)[..., None, None] * distance
    return scores.masked_fill(torch.ones(n, m, dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


def slopes_of(q: Tensor) -> Tensor:
    return q[..., 0, 0].square()


DRAWN = torch.randn(4, 1, 2, 4, FEATURES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def tensors(count: int) -> list[Tensor]:
    return [x.clone() for x in DRAWN[:count]]


def residual(attend: Attention) -> Callable[[Tensor], Tensor]:
    """Beside attention there is another way to the output: a lost share of a gradient is then no error."""
    _, k, v = tensors(3)
    return lambda x: x.sin() + attend(x, (k + x).cos(), v * x)


def penalty(gradient: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a gradient's square, and the gradient."""
    return gradient.detach(), *torch.autograd.grad(gradient.square().sum(), inputs)


def leaf() -> Tensor:
    return tensors(1)[0].requires_grad_()


# Doors: each gives tensors that hold a second derivative.


def batched_gradients(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    y = residual(attend)(x)
    cotangents = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)[::3]
    (rows,) = torch.autograd.grad(y, x, cotangents, create_graph=True, is_grads_batched=True)
    return penalty(rows, x)


def batched_gradients_of_batched_gradients(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    y = residual(attend)(x)
    cotangents = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)[:2]
    (rows,) = torch.autograd.grad(y, x, cotangents, create_graph=True, is_grads_batched=True)
    more = torch.stack([rows.detach().cos(), rows.detach(), rows.detach().sin()])
    several = torch.autograd.grad(rows, x, more, is_grads_batched=True, retain_graph=True)
    return *several, *torch.autograd.grad(rows, x, more[:1], is_grads_batched=True)


def vectorized_jacobian(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    return penalty(jacobian(residual(attend), x, create_graph=True, vectorize=True), x)


def vectorized_hessian(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()

    def energy(x: Tensor) -> Tensor:
        return residual(attend)(x).sin().sum()

    return (hessian(energy, x, vectorize=True),)


def forward_vectorized_jacobian(attend: Attention) -> tuple[Tensor, ...]:
    return (jacobian(residual(attend), tensors(1)[0], vectorize=True, strategy="forward-mode"),)


def vectorized_hessian_forward_over_reverse(attend: Attention) -> tuple[Tensor, ...]:
    def energy(x: Tensor) -> Tensor:
        return residual(attend)(x).sin().sum()

    x = tensors(1)[0]
    return (hessian(energy, x, vectorize=True, outer_jacobian_strategy="forward-mode"),)


def recorded_gradient(attend: Attention) -> tuple[Tensor, ...]:
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(residual(attend)(x).square().sum(), x, create_graph=True)[0]

    x = leaf()
    return penalty(make_fx(gradient)(leaf())(x), x)


def recorded_transform(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    return penalty(make_fx(grad(lambda x: residual(attend)(x).square().sum()))(x.detach())(x), x)


def recorded_then_transformed(attend: Attention) -> tuple[Tensor, ...]:
    x, move = tensors(2)
    recorded = make_fx(grad(lambda x: residual(attend)(x).square().sum()))(x)
    return jvp(recorded, (x,), (move,))[1], vmap(recorded)(torch.stack([x, move]))


def linearized(attend: Attention) -> tuple[Tensor, ...]:
    """Along several directions at once, and transposed."""
    x, move = tensors(2)
    _, along = linearize(residual(attend), x)
    return vmap(along)(torch.stack([move, 2 * move, x])), vjp(along, move)[1](x)[0]


def linearized_gradient(attend: Attention) -> tuple[Tensor, ...]:
    x, move = tensors(2)
    _, along = linearize(grad(lambda x: residual(attend)(x).square().sum()), x)
    return vmap(along)(torch.stack([move, x])), vjp(along, move)[1](x)[0]


def functionalized(attend: Attention) -> tuple[Tensor, ...]:
    x = tensors(1)[0]
    gradient = grad(lambda x: residual(attend)(x).square().sum())
    inner = grad(lambda x: functionalize(residual(attend))(x).square().sum())
    return functionalize(residual(attend))(x), functionalize(gradient)(x), inner(x)


def traced_and_saved(attend: Attention) -> tuple[Tensor, ...]:
    traced = torch.jit.trace(residual(attend), (tensors(1)[0],), check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    loaded, x = torch.jit.load(file), leaf()
    (gradient,) = torch.autograd.grad(loaded(x).square().sum(), x, create_graph=True)
    return penalty(gradient, x)


def compiled_by_dynamo_alone(attend: Attention) -> tuple[Tensor, ...]:
    """The compilers that keep torch's own double backward."""
    compiled, x = torch.compile(residual(attend), backend="eager", fullgraph=True), leaf()
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    return penalty(gradient, x)


def compiled_by_dynamo_alone_then_transformed(attend: Attention) -> tuple[Tensor, ...]:
    x, move = tensors(2)
    compiled = torch.compile(residual(attend), backend="eager")
    gradient = grad(lambda x: compiled(x).square().sum())
    return gradient(x), jvp(gradient, (x,), (move,))[1], vmap(gradient)(torch.stack([x, move]))


def compiled_autograd(attend: Attention) -> tuple[Tensor, ...]:
    x = leaf()
    with torch._dynamo.utils.maybe_enable_compiled_autograd(True, fullgraph=False):
        (gradient,) = torch.autograd.grad(residual(attend)(x).square().sum(), x, create_graph=True)
        return penalty(gradient, x)


def zero_cotangents(attend: Attention) -> tuple[Tensor, ...]:
    """A tensor without memory that stands for zeros, as forward mode hands on."""
    x = leaf()
    zero = torch._efficientzerotensor(x.shape, dtype=x.dtype)
    (gradient,) = torch.autograd.grad(residual(attend)(x), x, zero, create_graph=True)
    return (gradient.detach() + 0,)


DOORS = {
    function.__name__: function
    for function in (
        batched_gradients,
        batched_gradients_of_batched_gradients,
        vectorized_jacobian,
        vectorized_hessian,
        forward_vectorized_jacobian,
        vectorized_hessian_forward_over_reverse,
        recorded_gradient,
        recorded_transform,
        recorded_then_transformed,
        linearized,
        linearized_gradient,
        functionalized,
        traced_and_saved,
        compiled_by_dynamo_alone,
        compiled_by_dynamo_alone_then_transformed,
        compiled_autograd,
        zero_cotangents,
    )
}


def expected_of(door: str, formula: Attention) -> tuple[Tensor, ...]:
    """The formula's; but a recorded gradient of it cuts its graph at what autograd has saved."""
    if door != "recorded_gradient":
        return DOORS[door](formula)
    x = leaf()
    (gradient,) = torch.autograd.grad(residual(formula)(x).square().sum(), x, create_graph=True)
    return penalty(gradient, x)


# Contestants: causal attention, each its own.


def _torch(kernel: SDPBackend) -> Attention:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def _with_slopes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return metattn.attention(q, k, v, causal=True, alibi_slopes=slopes_of(q))


# each with the formula of what it computes
CONTESTANTS: dict[str, tuple[Attention, Attention]] = {
    "metattn": (functools.partial(metattn.attention, causal=True), plain),
    "metattn, slopes": (_with_slopes, sloped),
    "plain formula": (plain, plain),
    "torch, math": (_torch(SDPBackend.MATH), plain),
    "torch, flash": (_torch(SDPBackend.FLASH_ATTENTION), plain),
}
MARKS = ("<!-- doors:begin (written by `python -m benchmarks.doors`) -->", "<!-- doors:end -->")
TOLERANCE = 1e-8  # relative, in float64


def tried(door: str, attend: Attention, formula: Attention) -> dict[str, Any]:
    """What is behind a door: an error's text, or how far it is from right."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = DOORS[door](attend)
    except Exception as error:  # whatever it is, it says that there is no number
        return {"verdict": "raises", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    exact = expected_of(door, formula)
    distances = [
        float((x.detach() - y).norm() / y.norm().clamp_min(1e-30)) for x, y in zip(found, exact, strict=True)
    ]
    worst = max(distances)
    return {"verdict": "right" if worst < TOLERANCE else "silently wrong", "distance": worst}


def markdown(results: dict[str, Any]) -> str:
    names = list(CONTESTANTS)
    lines = [f"| door | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for door, by_contestant in results["doors"].items():
        cells = []
        for name in names:
            found = by_contestant[name]
            wrong = found["verdict"] == "silently wrong"
            cells.append(f"**silently wrong**, {found['distance']:.2g}" if wrong else found["verdict"])
        lines.append(f"| {door.replace('_', ' ')} | {' | '.join(cells)} |")
    what = results["machine"]
    lines += ["", f"torch {what['versions']['torch']}, float64, on a CPU; commit {what['commit']}."]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/doors"))
    parser.add_argument("--page", type=Path, help="a Markdown file whose table of doors is rewritten")
    args = parser.parse_args()
    found = {door: {name: tried(door, *both) for name, both in CONTESTANTS.items()} for door in DOORS}
    results = {"machine": machine(), "doors": found}
    publish(results, markdown(results), args.out, "doors", args.page, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
