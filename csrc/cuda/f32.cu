#include "cuda/kernels.h"

namespace metattn::cuda {

const char* run_f32(Map map, const Params& p, const Gpu& gpu) {
  const bool full = is_full(p);
  const char* error = full || larger(p.d, p.dv) > 128 ? kTooWide : start_map<float, 8, 4, false>(map, p, gpu);
  if (error == kTooWide) error = full ? start_map<float, 8, 1, true>(map, p, gpu) : start_map<float, 8, 1, false>(map, p, gpu);
  return error != nullptr ? error : start_sums<float, 1>(map, p, gpu);
}

}  // namespace metattn::cuda
