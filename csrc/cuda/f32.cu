#include "cuda/kernels.h"

namespace metattn::cuda {

const char* run_f32(Map map, const Params& p, const Gpu& gpu) {
  const int64_t width = larger(p.d, p.dv);
  const char* error = is_full(p)     ? start_map<float, 8, 1, true>(map, p, gpu)
                      : width <= 128 ? start_map<float, 8, 4, false>(map, p, gpu)
                                     : start_map<float, 8, 1, false>(map, p, gpu);
  return error != nullptr ? error : start_sums<float, 1>(map, p, gpu);
}

}  // namespace metattn::cuda
