#include "cuda/kernels.h"

namespace metattn::cuda {

// For checks of gradients rather than for speed: one shape of tile.
const char* run_f64(Map map, const Params& p, const Gpu& gpu) {
  const char* error = start_map<double, 4, 1, true>(map, p, gpu);
  return error != nullptr ? error : start_sums<double, 1>(map, p, gpu);
}

#ifdef __CUDACC__
bool has_code() {
  cudaFuncAttributes attributes;
  cudaFuncGetAttributes(&attributes, sum_shares_kernel<double>);
  return last_error() == nullptr;
}
#endif

}  // namespace metattn::cuda
