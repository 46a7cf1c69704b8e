// forward: O = softmax(S)∘Z·V and L = log-sum-exp in two parts, by the online softmax over key blocks.
#include "kernels.h"
#include "sweep.h"

namespace metattn::METATTN_ISA {
namespace {

// By how much, as a power of two, a score may exceed the reference before sums are rescaled to a new one.
constexpr int kSlack = 8;

template <class A>
struct Forward {
  using T = Compute<A>;
  const Params& p;
  const Exponents<T> exponents;
  Scope<A> scope;
  Arena arena;
  T* row;
  PackedRows<A> q;
  PackedKeys<A> k, v;
  WeightedSums<A> sums;
  T *s, *bend_tile, *z;
  T* acc;       // [kRows][padded(dv)] unnormalised output
  T* totals;    // [kRows][kLanes] sums of exponentials
  T* added;     // [kRows][kLanes], where weights are rounded, by how much that made them larger
  int64_t wide_dv;
  const bool in_registers;
  T slack;      // kSlack, as elements of the tile
  T reference[kRows];  // the element that a row's exponents are counted from
  T limit[kRows];      // the element from which on it is raised; -inf: nothing came yet
  // A block of rows that waits for other keys, and the sums of such blocks, one after the other.
  struct Waiting {
    T reference[kRows], limit[kRows];
    bool done;
  };
  Waiting* waiting;
  T* waiting_sums;

