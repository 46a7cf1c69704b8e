// Tiles of one (sequence, head): places, loads into shared memory, scores with every option, dropout, row statistics.
// Each option is written here once (docs/math.md has the formulas).
#pragma once

#include "cuda/products.h"
#include "geometry.h"
#include "philox.h"

namespace metattn::cuda {

constexpr int kWarpRows = 16;

static METATTN_HD int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static METATTN_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static METATTN_HD int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

struct Place {
  int64_t seq, head, kv_head;
  Sequence s;
};

// Keys up to so many before and behind a query's own place, i + offset.
struct Reach {
  int64_t offset, back, ahead;
};
static METATTN_DEVICE Reach reach_of(const Params& p, const Sequence& s) {
  constexpr int64_t kAll = int64_t{1} << 42;
  const int64_t ahead = p.causal != Causal::none ? 0 : kAll;
  return {p.causal == Causal::top_left ? 0 : s.m - s.n, p.window_left >= 0 ? p.window_left : kAll,
          p.window_right >= 0 ? smaller(ahead, p.window_right) : ahead};
}

// The queries that attend to some key of [key0, key_end).
static METATTN_DEVICE Range attending_rows(const Params& p, const Sequence& s, int64_t key0, int64_t key_end) {
  const Reach reach = reach_of(p, s);
  return {larger(0, key0 - reach.offset - reach.ahead), smaller(s.n, key_end - reach.offset + reach.back)};
}

// ---- shared memory ----

// Hands out aligned pieces of a block's shared memory; over a null base it only counts them.
struct Pieces {
  char* base;
  size_t used = 0;
  template <class T>
  METATTN_HD T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 16));
    return piece;
  }
  template <class S>
  METATTN_HD SharedTile<S> tile(bool wanted, int rows, int ld) {
    return wanted ? SharedTile<S>{take<S>(static_cast<int64_t>(rows) * ld), ld} : SharedTile<S>{};
  }
};

// Elements from a tile's row to the next: 16 bytes more than a multiple of `columns`, so that eight rows of 16 bytes
// lie in different banks.
template <class S>
static METATTN_HD int leading(const Params& p, int columns) {
  return static_cast<int>(round_up(larger(1, larger(p.d, p.dv)), columns) + 16 / static_cast<int64_t>(sizeof(S)));
}

// Sixteen bytes that are aligned so.
static METATTN_DEVICE void copy16(void* to, const void* from) {
#ifdef __CUDACC__
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#else
  memcpy(to, from, 16);
#endif
}

template <class S>
static METATTN_DEVICE bool strange(S x) {
  return !is_finite(widened<Compute<S>>(x));
}

// f(r, c) for the pieces of sixteen bytes, at (row, column), that this thread has of a tile's rows: it may look at what
// it has copied there itself before others may.
template <class S, class F>
static METATTN_DEVICE void each_piece(const Block& block, SharedTile<S> tile, int rows, F f) {
  constexpr int kVector = 16 / sizeof(S);
  const int chunks = tile.ld / kVector, further = block.workers() / chunks, beside = block.workers() % chunks;
  int r = block.worker() / chunks, c = block.worker() % chunks;
  for (; r < rows; r += further, c += beside) {
    if (c >= chunks) {
      c -= chunks;
      if (++r >= rows) return;
    }
    f(r, c * kVector);
  }
}

// Begins to copy rows [first, first + rows) of a (sequence, head) into a tile: zeros outside [lo, hi), and past the
// width. What does not lie in pieces of sixteen bytes is copied at once. Not inlined: kernels have up to nine of these.
template <class S>
static METATTN_CALLED void start_tile(Block& block, SharedTile<S> tile, int rows, const View& view, int64_t base, int64_t first,
                                      int64_t lo, int64_t hi, int64_t width) {
  if (!tile) return;
  constexpr int kVector = 16 / sizeof(S);
  const S* data = reinterpret_cast<const S*>(view.data) + base;
  const bool vectors = view.stride[3] == 1 && view.stride[2] % kVector == 0 && width % kVector == 0 &&
                       reinterpret_cast<uintptr_t>(data) % 16 == 0;
  each_piece(block, tile, rows, [&](int r, int c) {
    const int64_t row = first + r;
    const bool there = row >= lo && row < hi;
    const S* source = data + row * view.stride[2] + c * view.stride[3];
    if (vectors) {
      const bool inside = there && c < width;
      block.template copy<16>(tile.row(r) + c, inside ? source : data, inside);
    } else {
      alignas(16) S values[kVector];
      METATTN_UNROLL(int v = 0; v < kVector; ++v)
        values[v] = there && c + v < width ? source[v * view.stride[3]] : narrowed<S>(Compute<S>{0});
      copy16(tile.row(r) + c, values);
    }
  });
}

