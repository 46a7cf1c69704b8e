// The two ways to walk an attention problem. A row sweep gives each unit rows and walks the keys (forward, jvp); a
// key sweep gives each unit keys and walks the rows (vjp, vjp_jvp), so that dK and dV have one owner and dQ is either
// that owner's too or one part a key chunk, summed in a fixed order afterwards. No sum depends on the thread count.
#pragma once

#include "registers.h"

namespace metattn::METATTN_ISA {

// The sequence whose unit it is: first_unit[seq] <= unit < first_unit[seq + 1].
static inline int64_t packed_sequence_of(const Params& p, int64_t unit) {
  int64_t seq = 0, past = p.batch;
  while (past - seq > 1) {
    const int64_t middle = seq + (past - seq) / 2;
    if (p.first_unit[middle] <= unit) seq = middle;
    else past = middle;
  }
  return seq;
}

// A Map of a row sweep offers:
//   pack(seq, kv_head, s, key0, keys, block)   packs one block of keys
//   begin(tile), visit(tile, block), end(tile) a block of rows, its non-empty tiles in order, its results; or end
//                                              asks for the tiles once more, by true
template <class T, class Map>
static void row_sweep(const Params& p, int64_t unit, Map& map) {
  int64_t seq, within;  // the unit's sequence, and its place among that's units
  if (p.first_unit == nullptr) {
    const int64_t units = (p.n + p.row_chunk - 1) / p.row_chunk * p.kv_heads;
    seq = unit / units;
    within = unit % units;
  } else {
    seq = packed_sequence_of(p, unit);
    within = unit - p.first_unit[seq];
  }
  const Sequence s = sequence(p, seq);
  const int64_t kv_head = within % p.kv_heads;
  const int64_t row_begin = within / p.kv_heads * p.row_chunk;
  const int64_t row_end = smaller(row_begin + p.row_chunk, s.n);
  const int64_t key_begin = attended_keys(p, s, row_begin).lo / kKeys * kKeys;
  const int64_t key_end = attended_keys(p, s, row_end - 1).hi;
  for (int64_t key0 = key_begin; key0 < key_end; key0 += kKeys)
    map.pack(seq, kv_head, s, key0, smaller(kKeys, s.m - key0), (key0 - key_begin) / kKeys);
  const int64_t group = p.heads / p.kv_heads, rows = rows_at_once(p);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t row0 = row_begin; row0 < row_end; row0 += rows) {
      Tile tile{seq, head, kv_head, s, row0, smaller(rows, row_end - row0), 0, 0, 0, false};
      map.begin(tile);
      const int64_t lo = attended_keys(p, s, row0).lo, hi = attended_keys(p, s, row0 + tile.rows - 1).hi;
      do {
        for (int64_t key0 = lo / kKeys * kKeys; key0 < hi; key0 += kKeys) {
          place_keys<T>(p, tile, key0, s.m);
          map.visit(tile, (key0 - key_begin) / kKeys);
        }
      } while (map.end(tile));
    }
  }
}

// Most key blocks that a unit of a sweep packs.
static inline int64_t row_sweep_blocks(const Params& p) { return (p.m + kKeys - 1) / kKeys; }
static inline int64_t key_sweep_blocks(const Params& p) { return (p.key_chunk + kKeys - 1) / kKeys; }

