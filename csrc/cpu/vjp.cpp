// vjp: the first backward in one sweep of five products; D = rowsum(dO∘O) − dL, dS = P∘(Z∘(dO Vᵀ) − D).
#include "kernels.h"
#include "sweep.h"

namespace metattn::METATTN_ISA {
namespace {

template <class A>
struct Vjp {
  using T = Compute<A>;
  const Params& p;
  const Exponents<T> exponents;
  Scope<A> scope;
  Arena arena;
  KeySweepResults<A> results;
  T* row;
  PackedRows<A> q, d_o;
  PackedKeys<A> k, v;
  T *s, *tanh_tile, *z, *d_p, *scratch_row;
  LogSumExp<T> lse;
  T D[kRows];
  bool want_scores;  // somebody needs dS

  Vjp(const Params& params, char* scratch) : p(params), exponents(params), arena{scratch}, results(params, arena) {
    const int64_t blocks = key_sweep_blocks(p);
    want_scores = results.want_q || results.want_k || results.want_bias;
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, results.want_k);
    d_o = PackedRows<A>::take(arena, p.d_o, p.dv, results.want_v);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, results.want_q, true);
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, false, want_scores && p.d_o);
    s = arena.take<T>(kRows * kKeys);
    tanh_tile = p.softcap != 0 ? arena.take<T>(kRows * kKeys) : nullptr;
    z = p.rng != nullptr ? arena.take<T>(kRows * kKeys) : nullptr;
    d_p = arena.take<T>(kRows * kKeys);
    scratch_row = arena.take<T>(padded<T>(p.dv));
  }

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    pack_key_block<A, 2>(p, seq, kv_head, at, key0, keys, block, {&k, &v}, {&p.k, &p.v}, row);
  }
  void begin_keys(int64_t blocks) { results.begin_keys(blocks); }
  void end_keys(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys) {
    results.end_keys(seq, kv_head, at, key0, keys);
  }

  void begin(const Tile& tile) {
    lse.load(p, exponents, tile);
    q.pack(p, p.q, tile, lse.dead, row);
    if (d_o) d_o.pack(p, p.d_o, tile, lse.dead, row);
    row_dots(p.o, p.o_lo, p.d_lse, tile, d_o, lse.dead, p.dv, row, scratch_row, D);
    results.begin_rows(tile);
  }

  // s = dR, d_p = P∘Z; returns dS in `row`, where the bias gradient is wanted.
  template <bool Capped>
  void differentiate_row(const Tile& tile, int64_t r) {
    T *s_row = s + r * kKeys, *p_row = d_p + r * kKeys;
    lse.probabilities(exponents, tile, r, s_row);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight = load(s_row + j);
      const Vec<T> keep = z != nullptr ? load(z + r * kKeys + j) : splat<T>(1);
      const Vec<T> gain = v ? load(p_row + j) * keep : Vec<T>{};
      Vec<T> d_s = weight * (gain - D[r]);
      if (results.want_bias) store(row + j, d_s);
      if constexpr (Capped) {
        const Vec<T> u = load(tanh_tile + r * kKeys + j);
        d_s *= 1 - u * u;
      }
      store(s_row + j, d_s);
      store(p_row + j, weight * keep);
    }
  }

  void visit(const Tile& tile, int64_t block) {
    scores(p, exponents, tile, q, k, block, s, tanh_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    if (v) multiply_scores(tile, d_o, v, block, d_p, false);
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (p.softcap != 0) differentiate_row<true>(tile, r);
      else differentiate_row<false>(tile, r);
      if (results.want_bias) results.add_bias(tile, r, row);
    }
    results.add_q(tile, s, results.sums, k, block);
    results.add_k(tile, s, results.sums, q, block);
    if (d_o) results.add_v(tile, d_p, d_o, block);
  }

  void end(const Tile& tile, int64_t chunk, bool visited) { results.end_rows(tile, chunk, visited); }
};

}  // namespace

extern const MapKernel vjp[kArithmetics] = METATTN_MAP_KERNELS(Vjp, key_sweep);

}  // namespace metattn::METATTN_ISA
