// The operators metattn::{forward, vjp, jvp, vjp_jvp} on a GPU. With METATTN_EMULATED: metattn_emulated::…, the same
// kernels on CPU tensors, for tests.
#ifndef METATTN_EMULATED
#define METATTN_ON_GPU
#endif
#include <vector>

#include "call.h"
#include "cuda/launch.h"

#ifdef METATTN_ON_GPU
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace {

using metattn::cuda::Gpu;
using metattn::cuda::Map;

constexpr int64_t kBiasBlocks = 512;  // a sum over fewer tiles than this is cut into parts
constexpr int64_t kFewKeys = 128;     // up to so many, weights are multiplied in two parts

#ifdef METATTN_ON_GPU
Gpu gpu_of(const Tensor& q) {
  int bytes = 0, major = 0;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    STD_TORCH_CHECK(cudaDeviceGetAttribute(value, attribute, q.device_index()) == cudaSuccess,
                    "metattn: the GPU does not say how much shared memory it has, or what it computes");
  };
  ask(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(&major, cudaDevAttrComputeCapabilityMajor);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(q.device_index(), &stream));
  return {static_cast<size_t>(bytes), stream, major >= 8};
}
using Guard = torch::stable::accelerator::DeviceGuard;
#else
size_t emulated_shared_memory = 99 * 1024;
bool emulated_from_80 = true;
Gpu gpu_of(const Tensor&) { return {emulated_shared_memory, nullptr, emulated_from_80}; }
struct Guard {
  explicit Guard(int32_t) {}
};
#endif

const char* start(Map map, const Params& p, const Gpu& gpu, bool tf32) {
  switch (p.q.dtype) {
    case DType::bf16: return metattn::cuda::run_bf16(map, p, gpu);
    case DType::f16: return metattn::cuda::run_f16(map, p, gpu);
    case DType::f32: return tf32 ? metattn::cuda::run_tf32(map, p, gpu) : metattn::cuda::run_f32(map, p, gpu);
    default: return metattn::cuda::run_f64(map, p, gpu);
  }
}

// Why heads of these sizes do not fit a GPU, or null: a call of every map that has all tensors, and no rows.
const char* objection(DType dtype, int64_t d, int64_t dv, const Gpu& gpu, bool tf32) {
  static char byte;
  const View present{&byte, dtype, {0, 0, 0, 0}};
  Params p{};
  p.heads = p.kv_heads = 1;
  p.d = d;
  p.dv = dv;
  p.q = p.k = p.v = p.bias = p.d_o = p.t_q = p.t_k = p.t_v = p.t_bias = p.grad_q = p.grad_k = p.grad_v = present;
  p.grad_bias = &byte;
  for (const bool options : {true, false}) {
    if (!options) p.bias = p.t_bias = View{};
    for (const Map map : {Map::forward, Map::vjp, Map::jvp, Map::vjp_jvp})
      if (const char* error = start(map, p, gpu, tf32)) return error;
  }
  return nullptr;
}

// Memory for a map's kernels: given back when they are started, for torch's allocator goes by the stream.
struct Rooms {
  const Tensor& like;
  std::vector<Tensor> rooms;
  void* allocate(size_t bytes) {
    rooms.push_back(empty(like, {static_cast<int64_t>(bytes / sizeof(float))}, codes.f32));
    return rooms.back().data();
  }
};

// tf32: whether it is allowed. All maps of a call take it or none: what one has rounded and another has not would not
// cancel, as T − τ must.
void run(Map map, MapCall& call, bool tf32) {
  Params& p = call.p;
  Gpu gpu = gpu_of(call.inputs.q);
  Rooms rooms{call.inputs.q, {}};
  gpu.allocate = [](void* context, size_t bytes) { return static_cast<Rooms*>(context)->allocate(bytes); };
  gpu.context = &rooms;
  p.twice = p.m <= kFewKeys;
  tf32 = tf32 && gpu.from_80 && p.q.dtype == DType::f32 && objection(DType::f32, p.d, p.dv, gpu, true) == nullptr;
  const char* error = start(map, p, gpu, tf32);
  STD_TORCH_CHECK(error == nullptr, "metattn: ", error);
}

int32_t device_of(const Tensor& q) { return q.device_type() == codes.cpu ? 0 : q.device_index(); }

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Inputs inputs = take_inputs(in);
  const bool tf32 = in.flag();
  const Guard guard(device_of(inputs.q));
  MapCall call = make_call(inputs);
  Results results = new_results(call, false);
  run(Map::forward, call, tf32);
  put(stack, call, std::move(results));
}

void jvp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Tangents tangents = take_tangents(in);
  const bool tf32 = in.flag();
  const Guard guard(device_of(inputs.q));
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_tangents(call, tangents);
  Results results = new_results(call, true);
  run(Map::jvp, call, tf32);
  put(stack, call, std::move(results));
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// In how many parts a broadcast bias' gradient is summed: by shapes alone.
int64_t bias_parts(const Params& p) {
  const int64_t counts[4] = {p.batch, p.heads, ceil_div(p.n, 64), ceil_div(p.m, 32)};
  int64_t owned = 1, terms = 1;
  for (int dim = 0; dim < 4; ++dim) (p.grad_bias_stride[dim + 1] == 0 ? terms : owned) *= counts[dim];
  const int64_t wanted = kBiasBlocks / (owned > 0 ? owned : 1);
  const int64_t parts = wanted < terms ? wanted : terms;
  return parts > 0 ? parts : 1;
}

