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
//   begin(tile), visit(tile, block)            a block of rows, its non-empty tiles in order
//   end(tile, split)                           its results, or its sums over a split of the keys; or it asks for the
//                                              tiles once more, by true
//   keep(tile, slot), resume(tile, slot),      where keys come by spans: what is known of a block of rows put aside; an
//   settle(tile, slot), is_done, set_done       empty sum begun beside it; the two added; whether its results are out
struct RowUnit {
  int64_t seq, kv_head;
  Sequence s;
  int64_t head_begin, head_end, row_begin, row_end;
  int64_t key_begin, key_end;  // those that its rows see
  int64_t split;
};

static inline RowUnit row_unit(const Params& p, int64_t index) {
  const int64_t split = index % p.key_splits, unit = index / p.key_splits;
  const int64_t group = p.heads / p.kv_heads;
  const int64_t head_parts = (group + p.head_chunk - 1) / p.head_chunk, owners = p.kv_heads * head_parts;
  int64_t seq, within;  // the unit's sequence, and its place among that's units
  if (p.first_unit == nullptr) {
    const int64_t units = (p.n + p.row_chunk - 1) / p.row_chunk * owners;
    seq = unit / units;
    within = unit % units;
  } else {
    seq = packed_sequence_of(p, unit);
    within = unit - p.first_unit[seq];
  }
  const Sequence s = sequence(p, seq);
  const int64_t kv_head = within % owners / head_parts, part = within % head_parts;
  const int64_t row_begin = within / owners * p.row_chunk, row_end = smaller(row_begin + p.row_chunk, s.n);
  return {seq,
          kv_head,
          s,
          kv_head * group + part * p.head_chunk,
          kv_head * group + smaller((part + 1) * p.head_chunk, group),
          row_begin,
          row_end,
          attended_keys(p, s, row_begin).lo / kKeys * kKeys,
          attended_keys(p, s, row_end - 1).hi,
          split};
}

// body(tile, slot) for every block of rows of a unit.
template <class Body>
static inline void for_each_block_of_rows(const Params& p, const RowUnit& unit, const Body& body) {
  const int64_t rows = rows_at_once(p);
  int64_t slot = 0;
  for (int64_t head = unit.head_begin; head < unit.head_end; ++head)
    for (int64_t row0 = unit.row_begin; row0 < unit.row_end; row0 += rows) {
      Tile tile{unit.seq, head, unit.kv_head, unit.s, row0, smaller(rows, unit.row_end - row0), 0, 0, 0, false};
      body(tile, slot++);
    }
}

// Packs keys [begin, end), and visits those of them that a block of rows sees: all blocks are counted from `begin`.
template <class Map>
static inline void pack_keys(const RowUnit& unit, int64_t begin, int64_t end, Map& map) {
  for (int64_t key0 = begin; key0 < end; key0 += kKeys)
    map.pack(unit.seq, unit.kv_head, unit.s, key0, smaller(kKeys, unit.s.m - key0), (key0 - begin) / kKeys);
}
static inline Range seen_keys(const Params& p, const Tile& tile, int64_t begin, int64_t end) {
  const int64_t lo = attended_keys(p, tile.s, tile.row0).lo / kKeys * kKeys;
  return {larger(lo, begin), smaller(attended_keys(p, tile.s, tile.row0 + tile.rows - 1).hi, end)};
}
template <class T, class Map>
static inline void visit_keys(const Params& p, Tile& tile, const Range& range, int64_t begin, Map& map) {
  for (int64_t key0 = range.lo; key0 < range.hi; key0 += kKeys) {
    place_keys<T>(p, tile, key0, tile.s.m);
    map.visit(tile, (key0 - begin) / kKeys);
  }
}

