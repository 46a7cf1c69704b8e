// packed.h for Pairs: bfloat16 operands, float sums. Scores are exact products of the inputs; weights (probabilities and
// their derivatives) are rounded to bfloat16, or, where few keys would average no rounding out, taken in two parts.
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

// Up to so many rows or keys a sum averages no rounding of its weights out: they are multiplied in two parts.
constexpr int64_t kFewSamples = 128;

static_assert(kRows % kPairDepth == 0 && kKeys % kPairDepth == 0 && kLanes<float> == kPairTile);

static inline int64_t tiles_wide(int64_t x) { return round_up(x, kPairTile); }
static inline int64_t tiles_deep(int64_t x) { return round_up(x, kPairDepth); }

// A row of bfloat16 as it is, with zeros behind, up to `wide` elements, a multiple of kPairDepth; `strange` gathers the
// infinities and NaN in it.
static inline void copy_row(const View& view, int64_t offset, int64_t count, int64_t wide, uint16_t* row,
                            __mmask32& strange) {
  const uint16_t* source = reinterpret_cast<const uint16_t*>(view.data) + offset;
  const int64_t stride = view.stride[3];
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  if (stride != 1)
    for (int64_t c = 0; c < count; ++c) row[c] = source[c * stride];
  for (int64_t c = 0; c < wide; c += kPairDepth) {
    const int64_t left = count - c;
    const __mmask32 kept = left >= kPairDepth ? ~__mmask32{0} : left <= 0 ? 0 : (__mmask32{1} << left) - 1;
    const __m512i x = _mm512_maskz_loadu_epi16(kept, stride == 1 ? source + c : row + c);
    strange |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, exponent), exponent);
    _mm512_storeu_si512(row + c, x);
  }
}

// pairs[c] = (low[c], high[c]) for c < count, a multiple of kPairTile.
static inline void interleave(const uint16_t* low, const uint16_t* high, int64_t count, uint16_t* pairs) {
  for (int64_t c = 0; c < count; c += kPairTile) {
    const __m512i x = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low + c)));
    const __m512i y = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(high + c)));
    _mm512_storeu_si512(pairs + 2 * c, _mm512_or_si512(x, _mm512_slli_epi32(y, 16)));
  }
}
// target [columns][rows] of 32-bit pairs = source [rows][columns] turned; both counts multiples of kPairTile.
static inline void turn_pairs(const uint16_t* source, int64_t source_stride, int64_t rows, int64_t columns,
                              uint16_t* target, int64_t target_stride) {
  for (int64_t r = 0; r < rows; r += kPairTile) {
    for (int64_t c = 0; c < columns; c += kPairTile) {
      Vec<float> square[kLanes<float>];  // bits: nothing is computed with them
#pragma GCC unroll 16
      for (int64_t i = 0; i < kPairTile; ++i) memcpy(&square[i], source + 2 * ((r + i) * source_stride + c), 64);
      transpose<float>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < kPairTile; ++i) memcpy(target + 2 * ((c + i) * target_stride + r), &square[i], 64);
    }
  }
}

// A block of rows: row-major [kRows][deep width], operand A of scores; and turned [wide width][kRows], operand A of
// sums over rows.
template <>
struct PackedRows<Pairs> {
  uint16_t* data = nullptr;
  uint16_t* turned = nullptr;
  uint16_t* pairs = nullptr;  // [kRows / 2][deep width][2] on the way to turned
  int64_t width = 0, stride = 0;

  static PackedRows take(Arena& arena, const View& view, int64_t width, bool summed_over) {
    PackedRows packed;
    packed.width = width;
    packed.stride = tiles_deep(width);
    if (view) packed.data = arena.take<uint16_t>(kRows * packed.stride);
    if (view && summed_over) {
      packed.turned = arena.take<uint16_t>(packed.stride * kRows);
      packed.pairs = arena.take<uint16_t>(kRows * packed.stride);
    }
    return packed;
  }
  explicit operator bool() const { return data != nullptr; }