// Allocates the bias' gradient; the parts that it is the sum of, where it is not made in place.
Tensor set_bias_parts(MapCall& call, Tensor& grad_bias) {
  Params& p = call.p;
  const Tensor& bias = call.inputs.bias;
  const int64_t* sizes = bias.sizes();
  // blocks that position leaves out are never visited
  grad_bias = zeros(bias, {sizes[0], sizes[1], sizes[2], sizes[3]}, bias.dtype());
  p.grad_bias_out = strided(grad_bias, dtype_of(grad_bias, "dbias"), false, false);
  p.own_bias = sizes[0] == p.batch && sizes[1] == p.heads && sizes[2] == call.mask_rows && sizes[3] == call.mask_keys;
  p.bias_parts_stride = set_bias_gradient(call);
  if (p.own_bias) {
    p.grad_bias = p.grad_bias_out.data;
    return {};
  }
  p.grad_bias_parts = bias_parts(p);
  Tensor parts = zeros(bias, {p.grad_bias_parts, p.bias_parts_stride}, call.compute_type());
  p.grad_bias = parts.data();
  return parts;
}

Gradients run_gradients(Map map, MapCall& call, int64_t needs, bool tf32) {
  Params& p = call.p;
  Gradients made = new_gradients(call, needs);
  const Tensor statistics = empty(call.inputs.q, {metattn::kStatistics, call.leading, p.heads, call.rows}, call.compute_type());
  p.statistics = statistics.data();
  p.statistics_stride[2] = call.rows;
  p.statistics_stride[1] = call.packed ? 0 : p.heads * call.rows;
  p.statistics_stride[0] = call.leading * p.heads * call.rows;
  Tensor parts;
  if (needs & metattn::kNeedBias) parts = set_bias_parts(call, made[3]);
  run(map, call, tf32);
  return made;
}

void vjp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Cotangents cotangents = take_cotangents(in);
  const int64_t needs = in.integer();
  const bool tf32 = in.flag();
  const Guard guard(device_of(inputs.q));
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_cotangents(call, cotangents);
  put(stack, call, run_gradients(Map::vjp, call, needs, tf32));
}

void vjp_jvp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Cotangents cotangents = take_cotangents(in);
  const Tangents tangents = take_tangents(in);
  const Results given_t = take_results(in);
  const int64_t needs = in.integer();
  const bool tf32 = in.flag();
  const Guard guard(device_of(inputs.q));
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_cotangents(call, cotangents);
  set_tangents(call, tangents);
  set_tangent_results(call, given_t, bool(given_t[2]));
  put(stack, call, run_gradients(Map::vjp_jvp, call, needs, tf32));
}

// jvp, then vjp_jvp with what that gave.
void double_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Cotangents cotangents = take_cotangents(in);
  const Tangents tangents = take_tangents(in);
  const int64_t needs = in.integer();
  const bool tf32 = in.flag();
  const Guard guard(device_of(inputs.q));
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_cotangents(call, cotangents);
  set_tangents(call, tangents);
  Results results = new_results(call, true);
  run(Map::jvp, call, tf32);
  set_tangent_results(call, results, bool(call.p.out_o_lo));
  call.p.out_o = call.p.out_lse = call.p.out_o_lo = View{};
  Gradients gradients = run_gradients(Map::vjp_jvp, call, needs, tf32);
  put(put(stack, call, std::move(results)), call, std::move(gradients));
}

}  // namespace

#define METATTN_IMPLEMENT_OPERATORS(library) \
  library.impl("forward", forward);          \
  library.impl("vjp", vjp);                  \
  library.impl("jvp", jvp);                  \
  library.impl("vjp_jvp", vjp_jvp);          \
  library.impl("double_backward", double_backward)

// Why no call with heads of these sizes can run on a GPU, or null.
extern "C" __attribute__((visibility("default"))) const char* metattn_cuda_objection(int dtype, int64_t d, int64_t dv,
                                                                                     int64_t shared_memory) {
  return objection(static_cast<DType>(dtype), d, dv, {static_cast<size_t>(shared_memory), nullptr}, false);
}

#ifdef METATTN_ON_GPU
// Bytes of shared memory that a block may have on a GPU; 0 where this library has no kernels for it, or its driver is
// too old for them.
extern "C" __attribute__((visibility("default"))) int64_t metattn_cuda_shared_memory(int device) {
  int before = 0, bytes = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device) != cudaSuccess ||
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  const bool usable = metattn::cuda::has_code();
  cudaSetDevice(before);
  return usable ? bytes : 0;
}

// the schemas are the CPU library's
STABLE_TORCH_LIBRARY_IMPL(metattn, CUDA, library) { METATTN_IMPLEMENT_OPERATORS(library); }
STABLE_TORCH_LIBRARY_IMPL(metattn_bare, CUDA, library) { METATTN_IMPLEMENT_OPERATORS(library); }
#else
extern "C" __attribute__((visibility("default"))) void metattn_emulate_shared_memory(int64_t bytes) {
  emulated_shared_memory = static_cast<size_t>(bytes);
}
extern "C" __attribute__((visibility("default"))) void metattn_emulate_from_80(int yes) { emulated_from_80 = yes != 0; }
STABLE_TORCH_LIBRARY(metattn_emulated, library) { METATTN_DEFINE_OPERATORS(library); }
STABLE_TORCH_LIBRARY_IMPL(metattn_emulated, CPU, library) { METATTN_IMPLEMENT_OPERATORS(library); }
STABLE_TORCH_LIBRARY(metattn_emulated_bare, library) { METATTN_DEFINE_OPERATORS(library); }
STABLE_TORCH_LIBRARY_IMPL(metattn_emulated_bare, CPU, library) { METATTN_IMPLEMENT_OPERATORS(library); }
#endif