// Rounds, where products are TF32's, what this thread has copied of a tile's rows and waited for: tensor cores would cut
// it off. Here once, not for every warp and product that reads it.
template <class S>
static METATTN_CALLED void round_tile(const Block& block, SharedTile<S> tile, int rows) {
  if (!tile) return;
  each_piece(block, tile, rows, [&](int r, int c) {
    alignas(16) S values[16 / sizeof(S)];
    copy16(values, tile.row(r) + c);
    METATTN_UNROLL(S& x : values) x = narrowed<S>(as_factor(x));
    copy16(tile.row(r) + c, values);
  });
}
template <class S, int Count>
static METATTN_DEVICE void round_tiles(const Block& block, int rows, const SharedTile<S> (&tiles)[Count]) {
  if constexpr (kIsTf32<S>)
    METATTN_UNROLL(int n = 0; n < Count; ++n) round_tile(block, tiles[n], rows);
}

// Whether this thread copied an infinity or a NaN.
template <class S>
static METATTN_CALLED bool met_strange(const Block& block, SharedTile<S> tile, int rows) {
  bool met = false;
  if (!tile) return met;
  each_piece(block, tile, rows, [&](int r, int c) {
    METATTN_UNROLL(int v = 0; v < static_cast<int>(16 / sizeof(S)); ++v) met |= strange(tile.row(r)[c + v]);
  });
  return met;
}

// Zeros for infinities and NaN in the rows for which skip(r) holds, by the threads that copied them. The rest stays: a row
// whose weight lies at a sink has scores all the same.
template <class S, class Skip>
static METATTN_DEVICE void clear_rows(const Block& block, SharedTile<S> tile, int rows, Skip skip) {
  if (!tile) return;
  each_piece(block, tile, rows, [&](int r, int c) {
    if (!skip(r)) return;
    METATTN_UNROLL(int v = 0; v < static_cast<int>(16 / sizeof(S)); ++v)
      if (strange(tile.row(r)[c + v])) tile.row(r)[c + v] = narrowed<S>(Compute<S>{0});
  });
}

// ---- row statistics ----

// Of each row of a tile of queries, in shared memory.
template <class T>
struct Statistics {
  T *reference, *log_total, *d, *tau, *dt;
  static METATTN_HD Statistics take(Pieces& pieces, int rows) {
    return {pieces.take<T>(rows), pieces.take<T>(rows), pieces.take<T>(rows), pieces.take<T>(rows), pieces.take<T>(rows)};
  }
  METATTN_DEVICE Statistics from(int row) const { return {reference + row, log_total + row, d + row, tau + row, dt + row}; }
  METATTN_DEVICE bool idle(int r) const { return reference[r] == kInfinity<T>; }
};

template <class T>
static METATTN_DEVICE T per_head(const View& view, const Place& place) {
  return load<T>(view, offset_of(view, place.seq, place.head, 0));
}

// Rows that attend to nothing, or with a sink all of whose weight lies there to the last digit: an infinity or a NaN in
// their q and dO is nobody's business.
template <class T>
static METATTN_DEVICE bool is_idle(const Params& p, const Place& place, T reference, T log_total) {
  return reference == kInfinity<T> || (p.sinks && reference == per_head<T>(p.sinks, place) && log_total == 0);
}

// The log-sum-exp in its two parts, for P = exp((S − reference) − log_total), which keeps its digits however large scores
// are; a row that attends to nothing has +inf as its reference.
template <class T>
struct RowLogSumExp {
  T reference, log_total;
};
template <class T>
static METATTN_DEVICE RowLogSumExp<T> known_lse(const Params& p, const Place& place, int64_t i) {
  const double* lse = double_at(p.lse, place.seq, place.head, place.s.q0 + i);
  const double log_total = lse[p.lse.stride[3]];
  if (log_total == -kInfinity<double>) return {kInfinity<T>, 0};
  return {static_cast<T>(lse[0]), static_cast<T>(log_total)};
}

template <class T>
static METATTN_DEVICE T* statistic_at(const Params& p, Statistic field, const Place& place, int64_t i) {
  return reinterpret_cast<T*>(p.statistics) + field * p.statistics_stride[0] + place.seq * p.statistics_stride[1] +
         place.head * p.statistics_stride[2] + place.s.q0 + i;
}

