"""Three training steps that need more than a gradient, with PyTorch's attention and with metattn's.

    python -m benchmarks.training_steps [--seconds 20] [--out benchmarks/results/training-steps]
        [--page README.md]

Each is a whole step, a small transformer's, up to the gradients of its parameters. The code is one for all;
only the attention differs: torch's scaled_dot_product_attention, by its fused kernel for what is
differentiated once in reverse mode and by its math path for all else, the plain formula, and metattn's.
Gradients are compared with the plain formula's in float64, then steps are timed in turn. Memory is the peak
of a step in a process of its own, after a small one.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import metattn
from benchmarks.publish import publish
from metattn.bench.tables import ratio
from metattn.measure import in_fresh_process, interleave, machine, per_round

LAYERS, WIDTH, HEADS = 2, 128, 4
TOLERANCE = 1e-3  # of all gradients together, float32
MARKS = ("<!-- steps:begin (written by `python -m benchmarks.training_steps`) -->", "<!-- steps:end -->")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Gradients = tuple[Tensor, ...]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


class Way(NamedTuple):
    """An attention, and what it needs around what is differentiated twice, or in forward mode."""

    attend: Attention
    twice: Callable[[], AbstractContextManager[Any]] = nullcontext


ATTENTIONS = {
    "PyTorch": Way(
        nn.functional.scaled_dot_product_attention, functools.partial(sdpa_kernel, SDPBackend.MATH)
    ),
    "formula": Way(plain),
    "metattn": Way(metattn.scaled_dot_product_attention),
}


class Mixer(nn.Module):
    """[B, N, inputs] → [B, N, outputs]: pre-normalised layers of attention and an MLP."""

    def __init__(self, inputs: int, outputs: int, attend: Attention) -> None:
        super().__init__()
        self.attend = attend
        self.first, self.last = nn.Linear(inputs, WIDTH), nn.Linear(WIDTH, outputs)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.mixed = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(LAYERS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for qkv, mixed, mlp in zip(self.qkv, self.mixed, self.mlp, strict=True):
            q, k, v = qkv(normed(x)).unflatten(-1, (3, HEADS, -1)).movedim(2, 0).transpose(2, 3)
            x = x + mixed(self.attend(q, k, v).transpose(1, 2).flatten(2))
            x = x + mlp(normed(x))
        last: Tensor = self.last(normed(x))
        return last


def normed(x: Tensor) -> Tensor:
    return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


def draw(*sizes: int, seed: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def maml(way: Way, dtype: torch.dtype, length: int = 1024) -> Callable[[], Gradients]:
    """One inner step on 1,024 points, then the meta-gradient of the loss on 1,024 others."""
    net = Mixer(2, 1, way.attend).to(dtype)
    params = dict(net.named_parameters())
    support, query = (draw(1, length, 2, seed=seed).to(dtype) for seed in (1, 2))

    def loss(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return (functional_call(net, params, (x,)) - x.sum(-1, keepdim=True).sin()).square().mean()

    def step() -> Gradients:
        with way.twice():
            value = loss(params, support)
        inner = torch.autograd.grad(value, list(params.values()), create_graph=True)
        adapted = {
            name: value - 0.1 * gradient
            for (name, value), gradient in zip(params.items(), inner, strict=True)
        }
        return torch.autograd.grad(loss(adapted, query), list(params.values()))

    return step


def mean_flow(way: Way, dtype: torch.dtype, length: int = 1024) -> Callable[[], Gradients]:
    """MeanFlow (arXiv 2505.13447) on 1,024 tokens: a tangent along the path, and the loss's gradient."""
    net = Mixer(18, 16, way.attend).to(dtype)
    data, noise = (draw(1, length, 16, seed=seed).to(dtype) for seed in (1, 2))
    t, r = torch.full((1, 1, 1), 0.8, dtype=dtype), torch.full((1, 1, 1), 0.3, dtype=dtype)
    velocity = noise - data

    def field(z: Tensor, t: Tensor) -> Tensor:
        times = torch.cat([t, r], -1).expand(*z.shape[:2], 2)
        found: Tensor = net(torch.cat([z, times], -1))
        return found

    def step() -> Gradients:
        here = (1 - t) * data + t * noise
        with torch.no_grad(), way.twice():
            _, along = jvp(field, (here, t), (velocity, torch.ones_like(t)))
        target = velocity - (t - r) * along
        return torch.autograd.grad((field(here, t) - target).square().mean(), list(net.parameters()))

    return step


