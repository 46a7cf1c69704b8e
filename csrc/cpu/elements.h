// Elements of the four dtypes, rows of strided tensors, and scratch memory.
#pragma once

#include "params.h"
#include "vec.h"

namespace metattn::METATTN_ISA {

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
// Columns of a panel of a matrix that is `width` wide: as few panels as can be, alike, and so with little padding.
template <class T>
static inline int64_t panel_of(int64_t width) {
  const int64_t vectors = larger(1, (width + kLanes<T> - 1) / kLanes<T>);
  if (vectors <= kPanelVectors) return vectors * kLanes<T>;
  const int64_t count = (vectors + kPanelVectors - 1) / kPanelVectors;
  return (vectors + count - 1) / count * kLanes<T>;
}
template <class T>
static inline int64_t padded(int64_t width) {
  const int64_t panel = panel_of<T>(width);
  return width <= panel ? panel : round_up(width, panel);
}

// Hands out aligned pieces of a thread's scratch memory; over a null base it only counts them.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
};

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
static inline To bit_cast(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From));
  memcpy(&y, &x, sizeof(To));
  return y;
}

template <class T>
static inline T widen(double x) {
  return static_cast<T>(x);
}
template <class T>
static inline T widen(float x) {
  return static_cast<T>(x);
}
template <class T>
static inline T widen(BFloat16 x) {
  return static_cast<T>(bit_cast<float>(static_cast<uint32_t>(x.bits) << 16));
}
template <class T>
static inline T widen(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // 2^112 moves the exponent's bias, denormals included; infinities and NaN keep an exponent of ones
  const float value = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return static_cast<T>(bit_cast<float>(bit_cast<uint32_t>(value) | special | sign));
}

template <class To>
struct Narrow {
  template <class T>
  static To from(T x) {
    return static_cast<To>(x);
  }
};
template <>
struct Narrow<BFloat16> {
  template <class T>
  static BFloat16 from(T value) {
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
  }
};
template <>
struct Narrow<Float16> {
  template <class T>
  static Float16 from(T value) {
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65,520 and above round to inf
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded denormal in the last bits
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1);
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
  }
};

template <class T, class From>
static inline void load_row(const From* source, int64_t stride, int64_t count, T* row) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) row[i] = widen<T>(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) row[i] = widen<T>(source[i * stride]);
  }
}
template <class To, class T>
static inline void store_row(const T* row, int64_t count, T factor, int64_t stride, To* target) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) target[i] = Narrow<To>::from(row[i] * factor);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i * stride] = Narrow<To>::from(row[i] * factor);
  }
}

#if METATTN_VECTOR_BYTES == 64
// Sixteen floats as bfloat16, rounded to the nearest, ties to even.
static inline __m256i narrowed(Vec<float> x) {
  const __m512i bits = (__m512i)x;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}
// Sixteen bfloat16 as floats.
static inline Vec<float> widened(__m256i bits) { return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16); }

static inline void store_row(const float* row, int64_t count, float factor, int64_t stride, BFloat16* target) {
  if (stride != 1) return store_row<BFloat16, float>(row, count, factor, stride, target);
  for (int64_t c = 0; c < count; c += 16) {
    const __mmask16 mask = first_lanes(count - c);
    _mm256_mask_storeu_epi16(target + c, mask, narrowed(_mm512_maskz_loadu_ps(mask, row + c) * factor));
  }
}
#endif

template <class T>
constexpr DType kOwnDType = sizeof(T) == sizeof(float) ? DType::f32 : DType::f64;

