#include "cuda/kernels.h"

namespace metattn::cuda {

// float32 with products in TF32, in the two-byte floats' shapes of tiles, but the one for up to 32 features.
const char* run_tf32(Map map, const Params& p, const Gpu& gpu) {
  const int64_t width = larger(p.d, p.dv);
  const bool full = is_full(p);
  const char* error = full || width > 128 ? kTooWide
                      : width <= 64       ? start_map<Tf32, 8, 4, false>(map, p, gpu)
                                          : start_map<Tf32, 16, 4, false>(map, p, gpu);
  if (error == kTooWide) error = start_map<Tf32, 8, 2, true>(map, p, gpu);
  return error != nullptr ? error : start_sums<Tf32, 2>(map, p, gpu);
}

}  // namespace metattn::cuda
