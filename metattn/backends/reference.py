"""The four maps in plain differentiable PyTorch: the specification every other backend is tested against.

N×M matrices are stored, every option is supported, on any device and dtype, and each map may be
differentiated to any order. Sums are in float32 (float64 for float64 inputs). The maps recompute all they
need from the primals and ignore the row statistics that fused backends are handed, so that their own
derivatives are complete.

Two rules keep NaN away from what is masked, at any order: a masked score is selected away, never multiplied
away; and a query that attends to nothing, like a key or value that nothing attends to, is replaced by zeros
before it enters a product (0 · NaN would be NaN).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from metattn.layout import Needs
from metattn.problem import Constants, Primals, Problem, Results

Term = Tensor | float  # a term that is absent is the number 0.0: formulas stay as they are written
Output = TypeVar("Output")


def unavailable_reason() -> str | None:
    return None


def unsupported(problem: Problem, primals: Primals, constants: Constants) -> str | None:
    return None


reuses_dq = run_plain = None


# Packed sequences.


class Padding(NamedTuple):
    """Where the tokens of a packed tensor lie in a padded one, and the other way."""

    token: Tensor  # [S, longest] token of each padded row, or `total`, one past the last, where there is none
    row: Tensor  # [total] padded row of each token
    length: Tensor  # [S, 1, 1, 1]


def _padding(cu: Tensor | None, longest: int, total: int) -> Padding | None:
    if cu is None:
        return None
    cu = cu.long()
    length = cu.diff().unsqueeze(1)
    local, token = torch.arange(longest, device=cu.device), torch.arange(total, device=cu.device)
    sequence = torch.searchsorted(cu, token, right=True) - 1
    return Padding(
        token=torch.where(local < length, cu[:-1].unsqueeze(1) + local, total),
        row=sequence * longest + token - cu[sequence],
        length=length[:, :, None, None],
    )


def _pad(x: Tensor, packing: Padding | None) -> Tensor:
    """[1, H, total, d] → [S, H, longest, d], zeros where a sequence is shorter; dense tensors pass."""
    if packing is None:
        return x
    return torch.cat([x[0], x.new_zeros(x.shape[1], 1, x.shape[3])], 1)[:, packing.token].transpose(0, 1)


def _unpad(x: Tensor, packing: Padding | None) -> Tensor:
    """[S, H, longest, d] → [1, H, total, d]: the inverse of _pad, and its transpose too."""
    if packing is None:
        return x
    sequences, heads, longest, d = x.shape
    return x.transpose(0, 1).reshape(heads, sequences * longest, d)[:, packing.row].unsqueeze(0)


# Dropout.

_WORD = 0xFFFFFFFF


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10 (Salmon et al. 2011) on 32-bit words held in int64 tensors that broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        x, y = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 products wrap: their 64 bits are the unsigned ones
        c0, c1, c2, c3 = (y >> 32) & _WORD ^ c1 ^ k0, y & _WORD, (x >> 32) & _WORD ^ c3 ^ k1, x & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


def dropout_keep(rng: Tensor, dropout_p: float, heads: int, n: int, m: int) -> Tensor:
    """[B, heads, n, m]: word key % 4 of Philox, counter (key // 4, query, head, batch), key the seed."""
    threshold = min(round(dropout_p * 2**32), 2**32)
    seed, batch = rng[:, 0, None, None, None], rng[:, 1, None, None, None]
    head, query, block = (torch.arange(size, device=rng.device) for size in (heads, n, -(-m // 4)))
    words = philox(
        [block, query[:, None], head[:, None, None], batch & _WORD], [seed & _WORD, (seed >> 32) & _WORD]
    )
    return torch.stack(words, -1).flatten(-2)[..., :m] >= threshold


# What the maps share.


class State(NamedTuple):
    """P and all else that the four maps recompute from the primals; in the compute dtype."""

    q: Tensor  # [B, Hq, N, d]
    k: Tensor  # [B, Hq, M, d] one for each query head
    v: Tensor  # [B, Hq, M, dv]
    p: Tensor  # [B, Hq, N, M]
    z: Term  # [B, Hq, N, M] dropout's factor, or 1
    p_sink: Term  # [B, Hq, N, 1]
    s1: Term  # [B, Hq, N, M] the softcap's first derivative, or 1
    s2: Term  # [B, Hq, N, M] its second, or 0
    lse: Tensor  # [B, Hq, N, 2] float64: peak, and the log of the total over it
    alibi: Tensor  # [N, M] or [S, 1, N, M], what slopes are multiplied by
    alive: Tensor | None  # [1|B, 1|Hq, 1|N, 1|M] the entries that are attended to; None: all
    rows: Padding | None
    keys: Padding | None

    def queries(self, x: Tensor | None) -> Term:
        """A tensor shaped like q or o, in the compute dtype, zero in the rows that attend to nothing."""
        if x is None:
            return 0.0
        x = _pad(x.to(self.p.dtype), self.rows)
        return x if self.alive is None else torch.where(self.alive.any(-1, keepdim=True), x, 0.0)

    def statistics(self, x: Tensor | None) -> Term:
        """A row statistic [B, Hq, N], in the compute dtype, zero in the rows that attend to nothing."""
        if x is None:
            return 0.0
        dead = self.lse[..., 1:] == -torch.inf
        return torch.where(dead, 0.0, _pad(x.unsqueeze(-1).to(self.p.dtype), self.rows))

    def columns(self, x: Tensor | None) -> Term:
        """A tensor shaped like k or v, likewise, for each query head."""
        return 0.0 if x is None else _columns(x.to(self.p.dtype), self.q.shape[1], self.alive, self.keys)


def _columns(x: Tensor, heads: int, alive: Tensor | None, keys: Padding | None) -> Tensor:
    x = _pad(x, keys)
    if x.shape[1] != heads:
        x = x.repeat_interleave(heads // x.shape[1], 1)
    return x if alive is None else torch.where(alive.any(-2).unsqueeze(-1), x, 0.0)


def _state(problem: Problem, primals: Primals, constants: Constants) -> State:
    dtype = torch.float64 if primals.q.dtype == torch.float64 else torch.float32
    rows = _padding(constants.cu_q, problem.max_q, primals.q.shape[2])
    keys = _padding(constants.cu_k, problem.max_k, primals.k.shape[2])
    heads = primals.q.shape[1]
    n = primals.q.shape[2] if rows is None else problem.max_q
    m = primals.k.shape[2] if keys is None else problem.max_k
    bias = None if primals.bias is None else primals.bias.to(dtype)

    # Geometry: i and j are local to the sequence; so is M − N.
    i = torch.arange(n, device=primals.q.device).unsqueeze(1)
    j = torch.arange(m, device=primals.q.device)
    shift = m - n if rows is None or keys is None else keys.length - rows.length
    alibi = (i + shift - j).abs()
    distance = j - i - (0 if problem.causal == "top-left" else shift)
    left, right = problem.window
    conditions = [] if constants.mask is None else [constants.mask]
    if problem.causal is not None:
        conditions.append(distance <= 0)
    if left >= 0:
        conditions.append(distance >= -left)
    if right >= 0:
        conditions.append(distance <= right)
    if rows is not None and keys is not None:
        conditions.append((i < rows.length) & (j < keys.length))
    if bias is not None:
        conditions.append(bias != -torch.inf)
    alive = functools.reduce(torch.logical_and, conditions) if conditions else None

    q = _pad(primals.q.to(dtype), rows)
    q = q if alive is None else torch.where(alive.any(-1, keepdim=True), q, 0.0)
    k = _columns(primals.k.to(dtype), heads, alive, keys)
    v = _columns(primals.v.to(dtype), heads, alive, keys)

    # S = c·tanh(R/c) + bias + alibi, −inf where masked
    scores = problem.scale * (q @ k.mT)
    s1: Term = 1.0
    s2: Term = 0.0
    if problem.softcap is not None:
        bent = torch.tanh(scores / problem.softcap)
        scores, s1 = problem.softcap * bent, 1 - bent * bent
        s2 = bent * s1 * (-2 / problem.softcap)
    if bias is not None:
        scores = scores + bias
    if primals.slopes is not None:
        scores = scores - primals.slopes.to(dtype)[:, :, None, None] * alibi
    if alive is not None:
        scores = torch.where(alive, scores, -torch.inf)

    # L = logsumexp(S), P = exp(S − L), taken around each row's largest score, which is a constant: L does not
    # depend on it. total ≥ 1, or 0 where nothing is attended.
    peak = (
        scores.detach().amax(-1, keepdim=True) if m else scores.new_full((*scores.shape[:3], 1), -torch.inf)
    )
    sink = None if primals.sinks is None else primals.sinks.to(dtype)[:, :, None, None]
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    scores = scores - peak
    total = scores.exp().sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink - peak).exp()
    dead = total == 0
    log_total = torch.where(dead, 1.0, total).log()

    z: Term = 1.0
    if constants.rng is not None:
        keep = dropout_keep(constants.rng, problem.dropout_p, heads, n, m)
        z = keep.to(dtype) * (1 / (1 - problem.dropout_p) if problem.dropout_p < 1 else 0.0)
    return State(
        q=q,
        k=k,
        v=v,
        p=(scores - log_total).exp(),
        z=z,
        p_sink=0.0 if sink is None else (sink - peak - log_total).exp(),
        s1=s1,
        s2=s2,
        lse=torch.cat([peak.double(), torch.where(dead, -torch.inf, log_total.double())], -1),
        alibi=alibi,
        alive=alive,
        rows=rows,
        keys=keys,
    )


def _matmul(x: Term, y: Term) -> Term:
    return x @ y if isinstance(x, Tensor) and isinstance(y, Tensor) else 0.0


def _transposed(x: Term) -> Term:
    return x.mT if isinstance(x, Tensor) else x


def _rowsum(x: Tensor) -> Tensor:
    return x.sum(-1, keepdim=True)


def _in_full_precision(map_: Callable[..., Output]) -> Callable[..., Output]:
    """Autocast would take the products to a lower precision: the inputs' dtypes decide alone."""

    @functools.wraps(map_)
    def run(problem: Problem, primals: Primals, *arguments: object) -> Output:
        device = primals.q.device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return map_(problem, primals, *arguments)
        with torch.autocast(device, enabled=False):
            return map_(problem, primals, *arguments)

    return run


# The maps.


@_in_full_precision
def forward(problem: Problem, primals: Primals, constants: Constants) -> Results:
    """O = (P∘Z)V and L = logsumexp(S) → o [B, Hq, N, dv] in q's dtype, lse [B, Hq, N, 2] (Results)."""
    state = _state(problem, primals, constants)
    o = (state.p * state.z) @ state.v
    return Results(_unpad(o, state.rows).to(primals.q.dtype), _unpad(state.lse, state.rows))


@_in_full_precision
def weights(problem: Problem, primals: Primals, constants: Constants) -> Tensor:
    """P∘Z, what forward weighs V with → [B, Hq, N, M] in q's dtype (of packed sequences: padded)."""
    state = _state(problem, primals, constants)
    return (state.p * state.z).to(primals.q.dtype)


@_in_full_precision
def vjp(
    problem: Problem,
    primals: Primals,
    constants: Constants,
    results: Results,
    do: Tensor | None,
    dlse: Tensor | None,
    needs: Needs,
) -> Primals:
    """The gradients of ⟨dO, O⟩ + ⟨dL, L⟩ for those primals that `needs` names, None for the others."""
    state = _state(problem, primals, constants)
    d_o, d_l = state.queries(do), state.statistics(dlse)
    _, d, ds = _score_gradient(state, d_o, d_l)
    dr = state.s1 * ds
    return _gradients(
        primals,
        state,
        q=problem.scale * (dr @ state.k) if needs[0] else None,
        k=problem.scale * (dr.mT @ state.q) if needs[1] else None,
        v=_matmul((state.p * state.z).mT, d_o) if needs[2] else None,
        bias=ds if needs[3] else None,
        sinks=-state.p_sink * d if needs[4] else None,
        slopes=-ds * state.alibi if needs[5] else None,
    )


@_in_full_precision
def jvp(
    problem: Problem, primals: Primals, constants: Constants, results: Results, tangents: Primals
) -> Results:
    """The tangents of O and L → ot [B, Hq, N, dv] in q's dtype, lt = τ [B, Hq, N] float64."""
    state = _state(problem, primals, constants)
    c = state.columns(tangents.v)
    _, pt, _, tau = _score_tangent(problem, state, tangents)
    ot = (pt * state.z) @ state.v + _matmul(state.p * state.z, c)
    return Results(_unpad(ot, state.rows).to(primals.q.dtype), _unpad(tau, state.rows).squeeze(-1).double())


@_in_full_precision
def vjp_jvp(
    problem: Problem,
    primals: Primals,
    constants: Constants,
    results: Results,
    do: Tensor | None,
    dlse: Tensor | None,
    tangents: Primals,
    results_t: Results,
    needs: Needs,
) -> Primals:
    """The tangents of vjp's gradients along `tangents`, dO and dL held fixed; None where not needed."""
    state = _state(problem, primals, constants)
    p, z, s1, s2 = state.p, state.z, state.s1, state.s2
    d_o, d_l = state.queries(do), state.statistics(dlse)
    a, b, c = state.queries(tangents.q), state.columns(tangents.k), state.columns(tangents.v)
    dp, d, ds = _score_gradient(state, d_o, d_l)
    tr, pt, pt_sink, _ = _score_tangent(problem, state, tangents)
    e = z * _matmul(d_o, _transposed(c))
    dt = _rowsum(pt * dp + p * e)  # rowsum(dO∘Ot), with Ot written out
    dst = pt * (dp - d) + p * (e - dt)
    dr = s1 * ds
    drt = s1 * dst + s2 * tr * ds
    return _gradients(
        primals,
        state,
        q=problem.scale * (drt @ state.k + _matmul(dr, b)) if needs[0] else None,
        k=problem.scale * (drt.mT @ state.q + _matmul(dr.mT, a)) if needs[1] else None,
        v=_matmul((pt * z).mT, d_o) if needs[2] else None,
        bias=dst if needs[3] else None,
        sinks=-pt_sink * d - state.p_sink * dt if needs[4] else None,
        slopes=-dst * state.alibi if needs[5] else None,
    )


def double_backward(
    problem: Problem,
    primals: Primals,
    constants: Constants,
    results: Results,
    do: Tensor | None,
    dlse: Tensor | None,
    tangents: Primals,
    needs: Needs,
    dq: Tensor | None = None,
) -> tuple[Results, Primals]:
    """jvp, then vjp_jvp."""
    results_t = jvp(problem, primals, constants, results, tangents)
    return results_t, vjp_jvp(problem, primals, constants, results, do, dlse, tangents, results_t, needs)


def _score_gradient(state: State, do: Term, dlse: Term) -> tuple[Term, Tensor, Tensor]:
    """dP, D and dS; D = rowsum(dO∘O) − dL, with O written out."""
    dp = state.z * _matmul(do, _transposed(state.v))
    d = _rowsum(state.p * dp) - dlse
    return dp, d, state.p * (dp - d)


def _score_tangent(problem: Problem, state: State, tangents: Primals) -> tuple[Term, Tensor, Term, Tensor]:
    """TR, Pt, the sink's Pt, and τ."""
    a, b = state.queries(tangents.q), state.columns(tangents.k)
    tr = problem.scale * (_matmul(a, state.k.mT) + _matmul(state.q, _transposed(b)))
    t = state.s1 * tr
    if tangents.bias is not None:
        beta = tangents.bias.to(state.p.dtype)
        t = t + (beta if state.alive is None else torch.where(state.alive, beta, 0.0))
    if tangents.slopes is not None:
        t = t - tangents.slopes.to(state.p.dtype)[:, :, None, None] * state.alibi
    sigma = 0.0 if tangents.sinks is None else tangents.sinks.to(state.p.dtype)[:, :, None, None]
    tau = _rowsum(state.p * t) + state.p_sink * sigma
    return tr, state.p * (t - tau), state.p_sink * (sigma - tau), tau


def _gradients(
    primals: Primals,
    state: State,
    *,
    q: Tensor | None,
    k: Tensor | None,
    v: Term | None,
    bias: Tensor | None,
    sinks: Term | None,
    slopes: Tensor | None,
) -> Primals:
    """Padded gradients of each head → gradients in the shapes and dtypes of the primals."""

    def grouped(gradient: Term | None, primal: Tensor) -> Tensor | None:
        if not isinstance(gradient, Tensor):
            return None if gradient is None else torch.zeros_like(primal)
        (batch, heads, *size), kept = gradient.shape, primal.shape[1]
        group_sum = gradient if heads == kept else gradient.reshape(batch, kept, heads // kept, *size).sum(2)
        return _unpad(group_sum, state.keys).to(primal.dtype)

    def summed(gradient: Term | None, primal: Tensor | None) -> Tensor | None:
        if primal is None or not isinstance(gradient, Tensor):
            return None
        return gradient.sum_to_size(primal.shape).to(primal.dtype)

    return Primals(
        None if q is None else _unpad(q, state.rows).to(primals.q.dtype),  # type: ignore[arg-type]
        grouped(k, primals.k),  # type: ignore[arg-type]
        grouped(v, primals.v),  # type: ignore[arg-type]
        summed(bias, primals.bias),
        summed(sinks.sum(-2).squeeze(-1) if isinstance(sinks, Tensor) else None, primals.sinks),
        summed(None if slopes is None else slopes.sum((-2, -1)), primals.slopes),
    )
