// The gradients' row passes: a block owns queries and visits the keys that they attend to. dQ or, Second, dQt; the entries
// of a bias' own gradient, the shares of sinks and slopes, and the row statistics.
#pragma once

#include "cuda/common_keys.h"

namespace metattn::cuda {

template <class S, int Columns, int Tiles, bool Full, bool Second>
struct GradientRows {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = Tiles;
  static constexpr int kSums = 4 * Columns + 4 + (!Full ? 0 : kRounds<S> ? 2 : 8);
  using T = Compute<S>;
  QueryTiles<S> queries;
  KeyTiles<S, kTiles> keys;
  Statistics<T> known;

  METATTN_HD GradientRows(const Params& p, int warps, int stages, Pieces& pieces) {
    const int ld = leading<S>(p, 8 * Columns);
    queries = QueryTiles<S>::take(pieces, p, kWarpRows * warps, ld, true, Second);
    keys = KeyTiles<S, kTiles>::take(pieces, p, ld, static_cast<bool>(p.d_o), Second, stages);
    known = Statistics<T>::take(pieces, kWarpRows * warps);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    Place place;
    int64_t row0;
    if (!place_rows(p, block, place, row0)) return;
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    const int64_t mine = row0 + warp_row;
    find_statistics<S>(p, place, known, warp_row, mine, Second, block.chunk() == 0);
    if (!p.grad_q && !p.own_bias && p.grad_slopes == nullptr) return;
    queries.start(block, p, place, row0, rows);
    block.template wait<0>();
    queries.round(block, rows);
    block.sync();
    queries.clear_idle(block, p, place, known, rows);
    Fragment<T, Columns> acc;
    Rows<T> lack = Rows<T>::filled(0), lack_b = Rows<T>::filled(0);
    Distances far;
    if (Full && p.grad_slopes != nullptr) far.start(p, place, known, warp_row, mine);
    Aside<T> aside = Aside<T>::template of<kSums>(p, block);
    const Rows<T> same = Rows<T>::filled(1);
    const bool shares = Full && p.grad_slopes != nullptr && block.chunk() == 0;
    acc.fill(0);
    const int first = 8 * Columns * block.chunk();
    const Range range = keys_of_rows(p, place, row0, rows);
    keys.template sweep<Full>(block, p, place, range, [&](const auto& tiles, int64_t key0, bool unclean) {
      const Window<false> window{p, place, mine, key0, reach_of(p, place.s)};
      Scores<T, kTiles> at;
      scores_of<Full>(at, window, queries.q, warp_row, tiles.k, depth_of(p.d));
      if (unclean) clear_unseen(block, tiles.seen, at.s, {tiles.k, tiles.b});
      cotangents_of<Second>(at, queries.d_o, warp_row, tiles.v, tiles.c, depth_of(p.dv));
      if constexpr (Second) {
        add_scores(at.tr, queries.a, warp_row, tiles.k, depth_of(p.d));
        add_scores(at.tr, queries.q, warp_row, tiles.b, depth_of(p.d));
      }
      differentiate<Full, Second>(at, window, known, warp_row);
      if (p.own_bias && block.chunk() == 0) store_bias(p, place, mine, key0, at.ds);
      if (shares) far.add(place, known, warp_row, mine, key0, at);
      if (!p.grad_q) return;
      add_weighted(acc, at.outer, tiles.k, first, p.twice);
      count_weights<S>(p, lack, at.outer);
      if constexpr (Second) add_weighted(acc, at.inner, tiles.b, first, p.twice);
      if (Second && p.t_k) count_weights<S>(p, lack_b, at.inner);
    }, [&](int visits) {
      if (!aside.is_due(visits)) return;
      aside.put(0, acc, same);
      aside.put(4 * Columns, lack, same);
      aside.put(4 * Columns + 2, lack_b, same);
      if constexpr (Full) far.each([&](int element, Rows<T>& sum) { aside.put(4 * Columns + 4 + element, sum, same); });
      aside.begun = true;
    });
    aside.settle(0, acc, same);
    aside.settle(4 * Columns, lack, same);
    aside.settle(4 * Columns + 2, lack_b, same);
    if constexpr (Full) far.each([&](int element, Rows<T>& sum) { aside.settle(4 * Columns + 4 + element, sum, same); });
    if (shares) store_shares(p, place, warp_row, mine, far);
    if (!p.grad_q) return;
    if constexpr (kRounds<S>) {
      using Keys = KeyTiles<S, kTiles>;
      const bool is_known = p.softcap == 0;
      if (is_known) add_known_sums(p, place, known, warp_row, mine, Second, lack);
      add_mean_key<S, Full>(p, block, place, keys, &Keys::k, range, row0, first, lack, acc);
      if (Second && p.t_k) {
        if (is_known) add_known_sums(p, place, known, warp_row, mine, false, lack_b);
        add_mean_key<S, Full>(p, block, place, keys, &Keys::b, range, row0, first, lack_b, acc);
      }
    }
    store_rows<S>(p.grad_q, offset_of(p.grad_q, place.seq, place.head, place.s.q0), mine, place.s.n, first, p.d,
                  static_cast<T>(p.scale), acc);
  }

