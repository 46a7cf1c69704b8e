// contract.h for float and double, all in that type.
#pragma once

#include "gemm.h"
#include "key_sums.h"

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
// T: float or double.
template <class T>
struct PackedRows {
  T* data = nullptr;
  int64_t width = 0, wide = 0, panel = 0;

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
  T dot(int64_t r, const T* other) const {
    Vec<T> total = {};
    for (int64_t c = 0; c < wide; c += panel)
      for (int64_t i = 0; i < panel; i += kLanes<T>) total += load(data + c * kRows + r * panel + i) * load(other + c + i);
    return sum<T>(total);
  }
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

  // Into the natural block, and zeros up to the next multiple of kLanes.
  bool load_keys(const View& view, int64_t seq, int64_t kv_head, int64_t first, int64_t keys, int64_t block, T* row,
                 bool* strange) {
    T* const natural_block = block_at(block);
    if (wide == panel) load_wide_rows(view, offset_of(view, seq, kv_head, first), keys, width, wide, natural_block);
    for (int64_t key = 0; wide != panel && key < keys; ++key) {
      load_wide_row(view, offset_of(view, seq, kv_head, first + key), width, wide, row);
      for (int64_t c = 0; c < wide; c += panel) memcpy(natural_block + c * kKeys + key * panel, row + c, sizeof(T) * panel);
    }
    for (int64_t key = keys; key < round_up(keys, kLanes<T>); ++key) erase(block, key);
    Bits<T> found = {};
    for (int64_t c = 0; c < wide; c += panel)
      for (int64_t i = 0; i < keys * panel; i += kLanes<T>) found |= strange_lanes<T>(load(natural_block + c * kKeys + i));
    if (!any_set(found)) return false;
    for (int64_t key = 0; key < keys; ++key)
      for (int64_t c = 0; c < wide; c += panel) strange[key] |= !finite_row(natural_block + c * kKeys + key * panel, panel);
    return true;
  }
  void erase(int64_t block, int64_t key) {
    for (int64_t c = 0; c < wide; c += panel) memset(block_at(block) + c * kKeys + key * panel, 0, sizeof(T) * panel);
  }
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

template <class T>
static void multiply_scores(const Tile& tile, const PackedRows<T>& rows, const PackedKeys<T>& keys, int64_t block, T* c,
                            bool accumulate) {
  gemm(tile.rows, tile.keys, rows.width, rows.rows(), keys.over_features(block), c, kKeys, accumulate);
}

template <class T>
struct WeightedSums {
  static WeightedSums take(Arena&, const Params&, bool /*output*/ = false) { return {}; }
  WeightedSums in_two_parts() const { return {}; }

  static constexpr bool kRounds = false;
  bool knows_sums() const { return false; }
  void put(T* weights, int64_t r, int64_t j, Vec<T> weight, Vec<T>& /*added*/) const { store(weights + r * kKeys + j, weight); }
  void over_keys_put(const Tile& tile, const T* weights, const PackedKeys<T>& keys, int64_t block, T* sums) const {
    over_keys(tile, weights, keys, block, sums);
  }

  void over_keys(const Tile& tile, const T* weights, const PackedKeys<T>& keys, int64_t block, T* sums,
                 T* /*lacking*/ = nullptr) const {
    const Operand<T> by = row_major(weights, kKeys);
    if constexpr (sizeof(T) == sizeof(float)) {
      if (by_twos<T>(keys.width))
        return gemm<Read::kTwoAtOnce>(tile.rows, kLanes<T>, tile.keys, by, keys.over_keys(block), sums, keys.wide, true);
    }
    gemm(tile.rows, keys.width, tile.keys, by, keys.over_keys(block), sums, keys.wide, true);
  }
  static void finish_over_keys(T* sums, int64_t rows, int64_t width) {
    if (!by_twos<T>(width)) return;
    for (int64_t r = 0; r < rows; ++r, sums += kLanes<T>) store(sums, sums_of_twos<T>(load(sums)));
  }
};

template <class T>
struct KeySums : SumsOfKeys<T> {
  static KeySums take(Arena& arena, bool wanted, int64_t blocks, int64_t width, int64_t terms) {
    const int64_t wide = padded<T>(width);
    // turned, where that leaves fewer lanes empty
    const bool turned = wide == panel_of<T>(width) && 4 * width <= 3 * wide;
    return {{LongSums<T>::take(arena, wanted, blocks * kKeys * wide, terms), width, wide, width, turned}};
  }
  void add(const Tile& tile, const T* weights, const WeightedSums<T>&, const PackedRows<T>& rows, int64_t block,
           bool /*cancel*/) {
    constexpr int64_t kTwo = 2 * kLanes<T>;  // a dozen rows of so many fit the registers
    if (this->turned)
      gemm<Read::kTransposed>(this->width, tile.keys, tile.rows, rows.turned(), Panels<T>{weights, kTwo, kTwo, kKeys},
                              this->of_block(block), kKeys, true);
    else
      gemm<Read::kTransposed>(tile.keys, this->width, tile.rows, transposed(weights, kKeys), rows.columns(),
                              this->of_block(block), this->wide, true);
  }
};

}  // namespace metattn::METATTN_ISA
