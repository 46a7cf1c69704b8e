"""The steps that bench and its like time: what each map is called by, for any attention function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metattn import backends
from metattn.bench.answers import Inputs
from metattn.bench.cases import PRODUCTS
from metattn.measure import chunks
from metattn.problem import Call, Primals

Attend = Callable[..., Tensor]
Step = Callable[[], tuple[Tensor, ...]]


def step_of(attend: Attend, step: str, inputs: Inputs) -> Step:
    """The step as a call without arguments, for attention as a function of the primals; graphs that it starts
    from are built here, outside the timing."""
    primals, do, tangents = inputs.primals, inputs.do, inputs.tangents
    if step == "forward":
        detached = [p.detach() for p in primals]
        return lambda: (attend(*detached),)
    if step == "vjp":
        o = attend(*primals)
        cotangent = do.detach()
        return lambda: torch.autograd.grad(o, primals, cotangent, retain_graph=True)
    if step == "jvp":
        plain = tuple(p.detach() for p in primals)
        return lambda: torch.func.jvp(attend, plain, tangents)
    if step == "double backward":
        gradients = torch.autograd.grad(attend(*primals), primals, do, create_graph=True)
        return lambda: torch.autograd.grad(gradients, (*primals, do), tangents, retain_graph=True)
    if step == "second-order step":

        def second_order() -> tuple[Tensor, ...]:
            o = attend(*primals)
            gradients = torch.autograd.grad(o, primals, do, create_graph=True)
            second = torch.autograd.grad(gradients, (*primals, do), tangents)
            return o.detach(), *(g.detach() for g in gradients), *second

        return second_order
    raise ValueError(f"step: expected one of {', '.join(PRODUCTS)}, got {step!r}")


def step_of_compiled(attend: Attend, step: str, inputs: Inputs) -> Step:
    """The same for a compiled function, whose backward runs many times: it must not free what it reads."""
    with torch._functorch.config.patch(donated_buffer=False):
        return step_of(attend, step, inputs)


def raw_vjp_jvp(backend: str, call: Call, do: Tensor, tangents: tuple[Tensor, ...]) -> Step:
    """The fourth map by itself, straight from the backend: no public call runs it without the third.

    Everything in a call's canonical form, [B, H, N, d]; tangents of q, k, v and, with a bias, the bias.
    """
    module = backends.load(backend)
    problem, given, constants = call[0].on(backend), call[1], call[2]
    primals = Primals(*(None if x is None else x.detach() for x in given))  # type: ignore[arg-type]
    padded = Primals(*tangents, *(None,) * (len(primals) - len(tangents)))  # type: ignore[arg-type]
    cotangent = do.detach()
    needs = (True, True, True, primals.bias is not None, False, False)
    with torch.no_grad():
        results = module.forward(problem, primals, constants)
        results_t = module.jvp(problem, primals, constants, results, padded)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            gradients = module.vjp_jvp(
                problem, primals, constants, results, cotangent, None, padded, results_t, needs
            )
        return tuple(g for g in gradients if g is not None)

    return step


def checkpointed_step(
    math: Attend, forward: Attend, inputs: Inputs, scores_at_once: int
) -> tuple[Tensor, ...]:
    """The cheapest right second order that torch has: a flash forward, then the gradient of the math path,
    a few (batch, head) pairs at a time, checkpointed, so that only their matrices exist at once."""
    q, k, v, *bias = inputs.primals
    do = inputs.do
    batch, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
    o = forward(*(p.detach() for p in inputs.primals))

    def gradient(*tensors: Tensor) -> tuple[Tensor, ...]:
        *leaves, cotangent = tensors
        return torch.autograd.grad(math(*leaves), leaves, cotangent, create_graph=True)

    per_head = q.shape[2] * k.shape[2]
    heads_at_once = max(1, min(heads // group, scores_at_once // (batch * per_head * group))) * group
    batch_at_once = max(1, scores_at_once // (per_head * heads_at_once))
    shared = bool(bias) and bias[0].shape[0] != batch  # one bias for all of the batch
    pieces: list[list[tuple[Tensor, ...]]] = []
    for b in chunks(batch, batch_at_once):
        row = []
        for h in chunks(heads, heads_at_once):
            kv = slice(h.start // group, h.stop // group)
            part = (q[b, h], k[b, kv], v[b, kv], *(x[:, h] if shared else x[b, h] for x in bias), do[b, h])
            row.append(checkpoint(gradient, *part, use_reentrant=False))
        pieces.append(row)
    gradients = []
    for i in range(len(inputs.primals)):
        rows = [torch.cat([piece[i] for piece in row], dim=1) for row in pieces]
        gradients.append(torch.stack(rows).sum(dim=0) if i == 3 and shared else torch.cat(rows))
    second = torch.autograd.grad(gradients, (*inputs.primals, do), inputs.tangents)
    return o, *(g.detach() for g in gradients), *second
