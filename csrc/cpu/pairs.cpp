// The micro-kernels of bfloat16 products.
#include "pairs.h"

#include <immintrin.h>

namespace metattn::METATTN_ISA {

#ifdef METATTN_TILES

namespace {

// Sixteen rows of 64 bytes for each of the eight tiles.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileShapes kShapes;

// A block of C: one or two tiles each way, in registers while K runs by.
template <bool TwoDown, bool TwoAcross>
inline void tile_block(int64_t k, const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, float* c,
                       int64_t c_stride, bool accumulate) {
  const int64_t c_bytes = 4 * c_stride;
  const uint16_t* const a_low = a + a_stride;
  const uint16_t* const b_right = b + b_stride;
  float* const c_low = c + kPairTile * c_stride;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (TwoAcross) _tile_loadd(1, c + kPairTile, c_bytes);
    if constexpr (TwoDown) _tile_loadd(2, c_low, c_bytes);
    if constexpr (TwoDown && TwoAcross) _tile_loadd(3, c_low + kPairTile, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (TwoAcross) _tile_zero(1);
    if constexpr (TwoDown) _tile_zero(2);
    if constexpr (TwoDown && TwoAcross) _tile_zero(3);
  }
  for (int64_t at = 0; at < k * kPairTile; at += kTileElements) {
    _tile_loadd(4, a + at, 64);
    _tile_loadd(6, b + at, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (TwoAcross) {
      _tile_loadd(7, b_right + at, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (TwoDown) {
      _tile_loadd(5, a_low + at, 64);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (TwoAcross) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (TwoAcross) _tile_stored(1, c + kPairTile, c_bytes);
  if constexpr (TwoDown) _tile_stored(2, c_low, c_bytes);
  if constexpr (TwoDown && TwoAcross) _tile_stored(3, c_low + kPairTile, c_bytes);
}

template <bool TwoDown>
inline void tile_rows(int64_t n, int64_t k, const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, float* c,
                      int64_t c_stride, bool accumulate) {
  int64_t col = 0;
  for (; col + 2 * kPairTile <= n; col += 2 * kPairTile, b += 2 * b_stride)
    tile_block<TwoDown, true>(k, a, a_stride, b, b_stride, c + col, c_stride, accumulate);
  if (col < n) tile_block<TwoDown, false>(k, a, a_stride, b, b_stride, c + col, c_stride, accumulate);
}

// Two rows of tiles where K is two tiles deep: A stays in registers, and is loaded once.
inline void tile_rows_resident(int64_t n, const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, float* c,
                               int64_t c_stride, bool accumulate) {
  const int64_t c_bytes = 4 * c_stride;
  _tile_loadd(4, a, 64);
  _tile_loadd(5, a + a_stride, 64);
  _tile_loadd(6, a + kTileElements, 64);
  _tile_loadd(7, a + a_stride + kTileElements, 64);
  for (int64_t col = 0; col < n; col += kPairTile, b += b_stride) {
    float* const c_low = c + col + kPairTile * c_stride;
    if (accumulate) {
      _tile_loadd(0, c + col, c_bytes);
      _tile_loadd(1, c_low, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
    }
    _tile_loadd(2, b, 64);
    _tile_dpbf16ps(0, 4, 2);
    _tile_dpbf16ps(1, 5, 2);
    _tile_loadd(3, b + kTileElements, 64);
    _tile_dpbf16ps(0, 6, 3);
    _tile_dpbf16ps(1, 7, 3);
    _tile_stored(0, c + col, c_bytes);
    _tile_stored(1, c_low, c_bytes);
  }
}

}  // namespace

void gemm_pairs(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                float* c, int64_t c_stride, bool accumulate) {
  int64_t row = 0;
  for (; row + 2 * kPairTile <= m; row += 2 * kPairTile, a += 2 * a_stride) {
    float* const c_row = c + row * c_stride;
    if (k == 2 * kPairDepth) tile_rows_resident(n, a, a_stride, b, b_stride, c_row, c_stride, accumulate);
    else tile_rows<true>(n, k, a, a_stride, b, b_stride, c_row, c_stride, accumulate);
  }
  if (row < m) tile_rows<false>(n, k, a, a_stride, b, b_stride, c + row * c_stride, c_stride, accumulate);
}

PairsScope::PairsScope() {
  _tile_storeconfig(before_);
  _tile_loadconfig(&kShapes);
}
PairsScope::~PairsScope() { _tile_loadconfig(before_); }

#else

namespace {

constexpr int kMicroRows = 8;

inline __m512i load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }

// Both operands are bit patterns of bfloat16 pairs.
inline __m512 multiply(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }

// Half a tile of rows by one or two of columns.
template <int Vectors>
inline void micro_kernel(int64_t k, const uint16_t* a, const uint16_t* b, int64_t b_stride, float* c, int64_t c_stride,
                         bool accumulate) {
  __m512 acc[kMicroRows][Vectors];  // in registers where every loop over it is unrolled
#pragma GCC unroll 8
  for (int i = 0; i < kMicroRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j)
      acc[i][j] = accumulate ? _mm512_loadu_ps(c + i * c_stride + j * kPairTile) : _mm512_setzero_ps();
  for (int64_t tile = 0; tile < k; tile += kPairDepth, a += kTileElements, b += kTileElements) {
    for (int64_t at = 0; at < kPairDepth; at += 2) {
      __m512i columns[Vectors];
      for (int j = 0; j < Vectors; ++j) columns[j] = load_pairs(b + j * b_stride + at * kPairTile);
#pragma GCC unroll 8
      for (int i = 0; i < kMicroRows; ++i) {
        int32_t pair;
        memcpy(&pair, a + i * kPairDepth + at, sizeof pair);
        const __m512i both = _mm512_set1_epi32(pair);
        for (int j = 0; j < Vectors; ++j) acc[i][j] = multiply(acc[i][j], both, columns[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kMicroRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < Vectors; ++j) _mm512_storeu_ps(c + i * c_stride + j * kPairTile, acc[i][j]);
}

}  // namespace

void gemm_pairs(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                float* c, int64_t c_stride, bool accumulate) {
  for (int64_t col = 0; col < n; col += 2 * kPairTile, b += 2 * b_stride) {
    for (int64_t row = 0; row < m; row += kMicroRows) {
      const uint16_t* a_rows = a + row / kPairTile * a_stride + row % kPairTile * kPairDepth;
      float* c_row = c + row * c_stride + col;
      if (n - col > kPairTile) micro_kernel<2>(k, a_rows, b, b_stride, c_row, c_stride, accumulate);
      else micro_kernel<1>(k, a_rows, b, b_stride, c_row, c_stride, accumulate);
    }
  }
}

PairsScope::PairsScope() {}
PairsScope::~PairsScope() {}

#endif

}  // namespace metattn::METATTN_ISA
