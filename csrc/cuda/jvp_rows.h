// jvp: a block owns queries and visits the keys that they attend to. Ot = (P∘(T − t)∘Z)V + (P∘Z)C − (τ − t)·O and τ, for any
// t.
#pragma once

#include "cuda/operands.h"

namespace metattn::cuda {

// With t = 0 the terms cancel where a sharply peaked row has large T: a block with a row that lost more than this is
// swept once more, with t = τ of the first sweep. Where weights are rounded, O's were: t is then the mean of T over the
// first keys of a row, and of O's errors little comes in.
constexpr float kCancellation = 16;

template <class S, int Columns, int Tiles, bool Full>
struct JvpRows {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = Tiles;
  static constexpr int kSums = 4 * Columns + 2;
  using T = Compute<S>;
  QueryTiles<S> queries;
  KeyTiles<S, kTiles> keys;
  Statistics<T> known;

  METATTN_HD JvpRows(const Params& p, int warps, int stages, Pieces& pieces) {
    const int ld = leading<S>(p, 8 * Columns);
    queries = QueryTiles<S>::take(pieces, p, kWarpRows * warps, ld, false, true);
    keys = KeyTiles<S, kTiles>::take(pieces, p, ld, true, true, stages);
    known = Statistics<T>::take(pieces, kWarpRows * warps);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    Place place;
    int64_t row0;
    if (!place_rows(p, block, place, row0)) return;
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    for (int r = block.worker(); r < rows; r += block.workers()) {
      RowLogSumExp<T> lse{kInfinity<T>, 0};
      if (row0 + r < place.s.n) lse = known_lse<T>(p, place, row0 + r);
      known.reference[r] = lse.reference;
      known.log_total[r] = lse.log_total;
    }
    queries.start(block, p, place, row0, rows);
    block.template wait<0>();
    queries.round(block, rows);
    block.sync();
    queries.clear_idle(block, p, place, known, rows);
    const bool has_scores = p.t_q || p.t_k || p.t_bias || p.t_slopes;
    const int first = 8 * Columns * block.chunk();
    const int64_t mine = row0 + warp_row;
    Rows<T> base = Rows<T>::filled(0), based = Rows<T>::filled(!kRounds<S>);
    for (int sweep = 0; sweep < 2; ++sweep) {
      Aside<T> aside = Aside<T>::template of<kSums>(p, block);
      const Rows<T> same = Rows<T>::filled(1);
      Fragment<T, Columns> acc;
      Rows<T> excess = Rows<T>::filled(0);
      acc.fill(0);
      const Range range = keys_of_rows(p, place, row0, rows);
      keys.template sweep<Full>(block, p, place, range, [&](const auto& at, int64_t key0, bool unclean) {
        visit(p, block, place, at, row0, key0, unclean, has_scores, first, base, based, excess, acc);
      }, [&](int visits) {
        if (!aside.is_due(visits)) return;
        aside.put(0, acc, same);
        aside.put(4 * Columns, excess, same);
        aside.begun = true;
      });
      aside.settle(0, acc, same);
      aside.settle(4 * Columns, excess, same);
      based = Rows<T>::filled(1);
      if (p.sinks) {
        const T sigma = p.t_sinks ? per_head<T>(p.t_sinks, place) : 0;
        METATTN_EACH_LANE(slot, lane)
          METATTN_UNROLL(int h = 0; h < 2; ++h) {
            const int r = warp_row + lane / 4 + 8 * h;
            if (!known.idle(r))
              excess.x[slot][h] +=
                  sink_probability(p, place, known.reference[r], known.log_total[r]) * (sigma - base.x[slot][h]);
          }
      }
      const bool lossy = finish(p, place, mine, warp_row, first, excess, acc);
      store_rows_in_two<S>(p.out_o, p.out_o_lo, offset_of(p.out_o, place.seq, place.head, place.s.q0),
                           offset_of(p.out_o_lo, place.seq, place.head, place.s.q0), mine, place.s.n, first, p.dv, acc);
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL(int h = 0; h < 2; ++h) {
          const int r = lane / 4 + 8 * h;
          const bool idle = known.idle(warp_row + r);
          if (block.chunk() == 0 && lane % 4 == 0 && mine + r < place.s.n)
            *double_at(p.out_lse, place.seq, place.head, place.s.q0 + mine + r) =
                idle ? 0 : static_cast<double>(base.x[slot][h]) + static_cast<double>(excess.x[slot][h]);
          base.x[slot][h] = idle ? 0 : base.x[slot][h] + excess.x[slot][h];
        }
      if (!block.any(lossy && has_scores)) return;
    }
  }