  void pack(const Params& p, const View& view, const Tile& tile, const bool* dead, float*) {
    const int64_t rows = tiles_deep(tile.rows);
    for (int64_t r = 0; r < rows; ++r) {
      uint16_t* row = data + r * stride;
      const int64_t i = tile.row0 + r;
      bool live = r < tile.rows && !(dead != nullptr && dead[r]);
      if (live) {
        __mmask32 strange = 0;
        copy_row(view, offset_of(view, tile.seq, tile.head, tile.s.q0 + i), width, stride, row, strange);
        live = !p.sinks || strange == 0 || !dead_row<float>(p, tile.s, tile.seq, tile.head, i);
      }
      if (!live) memset(row, 0, sizeof(uint16_t) * stride);
    }
    if (turned == nullptr) return;
    for (int64_t r = 0; r < rows; r += 2)
      interleave(data + r * stride, data + (r + 1) * stride, stride, pairs + r * stride);
    turn_pairs(pairs, stride, tiles_wide(rows / 2), tiles_wide(width), turned, kRows / 2);
  }
  float dot(int64_t r, const float* other) const {
    Vec<float> total = {};
    for (int64_t c = 0; c < tiles_wide(width); c += kPairTile) {
      const __m512i bits =
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + r * stride + c)));
      total += (Vec<float>)_mm512_slli_epi32(bits, 16) * load(other + c);
    }
    return sum<float>(total);
  }
};

// Key blocks: pairs of keys (natural: [kKeys / 2][wide width][2], operand B of sums over keys) and pairs of features
// (turned: [deep width / 2][kKeys][2], operand B of scores).
template <>
struct PackedKeys<Pairs> {
  uint16_t* natural = nullptr;
  uint16_t* turned = nullptr;
  uint16_t* loaded = nullptr;  // [kKeys][stride]
  int64_t width = 0, stride = 0;  // stride: whole pairs' squares, two of features each

  static PackedKeys take(Arena& arena, const View& view, int64_t width, int64_t blocks, bool natural, bool turned) {
    PackedKeys packed;
    packed.width = width;
    packed.stride = tiles_deep(width);
    if (view && natural) packed.natural = arena.take<uint16_t>(blocks * kKeys * tiles_wide(width));
    if (view && turned) packed.turned = arena.take<uint16_t>(blocks * kKeys * packed.stride);
    if (view && (natural || turned)) packed.loaded = arena.take<uint16_t>(kKeys * packed.stride);
    return packed;
  }
  explicit operator bool() const { return loaded != nullptr; }
  const uint16_t* natural_block(int64_t block) const { return natural + block * kKeys * tiles_wide(width); }
  const uint16_t* turned_block(int64_t block) const { return turned + block * kKeys * stride; }

  bool load_keys(const View& view, int64_t seq, int64_t kv_head, int64_t first, int64_t keys, int64_t block, float*,
                 bool* strange) {
    __mmask32 any = 0;
    for (int64_t key = 0; key < keys; ++key) {
      __mmask32 found = 0;
      copy_row(view, offset_of(view, seq, kv_head, first + key), width, stride, loaded + key * stride, found);
      strange[key] |= found != 0;
      any |= found;
    }
    for (int64_t key = keys; key < tiles_deep(keys); ++key) erase(block, key);
    return any != 0;
  }
  void erase(int64_t /*block*/, int64_t key) { memset(loaded + key * stride, 0, sizeof(uint16_t) * stride); }
  void finish(int64_t block, int64_t keys) {
    if (turned != nullptr)
      turn_pairs(loaded, stride / 2, tiles_wide(keys), stride / 2, turned + block * kKeys * stride, kKeys);
    if (natural != nullptr) {
      uint16_t* target = natural + block * kKeys * tiles_wide(width);
      for (int64_t key = 0; key < tiles_deep(keys); key += 2)
        interleave(loaded + key * stride, loaded + (key + 1) * stride, tiles_wide(width),
                   target + key * tiles_wide(width));
    }
  }
};

static inline void multiply_scores(const Tile& tile, const PackedRows<Pairs>& rows, const PackedKeys<Pairs>& keys,
                                   int64_t block, float* c, bool accumulate) {
  gemm_pairs(tiles_wide(tile.rows), tile.cols, rows.stride, rows.data, rows.stride, keys.turned_block(block), kKeys, c,
             kKeys, accumulate);
}

// Sixteen weights as bfloat16, one to 32 bits, and what that lost (nothing where it overflowed).
static inline __m512i rounded_bits(__m512 x) {
  return _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
}
static inline __m512 lost(__m512 x) {
  const __m512 difference = _mm512_sub_ps(x, _mm512_castsi512_ps(rounded_bits(x)));
  const __m512 infinity = _mm512_set1_ps(__builtin_inff());
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(_mm512_abs_ps(difference), infinity, _CMP_LT_OQ), difference);
}

template <>
struct WeightedSums<Pairs> {
  uint16_t* rounded = nullptr;  // weights [kRows][kKeys], or pairs of rows [kRows / 2][kKeys][2]
  bool twice = false;

