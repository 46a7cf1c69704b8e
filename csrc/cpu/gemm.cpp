// The micro-kernels: blocks of C held in registers while K runs by.
#include "gemm.h"

namespace metattn::METATTN_ISA {
namespace {

// Rows of C that a micro-kernel keeps in registers beside some vectors of B: 24 of 32 registers with AVX-512, else 12 of 16.
#if METATTN_VECTOR_BYTES == 64
template <int Vectors>
constexpr int kMicroRows = Vectors == 1 ? 16 : 24 / Vectors;
#else
template <int Vectors>
constexpr int kMicroRows = Vectors == 1 ? 8 : 12 / Vectors;
#endif

// Element k of a row of A, in all lanes; or it and the next, in turn.
template <Read Way, class T>
inline Vec<T> spread(const T* a) {
  if constexpr (Way != Read::kTwoAtOnce) return splat(*a);
  else {
    static_assert(sizeof(T) == sizeof(float));
    double both;
    memcpy(&both, a, sizeof both);
    return (Vec<T>)splat(both);
  }
}

template <class T, Read Way, int Rows, int Vectors>
inline void micro_kernel(int64_t k_count, const Operand<T>& a, int64_t row, const T* b, int64_t b_step, T* c, int64_t c_stride,
                         bool accumulate) {
  // every loop over acc is unrolled, or the compiler keeps it in memory
  Vec<T> acc[Rows][Vectors];
  if (accumulate) {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] = load(c + i * c_stride + j * kLanes<T>);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) acc[i][j] = Vec<T>{};
  }
  constexpr bool Transposed = Way == Read::kTransposed;
  constexpr int kAtOnce = Way == Read::kTwoAtOnce ? 2 : 1;
  const T* a_panel = a.data + row * (Transposed ? 1 : a.stride);
  for (int64_t left = k_count; left > 0; left -= a.panel, a_panel += a.panel_stride) {
    const int64_t steps = left < a.panel ? left : a.panel;
    const T* a_k = a_panel;
    for (int64_t k = 0; k < steps; k += kAtOnce, b += b_step, a_k += Transposed ? a.stride : kAtOnce) {
      Vec<T> b_k[Vectors];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) b_k[j] = load(b + j * kLanes<T>);
#pragma GCC unroll 16
      for (int i = 0; i < Rows; ++i) {
        const Vec<T> a_ik = spread<Way>(a_k + (Transposed ? i : i * a.stride));
#pragma GCC unroll 4
        for (int j = 0; j < Vectors; ++j) acc[i][j] += a_ik * b_k[j];
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) store(c + i * c_stride + j * kLanes<T>, acc[i][j]);
}

// The rows left over when M is no multiple of kMicroRows.
template <class T, Read Way, int Vectors, int Rows>
void last_rows(int64_t rows, int64_t k_count, const Operand<T>& a, int64_t row, const T* b, int64_t b_step, T* c,
               int64_t c_stride, bool accumulate) {
  if constexpr (Rows > 0) {
    if (rows == Rows) {
      micro_kernel<T, Way, Rows, Vectors>(k_count, a, row, b, b_step, c, c_stride, accumulate);
    } else {
      last_rows<T, Way, Vectors, Rows - 1>(rows, k_count, a, row, b, b_step, c, c_stride, accumulate);
    }
  }
}

template <class T, Read Way, int Vectors>
void gemm_panel(int64_t m, int64_t k, const Operand<T>& a, const T* b, int64_t b_step, T* c, int64_t c_stride,
                bool accumulate) {
  constexpr int kStep = kMicroRows<Vectors>;
  int64_t row = 0;
  for (; row + kStep <= m; row += kStep)
    micro_kernel<T, Way, kStep, Vectors>(k, a, row, b, b_step, c + row * c_stride, c_stride, accumulate);
  last_rows<T, Way, Vectors, kStep - 1>(m - row, k, a, row, b, b_step, c + row * c_stride, c_stride, accumulate);
}

}  // namespace

template <Read Way, class T>
void gemm(int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Panels<T>& b, T* c, int64_t c_stride, bool accumulate) {
  const T* panel = b.data;
  for (int64_t col = 0; col < n; col += b.panel, panel += b.stride, c += b.panel) {
    switch (((n - col < b.panel ? n - col : b.panel) + kLanes<T> - 1) / kLanes<T>) {
      case 4: gemm_panel<T, Way, 4>(m, k, a, panel, b.step, c, c_stride, accumulate); break;
      case 3: gemm_panel<T, Way, 3>(m, k, a, panel, b.step, c, c_stride, accumulate); break;
      case 2: gemm_panel<T, Way, 2>(m, k, a, panel, b.step, c, c_stride, accumulate); break;
      default: gemm_panel<T, Way, 1>(m, k, a, panel, b.step, c, c_stride, accumulate);
    }
  }
}

#define METATTN_INSTANTIATE(way, type)                                                                                      \
  template void gemm<Read::way, type>(int64_t, int64_t, int64_t, const Operand<type>&, const Panels<type>&, type*, int64_t, \
                                      bool)
METATTN_INSTANTIATE(kRowMajor, float);
METATTN_INSTANTIATE(kTransposed, float);
METATTN_INSTANTIATE(kTwoAtOnce, float);
METATTN_INSTANTIATE(kRowMajor, double);
METATTN_INSTANTIATE(kTransposed, double);
#undef METATTN_INSTANTIATE

}  // namespace metattn::METATTN_ISA
