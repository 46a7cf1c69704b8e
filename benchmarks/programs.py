"""Whole programs of torch.func in one compiled graph, by every way into metattn, beside what is right.

    python -m benchmarks.programs [--routes attention module …] [--programs maml hessian …]
        [--jobs 2] [--out benchmarks/results/programs] [--page docs/recipes/compile.md]

Each program is compiled with fullgraph=True, for fixed and for changing shapes, and differentiated once more
by a backward from outside; value and gradients are compared with those of the formula in eager mode, in
float64. Where one is not right, the formula is compiled too: what compiles for it should for metattn. The
backend is "aot_eager": its graphs are those that Inductor gets, and compile in seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import metattn
from benchmarks.publish import publish
from metattn.measure import machine

HEADS, FEATURES, POINTS = 2, 4, 3
WIDTH = HEADS * FEATURES
TOLERANCE = 1e-10  # relative, in float64
MARKS = ("<!-- programs:begin (written by `python -m benchmarks.programs`) -->", "<!-- programs:end -->")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Layer = Callable[[list[Tensor], Tensor], Tensor]
Program = Callable[[list[Tensor], Tensor, Tensor], Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(-1) @ v


def overridden(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    with metattn.sdpa_override():
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def packed(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Every batch a sequence."""
    batch, _, points, _ = q.shape
    rows = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    ends = torch.arange(batch + 1, dtype=torch.int32) * points
    found = metattn.varlen_attention(*rows, ends, ends, POINTS, POINTS, causal=causal)
    return found.unflatten(0, (batch, points)).transpose(1, 2)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "attention": metattn.attention,
    "scaled_dot_product_attention": lambda q, k, v, causal: metattn.scaled_dot_product_attention(
        q, k, v, is_causal=causal
    ),
    "sdpa_override inside": overridden,
    "varlen_attention": packed,
}


def layer_of(attend: Attention) -> Layer:
    """Of [batch, points, WIDTH], by three weights."""

    def layer(w: list[Tensor], x: Tensor) -> Tensor:
        q, k, v = ((x @ weight).unflatten(-1, (HEADS, FEATURES)).transpose(-2, -3) for weight in w)
        return attend(q, k, v).transpose(-2, -3).flatten(-2)

    return layer


def total(tensors: Any) -> Tensor:
    return sum(x.square().sum() for x in tensors)  # type: ignore[return-value]