  METATTN_DEVICE void visit(const Params& p, Block& block, const Place& place, const KeyTiles<S, kTiles>& at, int64_t row0,
                            int64_t key0, bool unclean, bool has_scores, int first, Rows<T>& base, Rows<T>& based,
                            Rows<T>& excess, Fragment<T, Columns>& acc) const {
    const int warp_row = kWarpRows * block.warp();
    const Window<false> window{p, place, row0 + warp_row, key0, reach_of(p, place.s)};
    Fragment<T, kTiles> s, bend, t;
    s.fill(0);
    t.fill(0);
    add_scores(s, queries.q, warp_row, at.k, depth_of(p.d));
    finish_scores<Full>(window, s, bend);
    if (unclean) clear_unseen(block, at.seen, s, {at.v, at.c});
    const DropoutBits<kTiles> kept = dropout<Full, false, kTiles>(window);
    add_scores(t, queries.a, warp_row, at.k, depth_of(p.d));
    add_scores(t, queries.q, warp_row, at.b, depth_of(p.d));
    s.each([&](T& value, int r, int c, int slot, int tile, int e) {
      const T score = value, weight = probability(score, known.reference[warp_row + r], known.log_total[warp_row + r]);
      const T tangent = score_tangent<Full>(window, score, t.x[slot][tile][e], bend.x[slot][tile][e], r, c);
      value = weight;
      t.x[slot][tile][e] = score == -kInfinity<T> ? 0 : tangent;
    });
    if (kRounds<S> && has_scores && may_be_first(p, block, place, row0, key0)) find_base(s, t, base, based);
    t.each([&](T& value, int, int, int slot, int tile, int e) { value = s.x[slot][tile][e] * (value - base.x[slot][e / 2]); });
    if (has_scores) {
      const Rows<T> sums = t.row_sums();
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL(int h = 0; h < 2; ++h) excess.x[slot][h] += sums.x[slot][h];
      if (Full && p.rng != nullptr) apply_dropout(p, kept, t);
      add_weighted(acc, t, at.v, first, true);  // in two parts: Dt = rowsum(dO∘Ot) is to cancel with what is not rounded
    }
    if (at.c) {
      if (Full && p.rng != nullptr) apply_dropout(p, kept, s);
      add_weighted(acc, s, at.c, first, true);
    }
  }

  // Whether some row of the block may meet its first keys here.
  static METATTN_DEVICE bool may_be_first(const Params& p, const Block& block, const Place& place, int64_t row0, int64_t key0) {
    const int64_t last = smaller(row0 + kWarpRows * block.warps(), place.s.n) - 1;
    return p.mask || p.bias || key0 <= attended_keys(p, place.s, last).lo;
  }
  // base = the mean of T by these weights, of rows that had none before.
  static METATTN_DEVICE void find_base(const Fragment<T, kTiles>& weights, const Fragment<T, kTiles>& tangents, Rows<T>& base,
                                       Rows<T>& based) {
    Fragment<T, kTiles> terms = tangents;
    terms.each([&](T& value, int, int, int slot, int tile, int e) { value *= weights.x[slot][tile][e]; });
    const Rows<T> total = weights.row_sums(), sum = terms.row_sums();
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h) {
        const T mean = sum.x[slot][h] / total.x[slot][h];
        if (based.x[slot][h] != 0 || !is_finite(mean)) continue;
        base.x[slot][h] = mean;
        based.x[slot][h] = 1;
      }
  }

  // Ot of each row in acc, 0 where nothing is attended. Whether too many digits were lost.
  METATTN_DEVICE bool finish(const Params& p, const Place& place, int64_t mine, int warp_row, int first, const Rows<T>& excess,
                             Fragment<T, Columns>& acc) const {
    Fragment<T, Columns> terms;
    acc.each([&](T& value, int r, int c, int slot, int t, int e) {
      T term = 0;
      const int64_t i = place.s.q0 + mine + r;
      if (mine + r < place.s.n && first + c < p.dv && !known.idle(warp_row + r)) {
        const T o = in_two<S, T>(p.o, p.o_lo, offset_of(p.o, place.seq, place.head, i) + (first + c) * p.o.stride[3],
                                 offset_of(p.o_lo, place.seq, place.head, i) + (first + c) * p.o_lo.stride[3]);
        term = excess.x[slot][e / 2] * o;
        value -= term;
      } else {
        value = 0;
      }
      terms.x[slot][t][e] = term;
    });
    const auto larger_magnitude = [](T a, T b) {
      const T magnitude = b < 0 ? -b : b;
      return magnitude > a ? magnitude : a;
    };
    const Rows<T> largest_term = terms.joined(0, larger_magnitude), largest = acc.joined(0, larger_magnitude);
    bool lossy = false;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h)
        lossy |= largest_term.x[slot][h] > static_cast<T>(kCancellation) * largest.x[slot][h];
    return lossy;
  }
};

}  // namespace metattn::cuda
