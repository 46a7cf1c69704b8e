// What vjp_jvp and double_backward share: a key sweep with tangents, its tiles, and the derivatives of one of them.
// With Pt = P∘(T − τ) and E = Z∘(dO Cᵀ): dSt = Pt∘(dP − D) + P∘(E − Dt), dRt = s1∘dSt + s2∘TR∘dS.
#pragma once

#include "sweep.h"

namespace metattn::METATTN_ISA {

template <class A>
struct SecondOrder : GradientSweep<A> {
  using T = Compute<A>;
  PackedRows<A> a;
  PackedKeys<A> b, c;
  T *t_r, *e;       // tiles
  T *beta, *d_s_t;  // [kKeys] a row of the tangent of bias and ALiBi, and of dSt

  // sums_values: products sum over the keys of v and its tangent too.
  SecondOrder(const Params& params, char* scratch, bool sums_values, int64_t rows, int64_t tiles)
      : GradientSweep<A>(params, scratch, sums_values, rows, tiles) {
    Arena& arena = this->arena;
    const int64_t blocks = key_sweep_blocks(params);
    a = PackedRows<A>::take(arena, params.t_q, params.d, this->results.want_k);
    b = PackedKeys<A>::take(arena, params.t_k, params.d, blocks, this->results.want_q, true);
    c = PackedKeys<A>::take(arena, params.t_v, params.dv, blocks, sums_values, this->gains);
    t_r = arena.template take<T>(tiles * rows * kKeys);
    e = arena.template take<T>(tiles * rows * kKeys);
    beta = arena.template take<T>(kKeys);
    d_s_t = arena.template take<T>(kKeys);
  }

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    const Params& p = this->p;
    pack_key_block<A, 4>(p, seq, kv_head, at, key0, keys, block, {&this->k, &b, &this->v, &c}, {&p.k, &p.t_k, &p.v, &p.t_v},
                         this->row);
  }
  void begin(const Tile& tile) {
    GradientSweep<A>::begin(tile);
    if (a) a.pack(this->p, this->p.t_q, tile, this->lse.dead, this->row);
  }

  // Beside the base's tiles, e = dO Cᵀ and t_r = A Kᵀ + Q Bᵀ.
  void multiply(const Tile& tile, int64_t block) {
    GradientSweep<A>::multiply(tile, block);
    if (this->gains && c) multiply_scores(tile, this->d_o, c, block, e, false);
    if (a) multiply_scores(tile, a, this->k, block, t_r, false);
    if (b) multiply_scores(tile, this->q, b, block, t_r, bool(a));
    if (!a && !b) memset(t_r, 0, sizeof(T) * tile.rows * kKeys);
  }
  // s = P in a row, and its beta.
  void begin_row(const Tile& tile, int64_t r) {
    if (moves_addend(this->p)) load_addend_tangent(this->p, tile, r, this->s + r * kKeys, beta);
    this->probabilities(tile, r);
  }

  // Vectors from column j on of the row that begins at `at`. Rounded as jvp rounds: T − τ cancels.
  Vec<T> e_kept(int64_t at, int64_t j) const { return this->gains && c ? load(e + at + j) * this->kept(at, j) : Vec<T>{}; }
  Vec<T> raw_tangent(int64_t at, int64_t j) const { return rounded(load(t_r + at + j) * static_cast<T>(this->p.scale)); }
  template <bool Bent>
  Vec<T> tangent(int64_t at, int64_t j) const {
    Vec<T> t = raw_tangent(at, j);
    if constexpr (Bent) t *= slope_at(this->bend_tile + at + j);
    if (moves_addend(this->p)) t += load(beta + j);
    return t;
  }

  // s = dRt, t_r = dR, d_p = Pt∘Z; d_s_t = dSt, where it is wanted. excess: T − τ.
  template <bool Bent>
  void differentiate(int64_t at, int64_t j, Vec<T> excess, T d, T d_t) {
    T* const s = this->s + at + j;
    const Vec<T> weight = load(s), keep = this->kept(at, j);
    const Vec<T> gain = this->d_p_kept(at, j) - d;
    const Vec<T> weight_t = weight * excess;
    const Vec<T> d_s = weight * gain;
    const Vec<T> dst = weight_t * gain + weight * (e_kept(at, j) - d_t);
    if (this->results.want_scores) store(d_s_t + j, dst);
    if constexpr (Bent) {
      const T* const bend = this->bend_tile + at + j;
      const Vec<T> slope = slope_at(bend);
      store(s, slope * dst + curve_at(bend, slope, this->p) * raw_tangent(at, j) * d_s);
      store(t_r + at + j, slope * d_s);
    } else {
      store(s, dst);
      store(t_r + at + j, d_s);
    }
    store(this->d_p + at + j, weight_t * keep);
  }

  // In registers: P, and T, of rows [r, r + Rows), of the keys from column j on.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void weights_and_tangents(const Tile& tile, int64_t block, int64_t r, int64_t j,
                                                   RegisterTile<T, Rows, Vectors>& weight,
                                                   RegisterTile<T, Rows, Vectors>& tangent) const {
    this->probabilities_of(tile, block, r, j, weight);
    tangent = {};
    if (a) multiply_into(tangent, a, r, this->k, block, j);
    if (b) multiply_into(tangent, this->q, r, b, block, j);
    const T scale = static_cast<T>(this->p.scale);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) tangent.at[i][v] = rounded(tangent.at[i][v] * scale);
  }
  // dP − D, and E.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void gains_of(int64_t block, int64_t r, int64_t j, RegisterTile<T, Rows, Vectors>& gain,
                                       RegisterTile<T, Rows, Vectors>& gain_t) const {
    gain = gain_t = {};
    if (this->gains) multiply_into(gain, this->d_o, r, this->v, block, j);
    if (this->gains && c) multiply_into(gain_t, this->d_o, r, c, block, j);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) gain.at[i][v] -= this->D[r + i];
  }

  // by: how sums over dRt are taken.
  void add(const Tile& tile, int64_t block, const WeightedSums<A>& by) {
    auto& results = this->results;
    results.add_q(tile, this->s, by, this->k, block, results.common_k);
    if (b) results.add_q(tile, t_r, results.sums, b, block, results.common_b);
    results.add_k(tile, this->s, by, this->q, block);
    if (a) results.add_k(tile, t_r, results.sums, a, block);
    if (this->d_o) results.add_v(tile, this->d_p, this->d_o, block);
  }
};

}  // namespace metattn::METATTN_ISA
