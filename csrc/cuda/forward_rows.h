// forward: a block owns queries and visits the keys that they attend to. O = (P∘Z)V and L = logsumexp(S), by the online
// softmax.
#pragma once

#include "cuda/operands.h"

namespace metattn::cuda {

template <class S, int Columns, int Tiles, bool Full>
struct ForwardRows {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = 2 * Tiles;
  static constexpr int kSums = 4 * Columns + 6;  // that each lane may put aside
  using T = Compute<S>;
  SharedTile<S> q;
  KeyTiles<S, kTiles> keys;

  METATTN_HD ForwardRows(const Params& p, int warps, int stages, Pieces& pieces) {
    const int ld = leading<S>(p, 8 * Columns);
    q = pieces.tile<S>(true, kWarpRows * warps, ld);
    keys = KeyTiles<S, kTiles>::take(pieces, p, ld, true, false, stages);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    Place place;
    int64_t row0;
    if (!place_rows(p, block, place, row0)) return;
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    start_tile(block, q, rows, p.q, offset_of(p.q, place.seq, place.head, place.s.q0), row0, 0, place.s.n, p.d);
    block.end_group();
    if constexpr (kIsTf32<S>) {
      block.template wait<0>();
      round_tiles(block, rows, {q});
    }
    const T sink = p.sinks ? per_head<T>(p.sinks, place) : -kInfinity<T>;
    Rows<T> top = Rows<T>::filled(sink), total = Rows<T>::filled(sink == -kInfinity<T> ? 0 : 1);
    // of the weights that dropout leaves, and of these as they are multiplied
    Rows<T> kept_total = Rows<T>::filled(0), multiplied_total = Rows<T>::filled(0);
    const bool twice = p.twice || (Full && wants_exact_d(p));
    Aside<T> aside = Aside<T>::template of<kSums>(p, block);
    Rows<T> top_aside = Rows<T>::filled(-kInfinity<T>);  // from which what lies aside is counted
    const auto decay_aside = [&] {
      Rows<T> decay;
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL(int h = 0; h < 2; ++h)
          decay.x[slot][h] = top_aside.x[slot][h] == top.x[slot][h] ? 1 : exponential(top_aside.x[slot][h] - top.x[slot][h]);
      return decay;
    };
    Fragment<T, Columns> acc;
    acc.fill(0);
    const int first = 8 * Columns * block.chunk();
    const Range range = keys_of_rows(p, place, row0, rows);
    keys.template sweep<Full>(block, p, place, range, [&](const auto& at, int64_t key0, bool unclean) {
      const Window<false> window{p, place, row0 + warp_row, key0, reach_of(p, place.s)};
      Fragment<T, kTiles> s, bend;
      s.fill(0);
      add_scores(s, q, warp_row, at.k, depth_of(p.d));
      finish_scores<Full>(window, s, bend);
      if (unclean) clear_unseen(block, at.seen, s, {at.v});
      const DropoutBits<kTiles> kept = dropout<Full, false, kTiles>(window);
      const Rows<T> highest = s.joined(-kInfinity<T>, [](T a, T b) { return a > b ? a : b; });
      Rows<T> shift, decay;
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL(int h = 0; h < 2; ++h) {
          // a NaN among the scores is no highest, and comes out of the sum
          const T now = larger_of(top.x[slot][h], highest.x[slot][h]);
          shift.x[slot][h] = now == -kInfinity<T> ? 0 : now;
          decay.x[slot][h] = exponential(top.x[slot][h] - shift.x[slot][h]);
          top.x[slot][h] = now;
        }
      s.each([&](T& value, int, int, int slot, int, int e) { value = exponential(value - shift.x[slot][e / 2]); });
      const Rows<T> sums = s.row_sums();
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL(int h = 0; h < 2; ++h) total.x[slot][h] = total.x[slot][h] * decay.x[slot][h] + sums.x[slot][h];
      if (Full && p.rng != nullptr) apply_dropout(p, kept, s);
      acc.each([&](T& value, int, int, int slot, int, int e) { value *= decay.x[slot][e / 2]; });
      if constexpr (kRounds<S>) {
        const Rows<T> kept_sums = Full && p.rng != nullptr ? s.row_sums() : sums;
        const Rows<T> multiplied = sums_as_multiplied<S>(s, twice);
        METATTN_EACH_LANE(slot, lane)
          METATTN_UNROLL(int h = 0; h < 2; ++h) {
            kept_total.x[slot][h] = kept_total.x[slot][h] * decay.x[slot][h] + kept_sums.x[slot][h];
            multiplied_total.x[slot][h] = multiplied_total.x[slot][h] * decay.x[slot][h] + multiplied.x[slot][h];
          }
      }
      add_weighted(acc, s, at.v, first, twice);
    }, [&](int visits) {
      if (!aside.is_due(visits)) return;
      const Rows<T> decay = decay_aside();
      aside.put(0, acc, decay);
      aside.put(4 * Columns, total, decay);
      aside.put(4 * Columns + 2, kept_total, decay);
      aside.put(4 * Columns + 4, multiplied_total, decay);
      aside.begun = true;
      top_aside = top;
    });
    if (aside.begun) {
      const Rows<T> decay = decay_aside();
      aside.settle(0, acc, decay);
      aside.settle(4 * Columns, total, decay);
      aside.settle(4 * Columns + 2, kept_total, decay);
      aside.settle(4 * Columns + 4, multiplied_total, decay);
    }
    // a row that attends to nothing gives zeros, whatever 0·NaN brought in from a key that others see; O is a mean by the
    // weights as they were multiplied: a row's errors then weigh V − O, not V
    acc.each([&](T& value, int, int, int slot, int, int e) {
      const T all = total.x[slot][e / 2], multiplied = multiplied_total.x[slot][e / 2];
      const T mean = multiplied == 0 ? 1 : kept_total.x[slot][e / 2] / multiplied;
      value = all == 0 ? 0 : value / all * mean;
    });
    const int64_t mine = row0 + warp_row;
    store_rows_in_two<S>(p.out_o, p.out_o_lo, offset_of(p.out_o, place.seq, place.head, place.s.q0),
                         offset_of(p.out_o_lo, place.seq, place.head, place.s.q0), mine, place.s.n, first, p.dv, acc);
    if (block.chunk() != 0) return;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h) {
        const int64_t i = mine + lane / 4 + 8 * h;
        if (lane % 4 != 0 || i >= place.s.n) continue;
        // counted from the number nearest to L, the log has few digits to lose in T
        const double log_total = log(static_cast<double>(total.x[slot][h]));
        const double before = top.x[slot][h] == -kInfinity<T> ? 0 : static_cast<double>(top.x[slot][h]);
        const double nearest =
            log_total > -kInfinity<double> ? static_cast<double>(static_cast<T>(before + log_total)) : before;
        double* lse = double_at(p.out_lse, place.seq, place.head, place.s.q0 + i);
        lse[0] = nearest;
        lse[p.out_lse.stride[3]] = log_total - (nearest - before);
      }
  }
};

}  // namespace metattn::cuda
