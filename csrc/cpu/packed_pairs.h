// contract.h for Pairs: bfloat16 operands, float sums. Scores are exact products of the inputs; weights (probabilities and
// their derivatives) are rounded to bfloat16, or, where few keys would average no rounding out, taken in two parts.
//
// Derivatives of scores cancel what keys, or queries, have in common; once rounded they do not. Sums over keys therefore
// gain a mean key times what the weights' sum lacks (CommonKeys), and sums over rows the mean row of a block times what
// rounding took. A mean of rows that some weight leaves out would bring in what is masked there: a tile in which a weight
// is 0 has its weights in two parts.
#pragma once

#include <immintrin.h>

#include "packed.h"
#include "pairs.h"

namespace metattn::METATTN_ISA {

struct Pairs {};
template <>
struct ComputeOf<Pairs> {
  using type = float;
};
template <>
struct Scope<Pairs> : PairsScope {};

// Up to so many rows or keys a sum averages no rounding of its weights out: they are multiplied in two parts. O is worth
// it for longer: what rounding does to it enters D = rowsum(dO∘O), which is to cancel with dP, which is not rounded.
constexpr int64_t kFewSamples = 32, kFewForOutput = 128;

static_assert(kRows % kPairDepth == 0 && kKeys % kPairDepth == 0 && kLanes<float> == kPairTile);

static inline int64_t tiles_wide(int64_t x) { return round_up(x, kPairTile); }
static inline int64_t tiles_deep(int64_t x) { return round_up(x, kPairDepth); }

static inline __m256i load_half(const uint16_t* source) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)); }

// Tiles (pairs.h): where row r of those that hold rows of `deep` elements begins, and element c of it.
template <class U>
static inline U* tile_row(U* tiles, int64_t r, int64_t deep) {
  return tiles + r / kPairTile * kPairTile * deep + r % kPairTile * kPairDepth;
}
static inline int64_t in_tiles(int64_t c) { return c / kPairDepth * kTileElements + c % kPairDepth; }

// A row of bfloat16 as it is, with zeros behind, up to `deep` elements, into tiles; `strange` gathers the infinities and
// NaN in it.
static inline void copy_row(const View& view, int64_t offset, int64_t count, int64_t deep, uint16_t* row, __mmask32& strange) {
  const uint16_t* source = reinterpret_cast<const uint16_t*>(view.data) + offset;
  const int64_t stride = view.stride[3];
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  for (int64_t c = 0; c < deep; c += kPairDepth) {
    if (stride == 1) __builtin_prefetch(source + kRowsAhead * view.stride[2] + c);
    const int64_t left = count - c;
    const __mmask32 kept = left >= kPairDepth ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    uint16_t* const target = row + c * kPairTile;
    if (stride != 1)
      for (int64_t i = 0; i < smaller(left, kPairDepth); ++i) target[i] = source[(c + i) * stride];
    const __m512i x = _mm512_maskz_loadu_epi16(kept, stride == 1 ? source + c : target);
    strange |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    _mm512_storeu_si512(target, x);
  }
}
// total [wide width] += a row in tiles.
static inline void add_row(const uint16_t* row, int64_t width, float* total) {
  for (int64_t c = 0; c < width; c += kPairTile) store(total + c, load(total + c) + widened(load_half(row + in_tiles(c))));
}
// A total of so many rows becomes their mean; 0 where it is infinite or NaN: the sums that it is for are too.
static inline void divide_total(float* total, int64_t width, int64_t rows) {
  for (int64_t c = 0; c < width; c += kPairTile)
    store(total + c, finite_or_0<float>(load(total + c) / static_cast<float>(rows)));
}
static inline void zero_row(uint16_t* row, int64_t deep) {
  for (int64_t c = 0; c < deep; c += kPairDepth) memset(row + c * kPairTile, 0, sizeof(uint16_t) * kPairDepth);
}

