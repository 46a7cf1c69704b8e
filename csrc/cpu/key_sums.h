// Sums of many terms, and those over rows that each key of a unit has.
#pragma once

#include "masks.h"

namespace metattn::METATTN_ISA {

// to += from
template <class T>
static inline void add_all(T* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, load(to + i) + load(from + i));
}

// Sums of many terms, in whole vectors. A float loses digits of what is added to a long sum: every kSpan terms or so, what was
// gathered is put aside.
template <class T>
struct LongSums {
  T *data = nullptr, *aside = nullptr;
  int64_t terms = 0;

  static LongSums take(Arena& arena, bool wanted, int64_t size, int64_t terms) {
    if (!wanted) return {};
    T* const data = arena.take<T>(size);
    return {data, sizeof(T) == sizeof(float) && terms > 2 * kSpan ? arena.take<T>(size) : nullptr};
  }
  void clear(int64_t size) {
    memset(data, 0, sizeof(T) * size);
    if (aside != nullptr) memset(aside, 0, sizeof(T) * size);
    terms = 0;
  }
  void gained(int64_t more, int64_t size) {
    if (aside == nullptr || (terms += more) < kSpan) return;
    add_all(aside, data, size);
    memset(data, 0, sizeof(T) * size);
    terms = 0;
  }
  void finish(int64_t size) {
    if (aside != nullptr) add_all(data, aside, size);
  }
};

// For each key of a unit, [blocks][kKeys][wide]; or turned, [blocks][columns][kKeys].
template <class T>
struct SumsOfKeys {
  LongSums<T> sums;
  int64_t width = 0, wide = 0;  // wide: padded<T>(width)
  int64_t columns = 0;          // turned: at least the width
  bool turned = false;

  int64_t size(int64_t keys) const { return turned ? round_up(keys, kKeys) * columns : keys * wide; }
  void clear(int64_t keys) { sums.clear(size(keys)); }
  void gained(int64_t rows, int64_t keys) { sums.gained(rows, size(keys)); }
  void finish(int64_t keys) { sums.finish(size(keys)); }
  // Where the sums of a block of keys begin.
  T* of_block(int64_t block) const { return sums.data + block * kKeys * (turned ? columns : wide); }
  // The sums of kLanes keys, counted from the unit's first, from a multiple of that on: [kLanes][wide], in `rows` or where
  // they are.
  const T* of_keys(int64_t first, T* rows) const {
    if (!turned) return sums.data + first * wide;
    const T* corner = of_block(first / kKeys) + first % kKeys;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      Vec<T> square[kLanes<T>];
      const T* const from = corner + c * kKeys;
      if (c + kLanes<T> <= columns) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = load(from + i * kKeys);
      } else {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = c + i < columns ? load(from + i * kKeys) : Vec<T>{};
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<T>; ++i) store(rows + i * wide + c, square[i]);
    }
    return rows;
  }
};

}  // namespace metattn::METATTN_ISA
