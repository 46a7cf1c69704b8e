// jvp: the tangents of O and L for tangents A, B, C, β, σ, ω of Q, K, V, bias, sinks and slopes, in one pass over the keys:
// Ot = (P∘(T − t)∘Z)V + (P∘Z)C − (τ − t)·O for any t. With t = 0 the terms cancel where a sharply peaked row has large
// T; rows that lost more than kCancellation so are walked once more, with t = τ of the first pass. Where weights are
// rounded, O's were: t is then the mean of T over the first keys of a row, and of O's errors little comes in.
#include "kernels.h"
#include "sweep.h"

namespace metattn::METATTN_ISA {
namespace {

constexpr int kCancellation = 16;

template <class A>
struct Jvp {
  using T = Compute<A>;
  const Params& p;
  const Exponents<T> exponents;
  Scope<A> scope;
  Arena arena;
  T* row;
  PackedRows<A> q, a;
  PackedKeys<A> k, b, v, c;
  WeightedSums<A> sums;  // in two parts: Dt = rowsum(dO∘Ot) is to cancel with what is not rounded
  T *s, *bend_tile, *z, *t, *scratch_row;
  T* acc;  // [kRows][padded(dv)]
  T base[kRows];        // t
  double excess[kRows];  // τ − t
  bool again;            // this is the second pass
  bool based[kRows];     // base is known
  LogSumExp<T> lse;
  int64_t wide_dv;
  bool has_scores;  // a tangent reaches the scores
  const bool in_registers;
  // A block of rows that waits for other keys, and its sums, [kRows][padded(dv)].
  struct Waiting {
    T base[kRows];
    double excess[kRows];
    bool based[kRows], again, done;
  };
  Waiting* waiting;
  T* waiting_sums;

