// What a kernel knows of the machine: its block, its warps and their lanes. The same kernels run on a GPU and, for
// tests, emulated on a CPU: there one thread stands for a warp, and holds the registers of its 32 lanes.
#pragma once

#include "geometry.h"
#include "params.h"

#ifdef __CUDACC__
#define METATTN_DEVICE __device__ __forceinline__
#define METATTN_CALLED __device__ __noinline__
#define METATTN_UNROLL(...) _Pragma("unroll") for (__VA_ARGS__)
#else
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <deque>
#include <utility>
#include <vector>
#define METATTN_DEVICE inline
#define METATTN_CALLED inline
#define METATTN_UNROLL(...) for (__VA_ARGS__)
#endif

namespace metattn::cuda {

constexpr int kLanes = 32;
#ifdef __CUDACC__
constexpr int kSlots = 1;  // lanes that one thread stands for
static METATTN_DEVICE int lane_of(int) { return static_cast<int>(threadIdx.x) % kLanes; }
#else
constexpr int kSlots = kLanes;
static METATTN_DEVICE int lane_of(int slot) { return slot; }
#endif

// for each lane that this thread stands for
#define METATTN_EACH_LANE(slot, lane)                 \
  METATTN_UNROLL(int slot = 0; slot < kSlots; ++slot) \
    if ([[maybe_unused]] const int lane = ::metattn::cuda::lane_of(slot); true)

#ifdef __CUDACC__
struct Block {
  char* shared;
  METATTN_DEVICE int64_t index() const { return blockIdx.x; }
  METATTN_DEVICE int chunk() const { return static_cast<int>(blockIdx.y); }
  METATTN_DEVICE int warp() const { return static_cast<int>(threadIdx.x) / kLanes; }
  METATTN_DEVICE int warps() const { return static_cast<int>(blockDim.x) / kLanes; }
  // Work that all threads share: each takes the pieces worker, worker + workers, …
  METATTN_DEVICE int worker() const { return static_cast<int>(threadIdx.x); }
  METATTN_DEVICE int workers() const { return static_cast<int>(blockDim.x); }
  METATTN_DEVICE void sync() const { __syncthreads(); }
  METATTN_DEVICE bool any(bool x) const { return __syncthreads_or(x); }

  // Copies of 4, 8 or 16 bytes into shared memory, or zeros where not `there`. They go on in the background from compute
  // capability 8.0 on: those of a group are done when all but `Groups` of the groups begun are waited for.
  template <int Bytes>
  METATTN_DEVICE void copy(void* to, const void* from, bool there) const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    if constexpr (Bytes == 16)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(there ? 16 : 0) : "memory");
    else
      asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(from), "n"(Bytes), "r"(there ? Bytes : 0)
                   : "memory");
#else
    constexpr int kWords = Bytes / 4;
    METATTN_UNROLL(int w = 0; w < kWords; ++w)
      static_cast<uint32_t*>(to)[w] = there ? static_cast<const uint32_t*>(from)[w] : 0;
