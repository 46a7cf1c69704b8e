// Gradients of what many rows share: a bias that is broadcast somewhere, sinks, slopes. No atomics on floats: a block owns
// a tile of the sum, or one of its parts, and adds in an order that shapes alone decide.
#pragma once

#include "cuda/operands.h"

namespace metattn::cuda {

// One part of a tile of the bias' gradient, summed over those of batches, heads, rows and keys that the bias is
// broadcast over. grad_bias: compute type [parts, 1|B, 1|Hq, 1|N, 1|M].
template <class S, int Tiles, bool Second>
struct BiasSums {
  using Element = S;
  static constexpr bool kFull = true;
  static constexpr int kTiles = Tiles;
  static constexpr int kKeys = 8 * kTiles;
  using T = Compute<S>;
  QueryTiles<S> queries;
  KeyTiles<S, kTiles> keys;
  Statistics<T> known;
  T* total;  // [rows][kKeys]

  METATTN_HD BiasSums(const Params& p, int warps, int, Pieces& pieces) {
    const int ld = leading<S>(p, 16), rows = kWarpRows * warps;
    queries = QueryTiles<S>::take(pieces, p, rows, ld, true, Second);
    keys = KeyTiles<S, kTiles>::take(pieces, p, ld, static_cast<bool>(p.d_o), Second, 1);
    known = Statistics<T>::take(pieces, rows);
    total = pieces.take<T>(static_cast<int64_t>(rows) * kKeys);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    const int64_t row_blocks = (p.n + rows - 1) / rows, key_blocks = (p.m + kKeys - 1) / kKeys;
    const int64_t counts[4] = {p.batch, p.heads, row_blocks, key_blocks};
    int64_t own[4], summed[4], terms = 1, index = block.index() / p.grad_bias_parts;
    const int64_t part = block.index() % p.grad_bias_parts;
    for (int dim = 3; dim >= 0; --dim) {
      const bool shared = is_shared(p, dim);
      own[dim] = shared ? 0 : index % counts[dim];
      index = shared ? index : index / counts[dim];
      summed[dim] = shared ? counts[dim] : 1;
      terms *= summed[dim];
    }
    const int64_t share = (terms + p.grad_bias_parts - 1) / p.grad_bias_parts;
    Fragment<T, kTiles> sum, lost;  // by rounding the sum: terms may be thousands
    sum.fill(0);
    lost.fill(0);
    for (int64_t term = part * share; term < smaller(terms, (part + 1) * share); ++term) {
      int64_t at[4], rest = term;
      for (int dim = 3; dim >= 0; --dim) {
        at[dim] = own[dim] + rest % summed[dim];
        rest /= summed[dim];
      }
      Place place{at[0], at[1], at[1] / (p.heads / p.kv_heads), sequence(p, at[0])};
      add(p, block, place, at[2] * rows, at[3] * kKeys, warp_row, rows, sum, lost);
    }
    sum.each([&](T& value, int r, int c, int, int, int) { total[(warp_row + r) * kKeys + c] = value; });
    block.sync();
    T* out = reinterpret_cast<T*>(p.grad_bias) + part * p.bias_parts_stride + own[0] * p.grad_bias_stride[1] +
             own[1] * p.grad_bias_stride[2];
    const bool all_rows = is_shared(p, 2), all_keys = is_shared(p, 3);
    const int own_rows = all_rows ? 1 : rows, own_keys = all_keys ? 1 : kKeys;
    for (int piece = block.worker(); piece < own_rows * own_keys; piece += block.workers()) {
      const int r = piece / own_keys, c = piece % own_keys;
      const int64_t i = own[2] * rows + r, j = own[3] * kKeys + c;
      if ((!all_rows && i >= p.bias_size[2]) || (!all_keys && j >= p.bias_size[3])) continue;
      double value = 0;
      for (int x = all_rows ? 0 : r; x < (all_rows ? rows : r + 1); ++x)
        for (int y = all_keys ? 0 : c; y < (all_keys ? kKeys : c + 1); ++y) value += total[x * kKeys + y];
      out[(all_rows ? 0 : i * p.grad_bias_stride[3]) + (all_keys ? 0 : j * p.grad_bias_stride[4])] = static_cast<T>(value);
    }
  }

