// What each ISA's translation units offer to the dispatcher (dispatch.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"

namespace metattn {

// One map for one compute type: the scratch bytes of a thread, and the work of the units that next(walk) names, one after
// the other until it names −1.
struct MapKernel {
  size_t (*scratch_bytes)(const Params&);
  void (*run_units)(const Params&, char* scratch, int64_t (*next)(void* walk), void* walk);
};

// kDoubleBackward: jvp and vjp_jvp of problems of few keys.
enum MapName { kForward, kVjp, kJvp, kVjpJvp, kDoubleBackward, kMapCount };

// What sums and products are taken in; kPairs: bfloat16 operands, float sums.
enum Arithmetic { kFloat, kDouble, kPairs, kArithmetics };

#define METATTN_DECLARE_ISA(isa)                         \
  namespace isa {                                        \
  extern const MapKernel forward[kArithmetics];          \
  extern const MapKernel vjp[kArithmetics];              \
  extern const MapKernel jvp[kArithmetics];              \
  extern const MapKernel vjp_jvp[kArithmetics];          \
  extern const MapKernel double_backward[kArithmetics];  \
  extern const int64_t keys_at_once; /* most of those */ \
  }
METATTN_DECLARE_ISA(baseline)
METATTN_DECLARE_ISA(avx2)
METATTN_DECLARE_ISA(avx512)
METATTN_DECLARE_ISA(avx512_bf16)
METATTN_DECLARE_ISA(amx)
#undef METATTN_DECLARE_ISA

}  // namespace metattn