// A Map of a key sweep offers pack as above, rows_of_tile, and
//   begin_keys(keys), end_keys(seq, kv_head, s, key0, keys)   accumulators of dK and dV; their results
//   begin(tile), visit(tile, block), end(tile, chunk)           a block of rows; end also when no tile was visited
template <class T, class Map>
static void key_sweep(const Params& p, int64_t unit, Map& map) {
  const int64_t chunk = unit % p.key_chunks, owner = unit / p.key_chunks;
  const int64_t owned_heads = p.all_heads ? 1 : p.kv_heads;
  const int64_t seq_begin = p.all_batches ? 0 : owner / owned_heads;
  const int64_t seq_end = p.all_batches ? p.batch : seq_begin + 1;
  const int64_t kv_begin = p.all_heads ? 0 : owner % owned_heads;
  const int64_t kv_end = p.all_heads ? p.kv_heads : kv_begin + 1;
  const int64_t group = p.heads / p.kv_heads, rows = map.rows_of_tile;
  for (int64_t seq = seq_begin; seq < seq_end; ++seq) {
    const Sequence s = sequence(p, seq);
    const int64_t chunk_begin = chunk * p.key_chunk, chunk_end = smaller(chunk_begin + p.key_chunk, s.m);
    if (chunk > 0 && chunk_begin >= s.m) continue;  // chunk 0 goes on: it must write dQ of a sequence without keys
    const int64_t blocks = larger(0, chunk_end - chunk_begin + kKeys - 1) / kKeys;
    for (int64_t kv_head = kv_begin; kv_head < kv_end; ++kv_head) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t key0 = chunk_begin + block * kKeys;
        map.pack(seq, kv_head, s, key0, smaller(kKeys, chunk_end - key0), block);
      }
      map.begin_keys(larger(0, chunk_end - chunk_begin));
      for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
        for (int64_t row0 = 0; row0 < s.n; row0 += rows) {
          Tile tile{seq, head, kv_head, s, row0, smaller(rows, s.n - row0), 0, 0, 0, false};
          const int64_t first = larger(0, attended_keys(p, s, row0).lo - chunk_begin);
          const int64_t lo = chunk_begin + first / kKeys * kKeys;  // blocks are counted from the chunk's begin
          const int64_t hi = smaller(attended_keys(p, s, row0 + tile.rows - 1).hi, chunk_end);
          if (lo < hi) map.begin(tile);
          for (int64_t key0 = lo; key0 < hi; key0 += kKeys) {
            place_keys<T>(p, tile, key0, chunk_end);
            map.visit(tile, (key0 - chunk_begin) / kKeys);
          }
          map.end(tile, chunk, lo < hi);
        }
      }
      map.end_keys(seq, kv_head, s, chunk_begin, chunk_end - chunk_begin);
    }
  }
}

// What both key sweeps accumulate: dK, dV of the unit's keys, dQ of a row block, and the bias gradient.
template <class A>
struct KeySweepResults {
  using T = Compute<A>;
  const Params& p;
  bool want_q, want_k, want_v, want_bias;
  WeightedSums<A> sums;
  KeySums<A> grad_k, grad_v;
  CommonKeys<A> common_k, common_b;  // of the keys and their tangents
  T* grad_q;  // [kRows][padded(d)]
  T* rows;    // [kLanes][padded(d) or padded(dv)]
  int64_t wide_d;

  KeySweepResults(const Params& params, Arena& arena)
      : p(params),
        want_q(params.needs & kNeedQ),
        want_k(params.needs & kNeedK),
        want_v(params.needs & kNeedV),
        want_bias(params.needs & kNeedBias),
        sums(WeightedSums<A>::take(arena, params)),
        grad_k(KeySums<A>::take(arena, want_k, key_sweep_blocks(params), params.d)),
        grad_v(KeySums<A>::take(arena, want_v, key_sweep_blocks(params), params.dv)),
        common_k(CommonKeys<A>::take(arena, want_q, params.k, params.d)),
        common_b(CommonKeys<A>::take(arena, want_q, params.t_k, params.d)),
        wide_d(padded<T>(params.d)) {
    grad_q = want_q ? arena.take<T>(kRows * wide_d) : nullptr;
    rows = arena.take<T>(kLanes<T> * larger(padded<T>(p.d), padded<T>(p.dv)));
  }

