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

// A block of rows as panels [padded(width) / panel][kRows][panel]: operand A and operand B of a product over rows.
// `dead` rows (bit set) become zeros, so that what they hold can never leak. T: float or double.
template <class T>
struct PackedRows {
  T* data = nullptr;
  int64_t width = 0, wide = 0, panel = 0;

  // summed_over: whether products sum over these rows.
  static PackedRows take(Arena& arena, const View& view, int64_t width, bool /*summed_over*/) {
    const int64_t wide = padded<T>(width);
    return {view ? arena.take<T>(kRows * wide) : nullptr, width, wide, panel_of<T>(width)};
  }
  explicit operator bool() const { return data != nullptr; }
  Operand<T> rows() const { return panels(data, kRows, panel); }
  Panels<T> columns() const { return {data, panel, kRows * panel, panel}; }
  // Operand A of a product over rows, where there is a single panel.
  Operand<T> turned() const { return transposed(data, panel); }

  void pack(const Params& p, const View& view, const Tile& tile, const bool* dead, T* row) {
    T* const whole = wide == panel ? data : nullptr;  // rows of a single panel are loaded in place
    if (whole != nullptr && !p.sinks) {
      load_wide_rows(view, offset_of(view, tile.seq, tile.head, tile.s.q0 + tile.row0), tile.rows, width, wide, whole);
      for (int64_t r = 0; dead != nullptr && r < tile.rows; ++r)
        if (dead[r]) memset(whole + r * panel, 0, sizeof(T) * panel);
      return;
    }
    for (int64_t r = 0; r < tile.rows; ++r) {
      load_live_row(p, view, tile, r, dead, width, wide, whole != nullptr ? whole + r * panel : row);
      if (whole != nullptr) continue;
      for (int64_t c = 0; c < wide; c += panel) memcpy(data + c * kRows + r * panel, row + c, sizeof(T) * panel);
    }
  }
  // Σ over columns of this row times `other`, a padded plain row.
  T dot(int64_t r, const T* other) const {
    Vec<T> total = {};
    for (int64_t c = 0; c < wide; c += panel)
      for (int64_t i = 0; i < panel; i += kLanes<T>) total += load(data + c * kRows + r * panel + i) * load(other + c + i);
    return sum<T>(total);
  }
  // The same of a plain row of `width` elements and no more.
  T dot_bare(int64_t r, const T* other) const {
    if (wide == kLanes<T>) return sum<T>(load(data + r * panel) * load_first(other, width));
    Vec<T> total = {};
    for (int64_t c = 0; c < width; c += panel)
      for (int64_t i = 0; i < panel && c + i < width; i += kLanes<T>)
        total += load(data + c * kRows + r * panel + i) * load_first(other + c + i, width - c - i);
    return sum<T>(total);
  }
};

// Key blocks of a unit, each as panels over the width (natural: [padded(width) / panel][kKeys][panel], for products over
// keys) and as panels over the keys (turned: [kKeys / kKeyPanel][width][kKeyPanel], for scores), whichever is wanted.
// Where two natural keys fit a vector, they share it (by_twos: [kKeys / 2][kLanes], lanes 2c and 2c + 1 for column c), and
// so do the two parts of a sum over keys.
template <class T>
static inline bool by_twos(int64_t width) {
  return sizeof(T) == sizeof(float) && 2 * width <= kLanes<T>;
}

template <class T>
struct PackedKeys {
  static constexpr int64_t kKeyPanel = kPanelVectors * kLanes<T>;
  static_assert(kKeys % kKeyPanel == 0);

  T* natural = nullptr;
  T* turned = nullptr;
  T* loaded = nullptr;  // where a block is loaded to when natural ones are not kept as they come
  int64_t width = 0, wide = 0, panel = 0;

  static PackedKeys take(Arena& arena, const View& view, int64_t width, int64_t blocks, bool natural, bool turned) {
    PackedKeys packed;
    packed.width = width;
    packed.wide = padded<T>(width);
    packed.panel = panel_of<T>(width);
    if (view && natural) packed.natural = arena.take<T>(blocks * kKeys * packed.wide);
    if (view && turned) packed.turned = arena.take<T>(blocks * kKeys * width);
    if (view && (by_twos<T>(width) || !natural)) packed.loaded = arena.take<T>(kKeys * packed.wide);
    return packed;
  }
  explicit operator bool() const { return natural != nullptr || turned != nullptr; }
  T* natural_block(int64_t block) const { return natural + block * kKeys * wide; }
  T* block_at(int64_t block) const { return loaded != nullptr ? loaded : natural_block(block); }
  Panels<T> over_keys(int64_t block) const { return {natural_block(block), panel, kKeys * panel, panel}; }
  Panels<T> over_features(int64_t block) const {
    return {turned + block * kKeys * width, kKeyPanel, width * kKeyPanel, kKeyPanel};
  }

