// Scores of a tile with every option, dropout, and the statistics of rows. Each option is written here once; the four maps
// only combine these helpers (docs/math.md has the formulas).
#pragma once

#include "contract.h"
#include "philox.h"

namespace metattn::METATTN_ISA {

// ---- scores ----

// A row of a [seq, head, row, key] view under a tile; columns past its keys become 0.
template <class T>
static void load_bias_row(const View& bias, const Tile& tile, int64_t r, T* row) {
  load_row(bias, offset_of(bias, tile.seq, tile.head, tile.row0 + r) + tile.key0 * bias.stride[3], bias.stride[3], tile.keys,
           row);
  for (int64_t j = tile.keys; j < tile.cols; ++j) row[j] = 0;
}

// row −= slope·distance.
template <class T>
static void subtract_alibi(const View& slopes, const Tile& tile, int64_t r, T* row) {
  const T slope = load_scalar<T>(slopes, offset_of(slopes, tile.seq, tile.head, 0));
  for (int64_t j = 0; j < tile.keys; ++j)
    row[j] -= slope * static_cast<T>(alibi_distance(tile.s, tile.row0 + r, tile.key0 + j));
}

// The tangent of what is added to a row's products, of bias and ALiBi; where nothing is attended, what stands in the bias'
// is nobody's business.
static inline bool moves_addend(const Params& p) { return p.t_bias || p.t_slopes; }
template <class T>
static void load_addend_tangent(const Params& p, const Tile& tile, int64_t r, const T* s_row, T* row) {
  if (p.t_bias) load_bias_row(p.t_bias, tile, r, row);
  else memset(row, 0, sizeof(T) * tile.cols);
  if (p.t_slopes) subtract_alibi(p.t_slopes, tile, r, row);
  for (int64_t j = 0; j < tile.cols; j += kLanes<T>) store(row + j, load(s_row + j) > -kInfinity<T> ? load(row + j) : Vec<T>{});
}

// A softcap bends scores. for_bends calls body<Bent>(), which is compiled without it, too; bend_tile holds tanh(R / c).
template <class Body>
static inline void for_bends(const Params& p, const Body& body) {
  if (bends(p)) body.template operator()<true>();
  else body.template operator()<false>();
}
template <class T>
static inline T* take_bends(Arena& arena, const Params& p, int64_t elements) {
  return bends(p) ? arena.take<T>(elements) : nullptr;
}
// Its first and second derivative, s1 and s2 of docs/math.md, from an element of bend_tile on.
template <class T>
static inline Vec<T> slope_at(const T* bend) {
  const Vec<T> u = load(bend);
  return 1 - u * u;
}
template <class T>
static inline Vec<T> curve_at(const T* bend, Vec<T> slope, const Params& p) {
  return load(bend) * slope * static_cast<T>(-2 / p.softcap);
}
template <class T>
static void cap_row(T* s, T* bend_row, int64_t cols, T cap) {
  for (int64_t j = 0; j < cols; j += kLanes<T>) {
    const Vec<T> t = tanh_of<T>(load(s + j) / cap);
    store(bend_row + j, t);
    store(s + j, t * cap);
  }
}

constexpr double kLog2e = 1.4426950408889634074;

// What turns a tile's elements into exponents of 2. Exponents are of differences, (element − reference)·factor: exact for
// equal elements, however large. Plain problems have nothing but the scale between q·k and S. In float their tiles hold q·k
// itself, and the scale is part of the factor: a double that holds S tells which float that was. Of a double it could not:
// there, as elsewhere, tiles hold S.
template <class T>
struct Exponents {
  static constexpr bool kFoldsScale = sizeof(T) < sizeof(double);
  bool plain;
  double natural;  // S = natural·element
  T factor;        // log2(e)·natural