  // Σ dS·(distance − the nearest) of each row; where weights are not rounded, of P too, and what dS and P sum to.
  struct Distances {
    Rows<T> nearest = Rows<T>::filled(0), of_ds = Rows<T>::filled(0);
    Rows<T> of_p = Rows<T>::filled(0), ds = Rows<T>::filled(0), mass = Rows<T>::filled(0);
    METATTN_DEVICE void start(const Params& p, const Place& place, const Statistics<T>& known, int warp_row, int64_t row0) {
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL(int h = 0; h < 2; ++h) {
          const int r = lane / 4 + 8 * h, at = warp_row + r;
          if (row0 + r >= place.s.n || known.idle(at)) continue;
          if (beside_sink(p, place, known.reference[at], known.log_total[at]) < static_cast<T>(kLeastFar)) continue;
          nearest.x[slot][h] = static_cast<T>(nearest_distance(p, place.s, row0 + r));
        }
    }
    template <class F>
    METATTN_DEVICE void each(F f) {
      f(0, of_ds);
      if constexpr (kRounds<S>) return;
      f(2, of_p);
      f(4, ds);
      f(6, mass);
    }
    METATTN_DEVICE void add(const Place& place, const Statistics<T>& known, int warp_row, int64_t row0, int64_t key0,
                            const Scores<T, kTiles>& at) {
      const auto far = [&](T& value, int r, int c, int slot, int, int e) {
        value *= static_cast<T>(alibi_distance(place.s, row0 + r, key0 + c)) - nearest.x[slot][e / 2];
      };
      Fragment<T, kTiles> terms = at.ds;
      if constexpr (!kRounds<S>) gain(ds, terms);
      terms.each(far);
      gain(of_ds, terms);
      if constexpr (kRounds<S>) return;
      terms = at.s;
      terms.each([&](T& value, int r, int, int, int, int) {
        value = probability(value, known.reference[warp_row + r], known.log_total[warp_row + r]);
      });
      gain(mass, terms);
      terms.each(far);
      gain(of_p, terms);
    }
    static METATTN_DEVICE void gain(Rows<T>& sum, const Fragment<T, kTiles>& terms) {
      const Rows<T> more = terms.row_sums();
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL(int h = 0; h < 2; ++h) sum.x[slot][h] += more.x[slot][h];
    }
  };
  // Each row's −Σ dS·distance. Where weights are not rounded, what dS lacks of its known sum, by an error of D or
  // Dt, is spread over the keys as P is.
  METATTN_DEVICE void store_shares(const Params& p, const Place& place, int warp_row, int64_t mine,
                                   const Distances& far) const {
    Rows<T> sums = Rows<T>::filled(0);
    add_known_sums(p, place, known, warp_row, mine, Second, sums);
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h) {
        const int64_t i = mine + lane / 4 + 8 * h;
        if (lane % 4 != 0 || i >= place.s.n) continue;
        const T nearest = far.nearest.x[slot][h], sum = sums.x[slot][h];
        T found = far.of_ds.x[slot][h] + (nearest == 0 ? 0 : sum * nearest);
        if constexpr (!kRounds<S>) {
          const T mass = far.mass.x[slot][h], share = (sum - far.ds.x[slot][h]) / mass;  // a unit of P's
          const bool sink_has_most = known.idle(warp_row + static_cast<int>(i - mine)) || mass < T{0.5};
          if (!sink_has_most && is_finite(share)) found += share * far.of_p.x[slot][h];
        }
        *statistic_at<T>(p, kSlopeShare, place, i) = -found;
      }
  }

  static METATTN_DEVICE void store_bias(const Params& p, const Place& place, int64_t row0, int64_t key0,
                                        Fragment<T, kTiles>& ds) {
    ds.each([&](T& value, int r, int c, int, int, int) {
      if (row0 + r < place.s.n && key0 + c < place.s.m)
        store<T>(p.grad_bias_out,
                 offset_of(p.grad_bias_out, place.seq, place.head, row0 + r) + (key0 + c) * p.grad_bias_out.stride[3], value);
    });
  }
};

}  // namespace metattn::cuda