  static WeightedSums take(Arena& arena, const Params& p) {
    return {arena.take<uint16_t>(kRows * kKeys), smaller(p.n, p.m) <= kFewSamples};
  }

  template <bool Lost>
  static __m512 part(const float* weights) {
    const __m512 x = _mm512_loadu_ps(weights);
    return Lost ? lost(x) : x;
  }
  template <bool Lost>
  void round_rows(const Tile& tile, const float* weights) const {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const float* row = weights + r * kKeys;
      for (int64_t j = 0; j < tile.keys; j += kPairDepth) {
        const __m512 right = j + kPairTile < tile.cols ? part<Lost>(row + j + kPairTile) : _mm512_setzero_ps();
        _mm512_storeu_si512(rounded + r * kKeys + j, (__m512i)_mm512_cvtne2ps_pbh(right, part<Lost>(row + j)));
      }
    }
  }
  template <bool Lost>
  void round_pairs(const Tile& tile, const float* weights) const {
    // word l of a pair's register: word l / 2 of the first row's half, or of the second's
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                           5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int64_t r = 0; r < tiles_deep(tile.rows); r += 2) {
      const float* row = weights + r * kKeys;
      for (int64_t j = 0; j < tile.cols; j += kPairTile) {
        const __m512 first = r < tile.rows ? part<Lost>(row + j) : _mm512_setzero_ps();
        const __m512 second = r + 1 < tile.rows ? part<Lost>(row + kKeys + j) : _mm512_setzero_ps();
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(second, first);
        _mm512_storeu_si512(rounded + r * kKeys + 2 * j, _mm512_permutexvar_epi16(order, both));
      }
    }
  }

  // Weights from column j of row r on, for over_keys_put: rounded at once, or kept where they are multiplied twice.
  void put(float* weights, int64_t r, int64_t j, Vec<float> weight) const {
    if (twice) store(weights + r * kKeys + j, weight);
    else _mm256_storeu_si256(reinterpret_cast<__m256i*>(rounded + r * kKeys + j), (__m256i)_mm512_cvtneps_pbh(weight));
  }
  void over_keys_put(const Tile& tile, const float* weights, const PackedKeys<Pairs>& keys, int64_t block,
                     float* sums) const {
    if (twice) return over_keys(tile, weights, keys, block, sums);
    if (tile.cols < tiles_deep(tile.keys))
      for (int64_t r = 0; r < tile.rows; ++r) memset(rounded + r * kKeys + tile.cols, 0, sizeof(uint16_t) * kPairTile);
    multiply(tile, keys, block, sums);
  }
  void over_keys(const Tile& tile, const float* weights, const PackedKeys<Pairs>& keys, int64_t block, float* sums) const {
    round_rows<false>(tile, weights);
    multiply(tile, keys, block, sums);
    if (!twice) return;
    round_rows<true>(tile, weights);
    multiply(tile, keys, block, sums);
  }
  void multiply(const Tile& tile, const PackedKeys<Pairs>& keys, int64_t block, float* sums) const {
    gemm_pairs(tiles_wide(tile.rows), tiles_wide(keys.width), tiles_deep(tile.keys), rounded, kKeys,
               keys.natural_block(block), tiles_wide(keys.width), sums, padded<float>(keys.width), true);
  }
};

// Sums over rows, turned: [blocks][wide width][kKeys].
template <>
struct KeySums<Pairs> {
  float* data = nullptr;
  int64_t width = 0;

  static KeySums take(Arena& arena, bool wanted, int64_t blocks, int64_t width) {
    return {wanted ? arena.take<float>(blocks * kKeys * tiles_wide(width)) : nullptr, width};
  }
  void clear(int64_t blocks) { memset(data, 0, sizeof(float) * blocks * kKeys * tiles_wide(width)); }
  void add(const Tile& tile, const float* weights, const WeightedSums<Pairs>& by, const PackedRows<Pairs>& rows,
           int64_t block) {
    const auto multiply = [&] {
      gemm_pairs(tiles_wide(width), tile.cols, tiles_deep(tile.rows), rows.turned, kRows, by.rounded, kKeys,
                 data + block * kKeys * tiles_wide(width), kKeys, true);
    };
    by.round_pairs<false>(tile, weights);
    multiply();
    if (!by.twice) return;
    by.round_pairs<true>(tile, weights);
    multiply();
  }
  const float* of_key(int64_t key, float* row) const {
    const float* column = data + key / kKeys * kKeys * tiles_wide(width) + key % kKeys;
    for (int64_t c = 0; c < width; ++c) row[c] = column[c * kKeys];
    return row;
  }
};

}  // namespace metattn::METATTN_ISA