// Tile of pairs [kPairTile][kPairTile][2]: successive rows of `rows` side by side, from element c on.
static inline void interleave(const uint16_t* rows, int64_t c, Vec<float> (&pairs)[kPairTile], int64_t deep) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kPairTile; ++i) {
    const uint16_t* low = tile_row(rows, 2 * i, deep) + in_tiles(c);
    const uint16_t* high = tile_row(rows, 2 * i + 1, deep) + in_tiles(c);
    const __m512i x = _mm512_cvtepu16_epi32(load_half(low)), y = _mm512_cvtepu16_epi32(load_half(high));
    pairs[i] = (Vec<float>)_mm512_or_si512(x, _mm512_slli_epi32(y, 16));  // bits: nothing is computed with them
  }
}
static inline void store_tile(const Vec<float> (&tile)[kPairTile], uint16_t* target) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < kPairTile; ++i) memcpy(target + i * kPairDepth, &tile[i], sizeof tile[i]);
}

// A block of rows as tiles [kRows][deep width], operand A of scores; and turned, [wide width][kRows], operand A of sums
// over rows.
template <>
struct PackedRows<Pairs> {
  uint16_t* data = nullptr;
  uint16_t* turned = nullptr;
  float* mean = nullptr;  // [wide width], with turned: of the block's rows
  int64_t width = 0, deep = 0;

  static PackedRows take(Arena& arena, const View& view, int64_t width, bool summed_over) {
    PackedRows packed;
    packed.width = width;
    packed.deep = tiles_deep(width);
    if (view) packed.data = arena.take<uint16_t>(kRows * packed.deep);
    if (view && summed_over) packed.turned = arena.take<uint16_t>(tiles_wide(width) * kRows);
    if (view && summed_over) packed.mean = arena.take<float>(tiles_wide(width));
    return packed;
  }
  explicit operator bool() const { return data != nullptr; }

  void pack(const Params& p, const View& view, const Tile& tile, const bool* dead, float*) {
    const int64_t rows = tiles_deep(tile.rows);
    for (int64_t r = 0; r < rows; ++r) {
      uint16_t* row = tile_row(data, r, deep);
      const int64_t i = tile.row0 + r;
      bool live = r < tile.rows && !(dead != nullptr && dead[r]);
      if (live) {
        __mmask32 strange = 0;
        copy_row(view, offset_of(view, tile.seq, tile.head, tile.s.q0 + i), width, deep, row, strange);
        live = !p.sinks || strange == 0 || !dead_row<float>(p, tile.s, tile.seq, tile.head, i);
      }
      if (!live) zero_row(row, deep);
    }
    if (turned == nullptr) return;
    memset(mean, 0, sizeof(float) * tiles_wide(width));
    for (int64_t r = 0; r < tile.rows; ++r) add_row(tile_row(data, r, deep), width, mean);
    divide_total(mean, width, tile.rows);
    for (int64_t r = 0; r < rows; r += kPairDepth) {
      for (int64_t c = 0; c < tiles_wide(width); c += kPairTile) {
        Vec<float> pairs[kPairTile];
        interleave(data + r * deep, c, pairs, deep);
        transpose<float>(pairs);
        store_tile(pairs, turned + c * kRows + r * kPairTile);
      }
    }
  }
  float dot(int64_t r, const float* other) const {
    const uint16_t* row = tile_row(data, r, deep);
    Vec<float> total = {};
    for (int64_t c = 0; c < tiles_wide(width); c += kPairTile) total += widened(load_half(row + in_tiles(c))) * load(other + c);
    return sum<float>(total);
  }
  float dot_bare(int64_t r, const float* other) const {
    const uint16_t* row = tile_row(data, r, deep);
    Vec<float> total = {};
    for (int64_t c = 0; c < width; c += kPairTile)
      total += widened(load_half(row + in_tiles(c))) * load_first(other + c, width - c);
    return sum<float>(total);
  }
};

// Key blocks as tiles of pairs of keys (natural: operand B of sums over keys, [kKeys][wide width]) and of pairs of
// features (turned: operand B of scores, [deep width][kKeys]).
template <>
struct PackedKeys<Pairs> {
  uint16_t* natural = nullptr;
  uint16_t* turned = nullptr;
  uint16_t* loaded = nullptr;  // a block as it came, tiles [kKeys][deep width]
  int64_t width = 0, deep = 0;