#endif
  }
  METATTN_DEVICE void end_group() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  template <int Groups>
  METATTN_DEVICE void wait() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#endif
  }
};
// Work that a warp shares: each lane takes the pieces first_lane, first_lane + lane_step, …
static METATTN_DEVICE int first_lane() { return lane_of(0); }
static METATTN_DEVICE int lane_step() { return kLanes; }
template <class T>
static METATTN_DEVICE T lane_sum(T x) {
  METATTN_UNROLL(int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
static METATTN_DEVICE void set_bits(uint32_t* word, uint32_t bits) { atomicOr(word, bits); }
#else
struct Block {
  char* shared;
  int64_t block_index;
  int block_chunk, warp_index, warp_count;
  std::barrier<>* barrier;
  std::atomic<int>* flags;  // three in turn, so that none is cleared while it is read
  int turn = 0;
  int64_t index() const { return block_index; }
  int chunk() const { return block_chunk; }
  int warp() const { return warp_index; }
  int warps() const { return warp_count; }
  int worker() const { return warp_index; }
  int workers() const { return warp_count; }
  void sync() { barrier->arrive_and_wait(); }
  bool any(bool x) {
    std::atomic<int>& flag = flags[turn];
    turn = (turn + 1) % 3;
    if (x) flag.store(1);
    sync();
    const bool found = flag.load();
    if (warp_index == 0) flags[turn].store(0);
    sync();
    return found;
  }
  // What is copied in the background arrives when it is waited for; from the start there is nothing to read there.
  struct Copy {
    void* to;
    const void* from;
    int bytes;
  };
  std::vector<Copy> group{};
  std::deque<std::vector<Copy>> groups{};
  template <int Bytes>
  void copy(void* to, const void* from, bool there) {
    memset(to, 0xff, Bytes);
    group.push_back({to, there ? from : nullptr, Bytes});
  }
  void end_group() {
    groups.push_back(std::move(group));
    group.clear();
  }
  template <int Groups>
  void wait() {
    for (; groups.size() > static_cast<size_t>(Groups); groups.pop_front())
      for (const Copy& each : groups.front())
        each.from == nullptr ? memset(each.to, 0, static_cast<size_t>(each.bytes))
                             : memcpy(each.to, each.from, static_cast<size_t>(each.bytes));
  }
};
static inline int first_lane() { return 0; }
static inline int lane_step() { return 1; }
template <class T>
static inline T lane_sum(T x) {
  return x;
}
static inline void set_bits(uint32_t* word, uint32_t bits) { std::atomic_ref<uint32_t>(*word).fetch_or(bits); }
#endif

// ---- a value for each of the two rows, lane / 4 and lane / 4 + 8, that a lane has of a warp's sixteen ----

template <class T>
struct Rows {
  T x[kSlots][2];
  static METATTN_DEVICE Rows filled(T value) {
    Rows rows;
    METATTN_EACH_LANE(slot, lane) rows.x[slot][0] = rows.x[slot][1] = value;
    return rows;
  }
};

template <class T>
static METATTN_HD T larger_of(T a, T b) {
  return a > b ? a : b;
}

// Row and column of element e of the 16 × 8 tile t that a lane holds: how tensor cores lay out their results.
static METATTN_DEVICE int row_of(int lane, int e) { return lane / 4 + 8 * (e / 2); }
static METATTN_DEVICE int column_of(int lane, int tile, int e) { return 8 * tile + 2 * (lane % 4) + e % 2; }

// Sixteen rows of 8·Tiles columns, spread over a warp.
template <class T, int Tiles>
struct Fragment {
  T x[kSlots][Tiles][4];

  METATTN_DEVICE void fill(T value) {
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int t = 0; t < Tiles; ++t)
        METATTN_UNROLL(int e = 0; e < 4; ++e) x[slot][t][e] = value;
  }
  // f(value, row, column, slot, tile, e)
  template <class F>
  METATTN_DEVICE void each(F f) {
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int t = 0; t < Tiles; ++t)
        METATTN_UNROLL(int e = 0; e < 4; ++e) f(x[slot][t][e], row_of(lane, e), column_of(lane, t, e), slot, t, e);
  }
  // Adds up rows, or takes their maximum, with what the four lanes of a row have.
  template <class Join>
  METATTN_DEVICE Rows<T> joined(T start, Join join) const {
    Rows<T> rows = Rows<T>::filled(start);
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int t = 0; t < Tiles; ++t)
        METATTN_UNROLL(int e = 0; e < 4; ++e) rows.x[slot][e / 2] = join(rows.x[slot][e / 2], x[slot][t][e]);
#ifdef __CUDACC__
    METATTN_UNROLL(int h = 0; h < 2; ++h)
      METATTN_UNROLL(int step = 1; step < 4; step *= 2)
        rows.x[0][h] = join(rows.x[0][h], __shfl_xor_sync(0xffffffffu, rows.x[0][h], step));
#else
    for (int quad = 0; quad < kLanes; quad += 4)
      for (int h = 0; h < 2; ++h) {
        const T all = join(join(rows.x[quad][h], rows.x[quad + 1][h]), join(rows.x[quad + 2][h], rows.x[quad + 3][h]));
        for (int lane = quad; lane < quad + 4; ++lane) rows.x[lane][h] = all;
      }
#endif
    return rows;
  }
  METATTN_DEVICE Rows<T> row_sums() const {
    return joined(T{0}, [](T a, T b) { return a + b; });
  }
};

}  // namespace metattn::cuda