  static METATTN_DEVICE bool is_shared(const Params& p, int dim) { return p.grad_bias_stride[dim + 1] == 0; }

  METATTN_DEVICE void add(const Params& p, Block& block, const Place& place, int64_t row0, int64_t key0, int warp_row, int rows,
                          Fragment<T, kTiles>& sum, Fragment<T, kTiles>& lost) const {
    if (row0 >= place.s.n || key0 >= place.s.m) return;
    const Range range = keys_of_rows(p, place, row0, rows);
    if (key0 >= range.hi || key0 + kKeys <= range.lo) return;
    block.sync();  // what was here before is no longer read
    start_statistics(block, p, place, known, row0, rows);
    queries.start(block, p, place, row0, rows);
    keys.start(block, p, place, range, key0);
    block.template wait<0>();
    queries.round(block, rows);
    keys.round(block);
    block.sync();
    queries.clear_idle(block, p, place, known, rows);
    block.sync();
    const Window<false> window{p, place, row0 + warp_row, key0, reach_of(p, place.s)};
    Scores<T, kTiles> at;
    scores_of<true>(at, window, queries.q, warp_row, keys.k, depth_of(p.d));
    cotangents_of<Second>(at, queries.d_o, warp_row, keys.v, keys.c, depth_of(p.dv));
    if constexpr (Second) {
      add_scores(at.tr, queries.a, warp_row, keys.k, depth_of(p.d));
      add_scores(at.tr, queries.q, warp_row, keys.b, depth_of(p.d));
    }
    differentiate<true, Second>(at, window, known, warp_row);
    sum.each([&](T& value, int, int, int slot, int t, int e) {
      T& less = lost.x[slot][t][e];
      const T more = at.ds.x[slot][t][e] - less, before = value;
      value += more;
      less = (value - before) - more;
    });
  }
};

// The sum of the parts of a bias' gradient, in its dtype: elements worker, worker + workers, …
template <class T>
static METATTN_DEVICE void sum_parts(const Params& p, int64_t first, int64_t step) {
  const T* parts = reinterpret_cast<const T*>(p.grad_bias);
  const View& out = p.grad_bias_out;
  for (int64_t at = first; at < p.bias_parts_stride; at += step) {
    double value = 0;
    for (int64_t part = 0; part < p.grad_bias_parts; ++part) value += parts[part * p.bias_parts_stride + at];
    const int64_t j = at % p.bias_size[3], i = at / p.bias_size[3] % p.bias_size[2];
    const int64_t head = at / (p.bias_size[3] * p.bias_size[2]) % p.bias_size[1];
    const int64_t seq = at / (p.bias_size[3] * p.bias_size[2] * p.bias_size[1]);
    store<T>(out, offset_of(out, seq, head, i) + j * out.stride[3], static_cast<T>(value));
  }
}

// The gradient of one (batch, head) of sinks or slopes, or of a head over all batches, from the rows' shares: a warp's work.
template <class T>
static METATTN_DEVICE void sum_shares(const Params& p, Statistic field, int64_t slot) {
  Place place{};
  place.head = slot % p.heads;
  const bool shared = (field == kSinkShare ? p.sinks_batch : p.slopes_batch) == 1;
  double total = 0;
  for (place.seq = shared ? 0 : slot / p.heads; place.seq < (shared ? p.batch : slot / p.heads + 1); ++place.seq) {
    place.s = sequence(p, place.seq);
    for (int64_t i = first_lane(); i < place.s.n; i += lane_step())
      total += static_cast<double>(*statistic_at<T>(p, field, place, i));
  }
  total = lane_sum(total);
  char* const target = field == kSinkShare ? p.grad_sinks : p.grad_slopes;
  if (first_lane() == 0) reinterpret_cast<T*>(target)[slot] = static_cast<T>(total);
}

}  // namespace metattn::cuda
