// Vectors of one instruction set, by the compilers' vector extensions, and exp and tanh on them.
// Compiled once for each ISA: everything lies in that ISA's namespace and nothing from the standard library's
// templates is used, so that the linker can never merge code of one ISA into another's.
#pragma once

#include <cstdint>
#include <cstring>

#if METATTN_VECTOR_BYTES == 64
#include <immintrin.h>
#endif

#ifndef METATTN_ISA
#error "compile with -DMETATTN_ISA=<name> and -DMETATTN_VECTOR_BYTES=<bytes>"
#endif

namespace metattn::METATTN_ISA {

template <class T>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(METATTN_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(METATTN_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(METATTN_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(METATTN_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;
template <class T>
using Bits = typename VecOf<T>::bits;

// Elements of a vector.
template <class T>
constexpr int64_t kLanes = METATTN_VECTOR_BYTES / sizeof(T);
// Vectors that a panel, the columns that a micro-kernel makes at once, has at most.
constexpr int kPanelVectors = 4;

template <class T>
static inline Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
static inline void store(T* p, Vec<T> x) {
  *reinterpret_cast<Vec<T>*>(p) = x;
}
template <class T>
static inline Vec<T> splat(T x) {
  return x - Vec<T>{};
}

// The larger of each pair of elements; y where either is NaN, as the processors' own instruction has it.
template <class T>
static inline Vec<T> maximum(Vec<T> x, Vec<T> y) {
#if METATTN_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) return _mm512_max_ps(x, y);
  else return _mm512_max_pd(x, y);
#else
  return x > y ? x : y;
#endif
}

template <int... I>
struct Lanes {};
template <int N, int... I>
struct LanesBelow : LanesBelow<N - 1, N - 1, I...> {};
template <int... I>
struct LanesBelow<0, I...> {
  using type = Lanes<I...>;
};
template <class T>
using AllLanes = typename LanesBelow<static_cast<int>(kLanes<T>)>::type;

// Lane l of the result is lane I[l] of x followed by y.
template <class T, int... I>
static inline Vec<T> shuffled(Vec<T> x, Vec<T> y, Lanes<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(x, y, I...);
#else
  return __builtin_shuffle(x, y, Bits<T>{I...});
#endif
}

// Lane l from lane l ^ Step.
template <class T, int Step, int... I>
static inline Vec<T> exchanged(Vec<T> x, Lanes<I...>) {
  return shuffled<T>(x, x, Lanes<(I ^ Step)...>{});
}
template <class T, int Step = static_cast<int>(kLanes<T>) / 2>
static inline T sum(Vec<T> x) {
  if constexpr (Step == 0) return x[0];
  else return sum<T, Step / 2>(x + exchanged<T, Step>(x, AllLanes<T>{}));
}
// Largest element; a NaN is passed over (it shows in the sum of exponentials).
template <class T, int Step = static_cast<int>(kLanes<T>) / 2>
static inline T max_element(Vec<T> x) {
  if constexpr (Step == 0) return x[0];
  else return max_element<T, Step / 2>(maximum<T>(x, exchanged<T, Step>(x, AllLanes<T>{})));
}

// Whether an element lies above `limit`.
#if METATTN_VECTOR_BYTES == 64
static inline bool any_above(Vec<float> x, float limit) { return _mm512_cmp_ps_mask(x, splat(limit), _CMP_GT_OQ) != 0; }
static inline bool any_above(Vec<double> x, double limit) { return _mm512_cmp_pd_mask(x, splat(limit), _CMP_GT_OQ) != 0; }
#else
template <class V, class T>
static inline bool any_above(V x, T limit) {
  return max_element<T>(x) > limit;
}
#endif

template <class T, int... I>
static inline Bits<T> counted(Lanes<I...>) {
  return Bits<T>{I...};
}
// Lanes from `first` on, from y; those before, from x.
template <class T>
static inline Vec<T> joined(Vec<T> x, Vec<T> y, int64_t first) {
  using Index = decltype(Bits<T>{}[0] + 0);
  return counted<T>(AllLanes<T>{}) < Bits<T>{} + static_cast<Index>(first) ? x : y;
}

// The first `count` elements at `source`, of no more than a vector, zeros behind; and the first ones of a vector, stored.
#if METATTN_VECTOR_BYTES == 64
static inline __mmask16 first_lanes(int64_t count) { return count >= 16 ? 0xffff : (1u << count) - 1; }
static inline Vec<float> load_first(const float* source, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), source);
}
static inline Vec<double> load_first(const double* source, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), source);
}
static inline void store_first(float* target, int64_t count, Vec<float> x) {
  _mm512_mask_storeu_ps(target, first_lanes(count), x);
}
static inline void store_first(double* target, int64_t count, Vec<double> x) {
  _mm512_mask_storeu_pd(target, static_cast<__mmask8>(first_lanes(count)), x);
}
#else
template <class T>
static inline Vec<T> load_first(const T* source, int64_t count) {
  Vec<T> x = {};
  if (count >= kLanes<T>) memcpy(&x, source, sizeof x);
  else
    for (int64_t i = 0; i < count; ++i) x[i] = source[i];
  return x;
}
template <class T>
static inline void store_first(T* target, int64_t count, Vec<T> x) {
  if (count >= kLanes<T>) memcpy(target, &x, sizeof x);
  else
    for (int64_t i = 0; i < count; ++i) target[i] = x[i];
}
#endif

// Transposes a square of kLanes rows in registers: squares of Step in each pair of rows change places.
template <class T, int Step, int... I>
static inline void exchange_squares(Vec<T>& x, Vec<T>& y, Lanes<I...>) {
  constexpr int kCount = static_cast<int>(kLanes<T>);
  const Vec<T> low = shuffled<T>(x, y, Lanes<(I & Step ? I - Step + kCount : I)...>{});
  y = shuffled<T>(x, y, Lanes<(I & Step ? I + kCount : I + Step)...>{});
  x = low;
}
template <class T, int Step = static_cast<int>(kLanes<T>) / 2>
static inline void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (Step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i)
      if ((i & Step) == 0) exchange_squares<T, Step>(rows[i], rows[i + Step], AllLanes<T>{});
    transpose<T, Step / 2>(rows);
  }
}

