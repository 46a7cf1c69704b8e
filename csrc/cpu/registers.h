// Scores of a few rows against a panel of keys, kept in registers from the product on: what follows a product of narrow
// heads costs as much as the product, and to put scores aside and fetch them again would cost as much again. For problems
// without options that need a row in memory; of wider heads larger blocks of rows and keys are better.
#pragma once

#include "tile.h"

namespace metattn::METATTN_ISA {

// Rows at once: two products' scores against a whole panel lie in 24 of 32 registers. Sixteen hold too few.
#if METATTN_VECTOR_BYTES == 64 || defined(__aarch64__)
constexpr int kRowsInRegisters = 3;
#else
constexpr int kRowsInRegisters = 0;
#endif

// An arithmetic whose scores can, and a problem whose do.
template <class A>
constexpr bool kInRegisters = false;
#ifndef METATTN_PAIRS
template <>
constexpr bool kInRegisters<float> = kRowsInRegisters > 0;
template <>
constexpr bool kInRegisters<double> = kRowsInRegisters > 0;
#endif
template <class A, class T>
static inline bool fits_registers(const Params& p, const Exponents<T>& exponents) {
  return kInRegisters<A> && is_narrow(p) && exponents.plain && !p.mask && p.rng == nullptr;
}

// Rows × vectors of keys.
template <class T, int Rows, int Vectors>
struct RegisterTile {
  Vec<T> at[Rows][Vectors];
};

// gains += rows [r, r + Rows)·keysᵀ, of keys from column j of a tile on.
template <class T, int Rows, int Vectors>
[[gnu::always_inline]] static inline void multiply_into(RegisterTile<T, Rows, Vectors>& gains, const PackedRows<T>& rows,
                                                        int64_t r, const PackedKeys<T>& keys, int64_t block, int64_t j) {
  const Panels<T> panels = keys.over_features(block);
  const T* b = panels.data + j / panels.panel * panels.stride;
  RegisterTile<T, Rows, Vectors> x = gains;
  for (int64_t c = 0; c < rows.width; c += rows.panel) {
    const T* a = rows.data + c * kRows + r * rows.panel;
    const int64_t steps = smaller(rows.panel, rows.width - c);
    for (int64_t k = 0; k < steps; ++k, ++a, b += PackedKeys<T>::kKeyPanel) {
      Vec<T> b_k[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) b_k[v] = rounded(load(b + v * kLanes<T>));  // once for all rows
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> a_ik = splat(a[i * rows.panel]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) x.at[i][v] += a_ik * b_k[v];
      }
    }
  }
  gains = x;
}

// Makes products elements, as `scores` does for a tile: rounded, not to become part of another operation.
template <class T, int Rows, int Vectors>
[[gnu::always_inline]] static inline void scale_scores(const Params& p, const Exponents<T>& exponents,
                                                       RegisterTile<T, Rows, Vectors>& x) {
  if constexpr (Exponents<T>::kFoldsScale) return;
  if (!exponents.scales()) return;
  const T scale = static_cast<T>(p.scale);
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) x.at[i][v] = rounded(x.at[i][v] * scale);
}

// −inf in lanes outside [lo, hi), counted from the first.
template <class T, int Vectors>
[[gnu::always_inline]] static inline void hide_lanes(Vec<T> (&x)[Vectors], int64_t lo, int64_t hi) {
  const Vec<T> hidden = splat(-kInfinity<T>);
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    x[v] = joined<T>(x[v], hidden, larger(0, hi - v * kLanes<T>));
    x[v] = joined<T>(hidden, x[v], larger(0, lo - v * kLanes<T>));
  }
}
// Keys that row r of a tile may not see, of those from column j on.
template <class T, int Vectors>
[[gnu::always_inline]] static inline void hide_keys(const Params& p, const Tile& tile, int64_t r, int64_t j,
                                                    Vec<T> (&x)[Vectors]) {
  const int64_t first = tile.key0 + j;
  if (tile.partial) {
    const Range range = attended_keys(p, tile.s, tile.row0 + r);
    hide_lanes<T>(x, range.lo - first, smaller(range.hi, tile.key0 + tile.keys) - first);
  } else if (tile.keys - j < Vectors * kLanes<T>) {
    x[Vectors - 1] = joined<T>(x[Vectors - 1], splat(-kInfinity<T>), tile.keys - j - (Vectors - 1) * kLanes<T>);
  }
}

template <class T, int Vectors>
[[gnu::always_inline]] static inline void store_all(T* target, const Vec<T> (&x)[Vectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) store(target + v * kLanes<T>, x[v]);
}
template <class T, int Vectors>
[[gnu::always_inline]] static inline void load_all(const T* source, Vec<T> (&x)[Vectors]) {
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) x[v] = load(source + v * kLanes<T>);
}

// Calls body<Rows, Vectors>(r, j) for all rows of a tile, from each panel's first column on.
template <class T, int Vectors, class Body>
static inline void walk_rows(const Tile& tile, int64_t j, const Body& body) {
  int64_t r = 0;
  for (; r + kRowsInRegisters <= tile.rows; r += kRowsInRegisters) body.template operator()<kRowsInRegisters, Vectors>(r, j);
  for (; r < tile.rows; ++r) body.template operator()<1, Vectors>(r, j);
}
template <class T, class Body>
static inline void walk_registers(const Tile& tile, const Body& body) {
  constexpr int64_t kPanel = PackedKeys<T>::kKeyPanel;
  for (int64_t j = 0; j < tile.keys; j += kPanel) {
    switch ((smaller(kPanel, tile.keys - j) + kLanes<T> - 1) / kLanes<T>) {
      case 4: walk_rows<T, 4>(tile, j, body); break;
      case 3: walk_rows<T, 3>(tile, j, body); break;
      case 2: walk_rows<T, 2>(tile, j, body); break;
      default: walk_rows<T, 1>(tile, j, body);
    }
  }
}

}  // namespace metattn::METATTN_ISA
