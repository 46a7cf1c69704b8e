// Products of bfloat16 operands with float sums: by AMX tiles where the ISA has them, else by vdpbf16ps. Operand B holds
// two successive rows side by side, a pair to each column.
#pragma once

#include "vec.h"

namespace metattn::METATTN_ISA {

// Operands lie in tiles of 1 KB, each of kPairTile rows of A, or columns of B, by kPairDepth of K:
// A as [kPairTile][kPairDepth], B as [kPairDepth / 2][kPairTile][2]. Sizes of a product are padded to whole tiles.
constexpr int64_t kPairTile = 16, kPairDepth = 32;
constexpr int64_t kTileElements = kPairTile * kPairDepth;

// C [m, n] (+)= A [m, k]·B. Tiles along K follow each other; a_stride, b_stride: elements from one row of A's tiles to the
// next, one column of B's to the next; rows of C are c_stride apart. Compiled in pairs.cpp alone.
void gemm_pairs(int64_t m, int64_t n, int64_t k, const uint16_t* a, int64_t a_stride, const uint16_t* b, int64_t b_stride,
                float* c, int64_t c_stride, bool accumulate);

// While it lives, this thread may call gemm_pairs. The tiles' shapes are a thread's own, and other libraries' too: they
// are put back.
class PairsScope {
 public:
  PairsScope();
  ~PairsScope();
  PairsScope(const PairsScope&) = delete;
  PairsScope& operator=(const PairsScope&) = delete;

 private:
  alignas(64) char before_[64];
};

}  // namespace metattn::METATTN_ISA
