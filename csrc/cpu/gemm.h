// Register-blocked products of small tiles: C[M, N] (+)= A[M, K]·B[K, N].
// B and C's columns come in panels of kPanel columns, zero-padded: B panel p holds [K][kPanel] contiguously.
// A is read one element at a time and broadcast, so it may be row-major, transposed, or panels itself.
#pragma once

#include "vec.h"

namespace metattn::METATTN_ISA {

// Where element (row, k) of A lies: data[row·row_stride + (k / kPanel)·panel_stride + (k % kPanel)·k_stride].
// Transposed says that row_stride is 1, otherwise k_stride is.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;        // of rows, or of k when transposed
  int64_t panel_stride;  // from k to k + kPanel
};

template <class T>
static inline Operand<T> row_major(const T* data, int64_t row_stride) {
  return {data, row_stride, kPanel<T>};
}
template <class T>
static inline Operand<T> transposed(const T* data, int64_t k_stride) {
  return {data, k_stride, kPanel<T> * k_stride};
}
// Panels [K / kPanel][rows][kPanel], as pack_rows makes them.
template <class T>
static inline Operand<T> panels(const T* data, int64_t rows) {
  return {data, kPanel<T>, rows * kPanel<T>};
}

// C [m, n], rows c_stride apart, columns contiguous; b_stride: from one panel of B to the next. Columns of C up to the
// next multiple of kLanes are written. Compiled in gemm.cpp alone.
template <bool Transposed = false, class T>
void gemm(int64_t m, int64_t n, int64_t k, const Operand<T>& a, const T* b, int64_t b_stride, T* c, int64_t c_stride,
          bool accumulate);

}  // namespace metattn::METATTN_ISA
