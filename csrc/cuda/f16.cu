#include "cuda/kernels.h"

namespace metattn::cuda {

const char* run_f16(Map map, const Params& p, const Gpu& gpu) { return run_two_bytes<Float16>(map, p, gpu); }

}  // namespace metattn::cuda