  Forward(const Params& params, char* scratch)
      : p(params),
        exponents(params),
        arena{scratch},
        wide_dv(padded<T>(params.dv)),
        in_registers(fits_registers<A>(params, exponents)) {
    const int64_t blocks = row_sweep_blocks(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, false);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, false, true);
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, true, false);
    sums = WeightedSums<A>::take(arena, p, true);
    s = arena.take<T>(kRows * kKeys);
    bend_tile = take_bends<T>(arena, p, kRows * kKeys);
    z = take_dropout<T>(arena, p, kRows * kKeys);
    acc = arena.take<T>(kRows * wide_dv);
    totals = arena.take<T>(kRows * kLanes<T>);
    if (WeightedSums<A>::kRounds) added = arena.take<T>(kRows * kLanes<T>);
    const int64_t slots = row_sweep_slots(p);
    waiting = arena.take<Waiting>(slots);
    waiting_sums = arena.take<T>(slots * sums_of_a_block());
    slack = kSlack / exponents.factor;
  }
  int64_t sums_of_a_block() const { return kRows * (wide_dv + 2 * kLanes<T>); }

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    pack_key_block<A, 2>(p, seq, kv_head, at, key0, keys, block, {&k, &v}, {&p.k, &p.v}, row);
  }

  void clear(int64_t rows) {
    memset(acc, 0, sizeof(T) * rows * wide_dv);
    memset(totals, 0, sizeof(T) * rows * kLanes<T>);
    if constexpr (WeightedSums<A>::kRounds) memset(added, 0, sizeof(T) * rows * kLanes<T>);
  }
  void begin(const Tile& tile) {
    q.pack(p, p.q, tile, nullptr, row);
    clear(tile.rows);
    // a split of the keys has no sink: it is added with the sums
    const T sink =
        p.sinks && p.key_splits == 1 ? load_scalar<T>(p.sinks, offset_of(p.sinks, tile.seq, tile.head, 0)) : -kInfinity<T>;
    for (int64_t r = 0; r < tile.rows; ++r) {
      reference[r] = 0;
      limit[r] = -kInfinity<T>;
      if (sink == -kInfinity<T>) continue;
      refer_to(r, sink);
      totals[r * kLanes<T>] = 1;
    }
  }

  // ---- keys that come by spans ----

  T* sums_of(int64_t slot, int64_t r) const { return waiting_sums + slot * sums_of_a_block() + r * (wide_dv + 2 * kLanes<T>); }
  void keep(const Tile& tile, int64_t slot) {
    Waiting& to = waiting[slot];
    for (int64_t r = 0; r < tile.rows; ++r) {
      to.reference[r] = reference[r];
      to.limit[r] = limit[r];
      T* const target = sums_of(slot, r);
      store(target, load(totals + r * kLanes<T>));
      if constexpr (WeightedSums<A>::kRounds) store(target + kLanes<T>, load(added + r * kLanes<T>));
      memcpy(target + 2 * kLanes<T>, acc + r * wide_dv, sizeof(T) * wide_dv);
    }
  }
  void resume(const Tile& tile, int64_t slot) {
    q.pack(p, p.q, tile, nullptr, row);
    clear(tile.rows);
    const Waiting& from = waiting[slot];
    for (int64_t r = 0; r < tile.rows; ++r) {
      reference[r] = from.reference[r];
      limit[r] = from.limit[r];
    }
  }
  // The sums that wait are of an earlier reference.
  void settle(const Tile& tile, int64_t slot) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T* const source = sums_of(slot, r);
      if (sum<T>(load(source)) == 0) continue;  // nothing came; a NaN is not nothing, and has no limit either
      const T decay = waiting[slot].limit[r] == -kInfinity<T> ? 1 : decay_since(r, waiting[slot].reference[r]);
      const auto gain = [&](T* sum, const T* from) { store(sum, load(sum) + load(from) * decay); };
      gain(totals + r * kLanes<T>, source);
      if constexpr (WeightedSums<A>::kRounds) gain(added + r * kLanes<T>, source + kLanes<T>);
      for (int64_t c = 0; c < wide_dv; c += kLanes<T>) gain(acc + r * wide_dv + c, source + 2 * kLanes<T> + c);
    }
  }
  bool is_done(int64_t slot) const { return waiting[slot].done; }
  void set_done(int64_t slot, bool is) { waiting[slot].done = is; }

  void refer_to(int64_t r, T element) {
    reference[r] = element;
    limit[r] = element + slack;  // the element itself, where that is large
  }
  // O is a mean by the weights as they were multiplied: a row's errors then weigh V − O, not V.
  T weight_of(int64_t r, T total) const {
    if constexpr (!WeightedSums<A>::kRounds) return total;
    const T kept = z != nullptr && p.dropout_keep_scale > 0 ? static_cast<T>(p.dropout_keep_scale) : 1;
    return total + sum<T>(load(added + r * kLanes<T>)) / kept;
  }
  void leave(const Tile& tile, int64_t split) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t at = split_row(p, split, tile.seq, tile.head, tile.s.q0 + tile.row0 + r);
      const T total = sum<T>(load(totals + r * kLanes<T>));
      double* const found = p.split_weights + 3 * at;
      found[0] = static_cast<double>(reference[r]);
      found[1] = total;
      found[2] = weight_of(r, total);
      memcpy(reinterpret_cast<T*>(p.split_sums) + at * p.dv, acc + r * wide_dv, sizeof(T) * p.dv);
    }
  }
  // What sums are to be multiplied by that were counted from an earlier reference.
  T decay_since(int64_t r, T before) const {
    if (before == reference[r]) return 1;
    return static_cast<T>(__builtin_exp((static_cast<double>(before) - static_cast<double>(reference[r])) * exponents.natural));
  }
  static void logarithms(double (&x)[kRows], int64_t count, bool normal) {
    constexpr int64_t kStep = kLanes<double>;
    static_assert(kRows % kStep == 0);
    for (int64_t i = 0; normal && i < count; i += kStep) store(x + i, log_of_normal(load(x + i)));
    for (int64_t i = 0; !normal && i < count; ++i) x[i] = __builtin_log(x[i]);
  }
  // A row met a larger score than its reference allows for. `pending` columns of its weights are in no sum yet.
  [[gnu::noinline]] void raise(int64_t r, T top, int64_t pending) {
    const bool first = limit[r] == -kInfinity<T>;
    const T before = reference[r];
    refer_to(r, top);
    if (first) return;
    const T decay = decay_since(r, before);
    store(totals + r * kLanes<T>, load(totals + r * kLanes<T>) * decay);
    if constexpr (WeightedSums<A>::kRounds) store(added + r * kLanes<T>, load(added + r * kLanes<T>) * decay);
    for (int64_t c = 0; c < wide_dv; c += kLanes<T>) store(acc + r * wide_dv + c, load(acc + r * wide_dv + c) * decay);
    for (int64_t j = 0; j < pending; j += kLanes<T>) store(s + r * kKeys + j, load(s + r * kKeys + j) * decay);
  }

  // Weights of several rows, in registers.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void weigh_rows(const Tile& tile, int64_t block, int64_t r, int64_t j) {
    RegisterTile<T, Rows, Vectors> x{};
    multiply_into(x, q, r, k, block, j);
    scale_scores(p, exponents, x);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const int64_t row = r + i;
      hide_keys<T>(p, tile, row, j, x.at[i]);
      Vec<T> top = x.at[i][0];
