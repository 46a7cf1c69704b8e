// What sums over keys, whose weights cancel what all keys share, lack where weights are rounded (docs/math.md).
#pragma once

#include "packed.h"

namespace metattn::METATTN_ISA {

template <class A, bool Rounds = WeightedSums<A>::kRounds>
struct CommonKeys {
  Compute<A>* lacking = nullptr;
  static CommonKeys take(Arena&, bool /*wanted*/, const View&, int64_t /*width*/) { return {}; }
  void begin(const Params&, const View&, const Tile&, const bool* /*dead*/, Compute<A>* /*row*/) {}
  void finish(int64_t /*rows*/, const Compute<A>* /*known*/, bool /*adds*/, Compute<A>* /*sums*/) const {}
};

// Keys share what no derivative of scores depends on: their weights sum to what is known (GradientSweep), but not once they
// are rounded, nor where D comes of an O whose weights were. What is lacking is the weight of a mean key: of keys that all
// rows of a block attend to or, where there are few, of the last that each attends to. It depends on no key chunk.
template <class A>
struct CommonKeys<A, true> {
  using T = Compute<A>;
  static constexpr int64_t kOfAll = 32, kOfEach = 8;
  T* means = nullptr;    // [kRows][padded width], or [padded width]
  T* lacking = nullptr;  // [kRows]
  int64_t width = 0, wide = 0;
  bool shared = false;

  static CommonKeys take(Arena& arena, bool wanted, const View& view, int64_t width) {
    if (!wanted || !view) return {};
    const int64_t wide = padded<T>(width);
    return {arena.take<T>(kRows * wide), arena.take<T>(kRows), width, wide, false};
  }
  void begin(const Params& p, const View& view, const Tile& tile, const bool* dead, T* row) {
    if (means == nullptr) return;
    memset(lacking, 0, sizeof(T) * kRows);
    const int64_t lo = attended_keys(p, tile.s, tile.row0 + tile.rows - 1).lo, hi = attended_keys(p, tile.s, tile.row0).hi;
    shared = !p.mask && !p.bias && hi - lo >= kOfEach;
    if (shared) {
      const int64_t count = smaller(hi - lo, kOfAll);
      memset(means, 0, sizeof(T) * wide);
      for (int64_t n = 0; n < count; ++n) add(view, tile, lo + n * (hi - lo) / count, row, means);
      divide(means, count);
      return;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* const mean = means + r * wide;
      memset(mean, 0, sizeof(T) * wide);
      const Range range = attended_keys(p, tile.s, tile.row0 + r);
      int64_t count = 0;
      for (int64_t j = range.hi - 1; !dead[r] && j >= range.lo && count < kOfEach; --j) {
        if (!attends<T>(p, tile.s, tile.seq, tile.head, tile.row0 + r, j)) continue;
        add(view, tile, j, row, mean);
        ++count;
      }
      divide(mean, larger(1, count));
    }
  }
  void add(const View& view, const Tile& tile, int64_t key, T* row, T* total) const {
    load_wide_row(view, offset_of(view, tile.seq, tile.kv_head, tile.s.k0 + key), width, wide, row);
    for (int64_t c = 0; c < wide; c += kLanes<T>) store(total + c, load(total + c) + load(row + c));
  }
  void divide(T* total, int64_t count) const {
    for (int64_t c = 0; c < wide; c += kLanes<T>) store(total + c, finite_or_0<T>(load(total + c) / static_cast<T>(count)));
  }
  // known [rows]: null, or added where `adds`; a row whose known sum is none (NaN) gets nothing in any span of keys.
  void finish(int64_t rows, const T* known, bool adds, T* sums) const {
    for (int64_t r = 0; means != nullptr && r < rows; ++r) {
      const T weight = lacking[r] + (known != nullptr && (adds || !is_finite(known[r])) ? known[r] : 0);
      const T* mean = shared ? means : means + r * wide;
      for (int64_t c = 0; is_finite(weight) && c < wide; c += kLanes<T>)
        store(sums + r * wide + c, load(sums + r * wide + c) + weight * load(mean + c));
    }
  }
};

}  // namespace metattn::METATTN_ISA
