// The kernels of one dtype, and how each map starts them. Included by a file a dtype (bf16.cu, …), which nvcc compiles
// for GPUs, and a C++ compiler for the emulation.
#pragma once

#ifndef __CUDACC__
#include <cstring>
#include <memory>
#include <thread>
#include <vector>
#endif

#include <algorithm>

#include "cuda/forward_rows.h"
#include "cuda/gradient_columns.h"
#include "cuda/gradient_rows.h"
#include "cuda/jvp_rows.h"
#include "cuda/launch.h"
#include "cuda/sums.h"

namespace metattn::cuda {
namespace {

constexpr int kMostWarps = 4;
constexpr const char* kTooWide = "a head of this size does not fit the shared memory of this GPU";

template <class Pass>
size_t shared_bytes(const Params& p, int warps, int stages) {
  Pieces pieces{nullptr};
  Pass(p, warps, stages, pieces);
  return pieces.used;
}

// How many blocks' tiles shared memory holds: two, where that leaves room for as many blocks at a time; more than two of
// these have no registers.
template <class Pass>
int stages_for(const Params& p, const Gpu& gpu, int warps) {
  const auto resident = [&](int stages) {
    return std::min<size_t>(2, gpu.shared_memory / shared_bytes<Pass>(p, warps, stages));
  };
  return gpu.from_80 && resident(2) == resident(1) ? 2 : 1;
}

// Warps of a block: as many as shared memory holds, and rows need; 0 where one is too many.
template <class Pass>
int warps_for(const Params& p, const Gpu& gpu, int64_t rows) {
  int warps = kMostWarps;
  while (warps > 0 && shared_bytes<Pass>(p, warps, 1) > gpu.shared_memory) warps /= 2;
  while (warps > 1 && kWarpRows * (warps / 2) >= rows) warps /= 2;
  return warps;
}

#ifdef __CUDACC__

// Blocks that a multiprocessor shall have registers for: tiles leave shared memory for about as many, and nvcc would
// spill to have a third.
constexpr int kResident = 2;

template <class Pass>
__global__ void __launch_bounds__(kLanes* kMostWarps, kResident) pass_kernel(const __grid_constant__ Params p, int stages) {
#ifdef __CUDA_ARCH__
  if constexpr (kCompiled<typename Pass::Element, Pass::kFull>) {
    extern __shared__ __align__(16) char memory[];
    Block block{memory};
    Pieces pieces{memory};
    Pass(p, block.warps(), stages, pieces).run(p, block);
  } else {
    __trap();
  }
#endif
}
template <class T>
__global__ void sum_parts_kernel(const __grid_constant__ Params p) {
  sum_parts<T>(p, static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, static_cast<int64_t>(gridDim.x) * blockDim.x);
}
template <class T>
__global__ void sum_shares_kernel(const __grid_constant__ Params p, Statistic field) {
  sum_shares<T>(p, field, blockIdx.x);
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Pass>
const char* start(const Params& p, const Gpu& gpu, int warps, int64_t blocks, int64_t chunks) {
  const int stages = stages_for<Pass>(p, gpu, warps);
  const size_t bytes = shared_bytes<Pass>(p, warps, stages);
  if (bytes > 48 * 1024) {
    cudaFuncSetAttribute(pass_kernel<Pass>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (const char* error = last_error()) return error;
  }
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(chunks));
  pass_kernel<Pass><<<grid, kLanes * warps, bytes, static_cast<cudaStream_t>(gpu.stream)>>>(p, stages);
  return last_error();
}
template <class T>
const char* start_sum_parts(const Params& p, const Gpu& gpu) {
  const int64_t blocks = smaller((p.bias_parts_stride + 255) / 256, 4096);
  sum_parts_kernel<T><<<static_cast<unsigned>(blocks), 256, 0, static_cast<cudaStream_t>(gpu.stream)>>>(p);
  return last_error();
}
template <class T>
const char* start_sum_shares(const Params& p, Statistic field, const Gpu& gpu, int64_t slots) {
  sum_shares_kernel<T><<<static_cast<unsigned>(slots), kLanes, 0, static_cast<cudaStream_t>(gpu.stream)>>>(p, field);
  return last_error();
}

#else

// A thread a warp; shared memory holds NaN at first, as it may on a GPU.
template <class Pass>
const char* start(const Params& p, const Gpu& gpu, int warps, int64_t blocks, int64_t chunks) {
  const int stages = stages_for<Pass>(p, gpu, warps);
  const size_t bytes = shared_bytes<Pass>(p, warps, stages);
  const std::unique_ptr<char, void (*)(void*)> memory(
      static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(round_up(static_cast<int64_t>(bytes), 64)))), std::free);
  std::barrier<> barrier(warps);
  std::atomic<int> flags[3]{};
  const auto run_warp = [&](int warp) {
    for (int64_t index = 0; index < blocks * chunks; ++index) {
      if (warp == 0) memset(memory.get(), 0xff, bytes);
      barrier.arrive_and_wait();
      Block block{memory.get(), index / chunks, static_cast<int>(index % chunks), warp, warps, &barrier, flags};
      Pieces pieces{memory.get()};
      Pass(p, warps, stages, pieces).run(p, block);
      barrier.arrive_and_wait();
    }
  };
  std::vector<std::thread> threads;
  for (int warp = 1; warp < warps; ++warp) threads.emplace_back(run_warp, warp);
  run_warp(0);
  for (std::thread& thread : threads) thread.join();
  return nullptr;
}
template <class T>
const char* start_sum_parts(const Params& p, const Gpu&) {
  sum_parts<T>(p, 0, 1);
  return nullptr;
}
template <class T>
const char* start_sum_shares(const Params& p, Statistic field, const Gpu&, int64_t slots) {
  for (int64_t slot = 0; slot < slots; ++slot) sum_shares<T>(p, field, slot);
  return nullptr;
}

#endif

// A pass over `length` rows of each of `pairs`, each block with so many visits.
template <class Pass>
const char* start_pass(const Params& p, const Gpu& gpu, int64_t pairs, int64_t length, int64_t chunks, int64_t visits) {
  const int warps = warps_for<Pass>(p, gpu, length);
  if (warps == 0) return kTooWide;
  const int64_t rows = kWarpRows * warps, blocks = pairs * ((length + rows - 1) / rows);
  if (blocks >= int64_t{1} << 31) return "more blocks than a GPU takes in one launch";
  if (blocks == 0 || chunks == 0) return nullptr;
  using T = Compute<typename Pass::Element>;
  Params with_room = p;
  if (sizeof(T) < sizeof(double) && visits >= kLongVisits && gpu.allocate != nullptr) {
    with_room.aside_chunks = chunks;
    with_room.aside = static_cast<char*>(gpu.allocate(gpu.context, sizeof(T) * Pass::kSums * kLanes * warps * chunks * blocks));
  }
  return start<Pass>(with_room, gpu, warps, blocks, chunks);
}
template <class Pass>
const char* start_rows(const Params& p, const Gpu& gpu, int64_t chunks) {
  const int64_t keys = 8 * Pass::kTiles;
  return start_pass<Pass>(p, gpu, p.batch * p.heads, p.n, chunks, (p.m + keys - 1) / keys);
}

template <class S, int Tiles, bool Second>
const char* start_bias_sums(const Params& p, const Gpu& gpu) {
  using Sums = BiasSums<S, Tiles, Second>;
  const int warps = warps_for<Sums>(p, gpu, p.n);
  if (warps == 0) return kTooWide;
  const int64_t rows = kWarpRows * warps;
  int64_t blocks = p.grad_bias_parts;
  const int64_t counts[4] = {p.batch, p.heads, (p.n + rows - 1) / rows, (p.m + Sums::kKeys - 1) / Sums::kKeys};
  for (int dim = 0; dim < 4; ++dim)
    if (p.grad_bias_stride[dim + 1] != 0) blocks *= counts[dim];
  if (blocks >= int64_t{1} << 31) return "more blocks than a GPU takes in one launch";
  const char* error = blocks == 0 ? nullptr : start<Sums>(p, gpu, warps, blocks, 1);
  return error != nullptr || p.bias_parts_stride == 0 ? error : start_sum_parts<Compute<S>>(p, gpu);
}

template <class S, int Columns, int Tiles, bool Full, bool Second>
const char* start_gradients(const Params& p, const Gpu& gpu, int64_t chunks) {
  const char* error = start_rows<GradientRows<S, Columns, Tiles, Full, Second>>(p, gpu, p.grad_q ? larger(1, chunks) : 1);
  // two results of 128 features and their tangents' scores: half as many queries at a time, or registers spill
  constexpr int kQueryTiles = Second && Columns == 16 ? Tiles / 2 : Tiles;
  using Pass = GradientColumns<S, Columns, kQueryTiles, Full, Second>;
  const int64_t visits = (p.n + Pass::kQueries - 1) / Pass::kQueries * (p.heads / larger(1, p.kv_heads));
  if (error == nullptr && (p.grad_k || p.grad_v)) error = start_pass<Pass>(p, gpu, p.batch * p.kv_heads, p.m, chunks, visits);
  return error;
}

template <class S, int Columns, int Tiles, bool Full>
const char* start_map(Map map, const Params& p, const Gpu& gpu) {
  const auto chunks = [](int64_t width) { return (width + 8 * Columns - 1) / (8 * Columns); };
  const int64_t of_values = larger(1, chunks(p.dv));
  switch (map) {
    case Map::forward: return start_rows<ForwardRows<S, Columns, Tiles, Full>>(p, gpu, of_values);
    case Map::jvp: return start_rows<JvpRows<S, Columns, Tiles, Full>>(p, gpu, of_values);
    case Map::vjp: return start_gradients<S, Columns, Tiles, Full, false>(p, gpu, chunks(larger(p.d, p.dv)));
    default: return start_gradients<S, Columns, Tiles, Full, true>(p, gpu, chunks(larger(p.d, p.dv)));
  }
}

static bool is_full(const Params& p) { return p.softcap != 0 || p.bias || p.slopes || p.mask || p.rng != nullptr; }

// What follows a map's passes: sums over what a bias is broadcast over, and over rows for sinks and slopes.
template <class S, int Tiles>
const char* start_sums(Map map, const Params& p, const Gpu& gpu) {
  const char* error = nullptr;
  if (map != Map::vjp && map != Map::vjp_jvp) return error;
  if (p.grad_bias != nullptr && !p.own_bias)
    error = map == Map::vjp ? start_bias_sums<S, Tiles, false>(p, gpu) : start_bias_sums<S, Tiles, true>(p, gpu);
  if (error == nullptr && p.grad_sinks != nullptr && p.sinks_batch * p.heads > 0)
    error = start_sum_shares<Compute<S>>(p, kSinkShare, gpu, p.sinks_batch * p.heads);
  if (error == nullptr && p.grad_slopes != nullptr && p.slopes_batch * p.heads > 0)
    error = start_sum_shares<Compute<S>>(p, kSlopeShare, gpu, p.slopes_batch * p.heads);
  return error;
}

// Two-byte floats. With options, and heads past 128 features, in smaller tiles: of registers and shared memory there
// is no more, and every shape of tile costs minutes to compile.
template <class S>
const char* run_two_bytes(Map map, const Params& p, const Gpu& gpu) {
  const int64_t width = larger(p.d, p.dv);
  const bool full = is_full(p) || (std::is_same_v<S, BFloat16> && !gpu.from_80);
  const char* error = full           ? start_map<S, 8, 2, true>(map, p, gpu)
                      : width <= 32  ? start_map<S, 4, 4, false>(map, p, gpu)
                      : width <= 64  ? start_map<S, 8, 4, false>(map, p, gpu)
                      : width <= 128 ? start_map<S, 16, 4, false>(map, p, gpu)
                                     : start_map<S, 8, 2, false>(map, p, gpu);
  return error != nullptr ? error : start_sums<S, 2>(map, p, gpu);
}

}  // namespace
}  // namespace metattn::cuda