  explicit Exponents(const Params& p) {
    plain = !bends(p) && !p.bias && !p.slopes && !p.sinks && (!kFoldsScale || (p.scale > 1e-18 && p.scale < 1e18));
    natural = plain && kFoldsScale ? p.scale : 1;
    factor = static_cast<T>(natural * kLog2e);
  }
  // Whether q·k must be multiplied by the scale before it is an element.
  bool scales() const { return !kFoldsScale || !plain; }
};

// row *= factor, rounded: not to become part of another operation.
template <class T>
__attribute__((noinline)) static void scale_row(T* row, int64_t cols, T factor) {
  for (int64_t j = 0; j < cols; j += kLanes<T>) store(row + j, load(row + j) * factor);
}

// −inf before `lo` and from `hi` on: by whole vectors, which are read as such.
template <class T>
static inline void hide_outside(T* row, int64_t cols, int64_t lo, int64_t hi) {
  const Vec<T> hidden = splat(-kInfinity<T>);
  for (int64_t j = 0; j < smaller(lo, cols); j += kLanes<T>) store(row + j, joined<T>(hidden, load(row + j), lo - j));
  for (int64_t j = hi / kLanes<T> * kLanes<T>; j < cols; j += kLanes<T>)
    store(row + j, joined<T>(load(row + j), hidden, hi - j));
}

// tanh of what is hidden becomes 0: a NaN in it would come in by 0·NaN.
template <class T>
static inline void drop_hidden(const T* s_row, T* bend_row, int64_t cols) {
  for (int64_t j = 0; j < cols; j += kLanes<T>)
    store(bend_row + j, load(s_row + j) > -kInfinity<T> ? load(bend_row + j) : Vec<T>{});
}

// The tile [kRows][kKeys] of Exponents: scale·QKᵀ with softcap, bias and ALiBi, or QKᵀ alone; −inf where masked.
// row is scratch.
template <class A, class T>
static void scores(const Params& p, const Exponents<T>& exponents, const Tile& tile, const PackedRows<A>& q,
                   const PackedKeys<A>& k, int64_t block, T* s, T* bend_tile, T* row) {
  multiply_scores(tile, q, k, block, s, false);
  if (!exponents.scales() && !p.mask && !tile.partial && tile.cols == tile.keys) return;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* s_row = s + r * kKeys;
    const int64_t i = tile.row0 + r;
    if (exponents.scales()) scale_row(s_row, tile.cols, static_cast<T>(p.scale));
    if (bends(p)) cap_row<T>(s_row, bend_tile + r * kKeys, tile.cols, static_cast<T>(p.softcap));
    if (p.bias) {
      load_bias_row(p.bias, tile, r, row);
      // a select, not a sum, where the bias is −inf: it must hide NaN as a mask does
      for (int64_t j = 0; j < tile.keys; ++j) s_row[j] = row[j] == -kInfinity<T> ? row[j] : s_row[j] + row[j];
    }
    if (p.slopes) subtract_alibi(p.slopes, tile, r, s_row);
    if (p.mask) {
      const char* keep = p.mask.data + offset_of(p.mask, tile.seq, tile.head, i) + tile.key0 * p.mask.stride[3];
      if (p.mask.stride[3] == 1) {
        for (int64_t j = 0; j < tile.keys; ++j) s_row[j] = keep[j] ? s_row[j] : -kInfinity<T>;
      } else {
        for (int64_t j = 0; j < tile.keys; ++j) s_row[j] = keep[j * p.mask.stride[3]] ? s_row[j] : -kInfinity<T>;
      }
    }
    const Range range = tile.partial ? attended_keys(p, tile.s, i) : Range{tile.key0, tile.key0 + tile.keys};
    hide_outside(s_row, tile.cols, range.lo - tile.key0, larger(0, smaller(range.hi - tile.key0, tile.keys)));
    if (bends(p)) drop_hidden(s_row, bend_tile + r * kKeys, tile.cols);
  }
}

template <class T>
static inline T* take_dropout(Arena& arena, const Params& p, int64_t elements) {
  return p.rng != nullptr ? arena.take<T>(elements) : nullptr;
}
// Z [kRows][kKeys]: 0 where dropout drops, 1/(1 − p) where it keeps.
template <class T>
static void dropout_tile(const Params& p, const Tile& tile, T* z) {
  const uint64_t seed = static_cast<uint64_t>(p.rng[tile.seq * p.rng_stride[0]]);
  const uint32_t batch = static_cast<uint32_t>(p.rng[tile.seq * p.rng_stride[0] + p.rng_stride[1]]);
  const T keep = static_cast<T>(p.dropout_keep_scale);
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t j = 0; j < tile.cols; j += 4) {
      const PhiloxWords words = philox(seed, static_cast<uint32_t>((tile.key0 + j) / 4), static_cast<uint32_t>(tile.row0 + r),
                                       static_cast<uint32_t>(tile.head), batch);
      for (int w = 0; w < 4; ++w) z[r * kKeys + j + w] = words.w[w] >= p.dropout_threshold ? keep : 0;
    }
  }
}

// ---- row statistics ----

// A row's log-sum-exp in its two parts, for P = 2^((element − reference)·factor − log_total): it keeps its digits however
// large scores are, for the forward map counted from the same reference. A row that attends to nothing is dead: +inf as
// its reference makes its P exactly 0.
template <class T>
struct LogSumExp {
  T reference[kRows];  // an element
  T log_total[kRows];  // to base 2
  bool dead[kRows];

