// Column passes: a block owns keys and visits the queries that attend to them, of all query heads that share a key
// head. dK and dV or, Second, dKt and dVt.
#pragma once

#include "cuda/operands.h"

namespace metattn::cuda {

template <class S, int Columns, int Tiles, bool Full, bool Second>
struct GradientColumns {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = Tiles;
  static constexpr int kQueries = 8 * kTiles;
  static constexpr int kSums = 8 * Columns;
  using T = Compute<S>;
  SharedTile<S> k, b, v, c;
  QueryTiles<S> queries;  // of the first stage, as the statistics
  Statistics<T> known;
  int stages;
  int64_t step;  // elements from a stage's queries to the next's

  METATTN_HD GradientColumns(const Params& p, int warps, int stages, Pieces& pieces) : stages(stages) {
    const int ld = leading<S>(p, 8 * Columns), rows = kWarpRows * warps;
    k = pieces.tile<S>(true, rows, ld);
    b = pieces.tile<S>(Second && p.t_k, rows, ld);
    v = pieces.tile<S>(static_cast<bool>(p.d_o), rows, ld);
    c = pieces.tile<S>(Second && p.d_o && p.t_v, rows, ld);
    const size_t before = pieces.used;
    queries = QueryTiles<S>::take(pieces, p, kQueries, ld, true, Second);
    step = static_cast<int64_t>((pieces.used - before) / sizeof(S));
    pieces.take<S>((stages - 1) * step);
    known = Statistics<T>::take(pieces, stages * kQueries);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    const int64_t blocks = (p.m + rows - 1) / rows, pair = block.index() / blocks;
    const int64_t group = p.heads / p.kv_heads;
    Place place;
    place.seq = pair / p.kv_heads;
    place.kv_head = pair % p.kv_heads;
    place.s = sequence(p, place.seq);
    const int64_t key0 = block.index() % blocks * rows;
    if (key0 >= place.s.m) return;
    const auto own = [&](SharedTile<S> tile, const View& view, int64_t width) {
      start_tile(block, tile, rows, view, offset_of(view, place.seq, place.kv_head, place.s.k0), key0, 0, place.s.m, width);
    };
    own(k, p.k, p.d);
    own(b, p.t_k, p.d);
    own(v, p.v, p.dv);
    own(c, p.t_v, p.dv);
    block.end_group();
    if constexpr (kIsTf32<S>) {
      block.template wait<0>();
      round_tiles(block, rows, {k, b, v, c});
    }
    Aside<T> aside = Aside<T>::template of<kSums>(p, block);
    const Rows<T> same = Rows<T>::filled(1);
    Fragment<T, Columns> grad_k, grad_v;
    grad_k.fill(0);
    grad_v.fill(0);
    const int first = 8 * Columns * block.chunk();
    const Range range = attending_rows(p, place.s, key0, smaller(key0 + rows, place.s.m));
    // the blocks of queries of one head after the other; with two stages the next one is on its way meanwhile
    // (what is known of a visit is worked out from its number: registers are short)
    const int steps = range.hi > range.lo ? static_cast<int>((range.hi - range.lo + kQueries - 1) / kQueries) : 0;
    const int visits = steps * static_cast<int>(group);
    for (int visit = 1 - stages; visit < visits; ++visit) {
      if (const int next = visit + stages - 1; next < visits) {
        const int stage = next % stages;
        place.head = place.kv_head * group + next / steps;
        const int64_t first_row = range.lo + next % steps * kQueries;
        start_statistics(block, p, place, known.from(stage * kQueries), first_row, kQueries);
        queries.from(stage * step).start(block, p, place, first_row, kQueries);
      } else {
        block.end_group();
      }
      if (visit < 0) continue;
      if (stages == 2) block.template wait<1>();
      else block.template wait<0>();
      const int stage = visit % stages;
      place.head = place.kv_head * group + visit / steps;
      const int64_t row0 = range.lo + visit % steps * kQueries;
      const QueryTiles<S> now = queries.from(stage * step);
      const Statistics<T> told = known.from(stage * kQueries);
      now.round(block, kQueries);
      if (block.any(met_idle(block, p, place, told, row0, kQueries))) {
        now.clear_idle(block, p, place, told, kQueries);
        block.sync();
      }
      const Window<true> window{p, place, key0 + warp_row, row0, reach_of(p, place.s)};
      Scores<T, kTiles> at;
      scores_of<Full>(at, window, k, warp_row, now.q, depth_of(p.d));
      add_scores(at.dp, v, warp_row, now.d_o, depth_of(p.dv));
      if constexpr (Second) {
        add_scores(at.e, c, warp_row, now.d_o, depth_of(p.dv));
        add_scores(at.tr, k, warp_row, now.a, depth_of(p.d));
        add_scores(at.tr, b, warp_row, now.q, depth_of(p.d));
      }
      differentiate<Full, Second>(at, window, told, 0);
      if (p.grad_k) {  // in two parts: rows' cotangents may cancel what their queries share
        add_weighted(grad_k, at.outer, now.q, first, true);
        if constexpr (Second) add_weighted(grad_k, at.inner, now.a, first, true);
      }
      if (p.grad_v) add_weighted(grad_v, at.weights, now.d_o, first, p.twice);
      if (aside.is_due(visit + 1)) {
        aside.put(0, grad_k, same);
        aside.put(4 * Columns, grad_v, same);
        aside.begun = true;
      }
      block.sync();  // before anything is copied there
    }
    aside.settle(0, grad_k, same);
    aside.settle(4 * Columns, grad_v, same);
    const int64_t mine = key0 + warp_row;
    store_rows<S>(p.grad_k, offset_of(p.grad_k, place.seq, place.kv_head, place.s.k0), mine, place.s.m, first, p.d,
                  static_cast<T>(p.scale), grad_k);
    store_rows<S>(p.grad_v, offset_of(p.grad_v, place.seq, place.kv_head, place.s.k0), mine, place.s.m, first, p.dv, T{1},
                  grad_v);
  }
};

}  // namespace metattn::cuda