  void begin_keys(int64_t keys) {
    if (want_k) grad_k.clear(keys);
    if (want_v) grad_v.clear(keys);
  }
  void begin_rows(const Tile& tile, const bool* dead, T* row) {
    if (!want_q) return;
    memset(grad_q, 0, sizeof(T) * tile.rows * wide_d);
    common_k.begin(p, p.k, tile, dead, row);
    common_b.begin(p, p.t_k, tile, dead, row);
  }
  void add_q(const Tile& tile, const T* d_scores, const WeightedSums<A>& by, const PackedKeys<A>& keys, int64_t block,
             const CommonKeys<A>& common) {
    if (want_q) by.over_keys(tile, d_scores, keys, block, grad_q, common.lacking);
  }
  void add_k(const Tile& tile, const T* d_scores, const WeightedSums<A>& by, const PackedRows<A>& rows, int64_t block) {
    if (want_k) grad_k.add(tile, d_scores, by, rows, block, true);
  }
  void add_v(const Tile& tile, const T* weights, const PackedRows<A>& d_o, int64_t block) {
    if (want_v) grad_v.add(tile, weights, sums, d_o, block, false);
  }
  void add_bias(const Tile& tile, int64_t r, const T* d_scores) {
    const int64_t stride = p.grad_bias_stride[4];
    T* target = reinterpret_cast<T*>(p.grad_bias) + tile.key0 / p.key_chunk * p.grad_bias_stride[0] +
                tile.seq * p.grad_bias_stride[1] + tile.head * p.grad_bias_stride[2] +
                (tile.row0 + r) * p.grad_bias_stride[3] + tile.key0 * stride;
    if (stride == 0) {
      T total = 0;
      for (int64_t j = 0; j < tile.keys; ++j) total += d_scores[j];
      *target += total;
    } else {
      for (int64_t j = 0; j < tile.keys; ++j) target[j * stride] += d_scores[j];
    }
  }
  // known_k, known_b [kRows]: what the weights of k and its tangent sum to over all keys; null: what they lack was found.
  void end_rows(const Tile& tile, int64_t chunk, bool visited, const T* known_k, const T* known_b) {
    if (!want_q) return;
    if (!visited) memset(grad_q, 0, sizeof(T) * tile.rows * wide_d);
    sums.finish_over_keys(grad_q, tile.rows, p.d);
    if (visited) {
      // of all chunks that of the first key adds them
      const bool first = chunk == attended_keys(p, tile.s, tile.row0).lo / p.key_chunk;
      common_k.finish(tile.rows, first ? known_k : nullptr, grad_q);
      common_b.finish(tile.rows, first ? known_b : nullptr, grad_q);
    }
    const int64_t first = tile.s.q0 + tile.row0;
    if (p.grad_q_parts == nullptr) {
      store_rows(p.grad_q, offset_of(p.grad_q, tile.seq, tile.head, first), tile.rows, p.d, static_cast<T>(p.scale), grad_q,
                 wide_d);
    } else {
      for (int64_t r = 0; r < tile.rows; ++r) {
        T* part = reinterpret_cast<T*>(p.grad_q_parts) + chunk * p.grad_q_parts_stride[0] +
                  tile.seq * p.grad_q_parts_stride[1] + tile.head * p.grad_q_parts_stride[2] +
                  (first + r) * p.grad_q_parts_stride[3];
        memcpy(part, grad_q + r * wide_d, sizeof(T) * p.d);
      }
    }
  }
  void end_keys(int64_t seq, int64_t kv_head, const Sequence& s, int64_t key0, int64_t keys) {
    if (want_k) store_keys(p.grad_k, grad_k, static_cast<T>(p.scale), seq, kv_head, s.k0 + key0, keys);
    if (want_v) store_keys(p.grad_v, grad_v, T{1}, seq, kv_head, s.k0 + key0, keys);
  }
  void store_keys(const View& view, const KeySums<A>& sums, T factor, int64_t seq, int64_t kv_head, int64_t at,
                  int64_t keys) {
    for (int64_t first = 0; first < keys; first += kLanes<T>) {
      const T* found = sums.of_keys(first, rows);
      store_rows(view, offset_of(view, seq, kv_head, at + first), smaller(kLanes<T>, keys - first), sums.width, factor, found,
                 sums.wide);
    }
  }
};

// A key sweep that makes gradients: what it packs, its tiles and statistics of rows.
template <class A>
struct GradientSweep {
  using T = Compute<A>;
  const Params& p;
  const Exponents<T> exponents;
  Scope<A> scope;
  Arena arena;
  KeySweepResults<A> results;
  const int64_t rows_of_tile;
  const bool in_registers;
  const bool gains;  // dP is wanted: there is a dO, and somebody needs dS
  T* row;
  PackedRows<A> q, d_o;
  PackedKeys<A> k, v;
  T *s, *tanh_tile, *z, *d_p;  // tiles
  T* scratch_row;
  LogSumExp<T> lse;
  T D[kRows];
  T sums_of_ds[kRows];  // where weights are rounded: what dS sums to over the keys

