// Products of sixteen rows, which a warp owns, with a tile in shared memory: on tensor cores for two-byte floats and
// TF32 (sm_80 and later; float16 on sm_75 too), else by multiply-adds. Results are fragments.
#pragma once

#include "cuda/elements.h"

namespace metattn::cuda {

// A tile in shared memory: rows of `ld` elements, of which those past the width are zeros up to a multiple of 16.
template <class S>
struct SharedTile {
  S* data = nullptr;
  int ld = 0;
  METATTN_HD explicit operator bool() const { return data != nullptr; }
  METATTN_DEVICE S* row(int r) const { return data + r * ld; }
  METATTN_DEVICE SharedTile from(int64_t elements) const { return {data == nullptr ? nullptr : data + elements, ld}; }
};

#if defined(__CUDA_ARCH__)
template <class S>
constexpr bool kTensorCores =
    ((std::is_same_v<S, BFloat16> || kIsTf32<S>) && __CUDA_ARCH__ >= 800) || std::is_same_v<S, Float16>;
#else
template <class S>
constexpr bool kTensorCores = false;
#endif

// Whether a pass is compiled: bfloat16 without tensor cores takes minutes a shape of tile, and has one, that of calls
// with options. TF32 is on tensor cores, or is not.
#if defined(__CUDA_ARCH__)
template <class S, bool Full>
constexpr bool kCompiled = kTensorCores<S> || (!kIsTf32<S> && (Full || sizeof(S) > 2));
#endif

#ifdef __CUDACC__
static METATTN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
static METATTN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
static METATTN_DEVICE void load_matrices_turned(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row)));
}
// c += a·b of 16 × 16 times 16 × 8, in TF32 of 16 × 8 times 8 × 8
template <class S>
static METATTN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if constexpr (kIsTf32<S>)
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else if constexpr (std::is_same_v<S, BFloat16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(b0));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}
static METATTN_DEVICE uint32_t tf32_bits(float x) { return __float_as_uint(to_tf32(x)); }
template <class S>
static METATTN_DEVICE uint32_t pair(float x, float y) {
  uint32_t bits;
  if constexpr (std::is_same_v<S, BFloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
    memcpy(&bits, &both, sizeof bits);
  } else {
    const __half2 both = __floats2half2_rn(x, y);
    memcpy(&bits, &both, sizeof bits);
  }
  return bits;
}
#endif

// acc += A·Bᵀ over `depth` features: A sixteen rows, B 8·Tiles rows. Nothing where either is absent.
template <class S, class T, int Tiles>
static METATTN_DEVICE void add_scores(Fragment<T, Tiles>& acc, SharedTile<S> a, int first_row, SharedTile<S> b, int depth) {
  if (!a || !b) return;
  if constexpr (kTensorCores<S>) {
#ifdef __CUDACC__
    static_assert(Tiles % 2 == 0);
    constexpr int kVector = 16 / sizeof(S);
    const int lane = lane_of(0);
    // matrices of 8 rows of 16 bytes: lane l names a row of the one that its group of eight lanes stands for
    const S* a_row = a.row(first_row + lane % 16) + lane / 16 * kVector;
    const S* b_row = b.row(lane % 8 + lane / 16 * 8) + lane / 8 % 2 * kVector;
    const auto step = [&](int k) {
      uint32_t rows[4];
      load_matrices(rows, a_row + k);
      METATTN_UNROLL(int t = 0; t < Tiles; t += 2) {
        uint32_t columns[4];
        load_matrices(columns, b_row + t * 8 * b.ld + k);
        multiply<S>(acc.x[0][t], rows, columns[0], columns[1]);
        multiply<S>(acc.x[0][t + 1], rows, columns[2], columns[3]);
      }
    };
    if constexpr (kIsTf32<S>) {
#pragma unroll 1  // two steps have no more registers, and more take long to compile
      for (int k = 0; k < depth; k += 16) {
        step(k);
        step(k + 8);
      }
    } else {
      for (int k = 0; k < depth; k += 16) step(k);
    }
#endif
  } else {
    METATTN_EACH_LANE(slot, lane) {
      const S *low = a.row(first_row + lane / 4), *high = a.row(first_row + lane / 4 + 8);
      const S* columns = b.row(2 * (lane % 4));
#ifdef __CUDACC__
#pragma unroll 4
#endif
      for (int k = 0; k < depth; ++k) {
        const T x = widened<T>(low[k]), y = widened<T>(high[k]);
        METATTN_UNROLL(int t = 0; t < Tiles; ++t) {
          const T u = widened<T>(columns[8 * t * b.ld + k]), v = widened<T>(columns[(8 * t + 1) * b.ld + k]);
          acc.x[slot][t][0] += x * u;
          acc.x[slot][t][1] += x * v;
          acc.x[slot][t][2] += y * u;
          acc.x[slot][t][3] += y * v;
        }
      }
    }
  }
}

// A weight as tensor cores would have it: rounded to S, and with what that lost, rounded too, where both count.
template <class S, class T>
static METATTN_DEVICE T as_multiplied(T x, bool twice) {
  if constexpr (kIsTf32<S>) return to_tf32(x);
  const T high = widened<T>(narrowed<S>(x));
  return twice && is_finite(high) ? high + widened<T>(narrowed<S>(x - high)) : high;
}