def forces(way: Way, dtype: torch.dtype, length: int = 1024) -> Callable[[], Gradients]:
    """Two molecules of 512 atoms: forces from a learned energy, and the gradient of their error."""
    net = Mixer(3, 1, way.attend).to(dtype)
    positions = draw(2, length // 2, 3, seed=1).to(dtype).requires_grad_()
    wanted = draw(2, length // 2, 3, seed=2).to(dtype)

    def step() -> Gradients:
        with way.twice():
            energy = net(positions).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=True)
        loss = (-gradient - wanted).square().mean()
        found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
        return tuple(g for g in found if g is not None)

    return step


STEPS = {
    "MAML: 1,024 points, one inner step": maml,
    "MeanFlow: 1,024 tokens": mean_flow,
    "forces: 2 × 512 atoms": forces,
}


def step_of(
    name: str, attention: str, dtype: torch.dtype = torch.float32, length: int = 1024
) -> Callable[[], Gradients]:
    torch.manual_seed(0)  # of the parameters
    return STEPS[name](ATTENTIONS[attention], dtype, length)


def measure(name: str, seconds: float) -> dict[str, Any]:
    exact = torch.cat([g.flatten() for g in step_of(name, "formula", torch.float64)()])
    steps = {attention: step_of(name, attention) for attention in ATTENTIONS}
    errors = {}
    for attention, step in steps.items():
        found = torch.cat([g.flatten() for g in step()]).double()
        errors[attention] = float((found - exact).norm() / exact.norm())
        if errors[attention] > TOLERANCE:
            raise AssertionError(f"{name}, {attention}: gradients are off by {errors[attention]:.1e}")
    timings = interleave(dict(steps), seconds=seconds, least=9)
    samples = {attention: timing.samples for attention, timing in timings.items()}
    peaks = {
        attention: in_fresh_process("benchmarks.training_steps_peak", {"name": name, "attention": attention})
        for attention in ATTENTIONS
    }
    return {
        "name": name,
        "errors": errors,
        "times": {attention: {"samples": t.samples, **t.summary()} for attention, t in timings.items()},
        "ratios": {
            attention: per_round(samples[attention], samples["metattn"]).summary()
            for attention in ATTENTIONS
            if attention != "metattn"
        },
        "bytes": {attention: peak["bytes"] for attention, peak in peaks.items()},
    }


def markdown(results: dict[str, Any]) -> str:
    lines = [
        "| a training step | metattn, ms | PyTorch / metattn | the formula / metattn | "
        "MiB: PyTorch, formula, metattn |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        memory = {name: f"{size / 2**20:,.0f}" for name, size in row["bytes"].items()}
        cells = [
            row["name"],
            f"{row['times']['metattn']['median'] * 1e3:.0f}",
            ratio(row["ratios"]["PyTorch"]),
            ratio(row["ratios"]["formula"]),
            f"{memory['PyTorch']}, {memory['formula']}, {memory['metattn']}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    about = results["machine"]
    lines += [
        "",
        f"Whole steps of a {LAYERS}-layer transformer of width {WIDTH}, float32. Above 1 metattn is faster. "
        "PyTorch: its fused kernel where that can be differentiated enough, its math path elsewhere. "
        f"{about['cpu']}, {about['threads']} cores, torch {about['versions']['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each step's rounds")
    parser.add_argument("--out", type=Path, default=Path("metattn-bench"))
    parser.add_argument("--page", type=Path, help="rewrite the table of this page too")
    args = parser.parse_args(arguments)
    about = machine()
    results = {"machine": about, "rows": [measure(name, args.seconds) for name in STEPS]}
    publish(results, markdown(results), args.out, "training_steps", args.page, MARKS)


if __name__ == "__main__":
    sys.exit(main())