  void load(const Params& p, const Exponents<T>& exponents, const Tile& tile) {
    double score[kRows], total[kRows];
    const double* source = double_at(p.lse, tile.seq, tile.head, tile.s.q0 + tile.row0);
    for (int64_t r = 0; r < tile.rows; ++r, source += p.lse.stride[2]) {
      score[r] = source[0];
      total[r] = source[p.lse.stride[3]];
    }
    // loops without branches, for the compiler's vectors
    const double inverse = 1 / exponents.natural;
    for (int64_t r = 0; r < tile.rows; ++r) reference[r] = static_cast<T>(score[r] * inverse);
    for (int64_t r = 0; r < tile.rows; ++r) log_total[r] = static_cast<T>(total[r] * kLog2e);
    bool any = false;
    for (int64_t r = 0; r < tile.rows; ++r) any |= dead[r] = total[r] == -kInfinity<double>;
    for (int64_t r = 0; any && r < tile.rows; ++r) {
      if (!dead[r]) continue;
      reference[r] = kInfinity<T>;
      log_total[r] = 0;
    }
  }

  // Of a sink, which is in no tile; where there are sinks, tiles hold S.
  T probability_of(int64_t r, T sink) const {
    return exp2(splat((sink - reference[r]) * static_cast<T>(kLog2e) - log_total[r]))[0];
  }
  // Turns scores of the row into probabilities.
  void probabilities(const Exponents<T>& exponents, int64_t cols, int64_t r, T* row) const {
    for (int64_t j = 0; j < cols; j += kLanes<T>)
      store(row + j, exp2((metattn::METATTN_ISA::load(row + j) - reference[r]) * exponents.factor - log_total[r]));
  }
  // The same in registers.
  template <int Vectors>
  [[gnu::always_inline]] void probabilities(const Exponents<T>& exponents, int64_t r, Vec<T> (&x)[Vectors]) const {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) x[v] = exp2((x[v] - reference[r]) * exponents.factor - log_total[r]);
  }
};

// The same of a row that was counted from `before`, stored.
template <class T>
static inline void store_lse(const View& view, const Exponents<T>& exponents, double before, double log_total, double* target) {
  // counted from the element nearest to L, the log has few digits to lose in T
  const double sum = before + log_total / exponents.natural;
  const double nearest = log_total > -kInfinity<double> ? static_cast<double>(static_cast<T>(sum)) : before;
  target[0] = nearest * exponents.natural;
  target[view.stride[3]] = log_total - (nearest - before) * exponents.natural;
}

// Elements of a row of a tensor that is kept in two parts, the first of which is in `row`: without the lost digits,
// D = rowsum(dO∘O) would be off by as much as the dP − D of a sharply peaked row is large.
template <class T>
static void add_low(const View& low, int64_t seq, int64_t head, int64_t i, int64_t first, int64_t count, T* row, T* scratch) {
  if (!low) return;
  load_row(low, offset_of(low, seq, head, i) + first * low.stride[3], low.stride[3], count, scratch);
  for (int64_t c = 0; c < count; ++c) row[c] = (is_finite(row[c]) ? row[c] : 0) + scratch[c];
}

// Σ o∘cotangent over the columns of each row, less the cotangent of lse: D of docs/math.md, or Dt with o's tangent
// and none. `row` and `scratch` are padded<T>(dv) long. Dead rows get 0.
template <class A, class T>
static void row_dots(const View& values, const View& low, const View& minus, const Tile& tile, const PackedRows<A>& d_o,
                     const bool* dead, int64_t dv, T* row, T* scratch, T* result) {
  if (d_o && !low && has_rows_of<T>(values)) {
    const T* source = reinterpret_cast<const T*>(values.data) + offset_of(values, tile.seq, tile.head, tile.s.q0 + tile.row0);
    for (int64_t r = 0; r < tile.rows; ++r) result[r] = d_o.dot_bare(r, source + r * values.stride[2]);
  } else {
    const int64_t wide = padded<T>(dv);
    for (int64_t r = 0; r < tile.rows; ++r) {
      result[r] = 0;
      if (dead[r] || !d_o) continue;
      const int64_t i = tile.s.q0 + tile.row0 + r;
      load_wide_row(values, offset_of(values, tile.seq, tile.head, i), dv, wide, row);
      add_low(low, tile.seq, tile.head, i, 0, dv, row, scratch);
      result[r] = d_o.dot(r, row);
    }
  }
  for (int64_t r = 0; minus && r < tile.rows; ++r)
    result[r] -= static_cast<T>(*double_at(minus, tile.seq, tile.head, tile.s.q0 + tile.row0 + r));
  for (int64_t r = 0; r < tile.rows; ++r) result[r] = dead[r] ? 0 : result[r];
}

}  // namespace metattn::METATTN_ISA