#ifdef __CUDACC__
// What rounding two weights to S lost, rounded too.
template <class S>
static METATTN_DEVICE uint32_t lost_pair(float x, float y) {
  const float u = to_float(narrowed<S>(x)), v = to_float(narrowed<S>(y));
  return pair<S>(is_finite(u) ? x - u : 0.0f, is_finite(v) ? y - v : 0.0f);
}
#endif

// Whether a weight is rounded before it is multiplied. TF32 rounds what it is multiplied by as well.
template <class S>
constexpr bool kRounds = sizeof(S) < 4;

// Sums of rows of weights as add_weighted multiplies them.
template <class S, class T, int Tiles>
static METATTN_DEVICE Rows<T> sums_as_multiplied(const Fragment<T, Tiles>& weights, bool twice) {
  Fragment<T, Tiles> rounded = weights;
  rounded.each([&](T& value, int, int, int, int, int) { value = as_multiplied<S>(value, twice); });
  return rounded.row_sums();
}

// acc += W·B: W sixteen rows of 8·Tiles weights, rounded to S; B 8·Tiles rows of 8·Columns features from `first` on.
// twice: what rounding the weights lost is multiplied too. A sum over few terms has nothing to average that out. Not in
// TF32, where B is rounded as much.
template <class S, class T, int Tiles, int Columns>
static METATTN_DEVICE void add_weighted(Fragment<T, Columns>& acc, const Fragment<T, Tiles>& weights, SharedTile<S> b,
                                        int first, bool twice) {
  if (!b) return;
  if constexpr (kTensorCores<S> && kIsTf32<S>) {
#ifdef __CUDACC__
    // a lane's weights are of keys 2·(lane % 4) and the next, and its factors lane % 4 and lane % 4 + 4 of the eight:
    // keys may be summed in any order, so those are these
    const int lane = lane_of(0);
    const S* b_row = b.row(2 * (lane % 4)) + first + lane / 4;
    METATTN_UNROLL(int t = 0; t < Tiles; ++t) {
      const float (&w)[4] = weights.x[0][t];
      const uint32_t rows[4] = {tf32_bits(w[0]), tf32_bits(w[2]), tf32_bits(w[1]), tf32_bits(w[3])};
      const S* columns = b_row + 8 * t * b.ld;
      METATTN_UNROLL(int c = 0; c < Columns; ++c)
        multiply<S>(acc.x[0][c], rows, __float_as_uint(columns[8 * c].value), __float_as_uint(columns[b.ld + 8 * c].value));
    }
#endif
  } else if constexpr (kTensorCores<S>) {
#ifdef __CUDACC__
    static_assert(Tiles % 2 == 0 && Columns % 2 == 0);
    const int lane = lane_of(0);
    const S* b_row = b.row(lane % 16) + first + lane / 16 * 8;
    METATTN_UNROLL(int t = 0; t < Tiles; t += 2) {
      const float (&w)[4] = weights.x[0][t];
      const float (&u)[4] = weights.x[0][t + 1];
      const uint32_t rows[4] = {pair<S>(w[0], w[1]), pair<S>(w[2], w[3]), pair<S>(u[0], u[1]), pair<S>(u[2], u[3])};
      const uint32_t lost[4] = {lost_pair<S>(w[0], w[1]), lost_pair<S>(w[2], w[3]), lost_pair<S>(u[0], u[1]),
                                lost_pair<S>(u[2], u[3])};
      METATTN_UNROLL(int c = 0; c < Columns; c += 2) {
        uint32_t columns[4];
        load_matrices_turned(columns, b_row + t * 8 * b.ld + c * 8);
        multiply<S>(acc.x[0][c], rows, columns[0], columns[1]);
        multiply<S>(acc.x[0][c + 1], rows, columns[2], columns[3]);
        if (twice) {
          multiply<S>(acc.x[0][c], lost, columns[0], columns[1]);
          multiply<S>(acc.x[0][c + 1], lost, columns[2], columns[3]);
        }
      }
    }
#endif
  } else {
    METATTN_UNROLL(int t = 0; t < Tiles; ++t) {
      METATTN_UNROLL(int k = 0; k < 8; ++k) {
        METATTN_EACH_LANE(slot, lane) {
          // the lane of this row that holds column 8·t + k
          T x, y;
#ifdef __CUDACC__
          const int owner = lane / 4 * 4 + k / 2;
          x = __shfl_sync(0xffffffffu, weights.x[0][t][k % 2], owner);
          y = __shfl_sync(0xffffffffu, weights.x[0][t][2 + k % 2], owner);
#else
          x = weights.x[lane / 4 * 4 + k / 2][t][k % 2];
          y = weights.x[lane / 4 * 4 + k / 2][t][2 + k % 2];
#endif
          if constexpr (sizeof(S) < 4 || kIsTf32<S>) {
            x = as_multiplied<S>(x, twice);
            y = as_multiplied<S>(y, twice);
          }
          const S* columns = b.row(8 * t + k) + first + 2 * (lane % 4);
          METATTN_UNROLL(int c = 0; c < Columns; ++c) {
            const T u = widened<T>(columns[8 * c]), v = widened<T>(columns[8 * c + 1]);
            acc.x[slot][c][0] += x * u;
            acc.x[slot][c][1] += x * v;
            acc.x[slot][c][2] += y * u;
            acc.x[slot][c][3] += y * v;
          }
        }
      }
    }
  }
}

}  // namespace metattn::cuda