  // Loads keys [first, first + keys) of a sequence into the natural block, and zeros up to the next multiple of kLanes.
  // Marks keys that hold an infinity or a NaN, and says whether there are any.
  bool load_keys(const View& view, int64_t seq, int64_t kv_head, int64_t first, int64_t keys, int64_t block, T* row,
                 bool* strange) {
    T* const natural_block = block_at(block);
    if (wide == panel) load_wide_rows(view, offset_of(view, seq, kv_head, first), keys, width, wide, natural_block);
    for (int64_t key = 0; wide != panel && key < keys; ++key) {
      load_wide_row(view, offset_of(view, seq, kv_head, first + key), width, wide, row);
      for (int64_t c = 0; c < wide; c += panel)
        memcpy(natural_block + c * kKeys + key * panel, row + c, sizeof(T) * panel);
    }
    for (int64_t key = keys; key < round_up(keys, kLanes<T>); ++key) erase(block, key);
    Bits<T> found = {};
    for (int64_t c = 0; c < wide; c += panel)
      for (int64_t i = 0; i < keys * panel; i += kLanes<T>) found |= strange_lanes<T>(load(natural_block + c * kKeys + i));
    if (!any_set(found)) return false;
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t c = 0; c < wide; c += panel)
        strange[key] |= !finite_row(natural_block + c * kKeys + key * panel, panel);
    return true;
  }
  void erase(int64_t block, int64_t key) {
    for (int64_t c = 0; c < wide; c += panel) memset(block_at(block) + c * kKeys + key * panel, 0, sizeof(T) * panel);
  }
  // Makes of what was loaded what is wanted.
  void finish(int64_t block, int64_t keys) {
    if (natural != nullptr && loaded != nullptr) pair_keys(natural_block(block), keys);
    if (turned != nullptr) turn(block, keys);
  }
  void pair_keys(T* target, int64_t keys) {
    for (int64_t key = 0; key < keys; key += 2, target += wide)
      store(target, side_by_side<T>(load(loaded + key * wide), load(loaded + (key + 1) * wide)));
  }
  void turn(int64_t block, int64_t keys) {
    const T* source = block_at(block);
    for (int64_t key = 0; key < keys; key += kLanes<T>) {
      T* target = turned + block * kKeys * width + key / kKeyPanel * width * kKeyPanel + key % kKeyPanel;
      for (int64_t c = 0; c < width; c += kLanes<T>) {
        Vec<T> square[kLanes<T>];
        const T* corner = source + c / panel * panel * kKeys + key * panel + c % panel;
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = load(corner + i * panel);
        transpose<T>(square);
        const int64_t count = smaller(kLanes<T>, width - c);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes<T>; ++i)
          if (i < count) store(target + (c + i) * kKeyPanel, square[i]);
      }
    }
  }
};

// Packs one block of keys for all the given tensors, and zeroes the keys that nobody may see.
template <class A, int Count>
static void pack_key_block(const Params& p, int64_t seq, int64_t kv_head, const Sequence& s, int64_t key0, int64_t keys,
                           int64_t block, PackedKeys<A>* const (&packed)[Count], const View* const (&views)[Count],
                           Compute<A>* row) {
  bool strange[kKeys] = {}, any = false;
  for (int t = 0; t < Count; ++t)
    if (*packed[t]) any |= packed[t]->load_keys(*views[t], seq, kv_head, s.k0 + key0, keys, block, row, strange);
  for (int64_t key = 0; any && key < keys; ++key) {
    if (!strange[key] || !dead_key<Compute<A>>(p, seq, kv_head, s, key0 + key)) continue;
    for (int t = 0; t < Count; ++t)
      if (*packed[t]) packed[t]->erase(block, key);
  }
  for (int t = 0; t < Count; ++t)
    if (*packed[t]) packed[t]->finish(block, keys);
}

// C [kRows][kKeys] (+)= rows·keysᵀ of a tile.
template <class T>
static void multiply_scores(const Tile& tile, const PackedRows<T>& rows, const PackedKeys<T>& keys, int64_t block, T* c,
                            bool accumulate) {
  gemm(tile.rows, tile.keys, rows.width, rows.rows(), keys.over_features(block), c, kKeys, accumulate);
}

// Products of a tile of weights [kRows][kKeys], summed over its keys or its rows.
template <class T>
struct WeightedSums {
  // output: the sums are O.
  static WeightedSums take(Arena&, const Params&, bool /*output*/ = false) { return {}; }
  WeightedSums in_two_parts() const { return {}; }

  // Whether weights are rounded, which put may make larger.
  static constexpr bool kRounds = false;
  bool knows_sums() const { return false; }
  // Weights from column j of row r on, for over_keys_put; `added` gains by how much they are multiplied as larger ones.
  void put(T* weights, int64_t r, int64_t j, Vec<T> weight, Vec<T>& /*added*/) const { store(weights + r * kKeys + j, weight); }
  void over_keys_put(const Tile& tile, const T* weights, const PackedKeys<T>& keys, int64_t block, T* sums) const {
    over_keys(tile, weights, keys, block, sums);
  }