// An element of a result of dtype S that is kept in two parts.
template <class S, class T>
static METATTN_DEVICE T in_two(const View& high, const View& low, int64_t high_at, int64_t low_at) {
  const T x = widened<T>(reinterpret_cast<const S*>(high.data)[high_at]);
  return low ? (is_finite(x) ? x : 0) + widened<T>(reinterpret_cast<const BFloat16*>(low.data)[low_at]) : x;
}

// Σ (values + their low parts)∘dO over a row, by a warp.
template <class S, class T>
static METATTN_DEVICE T row_dot(const Params& p, const View& values, const View& low, const Place& place, int64_t i) {
  if (!p.d_o) return 0;
  const int64_t row = place.s.q0 + i;
  const int64_t a = offset_of(values, place.seq, place.head, row), b = offset_of(low, place.seq, place.head, row);
  const S* d_o = reinterpret_cast<const S*>(p.d_o.data) + offset_of(p.d_o, place.seq, place.head, row);
  T total = 0;
  for (int64_t f = first_lane(); f < p.dv; f += lane_step())
    total += in_two<S, T>(values, low, a + f * values.stride[3], b + f * low.stride[3]) *
             as_factor(d_o[f * p.d_o.stride[3]]);  // as products have it: dP − D cancels
  return lane_sum(total);
}

// Σ over the sink of what its probability weighs.
template <class T>
static METATTN_DEVICE T sink_probability(const Params& p, const Place& place, T reference, T log_total) {
  return exponential((per_head<T>(p.sinks, place) - reference) - log_total);
}

// 1 − Ps; 1 where it does not matter to what rows' dS and dSt sum to.
template <class T>
static METATTN_DEVICE T beside_sink(const Params& p, const Place& place, T reference, T log_total) {
  return is_difference(p) ? 1 - sink_probability(p, place, reference, log_total) : T{1};
}

// A warp finds out the statistics of its rows from `first` on; tell: and tells the column pass.
template <class S, class T>
static METATTN_DEVICE void find_statistics(const Params& p, const Place& place, const Statistics<T>& known, int warp_row,
                                           int64_t first, bool second, bool tell) {
  for (int r = 0; r < kWarpRows; ++r) {
    const int64_t i = first + r;
    RowLogSumExp<T> lse{kInfinity<T>, 0};
    T d = 0, tau = 0, dt = 0;
    if (i < place.s.n) {
      lse = known_lse<T>(p, place, i);
      if (lse.reference != kInfinity<T>) {
        d = row_dot<S, T>(p, p.o, p.o_lo, place, i);
        if (second) dt = row_dot<S, T>(p, p.o_t, p.o_t_lo, place, i);
        if (is_idle(p, place, lse.reference, lse.log_total)) {
          d = is_finite(d) ? d : 0;
          dt = is_finite(dt) ? dt : 0;
        }
        if (p.d_lse) d -= static_cast<T>(*double_at(p.d_lse, place.seq, place.head, place.s.q0 + i));
        if (second) tau = static_cast<T>(*double_at(p.lse_t, place.seq, place.head, place.s.q0 + i));
      }
    }
    if (first_lane() != 0) continue;
    const int at = warp_row + r;
    known.reference[at] = lse.reference;
    known.log_total[at] = lse.log_total;
    known.d[at] = d;
    known.tau[at] = tau;
    known.dt[at] = dt;
    if (i >= place.s.n || !tell) continue;
    *statistic_at<T>(p, kReference, place, i) = lse.reference;
    *statistic_at<T>(p, kLogTotal, place, i) = lse.log_total;
    *statistic_at<T>(p, kD, place, i) = d;
    *statistic_at<T>(p, kTau, place, i) = tau;
    *statistic_at<T>(p, kDt, place, i) = dt;
    if (p.needs & kNeedSinks) {
      const T weight = lse.reference == kInfinity<T> ? 0 : sink_probability(p, place, lse.reference, lse.log_total);
      const T moved = (p.t_sinks ? per_head<T>(p.t_sinks, place) : 0) - tau;
      *statistic_at<T>(p, kSinkShare, place, i) = second ? -weight * (moved * d + dt) : -weight * d;
    }
  }
}

