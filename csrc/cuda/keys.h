// Column passes: a block owns keys and visits the queries that attend to them, of all query heads that share a key
// head. dK and dV or, Second, dKt and dVt.
#pragma once

#include "cuda/rows.h"

namespace metattn::cuda {

template <class S, int Columns, int Tiles, bool Full, bool Second>
struct GradientKeys {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = Tiles;
  static constexpr int kQueries = 8 * kTiles;
  using T = Compute<S>;
  Tile<S> k, b, v, c;
  QueryTiles<S> queries;
  Statistics<T> known;

  METATTN_HD GradientKeys(const Params& p, int warps, Pieces& pieces) {
    const int ld = leading<S>(p, 8 * Columns), rows = kWarpRows * warps;
    k = pieces.tile<S>(true, rows, ld);
    b = pieces.tile<S>(Second && p.t_k, rows, ld);
    v = pieces.tile<S>(static_cast<bool>(p.d_o), rows, ld);
    c = pieces.tile<S>(Second && p.d_o && p.t_v, rows, ld);
    queries = QueryTiles<S>::take(pieces, p, kQueries, ld, true, Second);
    known = Statistics<T>::take(pieces, kQueries);
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
    const auto own = [&](Tile<S> tile, const View& view, int64_t width) {
      load_tile(block, tile, rows, view, offset_of(view, place.seq, place.kv_head, place.s.k0), key0, 0, place.s.m,
                width, [](int) { return false; });
    };
    own(k, p.k, p.d);
    own(b, p.t_k, p.d);
    own(v, p.v, p.dv);
    own(c, p.t_v, p.dv);
    Fragment<T, Columns> grad_k, grad_v;
    grad_k.fill(0);
    grad_v.fill(0);
    const int first = 8 * Columns * block.chunk();
    const Range range = attending_rows(p, place.s, key0, smaller(key0 + rows, place.s.m));
    for (place.head = place.kv_head * group; place.head < (place.kv_head + 1) * group; ++place.head)
      for (int64_t row0 = range.lo; row0 < range.hi; row0 += kQueries) {
        block.sync();  // what was here before is no longer read
        load_statistics(block, p, place, known, row0, kQueries);
        block.sync();
        queries.load(block, p, place, row0, kQueries,
                     [&](int r) { return is_idle(p, place, known.high[r], known.low[r]); });
        block.sync();
        const Window<true> window{p, place, key0 + warp_row, row0, reach_of(p, place.s)};
        Scores<T, kTiles> at;
        scores_of<Full>(at, window, k, warp_row, queries.q, depth_of(p.d));
        add_scores(at.dp, v, warp_row, queries.d_o, depth_of(p.dv));
        if constexpr (Second) {
          add_scores(at.e, c, warp_row, queries.d_o, depth_of(p.dv));
          add_scores(at.tr, k, warp_row, queries.a, depth_of(p.d));
          add_scores(at.tr, b, warp_row, queries.q, depth_of(p.d));
        }
        differentiate<Full, Second>(at, window, known, 0);
        if (p.grad_k) {
          add_weighted(grad_k, at.outer, queries.q, first, p.twice);
          if constexpr (Second) add_weighted(grad_k, at.inner, queries.a, first, p.twice);
        }
        if (p.grad_v) add_weighted(grad_v, at.weights, queries.d_o, first, p.twice);
      }
    const int64_t mine = key0 + warp_row;
    store_rows<S>(p.grad_k, offset_of(p.grad_k, place.seq, place.kv_head, place.s.k0), mine, place.s.m, first, p.d,
               static_cast<T>(p.scale), grad_k);
    store_rows<S>(p.grad_v, offset_of(p.grad_v, place.seq, place.kv_head, place.s.k0), mine, place.s.m, first, p.dv, T{1},
               grad_v);
  }
};

}  // namespace metattn::cuda
