// double_backward: jvp and vjp_jvp together, for problems whose keys are all in one block. A row's statistics are then at
// hand when its tile has been seen once: twelve products instead of fifteen, and every tensor is read once.
// With Pt = P∘(T − τ) and E = Z∘(dO Cᵀ): Ot = (Pt∘Z)V + (P∘Z)C, Dt = rowsum(Pt∘dP + P∘E); the rest as in vjp_jvp.
#include "kernels.h"
#include "sweep.h"

namespace metattn::METATTN_ISA {
namespace {

template <class A>
struct DoubleBackward {
  using T = Compute<A>;
  const Params& p;
  const Exponents<T> exponents;
  Scope<A> scope;
  Arena arena;
  KeySweepResults<A> results;
  T* row;
  PackedRows<A> q, a, d_o;
  PackedKeys<A> k, b, v, c;
  T *s, *tanh_tile, *z, *d_p, *t_r, *e;  // tiles; t_r stays zero where nothing is added to it
  T *beta, *tangent, *d_s_t;             // [kKeys] of a row: the bias' tangent, T, dSt
  T* scratch_row;
  T* acc;  // [kRows][padded(dv)] Ot
  LogSumExp<T> lse;
  T D[kRows];
  double tau[kRows];
  int64_t wide_dv;

  DoubleBackward(const Params& params, char* scratch)
      : p(params), exponents(params), arena{scratch}, results(params, arena), wide_dv(padded<T>(params.dv)) {
    const int64_t blocks = key_sweep_blocks(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, results.want_k);
    a = PackedRows<A>::take(arena, p.t_q, p.d, results.want_k);
    d_o = PackedRows<A>::take(arena, p.d_o, p.dv, results.want_v);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, results.want_q, true);
    b = PackedKeys<A>::take(arena, p.t_k, p.d, blocks, results.want_q, true);
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, true, bool(p.d_o));
    c = PackedKeys<A>::take(arena, p.t_v, p.dv, blocks, true, bool(p.d_o));
    s = arena.take<T>(kRows * kKeys);
    tanh_tile = p.softcap != 0 ? arena.take<T>(kRows * kKeys) : nullptr;
    z = p.rng != nullptr ? arena.take<T>(kRows * kKeys) : nullptr;
    d_p = arena.take<T>(kRows * kKeys);
    t_r = arena.take<T>(kRows * kKeys);
    e = arena.take<T>(kRows * kKeys);
    beta = arena.take<T>(kKeys);
    tangent = arena.take<T>(kKeys);
    d_s_t = arena.take<T>(kKeys);
    scratch_row = arena.take<T>(padded<T>(p.dv));
    acc = arena.take<T>(kRows * wide_dv);
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
    memset(acc, 0, sizeof(T) * tile.rows * wide_dv);
  }