// Lanes 2c and 2c + 1 from lane c of x and of y, of their first halves.
template <class T, int... I>
static inline Vec<T> interleaved(Vec<T> x, Vec<T> y, Lanes<I...>) {
  return shuffled<T>(x, y, Lanes<(I % 2 * static_cast<int>(kLanes<T>) + I / 2)...>{});
}
template <class T>
static inline Vec<T> side_by_side(Vec<T> x, Vec<T> y) {
  return interleaved<T>(x, y, AllLanes<T>{});
}
// Lane c from the sum of lanes 2c and 2c + 1; zeros behind.
template <class T, int... I>
static inline Vec<T> even_lanes(Vec<T> x, Lanes<I...>) {
  constexpr int kCount = static_cast<int>(kLanes<T>);
  return shuffled<T>(x, Vec<T>{}, Lanes<(2 * I < kCount ? 2 * I : kCount)...>{});
}
template <class T>
static inline Vec<T> sums_of_twos(Vec<T> x) {
  return even_lanes<T>(x + exchanged<T, 1>(x, AllLanes<T>{}), AllLanes<T>{});
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());
template <class T>
constexpr T kLeastNormal = static_cast<T>(sizeof(T) == sizeof(float) ? 0x1p-126 : 0x1p-1022);

// exp by 2^n·e^r, |r| <= ln(2)/2; relative error under 2 ulp where the result is normal, 0 below, inf above.
static inline Vec<float> exp(Vec<float> x) {
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  const Vec<float> low = splat(-87.33654f), high = splat(88.72283f);
  const Vec<float> clamped = x < low ? low : (x > high ? high : x);
  const Vec<float> shifted = clamped * 1.44269504088896341f + kRound;
  const Vec<float> n = shifted - kRound;
  Vec<float> r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Vec<float> y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  // 2^n in two factors: n reaches 128
  const Bits<float> whole = (Bits<float>)shifted - (Bits<float>)splat(kRound);
  const Bits<float> half = whole >> 1;
  const Vec<float> scale_a = (Vec<float>)((half + 127) << 23);
  const Vec<float> scale_b = (Vec<float>)((whole - half + 127) << 23);
  y = y * scale_a * scale_b;
  y = x < low ? Vec<float>{} : y;
  return x > high ? splat(kInfinity<float>) : y;
}

// e^r, |r| <= ln(2)/2, by Taylor's series to r^13: the next term is below 5e-18.
static inline Vec<double> exp_near_zero(Vec<double> r) {
  constexpr double kInverseFactorial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                          1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                          1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  Vec<double> y = splat(kInverseFactorial[0]);
  for (int i = 1; i < 12; ++i) y = y * r + kInverseFactorial[i];
  return y * r * r + r + 1.0;
}
static inline Vec<double> exp(Vec<double> x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5·2^52
  const Vec<double> low = splat(-708.39), high = splat(709.78);
  const Vec<double> clamped = x < low ? low : (x > high ? high : x);
  const Vec<double> shifted = clamped * 1.4426950408889634074 + kRound;
  const Vec<double> n = shifted - kRound;
  Vec<double> r = clamped - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  Vec<double> y = exp_near_zero(r);
  const Bits<double> whole = (Bits<double>)shifted - (Bits<double>)splat(kRound);
  const Bits<double> half = whole >> 1;
  y = y * (Vec<double>)((half + 1023) << 52) * (Vec<double>)((whole - half + 1023) << 52);
  y = x < low ? Vec<double>{} : y;
  return x > high ? splat(kInfinity<double>) : y;
}