  static PackedKeys take(Arena& arena, const View& view, int64_t width, int64_t blocks, bool natural, bool turned) {
    PackedKeys packed;
    packed.width = width;
    packed.deep = tiles_deep(width);
    if (view && natural) packed.natural = arena.take<uint16_t>(blocks * kKeys * tiles_wide(width));
    if (view && turned) packed.turned = arena.take<uint16_t>(blocks * kKeys * packed.deep);
    if (view && (natural || turned)) packed.loaded = arena.take<uint16_t>(kKeys * packed.deep);
    return packed;
  }
  explicit operator bool() const { return loaded != nullptr; }
  uint16_t* natural_block(int64_t block) const { return natural + block * kKeys * tiles_wide(width); }
  uint16_t* turned_block(int64_t block) const { return turned + block * kKeys * deep; }

  bool load_keys(const View& view, int64_t seq, int64_t kv_head, int64_t first, int64_t keys, int64_t block, float*,
                 bool* strange) {
    __mmask32 any = 0;
    for (int64_t key = 0; key < keys; ++key) {
      __mmask32 found = 0;
      copy_row(view, offset_of(view, seq, kv_head, first + key), width, deep, tile_row(loaded, key, deep), found);
      strange[key] |= found != 0;
      any |= found;
    }
    for (int64_t key = keys; key < tiles_deep(keys); ++key) erase(block, key);
    return any != 0;
  }
  void erase(int64_t /*block*/, int64_t key) { zero_row(tile_row(loaded, key, deep), deep); }
  void finish(int64_t block, int64_t keys) {
    for (int64_t at = 0; turned != nullptr && at < tiles_wide(keys) * deep; at += kTileElements) {
      Vec<float> pairs[kPairTile];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kPairTile; ++i) memcpy(&pairs[i], loaded + at + i * kPairDepth, sizeof pairs[i]);
      transpose<float>(pairs);
      store_tile(pairs, turned_block(block) + at);
    }
    for (int64_t key = 0; natural != nullptr && key < keys; key += kPairDepth) {
      for (int64_t c = 0; c < tiles_wide(width); c += kPairTile) {
        Vec<float> pairs[kPairTile];
        interleave(loaded + key * deep, c, pairs, deep);
        store_tile(pairs, natural_block(block) + c * kKeys + key * kPairTile);
      }
    }
  }
};

static inline void multiply_scores(const Tile& tile, const PackedRows<Pairs>& rows, const PackedKeys<Pairs>& keys,
                                   int64_t block, float* c, bool accumulate) {
  gemm_pairs(tiles_wide(tile.rows), tile.cols, rows.deep, rows.data, kPairTile * rows.deep, keys.turned_block(block),
             kPairTile * keys.deep, c, kKeys, accumulate);
}

// What sixteen weights lost when they were rounded to these bits (nothing where they overflowed).
static inline __m512 lost(__m512 x, __m256i bits) { return finite_or_0<float>(x - widened(bits)); }

// What is done about what weights lose when they are rounded: nothing; their sums, or what those lost, are kept; it is the
// weights' second part.
enum class Rounding { kPlain, kSums, kLosses, kTwoParts };

template <>
struct WeightedSums<Pairs> {
  static constexpr int64_t kPart = kRows * kKeys;
  uint16_t* rounded = nullptr;  // [kPart] tiles [kRows][kKeys] of weights, or of pairs of rows; and what rounding lost
  float* losses = nullptr;      // [kKeys] what rounding took from the sum of each key's weights
  bool twice = false;           // what rounding lost is multiplied too
  bool known_sums = true;       // of derivatives of scores over the keys: not where scores are bent

  static WeightedSums take(Arena& arena, const Params& p, bool output = false) {
    const bool few = smaller(p.n, p.m) <= (output ? kFewForOutput : kFewSamples) || (output && wants_exact_d(p));
    return {arena.take<uint16_t>(2 * kPart), arena.take<float>(kKeys), few, !bends(p)};
  }
  WeightedSums in_two_parts() const { return {rounded, losses, true, known_sums}; }
  bool knows_sums() const { return !twice && known_sums; }

