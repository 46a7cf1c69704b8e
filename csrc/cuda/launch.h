// How the four maps' kernels are started: on a GPU's stream, or emulated.
#pragma once

#include <cstddef>

#include "params.h"

namespace metattn::cuda {

// What a launch needs to know of a GPU.
struct Gpu {
  size_t shared_memory;  // bytes that one block may have
  void* stream;          // a cudaStream_t
  bool from_80 = true;   // of compute capability 8.0 or later: bfloat16 on tensor cores, copies in the background
  void* (*allocate)(void* context, size_t bytes) = nullptr;  // memory for what is started now
  void* context = nullptr;
};

enum class Map { forward, vjp, jvp, vjp_jvp };

// Start a map's kernels for q, k and v of one dtype. Null, or why they do not run.
const char* run_bf16(Map map, const Params& p, const Gpu& gpu);
const char* run_f16(Map map, const Params& p, const Gpu& gpu);
const char* run_f32(Map map, const Params& p, const Gpu& gpu);
const char* run_tf32(Map map, const Params& p, const Gpu& gpu);  // float32, products in TF32; from 8.0 on
const char* run_f64(Map map, const Params& p, const Gpu& gpu);

// Whether kernels were compiled for the current GPU, and its driver takes them.
bool has_code();

}  // namespace metattn::cuda