// row[i] = view[offset + i·stride] for i < count.
template <class T>
static void load_row(const View& view, int64_t offset, int64_t stride, int64_t count, T* row) {
  switch (view.dtype) {
    case DType::f64: return load_row(reinterpret_cast<const double*>(view.data) + offset, stride, count, row);
    case DType::f32: return load_row(reinterpret_cast<const float*>(view.data) + offset, stride, count, row);
    case DType::bf16: return load_row(reinterpret_cast<const BFloat16*>(view.data) + offset, stride, count, row);
    case DType::f16: return load_row(reinterpret_cast<const Float16*>(view.data) + offset, stride, count, row);
  }
}
// Whether the rows of a view are elements of T side by side.
template <class T>
static inline bool has_rows_of(const View& view) {
  return view.dtype == kOwnDType<T> && view.stride[3] == 1;
}
// What comes so many rows later is fetched while this is worked on.
constexpr int64_t kRowsAhead = 8;
// The same with zeros behind, up to `wide` elements: whole vectors.
template <class T>
static inline void load_wide_row(const View& view, int64_t offset, int64_t width, int64_t wide, T* row) {
  if (has_rows_of<T>(view)) {
    const T* source = reinterpret_cast<const T*>(view.data) + offset;
    for (int64_t c = 0; c < width; c += kLanes<T>) {
      __builtin_prefetch(source + kRowsAhead * view.stride[2] + c);
      store(row + c, load_first(source + c, width - c));
    }
  } else {
    load_row(view, offset, view.stride[3], width, row);
    for (int64_t c = width; c < round_up(width, kLanes<T>); ++c) row[c] = 0;
  }
  for (int64_t c = round_up(width, kLanes<T>); c < wide; c += kLanes<T>) store(row + c, Vec<T>{});
}
// The same of successive rows, `wide` elements each.
template <class T>
static inline void load_wide_rows(const View& view, int64_t offset, int64_t rows, int64_t width, int64_t wide, T* target) {
  if (has_rows_of<T>(view) && wide == kLanes<T>) {
    const T* source = reinterpret_cast<const T*>(view.data) + offset;
    for (int64_t r = 0; r < rows; ++r, source += view.stride[2], target += wide) {
      __builtin_prefetch(source + kRowsAhead * view.stride[2]);
      store(target, load_first(source, width));
    }
    return;
  }
  for (int64_t r = 0; r < rows; ++r) load_wide_row(view, offset + r * view.stride[2], width, wide, target + r * wide);
}
// view[offset + i·stride] = factor·row[i] for i < count.
template <class T>
static void store_row(const View& view, int64_t offset, int64_t stride, int64_t count, T factor, const T* row) {
  if (view.dtype == kOwnDType<T> && stride == 1) {
    T* const target = reinterpret_cast<T*>(view.data) + offset;
    for (int64_t c = 0; c < count; c += kLanes<T>) store_first(target + c, count - c, load_first(row + c, count - c) * factor);
    return;
  }
  switch (view.dtype) {
    case DType::f64: return store_row(row, count, factor, stride, reinterpret_cast<double*>(view.data) + offset);
    case DType::f32: return store_row(row, count, factor, stride, reinterpret_cast<float*>(view.data) + offset);
    case DType::bf16: return store_row(row, count, factor, stride, reinterpret_cast<BFloat16*>(view.data) + offset);
    case DType::f16: return store_row(row, count, factor, stride, reinterpret_cast<Float16*>(view.data) + offset);
  }
}

