#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#if defined(METATTN_HAS_AMX) || defined(METATTN_HAS_AVX512_BF16)
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "facts.h"
#include "finish.h"
#include "geometry.h"

namespace metattn {
namespace {

// masks.h's kRows, and the largest of its kKeys: chunks are alike on every instruction set.
constexpr int64_t kRowBlock = 96, kKeyBlock = 128;
// A key sweep is cut into at least this many units where its keys allow, whatever the number of threads is: sums
// over the cuts must not depend on the machine.
constexpr int64_t kKeySweepUnits = 16;
// Each of a head's units loads all its rows, which is worth it for so many products of elements a row, or where there are
// few heads.
constexpr int64_t kWorthAUnit = 1 << 13, kFewOwners = 4;
// Long problems are cut further, for machines of many threads: into up to so many units, of that many keys at least. A
// head's dQ is then a sum of at most kKeySweepUnits parts.
constexpr int64_t kLongSweepUnits = 64, kKeysOfLong = 2048;
// Where keys are too few for kKeySweepUnits, rows are cut too: into parts of at least so many products of elements.
constexpr double kWorthAPart = 1 << 21;
constexpr int64_t kLeastRows = 16;  // of a unit of a row sweep
// Where rows and heads are too few for so many units, the keys of a forward are split: into at least so many.
constexpr int kRowSweepUnits = 16;
constexpr int64_t kKeysOfSplit = 4096;

struct Isa {
  const char* name;
  const MapKernel* maps[kMapCount];
  const int64_t* keys_at_once;
  const MapKernel* pair_maps[kMapCount];  // of bfloat16 tensors; null: as floats
  const int64_t* pair_keys_at_once;
  bool (*usable)();
};

#define METATTN_MAPS(isa) {isa::forward, isa::vjp, isa::jvp, isa::vjp_jvp, isa::double_backward}, &isa::keys_at_once

#ifdef METATTN_HAS_AVX512
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}
#endif
#if defined(METATTN_HAS_AVX512_BF16) || defined(METATTN_HAS_AMX)
bool has_avx512_bf16() {
  unsigned eax = 0, ebx, ecx, edx;
  return has_avx512() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 5 & 1) != 0;
}
#endif
#ifdef METATTN_HAS_AMX
// Linux gives a process the tiles' state when it asks for it.
bool has_amx() {
#ifdef __linux__
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax, ebx, ecx, edx = 0;
  if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  return (edx & kBf16) != 0 && (edx & kTiles) != 0 && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
#endif

// Best first.
const Isa kIsas[] = {
#ifdef METATTN_HAS_AMX
    {"amx", METATTN_MAPS(avx512), METATTN_MAPS(amx), has_amx},
#endif
#ifdef METATTN_HAS_AVX512_BF16
    {"avx512_bf16", METATTN_MAPS(avx512), METATTN_MAPS(avx512_bf16), has_avx512_bf16},
#endif
#ifdef METATTN_HAS_AVX512
    {"avx512", METATTN_MAPS(avx512), {}, nullptr, has_avx512},
#endif
#ifdef METATTN_HAS_AVX2
    {"avx2", METATTN_MAPS(avx2), {}, nullptr, [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }},
#endif
    {"baseline", METATTN_MAPS(baseline), {}, nullptr, [] { return true; }},
};

const Isa* find_isa(const char* name) {
  for (const Isa& isa : kIsas)
    if (isa.usable() && (*name == '\0' || strcmp(isa.name, name) == 0)) return &isa;
  return nullptr;
}

std::string names_of_isas(bool usable) {
  std::string names;
  for (const Isa& isa : kIsas)
    if (!usable || isa.usable()) names += (names.empty() ? "" : ",") + std::string(isa.name);
  return names;
}

std::atomic<const Isa*>& active_isa() {
  static std::atomic<const Isa*> active{find_isa("")};
  return active;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// To wake a thread takes about as long as so many products of elements.
constexpr double kWorthAThread = 1 << 17;

// How many threads a map is worth.
int worth_of(const Params& p, int threads) {
  const double products = 1.0 * p.batch * p.heads * p.n * p.m * (p.d + p.dv);
  return products < kWorthAThread * threads ? static_cast<int>(products / kWorthAThread) + 1 : threads;
}

// Rows are independent of each other, so a row sweep may be cut by the number of threads. A packed problem's sequences have
// units of their own count, which `first_unit` receives.
int64_t plan_row_sweep(Params& p, MapName map, int threads, std::vector<int64_t>& first_unit) {
  const int64_t pairs = p.batch * p.kv_heads, group = p.kv_heads > 0 ? p.heads / p.kv_heads : 1;
  // spans of keys are counted from the first that a unit's rows see: then the number of threads must not cut the rows
  if (p.window_left >= 0 && p.m > kSpan) threads = kRowSweepUnits;
  const int64_t pieces = pairs > 0 ? ceil_div(4 * threads, pairs) : 1;
  p.row_chunk = larger(2 * kRowBlock, ceil_div(ceil_div(p.n, pieces), kRowBlock) * kRowBlock);
  p.head_chunk = larger(1, group);
  p.key_splits = 1;
  const int64_t finest = p.batch * p.heads * ceil_div(p.n, kLeastRows);
  if (map == kForward && finest > 0 && finest < kRowSweepUnits)
    p.key_splits = larger(1, smaller(ceil_div(kRowSweepUnits, finest), p.m / kKeysOfSplit));
  const int64_t units = ceil_div(p.n, p.row_chunk) * pairs * p.key_splits, wanted = worth_of(p, threads);
  if (units > 0 && units < wanted) {  // a unit packs its keys: fewer than threads only where there is no other way
    p.head_chunk = larger(1, group * units / wanted);
    const int64_t owners = pairs * ceil_div(group, p.head_chunk) * p.key_splits;
    if (owners < wanted) p.row_chunk = ceil_div(ceil_div(p.n, ceil_div(wanted, owners)), kLeastRows) * kLeastRows;
  }
  const int64_t owners = p.kv_heads * ceil_div(group, p.head_chunk);
  if (p.cu_q == nullptr) return ceil_div(p.n, p.row_chunk) * p.batch * owners * p.key_splits;
  first_unit.resize(p.batch + 1);
  for (int64_t seq = 0; seq < p.batch; ++seq)
    first_unit[seq + 1] = first_unit[seq] + ceil_div(sequence(p, seq).n, p.row_chunk) * owners;
  p.first_unit = first_unit.data();
  return first_unit[p.batch] * p.key_splits;
}

int64_t owners_of(const Params& p) { return (p.all_batches ? 1 : p.batch) * (p.all_heads ? 1 : p.kv_heads); }

// Keys of a unit.
int64_t plan_key_chunk(const Params& p, MapName map, int64_t owners) {
  if (map == kDoubleBackward || p.m == 0 || owners == 0) return larger(kKeyBlock, ceil_div(p.m, kKeyBlock) * kKeyBlock);
  const int64_t least = owners < kFewOwners ? kKeyBlock : larger(kKeyBlock, kWorthAUnit / larger(1, p.d + p.dv));
  const auto pieces_of = [&](int64_t units, int64_t least) {
    return smaller(smaller(ceil_div(units, owners), kKeySweepUnits), larger(1, p.m / least));
  };
  const int64_t pieces = larger(pieces_of(kKeySweepUnits, least), pieces_of(kLongSweepUnits, kKeysOfLong));
  return ceil_div(ceil_div(p.m, pieces), kKeyBlock) * kKeyBlock;
}

// Parts of an owner's rows, or of its pairs of batch and key head where it owns a bias for several. Each is an addend of the
// gradients of keys, or of the bias.
int64_t plan_row_parts(const Params& p, int64_t owners) {
  const int64_t units = owners * p.key_chunks;
  if (units == 0 || units >= kKeySweepUnits || p.kv_heads == 0) return 1;
  const int64_t group = p.heads / p.kv_heads, pairs = p.batch * p.kv_heads / owners;
  const bool cuts_pairs = p.all_batches || p.all_heads;
  int64_t most = cuts_pairs ? pairs : group * ceil_div(p.n, kRowBlock);
  const double work = 1.0 * pairs * group * p.n * smaller(p.m, p.key_chunk) * (p.d + p.dv);
  if (work < kWorthAPart * most) most = static_cast<int64_t>(work / kWorthAPart);
  if (cuts_pairs && p.needs & kNeedBias) {  // the parts take no more memory than dQ does
    const double elements = 1.0 * p.bias_size[0] * p.bias_size[1] * p.bias_size[2] * p.bias_size[3];
    const double room = 1.0 * p.batch * p.heads * p.n * p.d / 2;
    if (room < elements * most) most = static_cast<int64_t>(room / elements);
  }
  return larger(1, smaller(ceil_div(kKeySweepUnits, units), most));
}

// bfloat16 products need every operand in that dtype.
bool all_bfloat16(const Params& p) {
  for (const View* view : {&p.q, &p.k, &p.v, &p.d_o, &p.t_q, &p.t_k, &p.t_v})
    if (*view && view->dtype != DType::bf16) return false;
  return true;
}

bool takes_pairs(const Isa& isa, const Params& p) { return isa.pair_keys_at_once != nullptr && all_bfloat16(p); }

bool keys_fit(const Isa& isa, const Params& p) {
  // all keys of a head are one unit's: more than a few where there are heads for several threads
  if (p.m > kKeyBlock / 2 && p.batch * p.kv_heads < kFewOwners) return false;
  return p.m <= (takes_pairs(isa, p) ? *isa.pair_keys_at_once : *isa.keys_at_once);
}

const MapKernel& kernel_of(const Isa& isa, MapName map, const Params& p, bool is_double) {
  if (takes_pairs(isa, p)) return isa.pair_maps[map][kPairs];
  return isa.maps[map][is_double ? kDouble : kFloat];
}

// How many threads share a map's units.
int tasks_of(const Params& p, int64_t units, int threads) {
  const int64_t worth = worth_of(p, threads);
  return static_cast<int>(units < worth ? units : worth);
}

// Scratch memory of a call. Of a single thread, a moderate piece is kept for its next call: to get it anew takes longer than
// a small problem does.
constexpr size_t kKeptBytes = 1 << 20;

using Memory = std::unique_ptr<char, void (*)(void*)>;
Memory allocate(size_t bytes) { return {static_cast<char*>(std::aligned_alloc(64, bytes)), std::free}; }

class Scratch {
 public:
  Scratch(size_t stride, int tasks) : owned_(nullptr, std::free) {
    const size_t bytes = stride * tasks;
    if (tasks > 1 || bytes > kKeptBytes) {
      owned_ = allocate(bytes);
      data_ = owned_.get();
      return;
    }
    thread_local Memory kept(nullptr, std::free);
    thread_local size_t kept_bytes = 0;
    if (kept_bytes < bytes) {
      kept = allocate(bytes);
      kept_bytes = kept == nullptr ? 0 : bytes;
    }
    data_ = kept.get();
  }
  char* data() const { return data_; }

 private:
  Memory owned_;
  char* data_;
};

struct Walk {
  const Params& p;
  const MapKernel& kernel;
  int64_t units;
  char* scratch;
  size_t scratch_stride;
  std::atomic<int64_t> next{0};
};

int64_t next_unit(void* walk) {
  Walk& w = *static_cast<Walk*>(walk);
  const int64_t unit = w.next.fetch_add(1, std::memory_order_relaxed);
  return unit < w.units ? unit : -1;
}

struct Range1d {
  void (*body)(void* context, int64_t begin, int64_t end);
  void* context;
  int64_t count, step;
  std::atomic<int64_t> next{0};
};

// body(begin, end) over [0, count) in steps, on all threads.
template <class Body>
void parallel(const Threads& threads, int64_t count, int64_t step, Body body) {
  Range1d range{[](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); }, &body, count,
                step};
  const int64_t steps = ceil_div(count, step);
  threads.for_each(static_cast<int>(steps < threads.count ? steps : threads.count), [](void* context, int) {
    Range1d& job = *static_cast<Range1d*>(context);
    for (int64_t at; (at = job.next.fetch_add(job.step)) < job.count;)
      job.body(job.context, at, at + job.step < job.count ? at + job.step : job.count);
  }, &range);
}

void finish_key_sweep(const Params& p, bool is_double, const Threads& threads) {
  if (p.grad_q_parts != nullptr) {
    const int64_t batch = p.cu_q == nullptr ? p.batch : 1;
    const int64_t rows = p.grad_q_parts_stride[2] / (p.d > 0 ? p.d : 1);
    const PartSum job{p.grad_q_parts, p.key_chunks, p.grad_q_parts_stride[0],   is_double,
                      p.scale,        p.grad_q,     {batch, p.heads, rows, p.d}};
    parallel(threads, batch * p.heads * rows, 128, [&](int64_t begin, int64_t end) { sum_parts(job, begin, end); });
  }
  const auto sum_key_parts = [&](char* parts, const View& target, int64_t width, double factor) {
    if (parts == nullptr) return;
    const int64_t batch = p.cu_k == nullptr ? p.batch : 1, rows = batch * p.kv_heads * p.key_rows;
    const PartSum job{parts, p.row_parts, rows * width, is_double, factor, target, {batch, p.kv_heads, p.key_rows, width}};
    parallel(threads, rows, 128, [&](int64_t begin, int64_t end) { sum_parts(job, begin, end); });
  };
  sum_key_parts(p.grad_k_parts, p.grad_k, p.d, p.scale);
  sum_key_parts(p.grad_v_parts, p.grad_v, p.dv, 1);
  if (p.grad_bias_out) {
    const int64_t rows = p.bias_size[0] * p.bias_size[1] * p.bias_size[2];
    const PartSum job{p.grad_bias,
                      p.grad_bias_parts,
                      rows * p.bias_size[3],
                      is_double || p.bias_in_double,
                      1.0,
                      p.grad_bias_out,
                      {p.bias_size[0], p.bias_size[1], p.bias_size[2], p.bias_size[3]}};
    parallel(threads, rows, 16, [&](int64_t begin, int64_t end) { sum_parts(job, begin, end); });
  }
  for (int64_t slot = 0; p.grad_slopes != nullptr && slot < p.slopes_batch * p.heads; ++slot)
    slope_gradient(p, is_double, slot);
}

}  // namespace

