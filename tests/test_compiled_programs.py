"""Whole programs of torch.func in one compiled graph, with a backward through each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import largest_difference
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.functional import scaled_dot_product_attention

import metattn
from metattn.backends import available_backends
from metattn.layout import MAPS

pytestmark = pytest.mark.skipif(
    available_backends()["cpu"] is not None, reason=f"cpu: {available_backends()['cpu']}"
)

FEATURES, POINTS = 4, 3
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Program = Callable[[list[Tensor], Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * FEATURES**-0.5
    future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1) @ v


def overridden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with metattn.sdpa_override():
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Every batch a sequence."""
    batch, _, points, _ = q.shape
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    ends = torch.arange(batch + 1, dtype=torch.int32) * points
    found = metattn.varlen_attention(*rows, ends, ends, POINTS, POINTS, causal=True)
    return found.unflatten(0, (batch, points)).transpose(1, 2)


FUNCTIONS: dict[str, Attention] = {
    "attention": lambda q, k, v: metattn.attention(q, k, v, causal=True),
    "sdpa": lambda q, k, v: metattn.scaled_dot_product_attention(q, k, v, is_causal=True),
    "override": overridden,
    "packed": packed,
}


def total(tensors: Any) -> Tensor:
    return sum(x.square().sum() for x in tensors)  # type: ignore[return-value]