  // Words of sixteen weights and of sixteen more: one after the other, or side by side.
  template <bool SideBySide>
  static __m512i placed(__m512i words) {
    if constexpr (!SideBySide) return words;
    // word l of the result: word l / 2 of the first half, or of the second
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, words);
  }
  // Two times sixteen weights as bfloat16, placed.
  template <bool SideBySide>
  static __m512i put_both(__m512 first, __m512 second, uint16_t* target) {
    const __m512i bits = placed<SideBySide>((__m512i)_mm512_cvtne2ps_pbh(second, first));
    _mm512_storeu_si512(target, bits);
    return bits;
  }
  // And what that lost.
  template <bool SideBySide>
  static void put_two_parts(__m512 first, __m512 second, uint16_t* target) {
    const __m512i bits = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    _mm512_storeu_si512(target, placed<SideBySide>(bits));
    const __m512 first_lost = lost(first, _mm512_castsi512_si256(bits));
    const __m512 second_lost = lost(second, _mm512_extracti64x4_epi64(bits, 1));
    put_both<SideBySide>(first_lost, second_lost, target + kPart);
  }
  // The low and the high one of each pair of bfloat16.
  static Vec<float> low_ones(__m512i pairs) { return (Vec<float>)_mm512_slli_epi32(pairs, 16); }
  static Vec<float> high_ones(__m512i pairs) { return (Vec<float>)_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)); }

  // lacking [kRows] loses the sums of the rounded weights, or gains what these lost.
  template <Rounding how>
  void round_rows(const Tile& tile, const float* weights, float* lacking) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* row = weights + r * kKeys;
      Vec<float> total = {}, multiplied = {};
      for (int64_t j = 0; j < tile.keys; j += kPairDepth) {
        const __m512 left = _mm512_loadu_ps(row + j);
        const __m512 right = j + kPairTile < tile.cols ? _mm512_loadu_ps(row + j + kPairTile) : _mm512_setzero_ps();
        uint16_t* const target = tile_row(rounded, r, kKeys) + in_tiles(j);
        if constexpr (how == Rounding::kTwoParts) {
          put_two_parts<false>(left, right, target);
        } else {
          const __m512i bits = put_both<false>(left, right, target);
          multiplied += low_ones(bits) + high_ones(bits);
          total += left + right;
        }
      }
      if constexpr (how == Rounding::kSums) lacking[r] -= sum<float>(multiplied);
      if constexpr (how == Rounding::kLosses) lacking[r] += sum<float>(total - multiplied);
    }
  }
  // kLosses: of each key's weights; whether none of them is rounded to 0.
  template <Rounding how>
  bool round_pairs(const Tile& tile, const float* weights) const {
    __mmask32 zeros = 0;
    for (int64_t j = 0; j < tile.cols; j += kPairTile) {
      const int64_t count = smaller(tile.keys - j, kPairTile);
      const __mmask32 counted = static_cast<__mmask32>((uint64_t{1} << 2 * count) - 1);
      uint16_t* const target = rounded + j * kRows;
      Vec<float> low = {}, high = {};
      for (int64_t r = 0; r < tile.rows; r += 2) {
        const float* row = weights + r * kKeys + j;
        const bool both = r + 1 < tile.rows;
        const __m512 first = _mm512_loadu_ps(row), second = both ? _mm512_loadu_ps(row + kKeys) : _mm512_setzero_ps();
        if constexpr (how == Rounding::kTwoParts) {
          put_two_parts<true>(first, second, target + r * kPairTile);
        } else {
          const __m512i bits = put_both<true>(first, second, target + r * kPairTile);
          if constexpr (how == Rounding::kLosses) {
            constexpr __mmask32 kFirst = 0x55555555;
            zeros |= _mm512_mask_testn_epi16_mask(both ? counted : counted & kFirst, bits, _mm512_set1_epi16(0x7fff));
            low += first - low_ones(bits);
            high += second - high_ones(bits);
          }
        }
      }
      for (int64_t r = round_up(tile.rows, 2); r < tiles_deep(tile.rows); r += 2)
        for (int part = 0; part <= (how == Rounding::kTwoParts); ++part)
          memset(target + part * kPart + r * kPairTile, 0, sizeof(uint16_t) * kPairDepth);
      if constexpr (how == Rounding::kLosses) store(losses + j, finite_or_0<float>(low + high));
    }
    return zeros == 0;
  }

  static constexpr bool kRounds = true;
  // `added` gains where weights are in one part.
  void put(float* /*weights*/, int64_t r, int64_t j, Vec<float> weight, Vec<float>& added) const {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(weight);
    uint16_t* const target = tile_row(rounded, r, kKeys) + in_tiles(j);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), bits);
    if (twice) {
      const __m256i rest = (__m256i)_mm512_cvtneps_pbh(lost(weight, bits));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + kPart), rest);
    } else {
      added += widened(bits) - weight;
    }
  }
  void over_keys_put(const Tile& tile, const float* /*weights*/, const PackedKeys<Pairs>& keys, int64_t block,
                     float* sums) const {
    for (int64_t r = 0; tile.cols < tiles_deep(tile.keys) && r < tile.rows; ++r) {
      for (int part = 0; part <= twice; ++part)
        memset(tile_row(rounded + part * kPart, r, kKeys) + in_tiles(tile.cols), 0, sizeof(uint16_t) * kPairTile);
    }
    multiply(tile, keys, block, sums);
  }
  void over_keys(const Tile& tile, const float* weights, const PackedKeys<Pairs>& keys, int64_t block, float* sums,
                 float* lacking = nullptr) const {
    if (twice) round_rows<Rounding::kTwoParts>(tile, weights, lacking);
    else if (lacking == nullptr) round_rows<Rounding::kPlain>(tile, weights, lacking);
    else if (known_sums) round_rows<Rounding::kSums>(tile, weights, lacking);
    else round_rows<Rounding::kLosses>(tile, weights, lacking);
    multiply(tile, keys, block, sums);
  }
  static void finish_over_keys(float*, int64_t, int64_t) {}
  void multiply(const Tile& tile, const PackedKeys<Pairs>& keys, int64_t block, float* sums) const {
    for (int part = 0; part <= twice; ++part)
      gemm_pairs(tiles_wide(tile.rows), tiles_wide(keys.width), tiles_deep(tile.keys), rounded + part * kPart,
                 kPairTile * kKeys, keys.natural_block(block), kPairTile * kKeys, sums, padded<float>(keys.width), true);
  }
};