template <class T, class Map>
static void row_sweep(const Params& p, int64_t index, Map& map) {
  RowUnit unit = row_unit(p, index);
  if (p.key_splits > 1) {
    const int64_t spans = larger(0, unit.key_end - unit.key_begin + kSpan - 1) / kSpan, first = unit.key_begin;
    unit.key_begin = first + unit.split * spans / p.key_splits * kSpan;
    unit.key_end = smaller(unit.key_end, first + (unit.split + 1) * spans / p.key_splits * kSpan);
  }
  const int64_t begin = unit.key_begin;
  if (unit.key_end - begin <= kSpan) {
    pack_keys(unit, begin, unit.key_end, map);
    for_each_block_of_rows(p, unit, [&](Tile& tile, int64_t) {
      map.begin(tile);
      do visit_keys<T>(p, tile, seen_keys(p, tile, begin, unit.key_end), begin, map);
      while (map.end(tile, unit.split));
    });
    return;
  }
  bool more = true;
  for (bool first_walk = true; more; first_walk = false) {
    for (int64_t span = begin; span < unit.key_end; span += kSpan) {
      const int64_t span_end = smaller(span + kSpan, unit.key_end);
      const bool first = first_walk && span == begin;
      pack_keys(unit, span, span_end, map);
      for_each_block_of_rows(p, unit, [&](Tile& tile, int64_t slot) {
        const Range seen = seen_keys(p, tile, span, span_end);
        if (first) {
          map.set_done(slot, false);
          map.begin(tile);
        } else if (seen.lo < seen.hi && !map.is_done(slot)) {
          map.resume(tile, slot);
        } else {
          return;
        }
        visit_keys<T>(p, tile, seen, span, map);
        if (!first) map.settle(tile, slot);
        map.keep(tile, slot);
      });
    }
    more = false;
    for_each_block_of_rows(p, unit, [&](Tile& tile, int64_t slot) {
      if (map.is_done(slot)) return;
      map.resume(tile, slot);
      map.settle(tile, slot);
      const bool again = map.end(tile, unit.split);
      map.keep(tile, slot);
      map.set_done(slot, !again);
      more |= again;
    });
  }
}

// Most key blocks that a unit of a sweep packs, and blocks of rows that a row sweep keeps.
static inline int64_t row_sweep_blocks(const Params& p) { return (smaller(p.m, kSpan) + kKeys - 1) / kKeys; }
static inline int64_t row_sweep_slots(const Params& p) {
  const int64_t rows = rows_at_once(p);
  return p.m > kSpan ? p.head_chunk * ((smaller(p.row_chunk, p.n) + rows - 1) / rows) : 0;
}
static inline int64_t key_sweep_blocks(const Params& p) { return (smaller(p.key_chunk, kSpan) + kKeys - 1) / kKeys; }

// A Map of a key sweep offers pack as above, rows_of_tile, and
//   begin_keys(span), end_keys(span)            accumulators of dK and dV; their results
//   begin(tile), visit(tile, block)             a block of rows
//   end(tile, span, visited)                    its results; also when no tile was visited
struct KeySpan {
  int64_t seq, kv_head;
  Sequence s;
  int64_t chunk, row_part;   // of the unit
  int64_t key0, keys;
  bool first;                // of its chunk
};

template <class T, class Map>
static void sweep_span(const Params& p, const KeySpan& span, Map& map) {
  const Sequence& s = span.s;
  const int64_t end = span.key0 + span.keys, group = p.heads / p.kv_heads, rows = map.rows_of_tile;
  for (int64_t key0 = span.key0; key0 < end; key0 += kKeys)
    map.pack(span.seq, span.kv_head, s, key0, smaller(kKeys, end - key0), (key0 - span.key0) / kKeys);
  map.begin_keys(span);
  // a part of the blocks of rows of all heads, or all
  const int64_t blocks = (s.n + rows - 1) / rows, total = group * blocks;
  const bool cut = !p.all_batches && !p.all_heads;
  const int64_t from = cut ? span.row_part * total / p.row_parts : 0;
  const int64_t past = cut ? (span.row_part + 1) * total / p.row_parts : total;
  for (int64_t at = from; at < past; ++at) {
    const int64_t row0 = at % blocks * rows;
    Tile tile{span.seq, span.kv_head * group + at / blocks, span.kv_head, s, row0, smaller(rows, s.n - row0), 0, 0, 0, false};
    const int64_t first = larger(0, attended_keys(p, s, row0).lo - span.key0);
    const int64_t lo = span.key0 + first / kKeys * kKeys;  // blocks are counted from the span's begin
    const int64_t hi = smaller(attended_keys(p, s, row0 + tile.rows - 1).hi, end);
    if (lo < hi) map.begin(tile);
    for (int64_t key0 = lo; key0 < hi; key0 += kKeys) {
      place_keys<T>(p, tile, key0, end);
      map.visit(tile, (key0 - span.key0) / kKeys);
    }
    map.end(tile, span, lo < hi);
  }
  map.end_keys(span);
}

