// The four dtypes on a device: how they are stored, and the type they are computed in. A fifth is float32 whose
// products are taken in TF32.
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda/block.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace metattn::cuda {

#ifdef __CUDACC__
using BFloat16 = __nv_bfloat16;
using Float16 = __half;
static METATTN_DEVICE float to_float(BFloat16 x) { return __bfloat162float(x); }
static METATTN_DEVICE float to_float(Float16 x) { return __half2float(x); }
static METATTN_DEVICE BFloat16 to_bfloat16(float x) { return __float2bfloat16_rn(x); }
static METATTN_DEVICE Float16 to_float16(float x) { return __float2half_rn(x); }
#else
// g++ has both as types of its own; its bfloat16 is storage alone
struct BFloat16 {
  uint16_t bits;
};
using Float16 = _Float16;
static inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
static inline float to_float(Float16 x) { return static_cast<float>(x); }
static inline BFloat16 to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
static inline Float16 to_float16(float x) { return static_cast<Float16>(x); }
#endif

// A float32 whose products are TF32's: memory holds it as it is, shared memory rounded (round_tiles).
struct Tf32 {
  float value;
};
template <class S>
constexpr bool kIsTf32 = std::is_same_v<S, Tf32>;

// The nearest number of TF32, ten bits behind the point; of two the larger magnitude.
static METATTN_DEVICE float to_tf32(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
#else
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7f800000u) != 0x7f800000u) bits = (bits + 0x1000u) & 0xffffe000u;
  memcpy(&x, &bits, sizeof bits);
  return x;
#endif
}

template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class T>
static METATTN_DEVICE T widened(double x) {
  return static_cast<T>(x);
}
template <class T>
static METATTN_DEVICE T widened(float x) {
  return static_cast<T>(x);
}
template <class T>
static METATTN_DEVICE T widened(BFloat16 x) {
  return static_cast<T>(to_float(x));
}
template <class T>
static METATTN_DEVICE T widened(Float16 x) {
  return static_cast<T>(to_float(x));
}

template <class T>
static METATTN_DEVICE T widened(Tf32 x) {
  return static_cast<T>(x.value);
}

template <class S, class T>
static METATTN_DEVICE S narrowed(T x) {
  if constexpr (kIsTf32<S>) return {static_cast<float>(x)};
  else if constexpr (sizeof(S) >= 4) return static_cast<S>(x);
  else if constexpr (std::is_same_v<S, BFloat16>) return to_bfloat16(static_cast<float>(x));
  else return to_float16(static_cast<float>(x));
}

// An element as products have it.
template <class S>
static METATTN_DEVICE Compute<S> as_factor(S x) {
  if constexpr (kIsTf32<S>) return to_tf32(x.value);
  else return widened<Compute<S>>(x);
}

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_huge_val());

template <class T>
static METATTN_DEVICE bool is_finite(T x) {
  return x - x == 0;
}

// Rounded: not to become part of another operation.
static METATTN_DEVICE float product(float x, float y) {
#ifdef __CUDACC__
  return __fmul_rn(x, y);
#else
  return x * y;
#endif
}
static METATTN_DEVICE double product(double x, double y) {
#ifdef __CUDACC__
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

static METATTN_DEVICE float exponential(float x) {
#ifdef __CUDACC__
  return exp2f(x * 1.4426950408889634f);
#else
  return std::exp(x);
#endif
}
static METATTN_DEVICE double exponential(double x) { return exp(x); }
static METATTN_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
static METATTN_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }
static METATTN_DEVICE float natural_log(float x) { return logf(x); }
static METATTN_DEVICE double natural_log(double x) { return log(x); }

// An element of a view whose dtype is its own business: that of a bias, of what is one for each head. Not inlined, for
// a choice of dtypes at each of a fragment's elements is a lot of code.
template <class T>
static METATTN_CALLED T load(const View& view, int64_t offset) {
  switch (view.dtype) {
    case DType::f64: return static_cast<T>(reinterpret_cast<const double*>(view.data)[offset]);
    case DType::f32: return static_cast<T>(reinterpret_cast<const float*>(view.data)[offset]);
    case DType::bf16: return widened<T>(reinterpret_cast<const BFloat16*>(view.data)[offset]);
    default: return widened<T>(reinterpret_cast<const Float16*>(view.data)[offset]);
  }
}
template <class T>
static METATTN_CALLED void store(const View& view, int64_t offset, T x) {
  switch (view.dtype) {
    case DType::f64: reinterpret_cast<double*>(view.data)[offset] = static_cast<double>(x); break;
    case DType::f32: reinterpret_cast<float*>(view.data)[offset] = static_cast<float>(x); break;
    case DType::bf16: reinterpret_cast<BFloat16*>(view.data)[offset] = narrowed<BFloat16>(x); break;
    default: reinterpret_cast<Float16*>(view.data)[offset] = narrowed<Float16>(x); break;
  }
}

static METATTN_DEVICE int64_t offset_of(const View& view, int64_t seq, int64_t head, int64_t row) {
  return seq * view.stride[0] + head * view.stride[1] + row * view.stride[2];
}
static METATTN_DEVICE double* double_at(const View& view, int64_t seq, int64_t head, int64_t row) {
  return reinterpret_cast<double*>(view.data) + offset_of(view, seq, head, row);
}

}  // namespace metattn::cuda
