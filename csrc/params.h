// What one call of a map is told: a zero-initialised struct that host code fills and kernels read.
// Torch-free, shared by every device. "seq" is the batch index, or the sequence index of a packed batch.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define METATTN_HD __host__ __device__ __forceinline__
#else
#define METATTN_HD inline
#endif

namespace metattn {

enum class DType : int32_t { f64, f32, bf16, f16 };
enum class Causal : int32_t { none, top_left, bottom_right };

// A strided tensor of up to four dimensions; strides count elements, 0 on broadcast dimensions. Absent: data null.
struct View {
  char* data;
  DType dtype;
  int64_t stride[4];
  METATTN_HD explicit operator bool() const { return data != nullptr; }
};

// Bits of `needs`, in the order of the differentiable inputs.
enum Need : int64_t { kNeedQ = 1, kNeedK = 2, kNeedV = 4, kNeedBias = 8, kNeedSinks = 16, kNeedSlopes = 32 };

struct Params {
  int64_t batch;     // sequences
  int64_t heads;     // query heads, a multiple of kv_heads
  int64_t kv_heads;
  int64_t n, m;      // queries, keys of a dense problem; the longest sequence's of a packed one
  int64_t d, dv;     // head dimension of q and k, and of v
  const int32_t* cu_q;  // [batch + 1] row offsets of a packed problem, else null
  const int32_t* cu_k;

  double scale;
  double softcap;    // 0: none
  Causal causal;
  int64_t window_left, window_right;  // -1: unlimited
  double dropout_p;
  uint64_t dropout_threshold;         // keep where a Philox word is at least this
  double dropout_keep_scale;          // 1 / (1 - p), 0 for p = 1
  const int64_t* rng;                 // [batch, 2]: seed, batch index; null without dropout
  int64_t rng_stride[2];

  // Differentiable inputs and their constants.
  View q;       // [B, Hq, N, d]
  View k;       // [B, Hkv, M, d]
  View v;       // [B, Hkv, M, dv]
  View bias;    // [B, Hq, N, M] by broadcast strides
  View sinks;   // [B, Hq]
  View slopes;  // [B, Hq]
  View mask;    // bytes [B, Hq, N, M] by broadcast strides; dtype unused

  // Results of earlier maps and cotangents.
  View o;       // [B, Hq, N, dv]
  View o_lo;    // what rounding o to its dtype lost; absent where nothing is
  View lse;     // float64 [B, Hq, N, 2]: a reference score, and log Σ exp(S − reference), -inf where nothing is attended
  View d_o;     // cotangent of o
  View d_lse;   // float64 [B, Hq, N] cotangent of the log-sum-exp, the reference being a constant
  View t_q, t_k, t_v, t_bias, t_sinks, t_slopes;  // tangents, shaped as their primals
  View o_t;     // [B, Hq, N, dv] tangent of o
  View o_t_lo;
  View lse_t;   // float64 [B, Hq, N] tangent of the log-sum-exp, likewise

  // Outputs; absent where not wanted.
  View out_o, out_o_lo, out_lse;          // forward (o, lse) and jvp (their tangents: lse_t)
  View grad_q, grad_k, grad_v;            // vjp and vjp_jvp
  char* grad_q_parts;                     // compute type [key_chunks, B, Hq, N, d]; null where grad_q is written at once
  int64_t grad_q_parts_stride[4];         // elements; over (chunk, seq, head, row), columns contiguous
  char *grad_k_parts, *grad_v_parts;      // compute type [row_parts, B, Hkv, M, d or dv], contiguous; null: one part
  int64_t key_rows;                       // M of those, or a packed problem's total
  char* grad_bias;                        // zero-filled; [parts, 1|B, 1|Hq, 1|N, 1|M]
  bool bias_in_double;                    // grad_bias holds float64, else the compute type
  int64_t grad_bias_stride[5];            // over (chunk, seq, head, row, key); 0 on summed dimensions
  int64_t grad_bias_part_stride;          // over row parts
  int64_t grad_bias_parts;                // all of them: chunks of keys, times parts of rows, that share elements
  int64_t bias_size[4];                   // sizes of bias before broadcasting
  View grad_bias_out;                     // where the sum of the parts goes; absent where grad_bias is the result
  char* grad_sinks;                       // compute type [1|B, Hq] contiguous, zero-filled
  int64_t sinks_batch;                    // 1 or batch
  char* grad_slopes;                      // likewise
  int64_t slopes_batch;
  double* slope_sums;                     // key sweeps: [key_chunks·row_parts, B, Hq], zero-filled: Σ dS·distance
  int64_t needs;

  // Plan (cpu/dispatch.cpp): how the work is cut. A unit is what one thread does alone.
  int64_t row_chunk;            // row sweeps: rows of a unit
  int64_t head_chunk;           // and query heads of it, of those that share a key head
  int64_t key_splits;           // forward: into how many the keys of a few rows are split; their sums are left to be added
  char* split_sums;             // then: compute type [key_splits, B, Hq, N, dv] (or of packed rows), not yet divided,
  double* split_weights;        // and [key_splits, B, Hq, N, 3]: the reference element, P's sum from there and as rounded
  int64_t key_chunk;            // key sweeps: keys of a unit, a multiple of the key block
  int64_t key_chunks;
  int64_t row_parts;            // key sweeps: parts of an owner's row tiles, or of its pairs of batch and key head
  bool all_batches, all_heads;  // key sweeps: a unit walks every batch (head), so that it owns a broadcast bias gradient
  const int64_t* first_unit;    // row sweeps: [batch + 1] first unit of each packed sequence; null: all have as many

  // On a GPU (csrc/cuda): what a row pass tells a column pass and the sums after it, compute type
  // [kStatistics, B, Hq, N]; over (field, seq, head), rows contiguous.
  char* statistics;
  int64_t statistics_stride[3];
  int64_t bias_parts_stride;    // elements of grad_bias from one part of a sum to the next
  bool own_bias;                // whether the bias is nowhere broadcast: a row pass stores its gradient
  bool twice;                   // weights are multiplied in two parts: few keys average no rounding out
  char* aside;                  // where warps put long sums aside (cuda/aside.h), compute type; null: none is long
  int64_t aside_chunks;         // of each block's results
};

// Whether scores are bent on their way from products: dR is not dS, and its sums over the keys are unknown.
static METATTN_HD bool bends(const Params& p) { return p.softcap != 0; }
// Whether the forward multiplies weights that are rounded in two parts, so that O's D is exact: where scores are bent, what
// D lacks is hidden, and the gradient of slopes weighs it by distances.
static METATTN_HD bool wants_exact_d(const Params& p) { return bends(p) || p.slopes; }

enum Statistic : int { kReference, kLogTotal, kD, kTau, kDt, kSinkShare, kSlopeShare, kStatistics };

}  // namespace metattn