  // sums_values: products sum over the keys of v too. A tile has up to `rows`;
  // `tiles` are kept at a time, one after the other in memory.
  GradientSweep(const Params& params, char* scratch, bool sums_values, int64_t rows, int64_t tiles)
      : p(params),
        exponents(params),
        arena{scratch},
        results(params, arena),
        rows_of_tile(rows),
        in_registers(fits_registers<A>(params, exponents)),
        gains((results.want_q || results.want_k || results.want_bias) && params.d_o) {
    const int64_t blocks = key_sweep_blocks(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, results.want_k);
    d_o = PackedRows<A>::take(arena, p.d_o, p.dv, results.want_v);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, results.want_q, true);
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, sums_values, gains);
    const int64_t elements = tiles * rows * kKeys;
    s = arena.take<T>(elements);
    tanh_tile = p.softcap != 0 ? arena.take<T>(elements) : nullptr;
    z = p.rng != nullptr ? arena.take<T>(elements) : nullptr;
    d_p = arena.take<T>(elements);
    scratch_row = arena.take<T>(padded<T>(p.dv));
  }

  void begin_keys(int64_t keys) { results.begin_keys(keys); }
  void end_keys(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys) {
    results.end_keys(seq, kv_head, at, key0, keys);
  }
  void begin(const Tile& tile) {
    lse.load(p, exponents, tile);
    q.pack(p, p.q, tile, lse.dead, row);
    if (d_o) d_o.pack(p, p.d_o, tile, lse.dead, row);
    row_dots(p.o, p.o_lo, p.d_lse, tile, d_o, lse.dead, p.dv, row, scratch_row, D);
    if constexpr (WeightedSums<A>::kRounds) find_sums(tile);
    results.begin_rows(tile, lse.dead, row);
  }
  // Σ dS = Σ P∘dP − D·Σ P, with Σ P∘dP = D + dL, and Σ P = 1 − Ps.
  void find_sums(const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      sums_of_ds[r] = 0;
      if (lse.dead[r]) continue;
      if (p.d_lse)
        sums_of_ds[r] = static_cast<T>(*double_at(p.d_lse, tile.seq, tile.head, tile.s.q0 + tile.row0 + r));
      if (p.sinks) sums_of_ds[r] += D[r] * sink_probability(tile, r);
    }
  }
  T sink_probability(const Tile& tile, int64_t r) const {
    return lse.probability_of(r, load_scalar<T>(p.sinks, offset_of(p.sinks, tile.seq, tile.head, 0)));
  }
  // What end_rows is told of weights that `by` multiplies and that sum to these.
  static const T* known(const WeightedSums<A>& by, const T* sums) { return by.knows_sums() ? sums : nullptr; }

  // s = scores, d_p = dO Vᵀ, z.
  void multiply(const Tile& tile, int64_t block) {
    scores(p, exponents, tile, q, k, block, s, tanh_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    if (gains) multiply_scores(tile, d_o, v, block, d_p, false);
  }
  // s = P in a row.
  void probabilities(const Tile& tile, int64_t r) { lse.probabilities(exponents, tile.cols, r, s + r * kKeys); }

  // P of rows [r, r + Rows), of the keys from column j on.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void probabilities_of(const Tile& tile, int64_t block, int64_t r, int64_t j,
                                               Scores<T, Rows, Vectors>& x) const {
    x = {};
    multiply_into(x, q, r, k, block, j);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      hide_keys<T>(p, tile, r + i, j, x.at[i]);
      lse.probabilities(exponents, r + i, x.at[i]);
    }
  }

  // Vectors from column j on of the row that begins at `at`.
  Vec<T> kept(int64_t at, int64_t j) const { return z != nullptr ? load(z + at + j) : splat<T>(1); }
  Vec<T> d_p_kept(int64_t at, int64_t j) const { return gains ? load(d_p + at + j) * kept(at, j) : Vec<T>{}; }
};

// The kernels of a map that walks by `sweep`, for each arithmetic. The ISAs with bfloat16 products have those alone.
#define METATTN_MAP_KERNEL(Map, sweep, A)                                           \
  {[](const Params& p) { return Map<A>(p, nullptr).arena.used; },                   \
   [](const Params& p, char* scratch, int64_t (*next)(void*), void* walk) {         \
     Map<A> map(p, scratch);                                                        \
     for (int64_t unit; (unit = next(walk)) >= 0;) sweep<Compute<A>>(p, unit, map); \
   }}
#ifdef METATTN_PAIRS
#define METATTN_MAP_KERNELS(Map, sweep) {{}, {}, METATTN_MAP_KERNEL(Map, sweep, Pairs)}
#else
#define METATTN_MAP_KERNELS(Map, sweep) {METATTN_MAP_KERNEL(Map, sweep, float), METATTN_MAP_KERNEL(Map, sweep, double), {}}
#endif

}  // namespace metattn::METATTN_ISA
