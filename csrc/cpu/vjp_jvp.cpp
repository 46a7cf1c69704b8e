// vjp_jvp: the tangent of the first backward, dO and dL held fixed, in one sweep of ten products (five of scores).
// With Pt = P∘(T − τ) and E = Z∘(dO Cᵀ): dSt = Pt∘(dP − D) + P∘(E − Dt), dRt = s1∘dSt + s2∘TR∘dS.
#include "kernels.h"
#include "sweep.h"

namespace metattn::METATTN_ISA {
namespace {

template <class A>
struct VjpJvp {
  using T = Compute<A>;
  const Params& p;
  const Exponents<T> exponents;
  Scope<A> scope;
  Arena arena;
  KeySweepResults<A> results;
  T* row;
  PackedRows<A> q, a, d_o;
  PackedKeys<A> k, b, v, c;
  T *s, *tanh_tile, *z, *d_p, *t_r, *e;  // tiles; t_r and e stay zero where nothing is added to them
  T *beta, *d_s_t;                       // [kKeys] a row of the bias' tangent, and of dSt
  T* scratch_row;
  LogSumExp<T> lse;
  T D[kRows], Dt[kRows], tau[kRows];

  VjpJvp(const Params& params, char* scratch) : p(params), exponents(params), arena{scratch}, results(params, arena) {
    const int64_t blocks = key_sweep_blocks(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, results.want_k);
    a = PackedRows<A>::take(arena, p.t_q, p.d, results.want_k);
    d_o = PackedRows<A>::take(arena, p.d_o, p.dv, results.want_v);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, results.want_q, true);
    b = PackedKeys<A>::take(arena, p.t_k, p.d, blocks, results.want_q, true);
    const bool want_scores = results.want_q || results.want_k || results.want_bias;
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, false, want_scores && p.d_o);
    c = PackedKeys<A>::take(arena, p.t_v, p.dv, blocks, false, want_scores && p.d_o);
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
    row_dots(p.o_t, p.o_t_lo, View{}, tile, d_o, lse.dead, p.dv, row, scratch_row, Dt);
    for (int64_t r = 0; r < tile.rows; ++r)
      tau[r] = lse.dead[r] ? 0 : static_cast<T>(*double_at(p.lse_t, tile.seq, tile.head, tile.s.q0 + tile.row0 + r));
    results.begin_rows(tile);
  }

  // s = dRt, t_r = dR, d_p = Pt∘Z; d_s_t = dSt, where the bias gradient is wanted.
  template <bool Capped>
  void differentiate_row(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    const T scale = static_cast<T>(p.scale);
    lse.probabilities(exponents, tile, r, s + at);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight = load(s + at + j);
      const Vec<T> keep = z != nullptr ? load(z + at + j) : splat<T>(1);
      const Vec<T> gain = (v ? load(d_p + at + j) * keep : Vec<T>{}) - D[r];
      const Vec<T> extra = (c ? load(e + at + j) * keep : Vec<T>{}) - Dt[r];
      const Vec<T> raw = rounded(load(t_r + at + j) * scale);  // as jvp had it: T − τ cancels
      Vec<T> tangent = raw;
      Vec<T> slope = splat<T>(1), bend = {};
      if constexpr (Capped) {
        const Vec<T> u = load(tanh_tile + at + j);
        slope = 1 - u * u;
        bend = u * slope * static_cast<T>(-2 / p.softcap);
        tangent = raw * slope;
      }
      if (p.t_bias) tangent += load(beta + j);
      const Vec<T> weight_t = weight * (tangent - tau[r]);
      const Vec<T> d_s = weight * gain;
      const Vec<T> dst = weight_t * gain + weight * extra;
      if (results.want_bias) store(d_s_t + j, dst);
      if constexpr (Capped) {
        store(s + at + j, slope * dst + bend * raw * d_s);
        store(t_r + at + j, slope * d_s);
      } else {
        store(s + at + j, dst);
        store(t_r + at + j, d_s);
      }
      store(d_p + at + j, weight_t * keep);
    }
  }

  void visit(const Tile& tile, int64_t block) {
    scores(p, exponents, tile, q, k, block, s, tanh_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    if (v) multiply_scores(tile, d_o, v, block, d_p, false);
    if (c) multiply_scores(tile, d_o, c, block, e, false);
    if (a) multiply_scores(tile, a, k, block, t_r, false);
    if (b) multiply_scores(tile, q, b, block, t_r, bool(a));
    if (!a && !b) memset(t_r, 0, sizeof(T) * kRows * kKeys);
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (p.t_bias) load_bias_tangent(p, tile, r, s + r * kKeys, beta);
      if (p.softcap != 0) differentiate_row<true>(tile, r);
      else differentiate_row<false>(tile, r);
      if (results.want_bias) results.add_bias(tile, r, d_s_t);
    }
    results.add_q(tile, s, k, block);
    if (b) results.add_q(tile, t_r, b, block);
    results.add_k(tile, s, q, block);
    if (a) results.add_k(tile, t_r, a, block);
    if (d_o) results.add_v(tile, d_p, d_o, block);
  }

  void end(const Tile& tile, int64_t chunk, bool visited) { results.end_rows(tile, chunk, visited); }
};

}  // namespace

extern const MapKernel vjp_jvp[kArithmetics] = METATTN_MAP_KERNELS(VjpJvp, key_sweep);

}  // namespace metattn::METATTN_ISA