  // sums [kRows][padded(width)] += weights·keys; lacking: of CommonKeys.
  void over_keys(const Tile& tile, const T* weights, const PackedKeys<T>& keys, int64_t block, T* sums,
                 T* /*lacking*/ = nullptr) const {
    const Operand<T> by = row_major(weights, kKeys);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (by_twos<T>(keys.width))
        return gemm<Read::kTwoAtOnce>(tile.rows, kLanes<T>, tile.keys, by, keys.over_keys(block), sums, keys.wide, true);
    }
    gemm(tile.rows, keys.width, tile.keys, by, keys.over_keys(block), sums, keys.wide, true);
  }
  // Sums over all keys are in their place.
  static void finish_over_keys(T* sums, int64_t rows, int64_t width) {
    if (!by_twos<T>(width)) return;
    for (int64_t r = 0; r < rows; ++r, sums += kLanes<T>) store(sums, sums_of_twos<T>(load(sums)));
  }
};

// to += from
template <class T>
static inline void add_all(T* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, load(to + i) + load(from + i));
}

// Sums of many terms, in whole vectors. A float loses digits of what is added to a long sum: every kSpan terms or so, what was
// gathered is put aside.
template <class T>
struct LongSums {
  T *data = nullptr, *aside = nullptr;
  int64_t terms = 0;

  static LongSums take(Arena& arena, bool wanted, int64_t size, int64_t terms) {
    if (!wanted) return {};
    T* const data = arena.take<T>(size);
    return {data, sizeof(T) == sizeof(float) && terms > 2 * kSpan ? arena.take<T>(size) : nullptr};
  }
  void clear(int64_t size) {
    memset(data, 0, sizeof(T) * size);
    if (aside != nullptr) memset(aside, 0, sizeof(T) * size);
    terms = 0;
  }
  void gained(int64_t more, int64_t size) {
    if (aside == nullptr || (terms += more) < kSpan) return;
    add_all(aside, data, size);
    memset(data, 0, sizeof(T) * size);
    terms = 0;
  }
  void finish(int64_t size) {
    if (aside != nullptr) add_all(data, aside, size);
  }
};

// What sums over keys, whose weights cancel what all keys share, lack where weights are rounded.
template <class A>
struct CommonKeys {
  Compute<A>* lacking = nullptr;
  static CommonKeys take(Arena&, bool /*wanted*/, const View&, int64_t /*width*/) { return {}; }
  void begin(const Params&, const View&, const Tile&, const bool* /*dead*/, Compute<A>* /*row*/) {}
  void finish(int64_t /*rows*/, const Compute<A>* /*known*/, Compute<A>* /*sums*/) const {}
};

// Sums over rows, for each key of a unit: [blocks][kKeys][padded(width)]; or turned, [blocks][width][kKeys], where that
// leaves fewer lanes empty.
template <class T>
struct KeySums {
  LongSums<T> sums;
  int64_t width = 0, wide = 0;
  bool turned = false;

  // terms: most rows of a sum.
  static KeySums take(Arena& arena, bool wanted, int64_t blocks, int64_t width, int64_t terms) {
    const int64_t wide = padded<T>(width);
    return {LongSums<T>::take(arena, wanted, blocks * kKeys * wide, terms), width, wide,
            wide == panel_of<T>(width) && 4 * width <= 3 * wide};
  }
  int64_t size(int64_t keys) const { return turned ? round_up(keys, kKeys) * width : keys * wide; }
  void clear(int64_t keys) { sums.clear(size(keys)); }
  void gained(int64_t rows, int64_t keys) { sums.gained(rows, size(keys)); }
  void finish(int64_t keys) { sums.finish(size(keys)); }
  // cancel: weights cancel what all rows may share.
  void add(const Tile& tile, const T* weights, const WeightedSums<T>&, const PackedRows<T>& rows, int64_t block,
           bool /*cancel*/) {
    constexpr int64_t kTwo = 2 * kLanes<T>;  // a dozen rows of so many fit the registers
    if (turned)
      gemm<Read::kTransposed>(width, tile.keys, tile.rows, rows.turned(), Panels<T>{weights, kTwo, kTwo, kKeys},
                              sums.data + block * kKeys * width, kKeys, true);
    else
      gemm<Read::kTransposed>(tile.keys, width, tile.rows, transposed(weights, kKeys), rows.columns(),
                              sums.data + block * kKeys * wide, wide, true);
  }
  // The sums of kLanes keys, counted from the unit's first, from a multiple of that on: [kLanes][padded(width)], in `rows`
  // or where they are.
  const T* of_keys(int64_t first, T* rows) const {
    if (!turned) return sums.data + first * wide;
    const T* corner = sums.data + first / kKeys * kKeys * width + first % kKeys;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      Vec<T> square[kLanes<T>];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<T>; ++i) square[i] = c + i < width ? load(corner + (c + i) * kKeys) : Vec<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes<T>; ++i) store(rows + i * wide + c, square[i]);
    }
    return rows;
  }
};

}  // namespace metattn::METATTN_ISA