// Turned.
template <>
struct KeySums<Pairs> : SumsOfKeys<float> {
  static KeySums take(Arena& arena, bool wanted, int64_t blocks, int64_t width, int64_t terms) {
    const int64_t columns = tiles_wide(width);
    return {
        {LongSums<float>::take(arena, wanted, blocks * kKeys * columns, terms), width, padded<float>(width), columns, true}};
  }
  void add(const Tile& tile, const float* weights, const WeightedSums<Pairs>& by, const PackedRows<Pairs>& rows, int64_t block,
           bool cancel) {
    float* const target = of_block(block);
    bool twice = by.twice;
    if (!twice && !cancel) by.round_pairs<Rounding::kPlain>(tile, weights);
    if (!twice && cancel) {
      twice = !by.round_pairs<Rounding::kLosses>(tile, weights);
      for (int64_t c = 0; !twice && c < width; ++c)
        for (int64_t j = 0; j < tile.cols; j += kPairTile)
          store(target + c * kKeys + j, load(target + c * kKeys + j) + rows.mean[c] * load(by.losses + j));
    }
    if (twice) by.round_pairs<Rounding::kTwoParts>(tile, weights);
    for (int part = 0; part <= twice; ++part)
      gemm_pairs(columns, tile.cols, tiles_deep(tile.rows), rows.turned, kPairTile * kRows,
                 by.rounded + part * WeightedSums<Pairs>::kPart, kPairTile * kRows, target, kKeys, true);
  }
};

}  // namespace metattn::METATTN_ISA
