#include "cuda/kernels.h"

namespace metattn::cuda {

const char* run_bf16(Map map, const Params& p, const Gpu& gpu) { return run_two_bytes<BFloat16>(map, p, gpu); }

}  // namespace metattn::cuda
