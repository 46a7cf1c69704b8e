// What vjp_jvp and double_backward share: a key sweep with tangents, its tiles, and the derivatives of one of them.
// With Pt = P∘(T − τ) and E = Z∘(dO Cᵀ): dSt = Pt∘(dP − D) + P∘(E − Dt), dRt = s1∘dSt + s2∘TR∘dS.
#pragma once

#include "sweep.h"

namespace metattn::METATTN_ISA {

template <class A>
struct SecondOrder {
  using T = Compute<A>;
  const Params& p;
  const Exponents<T> exponents;
  Scope<A> scope;
  Arena arena;
  KeySweepResults<A> results;
  const bool gains;  // dP and E are wanted: there is a dO, and somebody needs dSt
  T* row;
  PackedRows<A> q, a, d_o;
  PackedKeys<A> k, b, v, c;
  T *s, *tanh_tile, *z, *d_p, *t_r, *e;
  T *beta, *d_s_t;  // [kKeys] a row of the bias' tangent, and of dSt
  T* scratch_row;
  LogSumExp<T> lse;
  T D[kRows];

  // sums_values: products sum over the keys of v and its tangent too.
  SecondOrder(const Params& params, char* scratch, bool sums_values)
      : p(params),
        exponents(params),
        arena{scratch},
        results(params, arena),
        gains((results.want_q || results.want_k || results.want_bias) && params.d_o) {
    const int64_t blocks = key_sweep_blocks(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, results.want_k);
    a = PackedRows<A>::take(arena, p.t_q, p.d, results.want_k);
    d_o = PackedRows<A>::take(arena, p.d_o, p.dv, results.want_v);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, results.want_q, true);
    b = PackedKeys<A>::take(arena, p.t_k, p.d, blocks, results.want_q, true);
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, sums_values, gains);
    c = PackedKeys<A>::take(arena, p.t_v, p.dv, blocks, sums_values, gains);
    s = arena.take<T>(kRows * kKeys);
    tanh_tile = p.softcap != 0 ? arena.take<T>(kRows * kKeys) : nullptr;
    z = p.rng != nullptr ? arena.take<T>(kRows * kKeys) : nullptr;
    d_p = arena.take<T>(kRows * kKeys);
    t_r = arena.take<T>(kRows * kKeys);
    e = arena.take<T>(kRows * kKeys);
    beta = arena.take<T>(kKeys);
    d_s_t = arena.take<T>(kKeys);
    scratch_row = arena.take<T>(padded<T>(p.dv));
  }

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    pack_key_block<A, 4>(p, seq, kv_head, at, key0, keys, block, {&k, &b, &v, &c}, {&p.k, &p.t_k, &p.v, &p.t_v}, row);
  }
  void begin_keys(int64_t blocks) { results.begin_keys(blocks); }
  void end_keys(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys) {
    results.end_keys(seq, kv_head, at, key0, keys);
  }
  void begin(const Tile& tile) {
    lse.load(p, exponents, tile);
    q.pack(p, p.q, tile, lse.dead, row);
    if (a) a.pack(p, p.t_q, tile, lse.dead, row);
    if (d_o) d_o.pack(p, p.d_o, tile, lse.dead, row);
    row_dots(p.o, p.o_lo, p.d_lse, tile, d_o, lse.dead, p.dv, row, scratch_row, D);
    results.begin_rows(tile);
  }

  // s = scores, d_p = dO Vᵀ, e = dO Cᵀ, t_r = A Kᵀ + Q Bᵀ, z.
  void multiply(const Tile& tile, int64_t block) {
    scores(p, exponents, tile, q, k, block, s, tanh_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    if (gains) multiply_scores(tile, d_o, v, block, d_p, false);
    if (gains && c) multiply_scores(tile, d_o, c, block, e, false);
    if (a) multiply_scores(tile, a, k, block, t_r, false);
    if (b) multiply_scores(tile, q, b, block, t_r, bool(a));
    if (!a && !b) memset(t_r, 0, sizeof(T) * kRows * kKeys);
  }
  // s = P in a row, and its beta.
  void begin_row(const Tile& tile, int64_t r) {
    if (p.t_bias) load_bias_tangent(p, tile, r, s + r * kKeys, beta);
    lse.probabilities(exponents, tile, r, s + r * kKeys);
  }

  // Vectors from column j on of the row that begins at `at`. Rounded as jvp rounds: T − τ cancels.
  Vec<T> kept(int64_t at, int64_t j) const { return z != nullptr ? load(z + at + j) : splat<T>(1); }
  Vec<T> d_p_kept(int64_t at, int64_t j) const { return gains ? load(d_p + at + j) * kept(at, j) : Vec<T>{}; }
  Vec<T> e_kept(int64_t at, int64_t j) const { return gains && c ? load(e + at + j) * kept(at, j) : Vec<T>{}; }
  Vec<T> raw_tangent(int64_t at, int64_t j) const { return rounded(load(t_r + at + j) * static_cast<T>(p.scale)); }
  template <bool Capped>
  Vec<T> tangent(int64_t at, int64_t j) const {
    Vec<T> t = raw_tangent(at, j);
    if constexpr (Capped) {
      const Vec<T> u = load(tanh_tile + at + j);
      t *= 1 - u * u;
    }
    if (p.t_bias) t += load(beta + j);
    return t;
  }

  // s = dRt, t_r = dR, d_p = Pt∘Z; d_s_t = dSt, where the bias gradient is wanted. excess: T − τ.
  template <bool Capped>
  void differentiate(int64_t at, int64_t j, Vec<T> excess, T d, T d_t) {
    const Vec<T> weight = load(s + at + j), keep = kept(at, j);
    const Vec<T> gain = d_p_kept(at, j) - d;
    const Vec<T> weight_t = weight * excess;
    const Vec<T> d_s = weight * gain;
    const Vec<T> dst = weight_t * gain + weight * (e_kept(at, j) - d_t);
    if (results.want_bias) store(d_s_t + j, dst);
    if constexpr (Capped) {
      const Vec<T> u = load(tanh_tile + at + j);
      const Vec<T> slope = 1 - u * u, bend = u * slope * static_cast<T>(-2 / p.softcap);
      store(s + at + j, slope * dst + bend * raw_tangent(at, j) * d_s);
      store(t_r + at + j, slope * d_s);
    } else {
      store(s + at + j, dst);
      store(t_r + at + j, d_s);
    }
    store(d_p + at + j, weight_t * keep);
  }

  // by: how sums over dRt are taken.
  void add(const Tile& tile, int64_t block, const WeightedSums<A>& by) {
    results.add_q(tile, s, by, k, block);
    if (b) results.add_q(tile, t_r, results.sums, b, block);
    results.add_k(tile, s, by, q, block);
    if (a) results.add_k(tile, t_r, results.sums, a, block);
    if (d_o) results.add_v(tile, d_p, d_o, block);
  }
};

}  // namespace metattn::METATTN_ISA
