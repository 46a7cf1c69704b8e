"""Whole programs of torch.func in one compiled graph, with a backward through each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import largest_difference
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp

import metattn
from benchmarks.programs import (
    PROGRAMS,
    ROUTES,
    Attention,
    Program,
    expected_of,
    layer_of,
    plain,
    programs,
    route,
    total,
    tried,
    with_gradients,
)
from metattn.backends import available_backends
from metattn.layout import MAPS

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.skipif(available_backends()["cpu"] is not None, reason=f"cpu: {available_backends()['cpu']}"),
]

# every program, every route, and both kinds of shapes
CASES = [(PROGRAMS[index % len(PROGRAMS)], by, index % 2 == 1) for index, by in enumerate(ROUTES)]
# whose tangents do not lie in memory as what they are the tangents of
CASES += [("jacfwd", "attention", True), ("hessian", "attention", True)]
# a weight for every task, of a size that is a symbol
CASES += [("vmap of maml", "metattn.nn.MultiheadAttention", True)]


ROUTE = "attention, causal"


@pytest.mark.parametrize(("name", "by", "dynamic"), CASES)
def test_program(name: str, by: str, dynamic: bool) -> None:
    assert tried(by, name, dynamic)["verdict"] == "right"


@pytest.mark.parametrize("name", ["maml", "force penalty"])
def test_inductor(name: str) -> None:
    """Its code calls the operators' bare twins."""
    by = route(ROUTE)
    compiled = torch.compile(programs(by.ours)[name], fullgraph=True)
    found, expected = with_gradients(compiled, by.weights), expected_of(ROUTE, name)
    assert largest_difference(found, expected) < 1e-11 * max(float(x.abs().max()) for x in expected)


def test_tangents_of_a_bias_that_lies_turned() -> None:
    """Its gradient is contiguous, and so must the gradient's tangent be where sizes are symbols."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    bias = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64).mT

    def moved(attend: Any) -> Any:
        def energy(q: Tensor, bias: Tensor) -> Tensor:
            return attend(q, k, v, bias).sin().sum()

        return lambda q, bias: jvp(grad(energy, argnums=(0, 1)), (q, bias), (q.sin(), bias.cos()))[1]

    ours = moved(lambda q, k, v, bias: metattn.attention(q, k, v, bias=bias))
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=True)
    expected = moved(lambda q, k, v, bias: (q @ k.mT / 2 + bias).softmax(-1) @ v)(q, bias)
    assert largest_difference(compiled(q, bias), expected) < 1e-11


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_reduced_overhead(autocast: bool) -> None:
    """A penalty on a gradient in torch's other mode, and in bfloat16 by autocast around all of it."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    weights = [(torch.randn(8, 8) / 3).requires_grad_() for _ in range(3)]
    layer = layer_of(lambda q, k, v: metattn.attention(q, k, v, causal=True))

    def penalty(w: list[Tensor], x: Tensor) -> Tensor:
        return total([grad(lambda x: layer(w, x).sin().float().sum())(x)])

    def run(function: Any) -> list[Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            value = function(weights, x)
            return [value, *torch.autograd.grad(value, weights)]

    found, expected = run(torch.compile(penalty, fullgraph=True, mode="reduce-overhead")), run(penalty)
    for ours, eager in zip(found, expected, strict=True):
        assert (ours - eager).norm() <= (3e-2 if autocast else 1e-5) * eager.norm()


def test_changing_batches_compile_twice() -> None:
    by = route(ROUTE)
    compiled = torch.compile(programs(by.ours)["maml"], backend="aot_eager", fullgraph=True)
    for batch in (2, 3, 5, 4):
        found = with_gradients(compiled, by.weights, batch)
        expected = with_gradients(programs(by.theirs)["maml"], by.weights, batch)
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
            output = layer_of(attend)(w, x)
            directions = torch.stack([y, y.cos()]) if batched else y
            found = torch.autograd.grad(output, w, directions, create_graph=True, is_grads_batched=batched)
            return total(found)

        return run

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        ours = penalty(lambda q, k, v: metattn.attention(q, k, v, causal=True))
        compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
        weights = route(ROUTE).weights
        found, expected = with_gradients(compiled, weights), with_gradients(penalty(plain), weights)
    assert largest_difference(found, expected) < 1e-11 * max(float(x.abs().max()) for x in expected)


def test_another_process_finds_what_was_compiled(tmp_path: Path) -> None:
    """By torch's cache on disk: the second process compiles nothing, one of another release all."""
    script = """
import sys, torch, metattn
from torch._dynamo.utils import counters
from torch.func import grad
from metattn import installation

assert installation.digest() in torch.compiler.config.cache_key_tag
if sys.argv[1:]:
    installation.digest = lambda: sys.argv[1]
    torch.compiler.config.cache_key_tag = ""

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

    def run(*release: str) -> str:
        command = [sys.executable, "-c", script, *release]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert [run(), run(), run("another"), run("another"), run()] == ["1 0", "0 1", "1 0", "0 1", "0 1"]