// Successive rows of a view from successive rows, `wide` elements each, times a factor.
template <class T>
static inline void store_rows(const View& view, int64_t offset, int64_t rows, int64_t width, T factor, const T* source,
                              int64_t wide) {
  if (has_rows_of<T>(view) && width <= kLanes<T>) {
    T* target = reinterpret_cast<T*>(view.data) + offset;
    for (int64_t r = 0; r < rows; ++r, target += view.stride[2], source += wide)
      store_first(target, width, load(source) * factor);
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    store_row(view, offset + r * view.stride[2], view.stride[3], width, factor, source + r * wide);
}

// The same added to what the view holds, which are elements of T. `scratch` is a row.
template <class T>
static inline void add_rows(const View& view, int64_t offset, int64_t rows, int64_t width, T factor, const T* source,
                            int64_t wide, T* scratch) {
  for (int64_t r = 0; r < rows; ++r, offset += view.stride[2], source += wide) {
    load_row(view, offset, view.stride[3], width, scratch);
    for (int64_t c = 0; c < width; ++c) scratch[c] += factor * source[c];
    store_row(view, offset, view.stride[3], width, T{1}, scratch);
  }
}

template <class T>
static inline bool is_finite(T x) {
  return x - x == 0;
}
template <class T>
static inline Vec<T> finite_or_0(Vec<T> x) {
  return x - x == 0 ? x : Vec<T>{};
}

template <class T>
static void store_rounded_row(const View& high, const View& low, int64_t high_at, int64_t low_at, int64_t count, T factor,
                              T* row, T* scratch) {
#if METATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == sizeof(float)) {
    if (high.dtype == DType::bf16 && high.stride[3] == 1 && low && low.stride[3] == 1) {
      uint16_t* const target = reinterpret_cast<uint16_t*>(high.data) + high_at;
      uint16_t* const rest = reinterpret_cast<uint16_t*>(low.data) + low_at;
      for (int64_t c = 0; c < count; c += 16) {
        const __mmask16 mask = first_lanes(count - c);
        const Vec<float> x = _mm512_maskz_loadu_ps(mask, row + c) * factor;
        const __m256i bits = narrowed(x);
        const Vec<float> wide = widened(bits);
        _mm256_mask_storeu_epi16(target + c, mask, bits);
        _mm256_mask_storeu_epi16(rest + c, mask, narrowed(x - finite_or_0<float>(wide)));
      }
      return;
    }
  }
#endif
  store_row(high, high_at, high.stride[3], count, factor, row);
  if (!low) return;
  load_row(high, high_at, high.stride[3], count, scratch);
  // where float16 overflowed, low (bfloat16) is the value itself
  for (int64_t c = 0; c < count; ++c) row[c] = row[c] * factor - (is_finite(scratch[c]) ? scratch[c] : 0);
  store_row(low, low_at, low.stride[3], count, T{1}, row);
}
// Row `row` of an output in its dtype, times a factor, and what rounding lost of it in `low`, where that is kept.
template <class T>
static inline void store_row_in_two(const View& high, const View& low, int64_t high_at, int64_t low_at, int64_t count, T factor,
                                    T* row, T* scratch) {
  if (has_rows_of<T>(high)) {  // nothing is lost
    T* const target = reinterpret_cast<T*>(high.data) + high_at;
    for (int64_t c = 0; c < count; c += kLanes<T>) store_first(target + c, count - c, load(row + c) * factor);
    return;
  }
  store_rounded_row(high, low, high_at, low_at, count, factor, row, scratch);
}

static inline int64_t offset_of(const View& view, int64_t seq, int64_t head, int64_t row) {
  return seq * view.stride[0] + head * view.stride[1] + row * view.stride[2];
}
template <class T>
static inline T load_scalar(const View& view, int64_t offset) {
  T value;
  load_row(view, offset, 1, 1, &value);
  return value;
}
static inline double* double_at(const View& view, int64_t seq, int64_t head, int64_t row) {
  return reinterpret_cast<double*>(view.data) + offset_of(view, seq, head, row);
}

// Where elements are infinities or NaN, all bits of a lane are set: to be gathered by |.
template <class T>
static inline Bits<T> strange_lanes(Vec<T> x) {
  constexpr int64_t exponent = sizeof(T) == 4 ? 0x7f800000 : 0x7ff0000000000000;
  const Bits<T> mask = Bits<T>{} + static_cast<decltype(Bits<T>{}[0] + 0)>(exponent);
  return ((Bits<T>)x & mask) == mask;
}
template <class V>
static inline bool any_set(V lanes) {
  uint64_t words[sizeof lanes / 8], any = 0;
  memcpy(words, &lanes, sizeof lanes);
  for (uint64_t word : words) any |= word;
  return any != 0;
}
template <class T>
static inline bool finite_row(const T* row, int64_t wide) {
  Bits<T> strange = {};
  for (int64_t c = 0; c < wide; c += kLanes<T>) strange |= strange_lanes<T>(load(row + c));
  return !any_set(strange);
}

}  // namespace metattn::METATTN_ISA