template <class T, class Map>
static void key_sweep(const Params& p, int64_t unit, Map& map) {
  const int64_t row_part = unit % p.row_parts, chunk = unit / p.row_parts % p.key_chunks;
  const int64_t owner = unit / p.row_parts / p.key_chunks;
  const int64_t owned_heads = p.all_heads ? 1 : p.kv_heads;
  const int64_t seq_begin = p.all_batches ? 0 : owner / owned_heads;
  const int64_t seq_end = p.all_batches ? p.batch : seq_begin + 1;
  const int64_t kv_begin = p.all_heads ? 0 : owner % owned_heads;
  const int64_t kv_end = p.all_heads ? p.kv_heads : kv_begin + 1;
  const int64_t pairs = (seq_end - seq_begin) * (kv_end - kv_begin);
  int64_t pair = -1;
  for (int64_t seq = seq_begin; seq < seq_end; ++seq) {
    const Sequence s = sequence(p, seq);
    const int64_t chunk_begin = chunk * p.key_chunk, chunk_end = smaller(chunk_begin + p.key_chunk, s.m);
    for (int64_t kv_head = kv_begin; kv_head < kv_end; ++kv_head) {
      ++pair;
      if (chunk > 0 && chunk_begin >= s.m) continue;  // chunk 0 goes on: it must write dQ of a sequence without keys
      if ((p.all_batches || p.all_heads) && pair * p.row_parts / pairs != row_part) continue;
      int64_t key0 = chunk_begin;
      do {
        const int64_t keys = larger(0, smaller(kSpan, chunk_end - key0));
        sweep_span<T>(p, {seq, kv_head, s, chunk, row_part, key0, keys, key0 == chunk_begin}, map);
        key0 += keys;
      } while (key0 < chunk_end);
    }
  }
}

// What both key sweeps accumulate: dK, dV of the unit's keys, dQ of a row block, and the gradients of bias and slopes.
template <class A>
struct KeySweepResults {
  using T = Compute<A>;
  const Params& p;
  bool want_q, want_k, want_v, want_bias, want_slopes;
  bool want_scores;  // gradients are sums of entries of dS
  WeightedSums<A> sums;
  KeySums<A> grad_k, grad_v;
  CommonKeys<A> common_k, common_b;  // of the keys and their tangents
  T* grad_q;  // [kRows][padded(d)]
  T* rows;    // [kLanes][padded(d) or padded(dv)]
  int64_t wide_d;
  int64_t row_part = 0;
  int64_t nearest[kRows];  // distance of each row, around which it is summed

  // Terms of a sum over rows.
  static int64_t rows_of_sums(const Params& p) { return p.heads / larger(1, p.kv_heads) * p.n; }

