// What all keys share. Derivatives of scores sum to 0 over the keys, or to what dL and a sink leave, and so cancel it. Their
// rounded values do not, nor those of a D that comes of an O whose weights were rounded. What the weights of a row lack is
// the weight of a mean of some keys that it attends to: another key would bring in what is masked.
#pragma once

#include "cuda/operands.h"

namespace metattn::cuda {

// lack loses the weights as they are multiplied; where a softcap hides their sum, it gains what they lost.
template <class S, class T, int Tiles>
static METATTN_DEVICE void count_weights(const Params& p, Rows<T>& lack, const Fragment<T, Tiles>& weights) {
  if constexpr (kRounds<S>) {
    const Rows<T> multiplied = sums_as_multiplied<S>(weights, p.twice);
    const Rows<T> sums = p.softcap != 0 ? weights.row_sums() : Rows<T>::filled(0);
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h) lack.x[slot][h] += sums.x[slot][h] - multiplied.x[slot][h];
  }
}

// What rows' dS or, tangent, dSt sum to: dL + D·Ps, and Dt·Ps + D·Pst with Pst = Ps·(σ − τ). NaN where few digits are
// left of that: nothing is taken for lacking then.
template <class T>
static METATTN_DEVICE void add_known_sums(const Params& p, const Place& place, const Statistics<T>& known, int warp_row,
                                          int64_t mine, bool tangent, Rows<T>& sums) {
  METATTN_EACH_LANE(slot, lane)
    METATTN_UNROLL(int h = 0; h < 2; ++h) {
      const int r = warp_row + lane / 4 + 8 * h;
      const int64_t i = mine + lane / 4 + 8 * h;
      if (i >= place.s.n || known.idle(r)) continue;
      T sum = 0;
      if (p.d_lse && !tangent) sum = static_cast<T>(*double_at(p.d_lse, place.seq, place.head, place.s.q0 + i));
      if (p.sinks) {
        const T moved = (p.t_sinks ? per_head<T>(p.t_sinks, place) : 0) - known.tau[r];
        sum += sink_probability(p, place, known.reference[r], known.log_total[r]) *
               (tangent ? known.dt[r] + known.d[r] * moved : known.d[r]);
      }
      const T left = beside_sink(p, place, known.reference[r], known.log_total[r]);
      const bool known_well = left > static_cast<T>(kLeastKnown);
      sums.x[slot][h] += known_well ? sum : kInfinity<T> - kInfinity<T>;
    }
}

// acc += lack·(a mean key of each row), of features [first, …) of one of the tiles: of those keys of one block that the row
// attends to, or of the first block that has such.
template <class S, bool Full, class T, int Columns, int Tiles>
static METATTN_DEVICE void add_mean_key(const Params& p, Block& block, const Place& place, const KeyTiles<S, Tiles>& keys,
                                        SharedTile<S> KeyTiles<S, Tiles>::* which, Range range, int64_t row0, int first,
                                        const Rows<T>& lack, Fragment<T, Columns>& acc) {
  constexpr int64_t kStep = 8 * Tiles;
  const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
  const int64_t last = smaller(row0 + rows, place.s.n) - 1;
  const int64_t begin = range.lo / kStep * kStep;
  // the nearest to the rows that all attend to: the first key of all is often unlike the others
  const int64_t lo = attended_keys(p, place.s, last).lo, hi = attended_keys(p, place.s, row0).hi;
  int64_t key0 = lo < hi ? larger(lo, hi - kStep) / kStep * kStep : begin;
  Fragment<T, Columns> mean;
  Rows<T> found = Rows<T>::filled(0);
  mean.fill(0);
  bool missing = range.hi > begin;
  for (int64_t following = begin; missing; key0 = following, following += kStep) {
    keys.start(block, p, place, range, key0);
    block.template wait<0>();
    const bool unclean = keys.template finish<Full>(block, p);
    const Window<false> window{p, place, row0 + warp_row, key0, reach_of(p, place.s)};
    Fragment<T, Tiles> s, bend;
    s.fill(0);
    finish_scores<Full>(window, s, bend);
    s.each([&](T& value, int, int, int slot, int, int e) {
      if (found.x[slot][e / 2] != 0) value = -kInfinity<T>;
    });
    if (unclean) clear_unseen(block, keys.seen, s, {keys.*which});
    s.each([&](T& value, int, int, int, int, int) { value = value == -kInfinity<T> ? 0 : 1; });
    add_weighted(mean, s, keys.*which, first, false);
    const Rows<T> more = s.row_sums();
    bool mine_missing = false;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h) {
        found.x[slot][h] += more.x[slot][h];
        mine_missing |= found.x[slot][h] == 0 && lack.x[slot][h] != 0;
      }
    missing = block.any(mine_missing) && following < range.hi;
    block.sync();  // before anything is copied there
  }
  acc.each([&](T& value, int, int, int slot, int t, int e) {
    const T weight = lack.x[slot][e / 2] / larger_of(found.x[slot][e / 2], T{1}), key = mean.x[slot][t][e];
    if (is_finite(weight) && is_finite(key)) value += weight * key;
  });
}

}  // namespace metattn::cuda
