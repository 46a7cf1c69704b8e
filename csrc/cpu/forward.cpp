// forward: O = softmax(S)∘Z·V and L = log-sum-exp, by the online softmax over key blocks.
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
  T *s, *tanh_tile, *z;
  T* acc;       // [kRows][padded(dv)] unnormalised output
  T* totals;    // [kRows][kLanes] sums of exponentials
  T* added;     // [kRows][kLanes], where weights are rounded, by how much that made them larger
  int64_t wide_dv;
  const bool in_registers;
  T slack;      // kSlack, as elements of the tile
  // The element of the tile that exponents are counted from, natural where it is large (LogSumExp), and what S it stands for.
  T reference[kRows], limit[kRows];  // limit: the element from which on the reference is raised
  double log_reference[kRows];       // -inf: nothing came yet
  bool large[kRows];

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
    tanh_tile = p.softcap != 0 ? arena.take<T>(kRows * kKeys) : nullptr;
    z = p.rng != nullptr ? arena.take<T>(kRows * kKeys) : nullptr;
    acc = arena.take<T>(kRows * wide_dv);
    totals = arena.take<T>(kRows * kLanes<T>);
    if (WeightedSums<A>::kRounds) added = arena.take<T>(kRows * kLanes<T>);
    slack = kSlack / exponents.factor;
  }

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    pack_key_block<A, 2>(p, seq, kv_head, at, key0, keys, block, {&k, &v}, {&p.k, &p.v}, row);
  }

  void begin(const Tile& tile) {
    q.pack(p, p.q, tile, nullptr, row);
    memset(acc, 0, sizeof(T) * tile.rows * wide_dv);
    const T sink = p.sinks ? load_scalar<T>(p.sinks, offset_of(p.sinks, tile.seq, tile.head, 0)) : -kInfinity<T>;
    for (int64_t r = 0; r < tile.rows; ++r) {
      reference[r] = 0;
      limit[r] = log_reference[r] = -kInfinity<T>;
      large[r] = false;
      Vec<T> total = {};
      if (sink != -kInfinity<T>) {
        refer_to(r, sink);
        total[0] = 1;
      }
      store(totals + r * kLanes<T>, total);
      if constexpr (WeightedSums<A>::kRounds) store(added + r * kLanes<T>, Vec<T>{});
    }
  }

  void refer_to(int64_t r, T element) {
    const T score = element * static_cast<T>(exponents.natural);
    large[r] = is_large<T>(static_cast<double>(score));
    reference[r] = large[r] ? score : element;
    log_reference[r] = large[r] ? static_cast<double>(score) : static_cast<double>(element) * exponents.natural;
    limit[r] = large[r] ? element : element + slack;
  }
  static void logarithms(double (&x)[kRows], int64_t count, bool normal) {
    constexpr int64_t kStep = kLanes<double>;
    static_assert(kRows % kStep == 0);
    for (int64_t i = 0; normal && i < count; i += kStep) store(x + i, log_of_normal(load(x + i)));
    for (int64_t i = 0; !normal && i < count; ++i) x[i] = __builtin_log(x[i]);
  }
  // A row met a larger score than its reference allows for. `pending` columns of its weights are in no sum yet.
  [[gnu::noinline]] void raise(int64_t r, T top, int64_t pending) {
    const double before = log_reference[r];
    refer_to(r, top);
    if (before == -kInfinity<double>) return;
    const T decay = static_cast<T>(__builtin_exp(before - log_reference[r]));
    store(totals + r * kLanes<T>, load(totals + r * kLanes<T>) * decay);
    if constexpr (WeightedSums<A>::kRounds) store(added + r * kLanes<T>, load(added + r * kLanes<T>) * decay);
    for (int64_t c = 0; c < wide_dv; c += kLanes<T>) store(acc + r * wide_dv + c, load(acc + r * wide_dv + c) * decay);
    for (int64_t j = 0; j < pending; j += kLanes<T>) store(s + r * kKeys + j, load(s + r * kKeys + j) * decay);
  }

  // Weights of several rows, in registers.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void weigh_rows(const Tile& tile, int64_t block, int64_t r, int64_t j) {
    Scores<T, Rows, Vectors> x{};
    multiply_into(x, q, r, k, block, j);
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
      if (__builtin_expect(large[row], false)) {
        store_all<T>(target, x.at[i]);
        natural_row(Vectors * kLanes<T>, target, row);
        load_all<T>(target, x.at[i]);
      } else {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) x.at[i][v] = exp2((x.at[i][v] - reference[row]) * exponents.factor);
      }
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
        walk_registers<T>(tile, [&]<int Rows, int Vectors>(int64_t r, int64_t j) [[gnu::always_inline]] {
          weigh_rows<Rows, Vectors>(tile, block, r, j);
        });
        return sums.over_keys(tile, s, v, block, acc);
      }
    }
    scores(p, exponents, tile, q, k, block, s, tanh_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* s_row = s + r * kKeys;
      Vec<T> top = load(s_row);
      for (int64_t j = kLanes<T>; j < tile.cols; j += kLanes<T>) top = maximum<T>(load(s_row + j), top);
      if (any_above(top, limit[r])) raise(r, max_element<T>(top), 0);
      if (large[r]) natural_row(tile.cols, s_row, r);
      Vec<T> total = load(totals + r * kLanes<T>), more = {};
      for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
        const Vec<T> x = load(s_row + j);
        Vec<T> weight = large[r] ? x : exp2((x - reference[r]) * exponents.factor);
        total += weight;
        if (z != nullptr) weight *= load(z + r * kKeys + j);
        sums.put(s, r, j, weight, more);
      }
      store(totals + r * kLanes<T>, total);
      if constexpr (WeightedSums<A>::kRounds) store(added + r * kLanes<T>, load(added + r * kLanes<T>) + more);
    }
    sums.over_keys_put(tile, s, v, block, acc);
  }
  [[gnu::noinline]] void natural_row(int64_t cols, T* s_row, int64_t r) {
    scale_row(s_row, cols, static_cast<T>(exponents.natural));
    for (int64_t j = 0; j < cols; j += kLanes<T>) store(s_row + j, exp(load(s_row + j) - reference[r]));
  }

  bool end(const Tile& tile) {
    sums.finish_over_keys(acc, tile.rows, p.dv);
    alignas(64) double log_total[kRows];
    for (int64_t r = 0; r < tile.rows; ++r) log_total[r] = sum<T>(load(totals + r * kLanes<T>));
    // O is a mean by the weights as they were multiplied: a row's errors then weigh V − O, not V
    const T kept = z != nullptr && p.dropout_keep_scale > 0 ? static_cast<T>(p.dropout_keep_scale) : 1;
    bool normal = true;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.s.q0 + tile.row0 + r;
      T* o = acc + r * wide_dv;
      const T total = static_cast<T>(log_total[r]);
      T weight = total;
      if constexpr (WeightedSums<A>::kRounds) weight += sum<T>(load(added + r * kLanes<T>)) / kept;
      if (total == 0) {  // dead
        memset(o, 0, sizeof(T) * wide_dv);  // 0·NaN may have come in from a key that other rows see
        weight = 1;
      }
      normal &= total >= kLeastNormal<T> && total < kInfinity<T>;
      store_row_in_two(p.out_o, p.out_o_lo, offset_of(p.out_o, tile.seq, tile.head, i),
                       offset_of(p.out_o_lo, tile.seq, tile.head, i), p.dv, 1 / weight, o, row);
    }
    logarithms(log_total, tile.rows, normal);
    for (int64_t r = 0; r < tile.rows; ++r)
      *double_at(p.out_lse, tile.seq, tile.head, tile.s.q0 + tile.row0 + r) =
          large[r] ? join_lse(reference[r], log_total[r]) : log_reference[r] + log_total[r];
    return false;
  }
};

}  // namespace

extern const MapKernel forward[kArithmetics] = METATTN_MAP_KERNELS(Forward, row_sweep);

}  // namespace metattn::METATTN_ISA