def programs(attend: Attention) -> dict[str, Program]:
    def layer(w: list[Tensor], x: Tensor) -> Tensor:
        return attend(x @ w[0], x @ w[1], x @ w[2])

    def loss(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (layer(w, x) - y).square().mean()

    def maml(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            w = [value - 0.1 * g for value, g in zip(w, grad(loss)(w, x, y), strict=True)]
        return loss(w, x, y)

    def moves(w: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(value.cos() for value in w)

    def summed(w: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(w, x).sum((0, 1, 2))

    def energy(w: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(w, x).sin().sum()

    return {
        "maml": maml,
        "vmap of maml": lambda w, x, y: vmap(lambda a, b: maml(w, a[None], b[None]))(x, y).mean(),
        "jvp": lambda w, x, y: jvp(lambda *w: loss(list(w), x, y), tuple(w), moves(w))[1],
        "grad of grad": lambda w, x, y: total(grad(lambda w: total(grad(loss)(w, x, y)))(w)),
        "jvp of grad": lambda w, x, y: total(
            jvp(lambda *w: tuple(grad(loss)(list(w), x, y)), tuple(w), moves(w))[1]
        ),
        "vmap of grad": lambda w, x, y: total(vmap(lambda a, b: grad(loss)(w, a[None], b[None]))(x, y)),
        "jacrev": lambda w, x, y: total([jacrev(summed(w))(x)]),
        "jacfwd": lambda w, x, y: total([jacfwd(summed(w))(x)]),
        "hessian": lambda w, x, y: total([hessian(energy(w))(x)]),
        "force penalty": lambda w, x, y: total([grad(energy(w))(x)]),
    }


def with_gradients(program: Program, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    w = [draw(FEATURES, FEATURES).requires_grad_() for _ in range(3)]
    value = program(w, draw(batch, 2, POINTS, FEATURES), draw(batch, 2, POINTS, FEATURES))
    return [value, *torch.autograd.grad(value, w)]


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


NAMES = list(programs(plain))
# every program with one function and kind of shapes, every function with several programs
CASES = [
    (name, list(FUNCTIONS)[index % len(FUNCTIONS)], index // len(FUNCTIONS) % 2 == 1)
    for index, name in enumerate(NAMES)
]


@pytest.mark.parametrize(("name", "function", "dynamic"), CASES)
def test_program(name: str, function: str, dynamic: bool) -> None:
    compiled = torch.compile(
        programs(FUNCTIONS[function])[name], backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    found, expected = with_gradients(compiled), with_gradients(programs(plain)[name])
    assert largest_difference(found, expected) < 1e-11 * max(float(x.abs().max()) for x in expected)


@pytest.mark.parametrize("name", ["maml", "force penalty"])
def test_inductor(name: str) -> None:
    """Its code calls the operators' bare twins."""
    compiled = torch.compile(programs(FUNCTIONS["attention"])[name], fullgraph=True)
    found, expected = with_gradients(compiled), with_gradients(programs(plain)[name])
    assert largest_difference(found, expected) < 1e-11 * max(float(x.abs().max()) for x in expected)


def test_changing_batches_compile_twice() -> None:
    compiled = torch.compile(programs(FUNCTIONS["attention"])["maml"], backend="aot_eager", fullgraph=True)
    for batch in (2, 3, 5, 4):
        found, expected = (with_gradients(each, batch) for each in (compiled, programs(plain)["maml"]))
        assert largest_difference(found, expected) < 1e-11 * max(float(x.abs().max()) for x in expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


class Graphs:
    """A backend of torch.compile that keeps what AOT autograd hands to compilers."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []
        self.backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=self._keep)

    def _keep(self, module: torch.fx.GraphModule, _: Any) -> Any:
        self.modules.append(module)
        return torch._functorch.aot_autograd.make_boxed_func(module.forward)

    def maps(self) -> list[str]:
        targets = [node.target for module in self.modules for node in module.graph.nodes]
        return sorted(t._opname for t in targets if getattr(t, "namespace", "") == "metattn")

    def shapes(self) -> Iterator[torch.Size]:
        for module in self.modules:
            for node in module.graph.nodes:
                value = node.meta.get("val")
                if isinstance(value, Tensor):
                    yield value.shape


def test_one_map_of_each_kind() -> None:
    """One forward, one vjp, one double backward for a call, and no matrix of queries by keys."""
    graphs = Graphs()
    n, m = 37, 41

    def penalty(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return total(grad(lambda *x: metattn.attention(*x).sum(), (0, 1, 2))(q, k, v))

    q, k, v = torch.randn(1, 2, n, 8), torch.randn(1, 2, m, 8), torch.randn(1, 2, m, 8)
    torch.compile(grad(penalty, (0, 1, 2)), backend=graphs.backend, fullgraph=True)(q, k, v)
    assert graphs.maps() == ["double_backward", "forward", "vjp"]
    assert set(graphs.maps()) < set(MAPS)
    assert not any(n in shape and m in shape for shape in graphs.shapes())


def test_module_in_a_program() -> None:
    """A converted layer of torch's by functional_call, its gradient's gradient in one graph."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    metattn.replace_attention(layer)
    params = {name: p.detach() for name, p in layer.named_parameters()}
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def penalty(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return total([grad(lambda x: functional_call(layer, params, (x,)).square().sum())(x)])

    def gradients(function: Any) -> list[Tensor]:
        return list(function(params, x).values())

    compiled = torch.compile(grad(penalty), backend="aot_eager", fullgraph=True)
    found, expected = gradients(compiled), gradients(grad(penalty))
    assert largest_difference(found, expected) < 1e-11 * max(float(x.abs().max()) for x in expected)


def test_dropout_is_drawn_anew_and_once_a_step() -> None:
    """A new mask at each run; the same in a step's forward and in both of its backwards."""
    q, v = (
        torch.randn(1, 2, 16, 4, dtype=torch.float64),
        torch.eye(16, dtype=torch.float64).expand(1, 2, 16, 16),
    )

    def gradient(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def energy(v: Tensor) -> tuple[Tensor, Tensor]:
            weights = metattn.attention(q, q, v, dropout_p=0.5)
            return weights.sum(), weights

        return grad(energy, has_aux=True)(v)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    columns, weights = compiled(q, v)
    assert largest_difference([columns[..., 0]], [weights.sum(-2)]) < 1e-12
    assert not torch.equal(weights, compiled(q, v)[1])


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no autograd.grad"
)
@pytest.mark.parametrize("batched", [False, True], ids=["one", "batched"])
def test_autograd_grad_inside(batched: bool) -> None:
    """torch.autograd.grad with create_graph, where Dynamo traces it; and a backward from outside."""

    def penalty(attend: Attention) -> Program:
        def run(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            output = attend(x @ w[0], x @ w[1], x @ w[2])
            directions = torch.stack([y, y.cos()]) if batched else y
            found = torch.autograd.grad(output, w, directions, create_graph=True, is_grads_batched=batched)
            return total(found)

        return run

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(penalty(FUNCTIONS["attention"]), backend="aot_eager", fullgraph=True)
        found, expected = with_gradients(compiled), with_gradients(penalty(plain))
    assert largest_difference(found, expected) < 1e-11 * max(float(x.abs().max()) for x in expected)


def test_another_process_finds_what_was_compiled(tmp_path: Path) -> None:
    """By torch's cache on disk: the second process compiles nothing."""
    script = """
import torch, metattn
from torch._dynamo.utils import counters
from torch.func import grad

def energy(q):
    return metattn.attention(q, q, q).sin().sum()

torch.compile(lambda q: grad(energy)(q), fullgraph=True)(torch.ones(1, 2, 5, 4))
found = counters["aot_autograd"]
print(found["autograd_cache_miss"], found["autograd_cache_hit"])
"""
    paths = [str(Path(__file__).resolve().parents[1]), *sys.path]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }

    def run() -> str:
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert [run(), run()] == ["1 0", "0 1"]