  // T of a row, and its τ: first a guess, then what is left around it, which does not cancel.
  template <bool Capped>
  void find_tau(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    const T scale = static_cast<T>(p.scale);
    Vec<T> guess = {}, excess = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      Vec<T> t = rounded(load(t_r + at + j) * scale);
      if constexpr (Capped) {
        const Vec<T> u = load(tanh_tile + at + j);
        t *= 1 - u * u;
      }
      if (p.t_bias) t += load(beta + j);
      t = rounded(t);
      store(tangent + j, t);
      guess += load(s + at + j) * t;
    }
    const T base = sum<T>(guess);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) excess += load(s + at + j) * (load(tangent + j) - base);
    tau[r] = lse.dead[r] ? 0 : static_cast<double>(base) + static_cast<double>(sum<T>(excess));
  }

  // s = dRt, t_r = dR, d_p = Pt∘Z, e = P∘Z; d_s_t = dSt, where the bias gradient is wanted.
  template <bool Capped>
  void differentiate_row(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    const T scale = static_cast<T>(p.scale), row_tau = static_cast<T>(tau[r]);
    const auto keep = [&](int64_t j) { return z != nullptr ? load(z + at + j) : splat<T>(1); };
    Vec<T> total = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight = load(s + at + j), kept = keep(j);
      const Vec<T> d_p_kept = d_o ? load(d_p + at + j) * kept : Vec<T>{};
      const Vec<T> extra = d_o && c ? load(e + at + j) * kept : Vec<T>{};
      total += weight * ((load(tangent + j) - row_tau) * d_p_kept + extra);
    }
    const T Dt = lse.dead[r] ? 0 : sum<T>(total);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight = load(s + at + j), kept = keep(j);
      const Vec<T> gain = (d_o ? load(d_p + at + j) * kept : Vec<T>{}) - D[r];
      const Vec<T> extra = (d_o && c ? load(e + at + j) * kept : Vec<T>{}) - Dt;
      const Vec<T> weight_t = weight * (load(tangent + j) - row_tau);
      const Vec<T> d_s = weight * gain;
      const Vec<T> dst = weight_t * gain + weight * extra;
      if (results.want_bias) store(d_s_t + j, dst);
      if constexpr (Capped) {
        const Vec<T> u = load(tanh_tile + at + j);
        const Vec<T> slope = 1 - u * u, bend = u * slope * static_cast<T>(-2 / p.softcap);
        store(s + at + j, slope * dst + bend * (load(t_r + at + j) * scale) * d_s);
        store(t_r + at + j, slope * d_s);
      } else {
        store(s + at + j, dst);
        store(t_r + at + j, d_s);
      }
      store(d_p + at + j, weight_t * kept);
      store(e + at + j, weight * kept);
    }
  }

  void visit(const Tile& tile, int64_t block) {
    scores(p, exponents, tile, q, k, block, s, tanh_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    if (d_o) multiply_scores(tile, d_o, v, block, d_p, false);
    if (d_o && c) multiply_scores(tile, d_o, c, block, e, false);
    if (a) multiply_scores(tile, a, k, block, t_r, false);
    if (b) multiply_scores(tile, q, b, block, t_r, bool(a));
    if (!a && !b) memset(t_r, 0, sizeof(T) * kRows * kKeys);
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (p.t_bias) load_bias_tangent(p, tile, r, s + r * kKeys, beta);
      lse.probabilities(exponents, tile, r, s + r * kKeys);
      if (p.softcap != 0) {
        find_tau<true>(tile, r);
        differentiate_row<true>(tile, r);
      } else {
        find_tau<false>(tile, r);
        differentiate_row<false>(tile, r);
      }
      if (results.want_bias) results.add_bias(tile, r, d_s_t);
    }
    results.sums.over_keys(tile, d_p, v, block, acc);
    if (c) results.sums.over_keys(tile, e, c, block, acc);
    results.add_q(tile, s, k, block);
    if (b) results.add_q(tile, t_r, b, block);
    results.add_k(tile, s, q, block);
    if (a) results.add_k(tile, t_r, a, block);
    if (d_o) results.add_v(tile, d_p, d_o, block);
  }

  void end(const Tile& tile, int64_t chunk, bool visited) {
    results.end_rows(tile, chunk, visited);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.s.q0 + tile.row0 + r;
      const bool dead = !visited || lse.dead[r];
      if (dead) memset(acc + r * wide_dv, 0, sizeof(T) * wide_dv);  // 0·NaN may have come in
      store_row_in_two(p.out_o, p.out_o_lo, offset_of(p.out_o, tile.seq, tile.head, i),
                       offset_of(p.out_o_lo, tile.seq, tile.head, i), p.dv, T{1}, acc + r * wide_dv, row);
      *double_at(p.out_lse, tile.seq, tile.head, i) = dead ? 0 : tau[r];
    }
  }
};

}  // namespace

extern const MapKernel double_backward[kArithmetics] = METATTN_MAP_KERNELS(DoubleBackward, key_sweep);
extern const int64_t keys_at_once = kKeys;

}  // namespace metattn::METATTN_ISA