#pragma GCC unroll 4
      for (int v = 1; v < Vectors; ++v) top = maximum<T>(x.at[i][v], top);
      if (any_above(top, limit[row])) {
        const T highest = max_element<T>(top);
        if (limit[row] == -kInfinity<T>) refer_to(row, highest);  // the first keys of most rows
        else raise(row, highest, j);
      }
      T* const target = s + row * kKeys + j;
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) x.at[i][v] = exp2((x.at[i][v] - reference[row]) * exponents.factor);
      Vec<T> total = load(totals + row * kLanes<T>);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) total += x.at[i][v];
      store(totals + row * kLanes<T>, total);
      store_all<T>(target, x.at[i]);
    }
  }

  void visit(const Tile& tile, int64_t block) {
    if constexpr (kInRegisters<A>) {
      if (in_registers) {
        walk_registers<T>(tile, [&]<int Rows, int Vectors>(int64_t r, int64_t j)
                                    [[gnu::always_inline]] { weigh_rows<Rows, Vectors>(tile, block, r, j); });
        return sums.over_keys(tile, s, v, block, acc);
      }
    }
    scores(p, exponents, tile, q, k, block, s, bend_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* s_row = s + r * kKeys;
      Vec<T> top = load(s_row);
      for (int64_t j = kLanes<T>; j < tile.cols; j += kLanes<T>) top = maximum<T>(load(s_row + j), top);
      if (any_above(top, limit[r])) raise(r, max_element<T>(top), 0);
      Vec<T> total = load(totals + r * kLanes<T>), more = {};
      for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
        Vec<T> weight = exp2((load(s_row + j) - reference[r]) * exponents.factor);
        total += weight;
        if (z != nullptr) weight *= load(z + r * kKeys + j);
        sums.put(s, r, j, weight, more);
      }
      store(totals + r * kLanes<T>, total);
      if constexpr (WeightedSums<A>::kRounds) store(added + r * kLanes<T>, load(added + r * kLanes<T>) + more);
    }
    sums.over_keys_put(tile, s, v, block, acc);
  }

  bool end(const Tile& tile, int64_t split) {
    sums.finish_over_keys(acc, tile.rows, p.dv);
    if (p.key_splits > 1) {
      leave(tile, split);
      return false;
    }
    alignas(64) double log_total[kRows];
    for (int64_t r = 0; r < tile.rows; ++r) log_total[r] = sum<T>(load(totals + r * kLanes<T>));
    bool normal = true;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.s.q0 + tile.row0 + r;
      T* o = acc + r * wide_dv;
      const T total = static_cast<T>(log_total[r]);
      T weight = weight_of(r, total);
      if (total == 0) {  // dead
        memset(o, 0, sizeof(T) * wide_dv);  // 0·NaN may have come in from a key that other rows see
        weight = 1;
      }
      normal &= total >= kLeastNormal<T> && total < kInfinity<T>;
      store_row_in_two(p.out_o, p.out_o_lo, offset_of(p.out_o, tile.seq, tile.head, i),
                       offset_of(p.out_o_lo, tile.seq, tile.head, i), p.dv, 1 / weight, o, row);
    }
    logarithms(log_total, tile.rows, normal);
    double* target = double_at(p.out_lse, tile.seq, tile.head, tile.s.q0 + tile.row0);
    for (int64_t r = 0; r < tile.rows; ++r, target += p.out_lse.stride[2])
      store_lse<T>(p.out_lse, exponents, reference[r], log_total[r], target);
    return false;
  }
};

}  // namespace

extern const MapKernel forward[kArithmetics] = METATTN_MAP_KERNELS(Forward, row_sweep);

}  // namespace metattn::METATTN_ISA