def programs(layer: Layer) -> dict[str, Program]:
    """Each gives a number that depends on the weights, and is to be differentiated by them."""

    def loss(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        return (layer(w, x) - y).square().mean()

    def maml(w: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
        for _ in range(2):
            w = [value - 0.1 * g for value, g in zip(w, grad(loss)(w, x, y), strict=True)]
        return loss(w, x, y)

    def moves(w: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(value.cos() for value in w)

    def summed(w: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(w, x).sum((0, 1))

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


def with_gradients(program: Program, weights: list[Tensor], batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    w = [weight.detach().clone().requires_grad_() for weight in weights]
    value = program(w, draw(batch, POINTS, WIDTH), draw(batch, POINTS, WIDTH))
    # a weight that a program makes no use of has the gradient 0; where it should not, it is not right
    return [value, *torch.autograd.grad(value, w, materialize_grads=True)]


@dataclass(frozen=True)
class Route:
    """A way into metattn, and the formula that it should be equal to."""

    weights: list[Tensor]
    ours: Layer
    theirs: Layer
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    tolerance: float = TOLERANCE


def _weights() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 2 for _ in range(3)]


def _by_function(name: str, causal: bool) -> Route:
    attend = FUNCTIONS[name]
    return Route(
        _weights(),
        layer_of(lambda q, k, v: attend(q, k, v, causal=causal)),
        layer_of(lambda q, k, v: plain(q, k, v, causal)),
    )


def _by_modules(
    ours: nn.Module, theirs: nn.Module, call: Callable[..., Any] = lambda found: found, **more: Any
) -> Route:
    """Two modules of the same parameters; `call` picks the layer's output of what a module gives."""
    ours.load_state_dict(theirs.state_dict())

    def layer(module: nn.Module, **options: Any) -> Layer:
        names = [name for name, _ in module.named_parameters()]
        return lambda w, x: call(functional_call(module, dict(zip(names, w, strict=True)), (x,), options))

    weights = [parameter.detach() for parameter in theirs.parameters()]
    return Route(weights, layer(ours), layer(theirs), **more)


class _SelfAttention(nn.Module):
    """Of a module with nn.MultiheadAttention's interface; the weights asked for keep torch to the formula."""

    def __init__(self, attention: nn.Module, need_weights: bool) -> None:
        super().__init__()
        self.attention, self.need_weights = attention, need_weights

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return found


def _encoder_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(2)
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 8, dropout=0.0, batch_first=True, dtype=torch.float64)


class _ByFormula(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            found: Tensor = self.module(x)
        return found


def _module() -> Route:
    torch.manual_seed(2)
    options: dict[str, Any] = {"batch_first": True, "dtype": torch.float64}
    theirs = nn.MultiheadAttention(WIDTH, HEADS, **options)
    ours = metattn.nn.MultiheadAttention(WIDTH, HEADS, **options)
    return _by_modules(_SelfAttention(ours, False), _SelfAttention(theirs, True))


def _replaced() -> Route:
    ours, theirs = _encoder_layer(), _encoder_layer()
    metattn.replace_attention(ours, norms=True)
    metattn.replace_norms(theirs)  # torch's are wrong in reverse over forward mode
    return _by_modules(_Same(ours), _ByFormula(theirs))


class _Same(nn.Module):
    """So that parameters have the same names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.module(x)
        return found


def _override_outside() -> Route:
    return _by_modules(_Same(_encoder_layer()), _ByFormula(_encoder_layer()), around=metattn.sdpa_override)


class _Embedded(nn.Module):
    """A model of transformers, on embeddings; what becomes of them."""

    def __init__(self, attention: str) -> None:
        super().__init__()
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=WIDTH,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            attn_implementation=attention,
        )
        torch.manual_seed(3)
        self.model = transformers.LlamaModel(config).double()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.model(inputs_embeds=x, use_cache=False).last_hidden_state
        return found


def _transformers() -> Route:
    from metattn.integrations.transformers import register

    register()
    ours, theirs = _Embedded("metattn"), _Embedded("eager")
    names = [name for name, _ in ours.named_parameters() if "embed_tokens" not in name]

    def layer(module: nn.Module) -> Layer:
        return lambda w, x: functional_call(module, dict(zip(names, w, strict=True)), (x,))

    weights = [dict(theirs.named_parameters())[name].detach() for name in names]
    # the model's code computes norms and, in its own attention, probabilities in float32
    return Route(weights, layer(ours), layer(theirs), tolerance=1e-5)


ROUTES: dict[str, Callable[[], Route]] = {
    **{
        f"{name}{', causal' * causal}": lambda name=name, causal=causal: _by_function(name, causal)
        for name in FUNCTIONS
        for causal in (False, True)
    },
    "metattn.nn.MultiheadAttention": _module,
    "replace_attention, norms too": _replaced,
    "sdpa_override outside": _override_outside,
    "transformers": _transformers,
}
PROGRAMS = list(programs(layer_of(plain)))


@cache
def route(name: str) -> Route:
    return ROUTES[name]()


def expected_of(name: str, program: str) -> list[Tensor]:
    """Of the formula in eager mode."""
    by = route(name)
    return with_gradients(programs(by.theirs)[program], by.weights)


def distance(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest of their relative errors; of a gradient that is zero, its size."""
    pairs = [(x.detach(), y.detach()) for x, y in zip(found, exact, strict=True)]
    return max(float((x - y).norm() / (y.norm() if y.norm() > 1e-12 else 1)) for x, y in pairs)


def tried(name: str, program: str, dynamic: bool, theirs: bool = False) -> dict[str, Any]:
    """How far a compiled program is from right, or the error's text."""
    by = route(name)
    torch._dynamo.reset()
    run = programs(by.theirs if theirs else by.ours)[program]
    exact = expected_of(name, program)
    try:
        with warnings.catch_warnings(), contextlib.nullcontext() if theirs else by.around():
            warnings.simplefilter("ignore")
            compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
            found = with_gradients(compiled, by.weights)
    except Exception as error:  # whatever it is, it says that there is no number
        return {"verdict": "raises", "error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    off = distance(found, exact)
    return {"verdict": "right" if off < by.tolerance else "wrong", "distance": off}


def rows_of(name: str, names: list[str]) -> list[dict[str, Any]]:
    """Of a route."""
    torch.set_num_threads(1)
    return [
        {"program": program, "dynamic": dynamic, **tried(name, program, dynamic)}
        for program in names
        for dynamic in (False, True)
    ]


def retried(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """What was not right, in a process of its own, as errors leave things behind; and the formula."""
    program, dynamic = row["program"], row["dynamic"]
    ours = tried(name, program, dynamic)
    if ours["verdict"] != "right":
        ours["formula"] = tried(name, program, dynamic, theirs=True)
    return {"program": program, "dynamic": dynamic, **ours}


def _with_retries(routes: dict[str, Any], jobs: int) -> dict[str, Any]:
    places = [
        (name, i) for name, rows in routes.items() for i, row in enumerate(rows) if row["verdict"] != "right"
    ]
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        again = pool.map(retried, [name for name, _ in places], [routes[name][i] for name, i in places])
        for (name, i), row in zip(places, again, strict=True):
            routes[name][i] = row
    return routes


def markdown(results: dict[str, Any]) -> str:
    lines = ["| route | right, of compiled programs | what is not right |", "|---|---:|---|"]
    for name, rows in results["routes"].items():
        rest = [
            f"{row['program']}{', changing shapes' * row['dynamic']}: {row['verdict']}, the formula: "
            f"{row['formula']['verdict']}"
            for row in rows
            if row["verdict"] != "right"
        ]
        lines.append(f"| {name} | {len(rows) - len(rest)} of {len(rows)} | {'; '.join(rest)} |")
    what = results["machine"]
    lines += [
        "",
        f"Programs: {', '.join(PROGRAMS)}; each for fixed and for changing shapes, in one graph, and a "
        f"backward through it. torch {what['versions']['torch']}, float64; commit {what['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--routes", nargs="+", choices=list(ROUTES), default=list(ROUTES), metavar="ROUTE")
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=PROGRAMS, metavar="PROGRAM")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, each for a route")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/programs"))
    parser.add_argument("--page", type=Path, help="a Markdown file whose table of programs is rewritten")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        found = pool.map(rows_of, args.routes, [args.programs] * len(args.routes))
        routes = dict(zip(args.routes, found, strict=True))
    results = {"machine": machine(), "routes": _with_retries(routes, args.jobs)}
    publish(results, markdown(results), args.out, "programs", args.page, MARKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
