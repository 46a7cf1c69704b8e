// Blocks of rows and of keys as the products want them, and the products themselves, by kind of arithmetic: float and
// double, all in that type, here; Pairs, whose operands are bfloat16, in packed_pairs.h. The maps know no difference.
#pragma once

#include "gemm.h"
#include "masks.h"

namespace metattn::METATTN_ISA {

template <class A>
struct ComputeOf {
  using type = A;
};
template <class A>
using Compute = typename ComputeOf<A>::type;

// What an arithmetic needs of a thread while its products run.
template <class A>
struct Scope {};

// A block of rows as panels [width / kPanel][kRows][kPanel]: operand A (panels()) and operand B of a product over rows.
// `dead` rows (bit set) become zeros, so that what they hold can never leak. T: float or double.
template <class T>
struct PackedRows {
  T* data = nullptr;
  int64_t width = 0;

  // summed_over: whether products sum over these rows.
  static PackedRows take(Arena& arena, const View& view, int64_t width, bool /*summed_over*/) {
    PackedRows packed;
    packed.width = width;
    if (view) packed.data = arena.take<T>(kRows * padded<T>(width));
    return packed;
  }
  explicit operator bool() const { return data != nullptr; }
  Operand<T> operand() const { return panels(data, kRows); }
  static constexpr int64_t panel_stride() { return kRows * kPanel<T>; }

  void pack(const Params& p, const View& view, const Tile& tile, const bool* dead, T* row) {
    const int64_t wide = padded<T>(width);
    for (int64_t c = width; c < wide; ++c) row[c] = 0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      load_live_row(p, view, tile, r, dead, width, row);
      for (int64_t c = 0; c < wide; c += kPanel<T>)
        memcpy(data + c * kRows + r * kPanel<T>, row + c, sizeof(T) * kPanel<T>);
    }
  }
  // Σ over columns of this row times `other`, a padded plain row.
  T dot(int64_t r, const T* other) const {
    Vec<T> total = {};
    for (int64_t c = 0; c < padded<T>(width); c += kPanel<T>) {
      const T* mine = data + c * kRows + r * kPanel<T>;
      for (int64_t i = 0; i < kPanel<T>; i += kLanes<T>) total += load(mine + i) * load(other + c + i);
    }
    return sum<T>(total);
  }
};

// Key blocks of a unit, each as panels over the width (natural: [width / kPanel][kKeys][kPanel], for products over
// keys) and as panels over the keys (turned: [kKeys / kPanel][width][kPanel], for scores), whichever is wanted.
template <class T>
struct PackedKeys {
  T* natural = nullptr;
  T* turned = nullptr;
  T* loaded = nullptr;  // where a block is loaded to when natural ones are not kept
  int64_t width = 0;

  static PackedKeys take(Arena& arena, const View& view, int64_t width, int64_t blocks, bool natural, bool turned) {
    PackedKeys packed;
    packed.width = width;
    if (view && natural) packed.natural = arena.take<T>(blocks * kKeys * padded<T>(width));
    if (view && turned) packed.turned = arena.take<T>(blocks * kKeys * width);
    if (view && turned && !natural) packed.loaded = arena.take<T>(kKeys * padded<T>(width));
    return packed;
  }
  explicit operator bool() const { return natural != nullptr || turned != nullptr; }
  T* natural_block(int64_t block) const {
    return natural == nullptr ? loaded : natural + block * kKeys * padded<T>(width);
  }
  T* turned_block(int64_t block) const { return turned + block * kKeys * width; }
  static constexpr int64_t natural_stride() { return kKeys * kPanel<T>; }
  int64_t turned_stride() const { return width * kPanel<T>; }

