// Which queries attend to which keys, and the tile of both that is worked on.
#pragma once

#include "elements.h"
#include "geometry.h"

namespace metattn::METATTN_ISA {

// Tile size: query rows × keys. More keys at a time where products are so fast that sums over them cost more to fetch and
// put back.
constexpr int64_t kRows = 96;
#ifdef METATTN_PAIRS
constexpr int64_t kKeys = 128;
#else
constexpr int64_t kKeys = 64;
#endif

// Heads up to this width make little of each row and key: what follows a product costs as much as the product.
constexpr int64_t kNarrow = 32;
static inline bool is_narrow(const Params& p) { return p.d <= kNarrow && p.dv <= kNarrow; }

// Rows of a tile, at most kRows: few where little is made of each, so that a tile's arrays stay near.
static inline int64_t rows_at_once(const Params& p) {
#ifdef METATTN_PAIRS
  static_cast<void>(p);
  return kRows;
#else
  return is_narrow(p) ? kRows / 2 : kRows;
#endif
}

static inline bool mask_keeps(const Params& p, int64_t seq, int64_t head, int64_t i, int64_t j) {
  return !p.mask || p.mask.data[offset_of(p.mask, seq, head, i) + j * p.mask.stride[3]] != 0;
}

template <class T>
static inline bool bias_keeps(const Params& p, int64_t seq, int64_t head, int64_t i, int64_t j) {
  return !p.bias || load_scalar<T>(p.bias, offset_of(p.bias, seq, head, i) + j * p.bias.stride[3]) != -kInfinity<T>;
}

template <class T>
static bool attends(const Params& p, const Sequence& s, int64_t seq, int64_t head, int64_t i, int64_t j) {
  const Range range = attended_keys(p, s, i);
  return j >= range.lo && j < range.hi && mask_keeps(p, seq, head, i, j) && bias_keeps<T>(p, seq, head, i, j);
}

// Whether a query attends to nothing. Asked for rows that hold an infinity or NaN and have a sink: without one, the
// log-sum-exp tells.
template <class T>
static bool dead_row(const Params& p, const Sequence& s, int64_t seq, int64_t head, int64_t i) {
  for (int64_t j = 0; j < s.m; ++j)
    if (attends<T>(p, s, seq, head, i, j)) return false;
  return true;
}

// Whether no query of any head that reads this key attends to it. Asked for keys that hold an infinity or NaN.
template <class T>
static bool dead_key(const Params& p, int64_t seq, int64_t kv_head, const Sequence& s, int64_t j) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    // a mask, or a bias, of keys alone says at once that a key is padding
    if (p.mask && p.mask.stride[2] == 0 && !mask_keeps(p, seq, head, 0, j)) continue;
    if (p.bias && p.bias.stride[2] == 0 && !bias_keeps<T>(p, seq, head, 0, j)) continue;
    for (int64_t i = 0; i < s.n; ++i)
      if (attends<T>(p, s, seq, head, i, j)) return false;
  }
  return true;
}

struct Tile {
  int64_t seq, head, kv_head;
  Sequence s;
  int64_t row0, rows;  // within the sequence
  int64_t key0, keys;
  int64_t cols;        // keys rounded up to whole vectors: what elementwise passes walk
  bool partial;        // position masks some of it
};

template <class T>
static inline void place_keys(const Params& p, Tile& tile, int64_t key0, int64_t key_end) {
  tile.key0 = key0;
  tile.keys = smaller(kKeys, key_end - key0);
  tile.cols = round_up(tile.keys, kLanes<T>);
  tile.partial = tile_cover(p, tile.s, tile.row0, tile.rows, tile.key0, tile.keys) != Cover::full;
}

// Row r of a tile, zeros behind it, and zeros alone where it is `dead` (bit set) or, with sinks, where it holds an infinity
// or a NaN and attends to nothing: what it holds can never leak.
template <class T>
static inline void load_live_row(const Params& p, const View& view, const Tile& tile, int64_t r, const bool* dead,
                                 int64_t width, int64_t wide, T* row) {
  const int64_t i = tile.row0 + r;
  bool live = dead == nullptr || !dead[r];
  if (live) {
    load_wide_row(view, offset_of(view, tile.seq, tile.head, tile.s.q0 + i), width, wide, row);
    live = !p.sinks || finite_row(row, wide) || !dead_row<T>(p, tile.s, tile.seq, tile.head, i);
  }
  if (!live)
    for (int64_t c = 0; c < wide; ++c) row[c] = 0;
}

}  // namespace metattn::METATTN_ISA