// Begins to copy what a row pass told of rows [first, first + rows); rows that are not there attend to nothing.
template <class T>
static METATTN_DEVICE void start_statistics(Block& block, const Params& p, const Place& place, const Statistics<T>& known,
                                            int64_t first, int rows) {
  for (int r = block.worker(); r < rows; r += block.workers()) {
    const int64_t i = first + r;
    const bool there = i < place.s.n;
    const auto one = [&](T* to, Statistic field) {
      const void* from = there ? static_cast<const void*>(statistic_at<T>(p, field, place, i)) : p.statistics;
      block.template copy<sizeof(T)>(to, from, there);
    };
    if (there) one(known.reference + r, kReference);
    else known.reference[r] = kInfinity<T>;
    one(known.log_total + r, kLogTotal);
    one(known.d + r, kD);
    one(known.tau + r, kTau);
    one(known.dt + r, kDt);
  }
}

// Whether a row that this thread copied the statistics of is there and idle.
template <class T>
static METATTN_DEVICE bool met_idle(const Block& block, const Params& p, const Place& place, const Statistics<T>& known,
                                    int64_t first, int rows) {
  bool met = false;
  for (int r = block.worker(); r < rows; r += block.workers())
    met |= first + r < place.s.n && is_idle(p, place, known.reference[r], known.log_total[r]);
  return met;
}

// ---- scores ----

// Where a warp's fragment lies: its rows are queries, or, turned, keys.
template <bool Turned>
struct Window {
  const Params& p;
  const Place& place;
  int64_t row0, column0;  // of the sequence
  Reach reach;
  METATTN_DEVICE int64_t query(int r, int c) const { return Turned ? column0 + c : row0 + r; }
  METATTN_DEVICE int64_t key(int r, int c) const { return Turned ? row0 + r : column0 + c; }
};

// S from scale·QKᵀ: softcap, bias, ALiBi, and −inf where masked, which is selected, never added: it hides NaN. Rounded alike
// in all maps: a row's reference is one of its scores.
// bend receives tanh(R / c) where there is a softcap.
template <bool Full, bool Turned, class T, int Tiles>
static METATTN_DEVICE void finish_scores(const Window<Turned>& window, Fragment<T, Tiles>& s, Fragment<T, Tiles>& bend) {
  const Params& p = window.p;
  const Place& place = window.place;
  const T scale = static_cast<T>(p.scale), cap = static_cast<T>(p.softcap);
  const T slope = Full && p.slopes ? per_head<T>(p.slopes, place) : 0;
  const int64_t n = place.s.n, m = place.s.m;
  s.each([&](T& value, int r, int c, int slot, int t, int e) {
    const int64_t i = window.query(r, c), j = window.key(r, c), own = i + window.reach.offset;
    T x = product(value, scale);
    bool keep = i < n && j < m && j <= own + window.reach.ahead && j >= own - window.reach.back;
    if constexpr (Full) {
      if (p.softcap != 0) {
        const T u = hyperbolic_tangent(x / cap);
        bend.x[slot][t][e] = u;
        x = product(u, cap);
      }
      if (p.bias && keep) {
        const T bias = load<T>(p.bias, offset_of(p.bias, place.seq, place.head, i) + j * p.bias.stride[3]);
        keep = bias != -kInfinity<T>;
        x += bias;
      }
      if (p.slopes) x -= product(slope, static_cast<T>(alibi_distance(place.s, i, j)));
      if (p.mask && keep) keep = p.mask.data[offset_of(p.mask, place.seq, place.head, i) + j * p.mask.stride[3]] != 0;
    }
    value = keep ? x : -kInfinity<T>;
  });
}

// Which entries dropout keeps, a bit each; all where there is none.
template <int Tiles>
struct DropoutBits {
  static_assert(4 * Tiles <= 32);
  uint32_t bits[kSlots];
  METATTN_DEVICE bool at(int slot, int t, int e) const { return bits[slot] >> (4 * t + e) & 1; }
};