  // Loads keys [first, first + keys) of a sequence into the natural block; the rest of it is zeros. Marks keys that hold
  // an infinity or a NaN.
  void load_keys(const View& view, int64_t seq, int64_t kv_head, int64_t first, int64_t keys, int64_t block, T* row,
                 bool* strange) {
    for (int64_t c = width; c < padded<T>(width); ++c) row[c] = 0;
    for (int64_t key = 0; key < keys; ++key) {
      load_row(view, offset_of(view, seq, kv_head, first + key), view.stride[3], width, row);
      strange[key] |= !finite_row(row, width);
      T* target = natural_block(block) + key * kPanel<T>;
      for (int64_t c = 0; c < padded<T>(width); c += kPanel<T>)
        memcpy(target + c * kKeys, row + c, sizeof(T) * kPanel<T>);
    }
    for (int64_t key = keys; key < kKeys; ++key) erase(block, key);
  }
  void erase(int64_t block, int64_t key) {
    T* target = natural_block(block) + key * kPanel<T>;
    for (int64_t c = 0; c < padded<T>(width); c += kPanel<T>) memset(target + c * kKeys, 0, sizeof(T) * kPanel<T>);
  }
  // Turns what was loaded.
  void finish(int64_t block) {
    if (turned == nullptr) return;
    const T* source = natural_block(block);
    for (int64_t key = 0; key < kKeys; key += kLanes<T>) {
      T* target = turned_block(block) + key / kPanel<T> * turned_stride() + key % kPanel<T>;
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        Vec<T> square[kLanes<T>];
        const T* corner = source + c / kPanel<T> * natural_stride() + key * kPanel<T> + c % kPanel<T>;
        for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = load(corner + i * kPanel<T>);
        transpose<T>(square);
        for (int64_t i = 0; i < kLanes<T> && c + i < width; ++i) store(target + (c + i) * kPanel<T>, square[i]);
      }
    }
  }
};

// Packs one block of keys for all the given tensors, and zeroes the keys that nobody may see.
template <class A, int Count>
static void pack_key_block(const Params& p, int64_t seq, int64_t kv_head, const Sequence& s, int64_t key0, int64_t keys,
                           int64_t block, PackedKeys<A>* const (&packed)[Count], const View* const (&views)[Count],
                           Compute<A>* row) {
  bool strange[kKeys] = {};
  for (int t = 0; t < Count; ++t)
    if (*packed[t]) packed[t]->load_keys(*views[t], seq, kv_head, s.k0 + key0, keys, block, row, strange);
  for (int64_t key = 0; key < keys; ++key) {
    if (!strange[key] || !dead_key<Compute<A>>(p, seq, kv_head, s, key0 + key)) continue;
    for (int t = 0; t < Count; ++t)
      if (*packed[t]) packed[t]->erase(block, key);
  }
  for (int t = 0; t < Count; ++t)
    if (*packed[t]) packed[t]->finish(block);
}

// C [kRows][kKeys] (+)= rows·keysᵀ of a tile.
template <class T>
static void multiply_scores(const Tile& tile, const PackedRows<T>& rows, const PackedKeys<T>& keys, int64_t block, T* c,
                            bool accumulate) {
  gemm(tile.rows, tile.keys, rows.width, rows.operand(), keys.turned_block(block), keys.turned_stride(), c, kKeys,
       accumulate);
}

// Products of a tile of weights [kRows][kKeys], summed over its keys or its rows.
template <class T>
struct WeightedSums {
  static WeightedSums take(Arena&, const Params&) { return {}; }

  // Weights from column j of row r on, for over_keys_put.
  void put(T* weights, int64_t r, int64_t j, Vec<T> weight) const { store(weights + r * kKeys + j, weight); }
  void over_keys_put(const Tile& tile, const T* weights, const PackedKeys<T>& keys, int64_t block, T* sums) const {
    over_keys(tile, weights, keys, block, sums);
  }

  // sums [kRows][padded(width)] += weights·keys
  void over_keys(const Tile& tile, const T* weights, const PackedKeys<T>& keys, int64_t block, T* sums) const {
    gemm(tile.rows, keys.width, tile.keys, row_major(weights, kKeys), keys.natural_block(block), keys.natural_stride(),
         sums, padded<T>(keys.width), true);
  }
};

// Sums over rows, for each key of a unit: [blocks][kKeys][padded(width)].
template <class T>
struct KeySums {
  T* data = nullptr;
  int64_t width = 0;

  static KeySums take(Arena& arena, bool wanted, int64_t blocks, int64_t width) {
    return {wanted ? arena.take<T>(blocks * kKeys * padded<T>(width)) : nullptr, width};
  }
  explicit operator bool() const { return data != nullptr; }
  void clear(int64_t blocks) { memset(data, 0, sizeof(T) * blocks * kKeys * padded<T>(width)); }
  void add(const Tile& tile, const T* weights, const WeightedSums<T>&, const PackedRows<T>& rows, int64_t block) {
    gemm<true>(tile.keys, width, tile.rows, transposed(weights, kKeys), rows.data, rows.panel_stride(),
               data + block * kKeys * padded<T>(width), padded<T>(width), true);
  }
  // The sums of one key, counted from the unit's first.
  const T* of_key(int64_t key, T* /*row*/) const { return data + key * padded<T>(width); }
};

}  // namespace metattn::METATTN_ISA