void plan_key_sweep(Params& p, MapName map) {
  const int64_t owners = owners_of(p);
  p.key_chunk = plan_key_chunk(p, map, owners);
  p.key_chunks = larger(1, ceil_div(p.m, p.key_chunk));
  p.row_parts = plan_row_parts(p, owners);
}

bool fits_double_backward(const Params& p) { return keys_fit(*active_isa().load(), p); }

Outcome run_map(MapName map, Params& p, bool is_double, const Threads& threads) {
  const Isa& isa = *active_isa().load();
  if (map == kDoubleBackward && !keys_fit(isa, p)) return Outcome::isa_changed;
  const bool key_sweep = map != kForward && map != kJvp;
  std::vector<int64_t> first_unit;
  int64_t units;
  if (key_sweep) {
    const bool wanted = map == kDoubleBackward || p.needs & (kNeedQ | kNeedK | kNeedV | kNeedBias | kNeedSlopes);
    units = p.kv_heads > 0 && wanted ? owners_of(p) * p.key_chunks * p.row_parts : 0;
  } else {
    units = plan_row_sweep(p, map, threads.count, first_unit);
  }
  const bool splits = !key_sweep && p.key_splits > 1;
  const int64_t rows = splits ? p.heads * split_rows(p) * (p.cu_q == nullptr ? p.batch : 1) : 0;
  const size_t weights = sizeof(double) * 3 * rows * p.key_splits;
  const Memory sums = splits ? allocate((weights + rows * p.key_splits * p.dv * (is_double ? 8 : 4) + 63) / 64 * 64)
                             : Memory(nullptr, std::free);
  if (splits) {
    if (sums == nullptr) return Outcome::no_memory;
    p.split_weights = reinterpret_cast<double*>(sums.get());
    p.split_sums = sums.get() + weights;
  }
  const MapKernel& kernel = kernel_of(isa, map, p, is_double);
  if (units > 0) {
    const int tasks = tasks_of(p, units, threads.count);
    const size_t stride = (kernel.scratch_bytes(p) + 127) / 64 * 64;
    const Scratch scratch(stride, tasks);
    if (scratch.data() == nullptr) return Outcome::no_memory;
    Walk walk{p, kernel, units, scratch.data(), stride};
    threads.for_each(tasks, [](void* context, int task) {
      const Walk& w = *static_cast<const Walk*>(context);
      w.kernel.run_units(w.p, w.scratch + task * w.scratch_stride, next_unit, context);
    }, &walk);
  }
  if (key_sweep) finish_key_sweep(p, is_double, threads);
  if (splits) parallel(threads, rows, 16, [&](int64_t begin, int64_t end) { join_splits(p, is_double, begin, end); });
  if (p.grad_sinks != nullptr)
    parallel(threads, p.sinks_batch * p.heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) sink_gradient(p, is_double, map == kVjpJvp, slot);
    });
  return Outcome::done;
}

}  // namespace metattn

const char* metattn_isa() { return metattn::active_isa().load()->name; }

const char* metattn_isas() {
  static const std::string names = metattn::names_of_isas(false);
  return names.c_str();
}

const char* metattn_usable_isas() {
  static const std::string names = metattn::names_of_isas(true);
  return names.c_str();
}

int metattn_set_isa(const char* name) {
  const metattn::Isa* isa = metattn::find_isa(name);
  if (isa == nullptr) return 1;
  metattn::active_isa().store(isa);
  return 0;
}
