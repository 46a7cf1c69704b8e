// Register-blocked products of small tiles: C[M, N] (+)= A[M, K]·B[K, N].
// B's columns come in panels, zero-padded: panel p holds [K][panel] contiguously, a panel being one to kPanelVectors
// vectors wide. A is read one element at a time and broadcast, so it may be row-major, transposed, or panels itself.
#pragma once

#include "vec.h"

namespace metattn::METATTN_ISA {

// Where element (row, k) of A lies: data[row·stride + (k / panel)·panel_stride + k % panel], or, transposed,
// data[row + k·stride].
template <class T>
struct Operand {
  const T* data;
  int64_t stride;        // of rows, or of k when transposed
  int64_t panel;
  int64_t panel_stride;  // from k to k + panel
};

template <class T>
static inline Operand<T> row_major(const T* data, int64_t row_stride) {
  return {data, row_stride, INT64_MAX, 0};
}
template <class T>
static inline Operand<T> transposed(const T* data, int64_t k_stride) {
  return {data, k_stride, INT64_MAX, 0};
}
// Panels [K / panel][rows][panel], as rows are packed.
template <class T>
static inline Operand<T> panels(const T* data, int64_t rows, int64_t panel) {
  return {data, panel, panel, rows * panel};
}

// Operand B: from one panel to the next, `stride`; from one k to the next, `step`.
template <class T>
struct Panels {
  const T* data;
  int64_t panel, stride, step;
};

// How A is read. kTwoAtOnce: two k at a time, against a B whose vectors hold the columns of both side by side (lanes 2c and
// 2c + 1), and so does C, in two parts of a sum: half the work where B is at most half a vector wide.
enum class Read { kRowMajor, kTransposed, kTwoAtOnce };

// C [m, n], rows c_stride apart, columns contiguous; columns up to the next multiple
// of kLanes are written. Compiled in gemm.cpp alone.
template <Read Way = Read::kRowMajor, class T>
void gemm(int64_t m, int64_t n, int64_t k, const Operand<T>& a, const Panels<T>& b, T* c, int64_t c_stride, bool accumulate);

}  // namespace metattn::METATTN_ISA