  Jvp(const Params& params, char* scratch)
      : p(params),
        exponents(params),
        arena{scratch},
        wide_dv(padded<T>(params.dv)),
        in_registers(fits_registers<A>(params, exponents)) {
    const int64_t blocks = row_sweep_blocks(p);
    has_scores = p.t_q || p.t_k || moves_addend(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, false);
    a = PackedRows<A>::take(arena, p.t_q, p.d, false);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, false, true);
    b = PackedKeys<A>::take(arena, p.t_k, p.d, blocks, false, true);
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, has_scores, false);
    c = PackedKeys<A>::take(arena, p.t_v, p.dv, blocks, true, false);
    sums = WeightedSums<A>::take(arena, p).in_two_parts();
    s = arena.take<T>(kRows * kKeys);
    bend_tile = take_bends<T>(arena, p, kRows * kKeys);
    z = take_dropout<T>(arena, p, kRows * kKeys);
    t = has_scores ? arena.take<T>(kRows * kKeys) : nullptr;
    acc = arena.take<T>(kRows * wide_dv);
    scratch_row = arena.take<T>(wide_dv);
    const int64_t slots = row_sweep_slots(p);
    waiting = arena.take<Waiting>(slots);
    waiting_sums = arena.take<T>(slots * kRows * wide_dv);
  }

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    pack_key_block<A, 4>(p, seq, kv_head, at, key0, keys, block, {&k, &b, &v, &c}, {&p.k, &p.t_k, &p.v, &p.t_v}, row);
  }

  void pack_rows(const Tile& tile) {
    lse.load(p, exponents, tile);
    q.pack(p, p.q, tile, lse.dead, row);
    if (a) a.pack(p, p.t_q, tile, lse.dead, row);
  }
  void begin(const Tile& tile) {
    pack_rows(tile);
    again = false;
    for (int64_t r = 0; r < tile.rows; ++r) base[r] = 0;
    for (int64_t r = 0; r < tile.rows; ++r) based[r] = !WeightedSums<A>::kRounds || !has_scores;
    clear(tile.rows);
  }

  void clear(int64_t rows) {
    memset(acc, 0, sizeof(T) * rows * wide_dv);
    for (int64_t r = 0; r < rows; ++r) excess[r] = 0;
  }

  // Keys that come by spans.
  T* sums_of(int64_t slot) const { return waiting_sums + slot * kRows * wide_dv; }
  void keep(const Tile& tile, int64_t slot) {
    Waiting& to = waiting[slot];
    to.again = again;
    for (int64_t r = 0; r < tile.rows; ++r) {
      to.base[r] = base[r];
      to.based[r] = based[r];
      to.excess[r] = excess[r];
    }
    memcpy(sums_of(slot), acc, sizeof(T) * tile.rows * wide_dv);
  }
  void resume(const Tile& tile, int64_t slot) {
    pack_rows(tile);
    clear(tile.rows);
    again = waiting[slot].again;
    for (int64_t r = 0; r < tile.rows; ++r) {
      base[r] = waiting[slot].base[r];
      based[r] = waiting[slot].based[r];
    }
  }
  void settle(const Tile& tile, int64_t slot) {
    for (int64_t r = 0; r < tile.rows; ++r) excess[r] += waiting[slot].excess[r];
    add_all(acc, sums_of(slot), tile.rows * wide_dv);
  }
  bool is_done(int64_t slot) const { return waiting[slot].done; }
  void set_done(int64_t slot, bool is) { waiting[slot].done = is; }
  // T of a row, from column j on.
  template <bool Bent>
  Vec<T> tangent_at(int64_t r, int64_t j) const {
    Vec<T> tangent = rounded(load(t + r * kKeys + j) * static_cast<T>(p.scale));
    if constexpr (Bent) tangent *= slope_at(bend_tile + r * kKeys + j);
    return moves_addend(p) ? tangent + load(row + j) : tangent;
  }
  // base = the mean of T by the weights of these keys, the first that have any.
  template <bool Bent>
  void find_base(const Tile& tile, int64_t r) {
    Vec<T> total = {}, weights = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight = load(s + r * kKeys + j);
      weights += weight;
      total += weight * tangent_at<Bent>(r, j);
    }
    const T mean = sum<T>(total) / sum<T>(weights);
    based[r] = sum<T>(weights) > 0;
    base[r] = based[r] && is_finite(mean) ? mean : 0;
  }

  // t = P∘(T − base)∘Z and s = P∘Z; excess gains Σ P∘(T − base).
  template <bool Bent>
  void weigh_row(const Tile& tile, int64_t r) {
    T *s_row = s + r * kKeys, *t_row = t + r * kKeys;
    Vec<T> total = {};
    lse.probabilities(exponents, tile.cols, r, s_row);
    if (!based[r]) find_base<Bent>(tile, r);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight = load(s_row + j);
      const Vec<T> keep = z != nullptr ? load(z + r * kKeys + j) : splat<T>(1);
      if (has_scores) {
        const Vec<T> weighted = weight * (tangent_at<Bent>(r, j) - base[r]);
        total += weighted;
        store(t_row + j, weighted * keep);
      }
      store(s_row + j, weight * keep);
    }
    excess[r] += static_cast<double>(sum<T>(total));
  }

  // The same of several rows, in registers.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void weigh_rows(const Tile& tile, int64_t block, int64_t r, int64_t j) {
    const T scale = static_cast<T>(p.scale);
    RegisterTile<T, Rows, Vectors> weight{}, tangent{};
    multiply_into(weight, q, r, k, block, j);
    scale_scores(p, exponents, weight);
    if (a) multiply_into(tangent, a, r, k, block, j);
    if (b) multiply_into(tangent, q, r, b, block, j);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      hide_keys<T>(p, tile, r + i, j, weight.at[i]);
      lse.probabilities(exponents, r + i, weight.at[i]);
      Vec<T> total = {};
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = (r + i) * kKeys + j + v * kLanes<T>;
        store(s + at, weight.at[i][v]);
        if (!has_scores) continue;
        const Vec<T> weighted = weight.at[i][v] * (rounded(tangent.at[i][v] * scale) - base[r + i]);
        total += weighted;
        store(t + at, weighted);
      }
      excess[r + i] += static_cast<double>(sum<T>(total));
    }
  }
  // s, and t, of a tile in memory.
  void weigh_tile(const Tile& tile, int64_t block) {
    scores(p, exponents, tile, q, k, block, s, bend_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    if (a) multiply_scores(tile, a, k, block, t, false);
    if (b) multiply_scores(tile, q, b, block, t, bool(a));
    if (has_scores && !a && !b) memset(t, 0, sizeof(T) * kRows * kKeys);
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (moves_addend(p)) load_addend_tangent(p, tile, r, s + r * kKeys, row);
      for_bends(p, [&]<bool Bent>() { weigh_row<Bent>(tile, r); });
    }
  }

  void visit(const Tile& tile, int64_t block) {
    if constexpr (kInRegisters<A>) {
      if (in_registers)
        walk_registers<T>(tile, [&]<int Rows, int Vectors>(int64_t r, int64_t j)
                                    [[gnu::always_inline]] { weigh_rows<Rows, Vectors>(tile, block, r, j); });
    }
    if (!in_registers) weigh_tile(tile, block);
    if (has_scores) sums.over_keys(tile, t, v, block, acc);
    if (c) sums.over_keys(tile, s, c, block, acc);
  }

  // Adds the sink's share, Ps·(σ − base), to the excess, and leaves Ot in acc. Whether too many digits were lost.
  bool finish_row(const Tile& tile, int64_t r) {
    T* o_t = acc + r * wide_dv;
    if (lse.dead[r]) {
      memset(o_t, 0, sizeof(T) * wide_dv);
      return false;
    }
    if (p.sinks) {
      const T sink = load_scalar<T>(p.sinks, offset_of(p.sinks, tile.seq, tile.head, 0));
      const T weight = lse.probability_of(r, sink);
      const T tangent = p.t_sinks ? load_scalar<T>(p.t_sinks, offset_of(p.t_sinks, tile.seq, tile.head, 0)) : static_cast<T>(0);
      excess[r] += static_cast<double>(weight * (tangent - base[r]));
    }
    const int64_t i = tile.s.q0 + tile.row0 + r;
    load_wide_row(p.o, offset_of(p.o, tile.seq, tile.head, i), p.dv, wide_dv, row);
    add_low(p.o_lo, tile.seq, tile.head, i, 0, p.dv, row, scratch_row);
    Vec<T> largest_term = {}, largest = {};
    for (int64_t col = 0; col < wide_dv; col += kLanes<T>) {
      const Vec<T> term = load(row + col) * static_cast<T>(excess[r]);
      const Vec<T> less = load(o_t + col) - term;
      store(o_t + col, less);
      largest_term = larger_magnitude(term, largest_term);
      largest = larger_magnitude(less, largest);
    }
    return max_element<T>(largest_term) > kCancellation * max_element<T>(largest);
  }

  static Vec<T> larger_magnitude(Vec<T> x, Vec<T> so_far) { return maximum<T>(x < 0 ? -x : x, so_far); }

  bool end(const Tile& tile, int64_t /*split*/) {
    bool any = false, lossy[kRows];
    sums.finish_over_keys(acc, tile.rows, p.dv);
    for (int64_t r = 0; r < tile.rows; ++r) any |= lossy[r] = finish_row(tile, r);
    if (any && has_scores && !again) {
      again = true;
      // the others give the same once more: their neighbours are not to be told from their bits
      for (int64_t r = 0; r < tile.rows; ++r)
        if (lossy[r]) base[r] += static_cast<T>(excess[r]);
      clear(tile.rows);
      return true;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.s.q0 + tile.row0 + r;
      store_row_in_two(p.out_o, p.out_o_lo, offset_of(p.out_o, tile.seq, tile.head, i),
                       offset_of(p.out_o_lo, tile.seq, tile.head, i), p.dv, T{1}, acc + r * wide_dv, row);
      *double_at(p.out_lse, tile.seq, tile.head, i) = lse.dead[r] ? 0 : static_cast<double>(base[r]) + excess[r];
    }
    return false;
  }
};

}  // namespace

extern const MapKernel jvp[kArithmetics] = METATTN_MAP_KERNELS(Jvp, row_sweep);

}  // namespace metattn::METATTN_ISA