// The natural logarithm of normal numbers above 0, to 2 ulp: x = m·2^e, m next to 1, log m = 2·artanh((m − 1)/(m + 1)).
static inline Vec<double> log_of_normal(Vec<double> x) {
  constexpr int64_t kRootHalf = 0x3fe6a09e667f3bcd;  // of √½
  const Bits<double> exponent = ((Bits<double>)x - kRootHalf) >> 52;
  const Vec<double> m = (Vec<double>)((Bits<double>)x - (exponent << 52));
  const Vec<double> e = __builtin_convertvector(exponent, Vec<double>);
  const Vec<double> s = (m - 1) / (m + 1), z = s * s;
  Vec<double> y = splat(1.0 / 21);
  for (int i = 19; i >= 3; i -= 2) y = y * z + 1.0 / i;
  return (e * 1.90821492927058770002e-10 + 2 * (s * z * y)) + 2 * s + e * 6.93147180369123816490e-1;  // ln 2 in two parts
}

// x, rounded by itself: the compiler may not make a product and a sum that follows it one operation.
template <class V>
static inline V rounded(V x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

// 2^z for z below 128 (1024 in double): what probabilities are made of. Exact at 0; relative error below 1.7e-7 in float
// (a minimax polynomial), 2 ulp in double (Taylor's); results below the least normal number are 0; NaN stays.
static inline Vec<float> exp2_near_zero(Vec<float> r) {
  Vec<float> y = splat(1.326472730e-3f);
  y = y * r + 9.671512991e-3f;
  y = y * r + 5.550733581e-2f;
  y = y * r + 2.402224243e-1f;
  y = y * r + 6.931470037e-1f;
  return y * r + 1.0f;
}
#if METATTN_VECTOR_BYTES == 64
static inline Vec<float> exp2(Vec<float> z) {
  // what would be denormal becomes 0: the processor takes a hundred times as long to make it
  const __mmask16 normal = _mm512_cmp_ps_mask(z, splat(-126.0f), _CMP_NLT_UQ);
  const Vec<float> r = _mm512_reduce_ps(z, 0x8);  // less the nearest integer
  return _mm512_maskz_scalef_ps(normal, exp2_near_zero(r), z - r);
}
#else
static inline Vec<float> exp2(Vec<float> z) {
  constexpr float kRound = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer and leaves that in the last bits
  const Vec<float> clamped = maximum<float>(splat(-126.0f), z);
  const Vec<float> shifted = clamped + kRound;
  const Vec<float> r = clamped - (shifted - kRound);
  const Vec<float> y = exp2_near_zero(r) * (Vec<float>)(((Bits<float>)shifted << 23) + 0x3f800000);
  return z < -126.0f ? Vec<float>{} : y;
}
#endif
static inline Vec<double> exp2(Vec<double> z) {
  constexpr double kRound = 6755399441055744.0;  // 1.5·2^52
  const Vec<double> clamped = maximum<double>(splat(-1022.0), z);
  const Vec<double> shifted = clamped + kRound;
  const Vec<double> r = (clamped - (shifted - kRound)) * 0.693147180559945309417;
  const Vec<double> y = exp_near_zero(r) * (Vec<double>)(((Bits<double>)shifted << 52) + 0x3ff0000000000000);
  return z < -1022.0 ? Vec<double>{} : y;
}

// tanh: an odd polynomial (float) or rational (double) near 0, where 1 − 2/(e^{2|x|} + 1) would cancel.
// Coefficients: S. L. Moshier, Cephes mathematical library.
static inline Vec<float> tanh_near_zero(Vec<float> x) {
  const Vec<float> z = x * x;
  Vec<float> y = splat(-5.70498872745e-3f);
  y = y * z + 2.06390887954e-2f;
  y = y * z - 5.37397155531e-2f;
  y = y * z + 1.33314422036e-1f;
  y = y * z - 3.33332819422e-1f;
  return y * z * x + x;
}
static inline Vec<double> tanh_near_zero(Vec<double> x) {
  const Vec<double> z = x * x;
  const Vec<double> p = (splat(-9.64399179425052238628e-1) * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3;
  const Vec<double> q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3;
  return x * z * p / q + x;
}
template <class T>
static inline Vec<T> tanh_of(Vec<T> x) {
  const Vec<T> magnitude = x < 0 ? -x : x;
  const Vec<T> far = 1 - 2 / (exp(magnitude * 2) + 1);
  return magnitude < static_cast<T>(0.625) ? tanh_near_zero(x) : (x < 0 ? -far : far);
}

}  // namespace metattn::METATTN_ISA
