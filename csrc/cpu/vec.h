// Vectors of one instruction set, by the compilers' vector extensions, and exp and tanh on them.
// Compiled once for each ISA: everything lies in that ISA's namespace and nothing from the standard library's
// templates is used, so that the linker can never merge code of one ISA into another's.
#pragma once

#include <cstdint>
#include <cstring>

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

// Elements of a vector, and of a panel: two vectors, the columns that a micro-kernel makes at once.
template <class T>
constexpr int64_t kLanes = METATTN_VECTOR_BYTES / sizeof(T);
template <class T>
constexpr int64_t kPanel = 2 * kLanes<T>;

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

template <class T>
static inline T sum(Vec<T> x) {
  T total = 0;
  for (int64_t i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}
// Largest element; a NaN is passed over (it shows in the sum of exponentials).
template <class T>
static inline T max_element(Vec<T> x, T start) {
  for (int64_t i = 0; i < kLanes<T>; ++i) start = x[i] > start ? x[i] : start;
  return start;
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

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

static inline Vec<double> exp(Vec<double> x) {
  constexpr double kRound = 6755399441055744.0;  // 1.5·2^52
  const Vec<double> low = splat(-708.39), high = splat(709.78);
  const Vec<double> clamped = x < low ? low : (x > high ? high : x);
  const Vec<double> shifted = clamped * 1.4426950408889634074 + kRound;
  const Vec<double> n = shifted - kRound;
  Vec<double> r = clamped - n * 6.93145751953125e-1;
  r = r - n * 1.42860682030941723212e-6;
  // Taylor to r^13: the next term is below 5e-18
  constexpr double kInverseFactorial[] = {1.0 / 6227020800, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800,
                                          1.0 / 362880,     1.0 / 40320,     1.0 / 5040,     1.0 / 720,
                                          1.0 / 120,        1.0 / 24,        1.0 / 6,        0.5};
  Vec<double> y = splat(kInverseFactorial[0]);
  for (int i = 1; i < 12; ++i) y = y * r + kInverseFactorial[i];
  y = y * r * r + r + 1.0;
  const Bits<double> whole = (Bits<double>)shifted - (Bits<double>)splat(kRound);
  const Bits<double> half = whole >> 1;
  y = y * (Vec<double>)((half + 1023) << 52) * (Vec<double>)((whole - half + 1023) << 52);
  y = x < low ? Vec<double>{} : y;
  return x > high ? splat(kInfinity<double>) : y;
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