template <bool Full, bool Turned, int Tiles>
static METATTN_DEVICE DropoutBits<Tiles> dropout(const Window<Turned>& window) {
  DropoutBits<Tiles> kept;
  METATTN_EACH_LANE(slot, lane) kept.bits[slot] = 0xffffffffu;
  if constexpr (Full) {
    const Params& p = window.p;
    if (p.rng == nullptr) return kept;
    const int64_t* rng = p.rng + window.place.seq * p.rng_stride[0];
    const uint64_t seed = static_cast<uint64_t>(rng[0]);
    const uint32_t batch = static_cast<uint32_t>(rng[p.rng_stride[1]]);
    METATTN_EACH_LANE(slot, lane) {
      uint32_t bits = 0;
      for (int t = 0; t < Tiles; ++t) {
        PhiloxWords words{};
        for (int e = 0; e < 4; ++e) {
          const int r = row_of(lane, e), c = column_of(lane, t, e);
          const int64_t i = window.query(r, c), j = window.key(r, c);
          // unturned, two neighbours share a counter
          if (Turned || e % 2 == 0)
            words = philox(seed, static_cast<uint32_t>(j / 4), static_cast<uint32_t>(i),
                           static_cast<uint32_t>(window.place.head), batch);
          const uint32_t low = j % 2 != 0 ? words.w[1] : words.w[0], high = j % 2 != 0 ? words.w[3] : words.w[2];
          const uint32_t word = j % 4 >= 2 ? high : low;
          bits |= static_cast<uint32_t>(word >= p.dropout_threshold) << (4 * t + e);
        }
      }
      kept.bits[slot] = bits;
    }
  }
  return kept;
}

// β under a fragment; 0 where nothing is attended.
template <bool Turned, class T>
static METATTN_DEVICE T bias_tangent(const Window<Turned>& window, int r, int c) {
  const View& view = window.p.t_bias;
  return load<T>(view,
                 offset_of(view, window.place.seq, window.place.head, window.query(r, c)) + window.key(r, c) * view.stride[3]);
}

// ---- keys that nobody may see ----

// Zeroes the rows of tiles of keys that no query of the block attends to, where one holds an infinity or NaN: 0·NaN
// must not reach a sum. All threads of a block come here, or none.
template <class S, class T, int Tiles, int Count>
static METATTN_DEVICE void clear_unseen(Block& block, uint32_t* seen, const Fragment<T, Tiles>& s,
                                        const SharedTile<S> (&tiles)[Count]) {
  static_assert(8 * Tiles <= 64);
  for (int w = block.worker(); w < 2; w += block.workers()) seen[w] = 0;
  block.sync();
  METATTN_EACH_LANE(slot, lane)
    METATTN_UNROLL(int t = 0; t < Tiles; ++t)
      METATTN_UNROLL(int e = 0; e < 4; ++e)
        if (s.x[slot][t][e] != -kInfinity<T>) {
          const int c = column_of(lane, t, e);
          set_bits(seen + c / 32, uint32_t{1} << c % 32);
        }
  block.sync();
  for (int c = block.worker(); c < 8 * Tiles; c += block.workers()) {
    if (seen[c / 32] >> c % 32 & 1) continue;
    METATTN_UNROLL(int n = 0; n < Count; ++n)
      if (tiles[n])
        for (int f = 0; f < tiles[n].ld; ++f) tiles[n].row(c)[f] = narrowed<S>(T{0});
  }
  block.sync();
}

// ---- results ----

// Stores factor·acc of a warp's rows: columns [first, …) of rows row0 on, up to row `end`.
template <class S, class T, int Columns>
static METATTN_DEVICE void store_rows(const View& view, int64_t base, int64_t row0, int64_t end, int64_t first, int64_t width,
                                      T factor, Fragment<T, Columns>& acc) {
  if (!view) return;
  S* out = reinterpret_cast<S*>(view.data) + base;
  acc.each([&](T& value, int r, int c, int, int, int) {
    if (row0 + r < end && first + c < width)
      out[(row0 + r) * view.stride[2] + (first + c) * view.stride[3]] = narrowed<S>(value * factor);
  });
}

// The same, and what rounding lost.
template <class S, class T, int Columns>
static METATTN_DEVICE void store_rows_in_two(const View& high, const View& low, int64_t base, int64_t low_base, int64_t row0,
                                             int64_t end, int64_t first, int64_t width, Fragment<T, Columns>& acc) {
  S* out = reinterpret_cast<S*>(high.data) + base;
  BFloat16* lost = reinterpret_cast<BFloat16*>(low.data) + low_base;
  acc.each([&](T& value, int r, int c, int, int, int) {
    if (row0 + r >= end || first + c >= width) return;
    const S kept = narrowed<S>(value);
    out[(row0 + r) * high.stride[2] + (first + c) * high.stride[3]] = kept;
    if (sizeof(S) >= 4 || !low) return;
    // where float16 overflowed, low (bfloat16) is the value itself
    const T wide = widened<T>(kept);
    lost[(row0 + r) * low.stride[2] + (first + c) * low.stride[3]] = narrowed<BFloat16>(value - (is_finite(wide) ? wide : 0));
  });
}

}  // namespace metattn::cuda
