// What each ISA's translation units offer to the dispatcher (dispatch.cpp).
#pragma once

#include <cstddef>
#include <cstdint>

#include "params.h"

namespace metattn {

// One map for one compute type: the scratch bytes of a thread, and the work of one unit.
struct MapKernel {
  size_t (*scratch_bytes)(const Params&);
  void (*run_unit)(const Params&, int64_t unit, char* scratch);
};

enum MapName { kForward, kVjp, kJvp, kVjpJvp, kMapCount };

// Gradients of the sinks are sums over rows: one unit a (batch, head) slot of the result; no scratch beyond a row.
struct IsaKernels {
  MapKernel maps[kMapCount][2];  // [map][0: float, 1: double]
};

#define METATTN_DECLARE_ISA(isa)  \
  namespace isa {                 \
  extern const MapKernel forward[2];  \
  extern const MapKernel vjp[2];      \
  extern const MapKernel jvp[2];      \
  extern const MapKernel vjp_jvp[2];  \
  }
METATTN_DECLARE_ISA(baseline)
METATTN_DECLARE_ISA(avx2)
METATTN_DECLARE_ISA(avx512)
#undef METATTN_DECLARE_ISA

}  // namespace metattn