  KeySweepResults(const Params& params, Arena& arena)
      : p(params),
        want_q(params.needs & kNeedQ),
        want_k(params.needs & kNeedK),
        want_v(params.needs & kNeedV),
        want_bias(params.needs & kNeedBias),
        want_slopes(params.needs & kNeedSlopes),
        want_scores(want_bias || want_slopes),
        sums(WeightedSums<A>::take(arena, params)),
        grad_k(KeySums<A>::take(arena, want_k, key_sweep_blocks(params), params.d, rows_of_sums(params))),
        grad_v(KeySums<A>::take(arena, want_v, key_sweep_blocks(params), params.dv, rows_of_sums(params))),
        common_k(CommonKeys<A>::take(arena, want_q, params.k, params.d)),
        common_b(CommonKeys<A>::take(arena, want_q, params.t_k, params.d)),
        wide_d(padded<T>(params.d)) {
    grad_q = want_q ? arena.take<T>(kRows * wide_d) : nullptr;
    rows = arena.take<T>(kLanes<T> * larger(padded<T>(p.d), padded<T>(p.dv)));
  }

  void begin_keys(const KeySpan& span) {
    row_part = span.row_part;
    if (want_k) grad_k.clear(span.keys);
    if (want_v) grad_v.clear(span.keys);
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
  // A row of dS.
  void add_scores(const Tile& tile, int64_t r, const T* d_scores) {
    if (want_bias && p.bias_in_double) add_bias_to<double>(tile, r, d_scores);
    else if (want_bias) add_bias_to<T>(tile, r, d_scores);
    if (want_slopes) add_slopes(tile, r, d_scores);
  }
  void add_slopes(const Tile& tile, int64_t r, const T* d_scores) {
    double total = 0;
    for (int64_t j = 0; j < tile.keys; ++j)
      total += static_cast<double>(d_scores[j]) *
               static_cast<double>(alibi_distance(tile.s, tile.row0 + r, tile.key0 + j) - nearest[r]);
    *slope_sum(tile, tile.key0 / p.key_chunk) += total;
  }
  double* slope_sum(const Tile& tile, int64_t chunk) const {
    return p.slope_sums + ((chunk * p.row_parts + row_part) * p.batch + tile.seq) * p.heads + tile.head;
  }
  template <class Sum>
  void add_bias_to(const Tile& tile, int64_t r, const T* d_scores) {
    const int64_t stride = p.grad_bias_stride[4];
    Sum* target = reinterpret_cast<Sum*>(p.grad_bias) + tile.key0 / p.key_chunk * p.grad_bias_stride[0] +
                  row_part * p.grad_bias_part_stride + tile.seq * p.grad_bias_stride[1] + tile.head * p.grad_bias_stride[2] +
                  (tile.row0 + r) * p.grad_bias_stride[3] + tile.key0 * stride;
    if (stride == 0) {
      Sum total = 0;
      for (int64_t j = 0; j < tile.keys; ++j) total += static_cast<Sum>(d_scores[j]);
      *target += total;
    } else {
      for (int64_t j = 0; j < tile.keys; ++j) target[j * stride] += static_cast<Sum>(d_scores[j]);
    }
  }
  // known_k, known_b [kRows]: what the weights of k and its tangent sum to over all keys; null: what they lack was found.
  // scores [kRows]: what dS, or dSt, sums to; null: to 0.
  void end_rows(const Tile& tile, const KeySpan& span, bool visited, const T* known_k, const T* known_b, const T* scores) {
    if (want_k) grad_k.gained(tile.rows, span.keys);
    if (want_v) grad_v.gained(tile.rows, span.keys);
    // of all spans that of the first key adds what is known of a row
    const int64_t first = attended_keys(p, tile.s, tile.row0).lo;
    const bool adds = visited && first >= span.key0 && first < span.key0 + span.keys;
    if (want_slopes && adds && scores != nullptr)
      for (int64_t r = 0; r < tile.rows; ++r)
        if (nearest[r] != 0) *slope_sum(tile, span.chunk) += static_cast<double>(scores[r]) * static_cast<double>(nearest[r]);
    if (!want_q || (!visited && !span.first)) return;
    if (!visited) memset(grad_q, 0, sizeof(T) * tile.rows * wide_d);
    sums.finish_over_keys(grad_q, tile.rows, p.d);
    if (visited) {
      common_k.finish(tile.rows, known_k, adds, grad_q);
      common_b.finish(tile.rows, known_b, adds, grad_q);
    }
    const int64_t at = tile.s.q0 + tile.row0;
    if (p.grad_q_parts == nullptr) {
      const int64_t offset = offset_of(p.grad_q, tile.seq, tile.head, at);
      if (span.first) store_rows(p.grad_q, offset, tile.rows, p.d, static_cast<T>(p.scale), grad_q, wide_d);
      else add_rows(p.grad_q, offset, tile.rows, p.d, static_cast<T>(p.scale), grad_q, wide_d, rows);
      return;
    }
    T* part = reinterpret_cast<T*>(p.grad_q_parts) + span.chunk * p.grad_q_parts_stride[0] +
              tile.seq * p.grad_q_parts_stride[1] + tile.head * p.grad_q_parts_stride[2] + at * p.grad_q_parts_stride[3];
    for (int64_t r = 0; r < tile.rows; ++r, part += p.grad_q_parts_stride[3]) {
      const T* found = grad_q + r * wide_d;
      if (span.first) memcpy(part, found, sizeof(T) * p.d);
      else
        for (int64_t c = 0; c < p.d; ++c) part[c] += found[c];
    }
  }
  void end_keys(const KeySpan& span) {
    if (want_k) store_keys(p.grad_k, p.grad_k_parts, grad_k, static_cast<T>(p.scale), span);
    if (want_v) store_keys(p.grad_v, p.grad_v_parts, grad_v, T{1}, span);
  }
  void store_keys(const View& view, char* parts, KeySums<A>& sums, T factor, const KeySpan& span) {
    sums.finish(span.keys);
    const int64_t at = span.s.k0 + span.key0;
    T* part = reinterpret_cast<T*>(parts);
    if (parts != nullptr)
      part += sums.width *
              (at + p.key_rows *
                        (span.kv_head + p.kv_heads * (p.cu_k == nullptr ? span.row_part * p.batch + span.seq : span.row_part)));
    for (int64_t first = 0; first < span.keys; first += kLanes<T>) {
      const T* found = sums.of_keys(first, rows);
      const int64_t count = smaller(kLanes<T>, span.keys - first);
      if (parts == nullptr) {
        store_rows(view, offset_of(view, span.seq, span.kv_head, at + first), count, sums.width, factor, found, sums.wide);
      } else {
        for (int64_t key = 0; key < count; ++key, part += sums.width)
          memcpy(part, found + key * sums.wide, sizeof(T) * sums.width);
      }
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
  T *s, *bend_tile, *z, *d_p;  // tiles
  T* scratch_row;
  LogSumExp<T> lse;
  T D[kRows];
  T sums_of_ds[kRows];  // what dS sums to over the keys, where somebody asks

  // sums_values: products sum over the keys of v too. A tile has up to `rows`;
  // `tiles` are kept at a time, one after the other in memory.
  GradientSweep(const Params& params, char* scratch, bool sums_values, int64_t rows, int64_t tiles)
      : p(params),
        exponents(params),
        arena{scratch},
        results(params, arena),
        rows_of_tile(rows),
        in_registers(fits_registers<A>(params, exponents)),
        gains((results.want_q || results.want_k || results.want_scores) && params.d_o) {
    const int64_t blocks = key_sweep_blocks(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<A>::take(arena, p.q, p.d, results.want_k);
    d_o = PackedRows<A>::take(arena, p.d_o, p.dv, results.want_v);
    k = PackedKeys<A>::take(arena, p.k, p.d, blocks, results.want_q, true);
    v = PackedKeys<A>::take(arena, p.v, p.dv, blocks, sums_values, gains);
    const int64_t elements = tiles * rows * kKeys;
    s = arena.take<T>(elements);
    bend_tile = take_bends<T>(arena, p, elements);
    z = take_dropout<T>(arena, p, elements);
    d_p = arena.take<T>(elements);
    scratch_row = arena.take<T>(padded<T>(p.dv));
  }

  void begin_keys(const KeySpan& span) { results.begin_keys(span); }
  void end_keys(const KeySpan& span) { results.end_keys(span); }
  void begin(const Tile& tile) {
    lse.load(p, exponents, tile);
    q.pack(p, p.q, tile, lse.dead, row);
    if (d_o) d_o.pack(p, p.d_o, tile, lse.dead, row);
    row_dots(p.o, p.o_lo, p.d_lse, tile, d_o, lse.dead, p.dv, row, scratch_row, D);
    if (asks_sums()) find_sums(tile);
    for (int64_t r = 0; results.want_slopes && r < tile.rows; ++r)
      results.nearest[r] = beside_sink(tile, r) < kLeastFar ? 0 : nearest_distance(p, tile.s, tile.row0 + r);
    results.begin_rows(tile, lse.dead, row);
  }
  bool asks_sums() const { return WeightedSums<A>::kRounds || results.want_slopes; }
  // Σ dS = Σ P∘dP − D·Σ P, with Σ P∘dP = D + dL, and Σ P = 1 − Ps.
  void find_sums(const Tile& tile) {
    memset(sums_of_ds, 0, sizeof(T) * tile.rows);
    for (int64_t r = 0; (p.d_lse || p.sinks) && r < tile.rows; ++r) {
      if (lse.dead[r]) continue;
      if (p.d_lse) sums_of_ds[r] = static_cast<T>(*double_at(p.d_lse, tile.seq, tile.head, tile.s.q0 + tile.row0 + r));
      if (p.sinks) sums_of_ds[r] += D[r] * sink_probability(tile, r);
      if (!(beside_sink(tile, r) > kLeastKnown)) sums_of_ds[r] = kUnknown;
    }
  }
  static constexpr T kUnknown = static_cast<T>(__builtin_nan(""));
  // 1 − Ps; 1 where it does not matter to what dS and dSt sum to.
  double beside_sink(const Tile& tile, int64_t r) const {
    return is_difference(p) && !lse.dead[r] ? 1 - static_cast<double>(sink_probability(tile, r)) : 1;
  }
  T sink_probability(const Tile& tile, int64_t r) const {
    return lse.probability_of(r, load_scalar<T>(p.sinks, offset_of(p.sinks, tile.seq, tile.head, 0)));
  }
  // What end_rows is told of weights that `by` multiplies and that sum to these.
  static const T* known(const WeightedSums<A>& by, const T* sums) { return by.knows_sums() ? sums : nullptr; }

  // s = scores, d_p = dO Vᵀ, z.
  void multiply(const Tile& tile, int64_t block) {
    scores(p, exponents, tile, q, k, block, s, bend_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    if (gains) multiply_scores(tile, d_o, v, block, d_p, false);
  }
  // s = P in a row.
  void probabilities(const Tile& tile, int64_t r) { lse.probabilities(exponents, tile.cols, r, s + r * kKeys); }

  // P of rows [r, r + Rows), of the keys from column j on.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void probabilities_of(const Tile& tile, int64_t block, int64_t r, int64_t j,
                                               RegisterTile<T, Rows, Vectors>& x) const {
    x = {};
    multiply_into(x, q, r, k, block, j);
    scale_scores(p, exponents, x);
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
#define METATTN_MAP_KERNEL(Map, sweep, A)                                          \
  {[](const Params& p) { return Map<A>(p, nullptr).arena.used; },                  \
   [](const Params& p, char* scratch, int64_t (*next)(void*), void* walk) {        \
    Map<A> map(p, scratch);                                                        \
    for (int64_t unit; (unit = next(walk)) >= 0;) sweep<Compute<A>>(p, unit, map); \
  }}
#ifdef METATTN_PAIRS
#define METATTN_MAP_KERNELS(Map, sweep) {{}, {}, METATTN_MAP_KERNEL(Map, sweep, Pairs)}
#else
#define METATTN_MAP_KERNELS(Map, sweep)                                               \
  {                                                                                   \
    METATTN_MAP_KERNEL(Map, sweep, float), METATTN_MAP_KERNEL(Map, sweep, double), {} \
  }
#endif

}  // namespace metattn::METATTN_ISA
