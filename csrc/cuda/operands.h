// Where a block works, and the tiles that it brings into shared memory: of keys, of queries, and of what is shaped like them.
#pragma once

#include "cuda/derivatives.h"

namespace metattn::cuda {

// Where a block of queries is; whether it has any.
static METATTN_DEVICE bool place_rows(const Params& p, const Block& block, Place& place, int64_t& row0) {
  const int64_t rows = kWarpRows * block.warps(), blocks = (p.n + rows - 1) / rows;
  const int64_t pair = block.index() / blocks;
  place.seq = pair / p.heads;
  place.head = pair % p.heads;
  place.kv_head = place.head / (p.heads / p.kv_heads);
  place.s = sequence(p, place.seq);
  row0 = (blocks - 1 - block.index() % blocks) * rows;  // the last have the most keys under a causal mask: first
  return row0 < place.s.n;
}

// The keys that rows [row0, row0 + rows) attend to.
static METATTN_DEVICE Range keys_of_rows(const Params& p, const Place& place, int64_t row0, int64_t rows) {
  const int64_t last = smaller(row0 + rows, place.s.n) - 1;
  return {attended_keys(p, place.s, row0).lo, attended_keys(p, place.s, last).hi};
}

// Tiles of keys, values and their tangents, in shared memory; with two stages, so are those of the next block.
template <class S, int Tiles>
struct KeyTiles {
  SharedTile<S> k, b, v, c;  // of the first stage
  uint32_t* seen;
  int stages;
  int64_t step;  // elements from a stage to the next

  static METATTN_HD KeyTiles take(Pieces& pieces, const Params& p, int ld, bool with_v, bool tangents, int stages) {
    KeyTiles tiles;
    tiles.seen = pieces.take<uint32_t>(2);
    const size_t before = pieces.used;
    tiles.k = pieces.tile<S>(true, 8 * Tiles, ld);
    tiles.b = pieces.tile<S>(tangents && p.t_k, 8 * Tiles, ld);
    tiles.v = pieces.tile<S>(with_v, 8 * Tiles, ld);
    tiles.c = pieces.tile<S>(tangents && with_v && p.t_v, 8 * Tiles, ld);
    tiles.stages = stages;
    tiles.step = static_cast<int64_t>((pieces.used - before) / sizeof(S));
    pieces.take<S>((stages - 1) * tiles.step);
    return tiles;
  }
  METATTN_DEVICE KeyTiles at(int stage) const {
    const int64_t by = stage * step;
    return {k.from(by), b.from(by), v.from(by), c.from(by), seen, 1, step};
  }
  // Begins to copy the keys [key0, …) of [range.lo, range.hi).
  METATTN_DEVICE void start(Block& block, const Params& p, const Place& place, Range range, int64_t key0) const {
    const auto one = [&](SharedTile<S> tile, const View& view, int64_t width) {
      start_tile(block, tile, 8 * Tiles, view, offset_of(view, place.seq, place.kv_head, place.s.k0), key0, range.lo, range.hi,
                 width);
    };
    one(k, p.k, p.d);
    one(b, p.t_k, p.d);
    one(v, p.v, p.dv);
    one(c, p.t_v, p.dv);
    block.end_group();
  }
  METATTN_DEVICE void round(const Block& block) const { round_tiles(block, 8 * Tiles, {k, b, v, c}); }
  // Lets all threads see what each has waited for. Whether unseen keys must be cleared.
  template <bool Full>
  METATTN_DEVICE bool finish(Block& block, const Params& p) const {
    round(block);
    if (Full && (p.mask || p.bias)) {
      bool met = met_strange(block, k, 8 * Tiles);
      met |= met_strange(block, b, 8 * Tiles);
      met |= met_strange(block, v, 8 * Tiles);
      met |= met_strange(block, c, 8 * Tiles);
      return block.any(met);
    }
    block.sync();
    return false;
  }
  // visit(tiles, key0, whether unseen keys must be cleared) for each block of the keys of a range, and rest(visits) after it.
  template <bool Full, class Visit, class Rest>
  METATTN_DEVICE void sweep(Block& block, const Params& p, const Place& place, Range range, Visit visit, Rest rest) const {
    constexpr int64_t kStep = 8 * Tiles;
    const int64_t first = range.lo / kStep * kStep;
    const int visits = range.hi > first ? static_cast<int>((range.hi - first + kStep - 1) / kStep) : 0;
    for (int index = 1 - stages; index < visits; ++index) {
      const int next = index + stages - 1;
      if (next < visits) at(next % stages).start(block, p, place, range, first + next * kStep);
      else block.end_group();
      if (index < 0) continue;
      if (stages == 2) block.template wait<1>();
      else block.template wait<0>();
      const KeyTiles now = at(index % stages);
      const bool unclean = now.template finish<Full>(block, p);
      visit(now, first + index * kStep, unclean);
      rest(index + 1);
      block.sync();  // before anything is copied there
    }
  }
};

// Tiles of queries and what is shaped like them.
template <class S>
struct QueryTiles {
  SharedTile<S> q, a, d_o;

  static METATTN_HD QueryTiles take(Pieces& pieces, const Params& p, int rows, int ld, bool with_d_o, bool tangents) {
    QueryTiles tiles;
    tiles.q = pieces.tile<S>(true, rows, ld);
    tiles.a = pieces.tile<S>(tangents && p.t_q, rows, ld);
    tiles.d_o = pieces.tile<S>(with_d_o && p.d_o, rows, ld);
    return tiles;
  }
  METATTN_DEVICE QueryTiles from(int64_t elements) const { return {q.from(elements), a.from(elements), d_o.from(elements)}; }
  // Begins to copy rows [row0, row0 + rows).
  METATTN_DEVICE void start(Block& block, const Params& p, const Place& place, int64_t row0, int rows) const {
    const auto one = [&](SharedTile<S> tile, const View& view, int64_t width) {
      start_tile(block, tile, rows, view, offset_of(view, place.seq, place.head, place.s.q0), row0, 0, place.s.n, width);
    };
    one(q, p.q, p.d);
    one(a, p.t_q, p.d);
    one(d_o, p.d_o, p.dv);
    block.end_group();
  }
  METATTN_DEVICE void round(const Block& block, int rows) const { round_tiles(block, rows, {q, a, d_o}); }
  // Zeros for NaN in the idle rows; each thread has waited for what it copied.
  template <class T>
  METATTN_DEVICE void clear_idle(const Block& block, const Params& p, const Place& place, const Statistics<T>& known,
                                 int rows) const {
    const auto idle = [&](int r) { return is_idle(p, place, known.reference[r], known.log_total[r]); };
    clear_rows(block, q, rows, idle);
    clear_rows(block, a, rows, idle);
    clear_rows(block, d_o, rows, idle);
  }
};

static METATTN_DEVICE int depth_of(int64_t width) { return static_cast<int>(round_up(width, 16)); }

}  // namespace metattn::cuda
