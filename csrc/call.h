// A call of an operator: schemas, checks, views, allocation. LibTorch's stable ABI only, so that one binary serves every
// torch from 2.10 on. Python (metattn/backends) validates a call for users; the checks here keep a raw call of an
// operator from reading memory that is not there.
//
// METATTN_ON_GPU: tensors must be on a GPU, and values that lie there are not read.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "params.h"

namespace {

using metattn::Causal;
using metattn::DType;
using metattn::Params;
using metattn::View;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;
using Results = std::tuple<Tensor, Tensor, Tensor>;  // o, lse, o_lo; or their tangents
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Both = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

#ifdef METATTN_ON_GPU
thread_local int32_t gpu_of_call = 0;  // q's
bool is_here(const Tensor& x) { return x.is_cuda() && x.get_device_index() == gpu_of_call; }
constexpr const char* kHere = "q's GPU";
#else
bool is_here(const Tensor& x) { return x.is_cpu(); }
constexpr const char* kHere = "the CPU";
#endif

// ---- tensors as views ----

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Double: return DType::f64;
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, "metattn: ", name, " must be float64, float32, bfloat16 or float16");
}

// The last `dims` dimensions must have the given sizes; `broadcast` lets a size of 1 stand for any.
void check_sizes(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes, bool broadcast) {
  STD_TORCH_CHECK(is_here(x), "metattn: ", name, " must be on ", kHere);
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(sizes.size()), "metattn: ", name, " must have ", sizes.size(),
                  " dimensions, has ", x.dim());
  int64_t dim = 0;
  for (const int64_t size : sizes) {
    const int64_t have = x.size(dim);
    STD_TORCH_CHECK(have == size || (broadcast && have == 1), "metattn: ", name, " must have size ", size,
                    " in dimension ", dim, ", has ", have);
    ++dim;
  }
}

View strided(const Tensor& x, DType dtype, bool broadcast, bool packed) {
  View view{static_cast<char*>(x.data_ptr()), dtype, {0, 0, 0, 0}};
  static char empty;
  if (view.data == nullptr) view.data = &empty;  // an empty tensor is present all the same
  for (int64_t dim = 0; dim < x.dim(); ++dim) view.stride[dim] = broadcast && x.size(dim) == 1 ? 0 : x.stride(dim);
  if (packed) view.stride[0] = 0;  // sequences follow each other along the rows
  return view;
}

// One call of a map, being filled in.
struct Call {
  Params p{};
  Tensor q, k, v;
  Maybe bias, sinks;
  bool packed = false;
  bool is_double = false;
  int64_t leading = 0;  // size of dimension 0 of q: B, or 1 when packed
  int64_t rows = 0, keys = 0;            // sizes of dimension 2: N, M, or the packed totals
  int64_t mask_rows = 0, mask_keys = 0;  // what masks and biases broadcast to: N, M, or the bounds of packed lengths

  View like(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes) const {
    check_sizes(x, name, sizes, false);
    return strided(x, dtype_of(x, name), false, packed);
  }
  View query_like(const Tensor& x, const char* name, int64_t width) const {
    return like(x, name, {leading, p.heads, rows, width});
  }
  View key_like(const Tensor& x, const char* name, int64_t width) const {
    return like(x, name, {leading, p.kv_heads, keys, width});
  }
  View statistic(const Tensor& x, const char* name) const {
    check_sizes(x, name, {leading, p.heads, rows}, false);
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Double, "metattn: ", name, " must be float64");
    return strided(x, DType::f64, false, packed);
  }
  View bias_like(const Tensor& x, const char* name) const {
    check_sizes(x, name, {p.batch, p.heads, mask_rows, mask_keys}, true);
    return strided(x, dtype_of(x, name), true, false);
  }
  View head_like(const Tensor& x, const char* name) const {
    check_sizes(x, name, {p.batch, p.heads}, true);
    return strided(x, dtype_of(x, name), true, false);
  }
  // As q where the width is q's, so that a layout is kept; else contiguous.
  Tensor new_query(int64_t width) const {
    if (width == p.d) return torch::stable::empty_like(q);
    return torch::stable::new_empty(q, {leading, p.heads, rows, width});
  }
  Tensor new_statistic() const {
    return torch::stable::new_empty(q, {leading, p.heads, rows}, ScalarType::Double);
  }
  ScalarType compute_type() const { return is_double ? ScalarType::Double : ScalarType::Float; }
  Tensor nothing() const { return torch::stable::new_empty(q, {0}); }
};

#define METATTN_PROBLEM_ARGUMENTS                                                                                  \
  Tensor q, Tensor k, Tensor v, Maybe bias, Maybe sinks, Maybe mask, Maybe slopes, Maybe rng, Maybe cu_q, Maybe cu_k, \
      int64_t max_q, int64_t max_k, double scale, double softcap, int64_t causal, int64_t window_left,                \
      int64_t window_right, double dropout_p
#define METATTN_PROBLEM_NAMES                                                                                    \
  q, k, v, bias, sinks, mask, slopes, rng, cu_q, cu_k, max_q, max_k, scale, softcap, causal, window_left, window_right, \
      dropout_p
#define METATTN_PROBLEM_SCHEMA                                                                                  \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? mask, Tensor? slopes, Tensor? rng, "      \
  "Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, float scale, float softcap, int causal, int window_left, " \
  "int window_right, float dropout_p"

// The offsets of packed sequences, checked; `longest` becomes that of the sequences there are.
const int32_t* offsets(const Tensor& cu, const char* name, int64_t total, int64_t most, int64_t& longest) {
  STD_TORCH_CHECK(is_here(cu) && cu.dim() == 1 && cu.size(0) >= 1 && cu.is_contiguous() &&
                      cu.scalar_type() == ScalarType::Int,
                  "metattn: ", name, " must be a contiguous int32 tensor of at least one offset");
  const int32_t* data = static_cast<const int32_t*>(cu.const_data_ptr());
#ifdef METATTN_ON_GPU
  static_cast<void>(total);
  longest = most;
#else
  const int64_t count = cu.size(0);
  STD_TORCH_CHECK(data[0] == 0 && data[count - 1] == total, "metattn: ", name, " must run from 0 to ", total);
  longest = 0;
  for (int64_t i = 1; i < count; ++i) {
    const int64_t length = static_cast<int64_t>(data[i]) - data[i - 1];
    STD_TORCH_CHECK(length >= 0 && length <= most, "metattn: ", name,
                    " must not decrease, nor step by more than the longest sequence");
    if (length > longest) longest = length;
  }
#endif
  return data;
}

Call make_call(METATTN_PROBLEM_ARGUMENTS) {
#ifdef METATTN_ON_GPU
  gpu_of_call = q.get_device_index();
#endif
  Call call{{}, q, k, v, bias, sinks};
  Params& p = call.p;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "metattn: q, k and v must have 4 dimensions");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "metattn: q, k and v must have one dtype");
  call.is_double = dtype_of(q, "q") == DType::f64;
  call.packed = cu_q.has_value();
  STD_TORCH_CHECK(call.packed == cu_k.has_value(), "metattn: cu_q and cu_k go together");
  call.leading = q.size(0);
  call.rows = q.size(2);
  call.keys = k.size(2);
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.d = q.size(3);
  p.dv = v.size(3);
  STD_TORCH_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, "metattn: ", p.heads,
                  " query heads are no multiple of ", p.kv_heads, " key heads");
  if (call.packed) {
    STD_TORCH_CHECK(call.leading == 1, "metattn: a packed problem has a leading dimension of 1");
    STD_TORCH_CHECK(cu_q->dim() == 1 && cu_k->dim() == 1 && cu_q->size(0) == cu_k->size(0),
                    "metattn: cu_q and cu_k must have one length");
    p.batch = cu_q->size(0) - 1;
    p.cu_q = offsets(*cu_q, "cu_q", call.rows, max_q, p.n);
    p.cu_k = offsets(*cu_k, "cu_k", call.keys, max_k, p.m);
    call.mask_rows = max_q;
    call.mask_keys = max_k;
  } else {
    p.batch = call.leading;
    call.mask_rows = p.n = call.rows;
    call.mask_keys = p.m = call.keys;
  }
  p.q = call.query_like(q, "q", p.d);
  p.k = call.key_like(k, "k", p.d);
  p.v = call.key_like(v, "v", p.dv);
  if (bias) p.bias = call.bias_like(*bias, "bias");
  if (sinks) p.sinks = call.head_like(*sinks, "sinks");
  if (slopes) p.slopes = call.head_like(*slopes, "slopes");
  if (mask) {
    check_sizes(*mask, "mask", {p.batch, p.heads, call.mask_rows, call.mask_keys}, true);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "metattn: mask must be bool");
    p.mask = strided(*mask, DType::f32, true, false);
  }
  if (rng) {
    check_sizes(*rng, "rng", {p.batch, 2}, false);
    STD_TORCH_CHECK(rng->scalar_type() == ScalarType::Long, "metattn: rng must be int64");
    p.rng = reinterpret_cast<const int64_t*>(strided(*rng, DType::f64, false, false).data);
    p.rng_stride[0] = rng->stride(0);
    p.rng_stride[1] = rng->stride(1);
    STD_TORCH_CHECK(dropout_p >= 0 && dropout_p <= 1, "metattn: dropout_p must lie in [0, 1]");
    p.dropout_p = dropout_p;
    p.dropout_threshold = static_cast<uint64_t>(std::nearbyint(dropout_p * 4294967296.0));
    p.dropout_keep_scale = dropout_p < 1 ? 1 / (1 - dropout_p) : 0;
  }
  STD_TORCH_CHECK(causal >= 0 && causal <= 2, "metattn: causal must be 0, 1 or 2");
  p.scale = scale;
  p.softcap = softcap;
  p.causal = static_cast<Causal>(causal);
  constexpr int64_t kFar = int64_t{1} << 40;  // beyond any key, and sums of it do not overflow
  p.window_left = window_left < kFar ? window_left : kFar;
  p.window_right = window_right < kFar ? window_right : kFar;
  return call;
}

// Allocates o, lse and, for dtypes that o is rounded to, o_lo (no elements otherwise).
Results new_results(Call& call) {
  const bool rounded = call.q.scalar_type() != call.compute_type();
  Tensor o = call.new_query(call.p.dv), lse = call.new_statistic();
  // bfloat16 for float16 too: where o overflows, o_lo holds it
  Tensor o_lo = rounded ? torch::stable::new_empty(o, {call.leading, call.p.heads, call.rows, call.p.dv}, ScalarType::BFloat16)
                        : call.nothing();
  call.p.out_o = call.query_like(o, "o", call.p.dv);
  call.p.out_lse = call.statistic(lse, "lse");
  if (rounded) call.p.out_o_lo = call.query_like(o_lo, "o_lo", call.p.dv);
  return {o, lse, o_lo};
}

void set_results(Call& call, const Tensor& o, const Tensor& lse, const Maybe& o_lo) {
  call.p.o = call.query_like(o, "o", call.p.dv);
  call.p.lse = call.statistic(lse, "lse");
  if (o_lo) call.p.o_lo = call.query_like(*o_lo, "o_lo", call.p.dv);
}
void set_cotangents(Call& call, const Maybe& d_o, const Maybe& d_lse) {
  if (d_o) call.p.d_o = call.query_like(*d_o, "do", call.p.dv);
  if (d_lse) call.p.d_lse = call.statistic(*d_lse, "dlse");
}
void set_tangents(Call& call, const Maybe& t_q, const Maybe& t_k, const Maybe& t_v, const Maybe& t_bias,
                  const Maybe& t_sinks) {
  if (t_q) call.p.t_q = call.query_like(*t_q, "tq", call.p.d);
  if (t_k) call.p.t_k = call.key_like(*t_k, "tk", call.p.d);
  if (t_v) call.p.t_v = call.key_like(*t_v, "tv", call.p.dv);
  STD_TORCH_CHECK(!t_bias || call.bias, "metattn: tbias without a bias");
  if (t_bias) call.p.t_bias = call.bias_like(*t_bias, "tbias");
  STD_TORCH_CHECK(!t_sinks || call.sinks, "metattn: tsinks without sinks");
  if (t_sinks) call.p.t_sinks = call.head_like(*t_sinks, "tsinks");
}

// What both gradients' operators are given besides the call.
void set_first_order(Call& call, const Tensor& o, const Tensor& lse, const Maybe& o_lo, const Maybe& d_o,
                     const Maybe& d_lse) {
  set_results(call, o, lse, o_lo);
  set_cotangents(call, d_o, d_lse);
}
void set_tangent_results(Call& call, const Tensor& o_t, const Tensor& lse_t, const Maybe& o_t_lo) {
  call.p.o_t = call.query_like(o_t, "ot", call.p.dv);
  call.p.lse_t = call.statistic(lse_t, "lt");
  if (o_t_lo) call.p.o_t_lo = call.query_like(*o_t_lo, "ot_lo", call.p.dv);
}

// Allocates what is needed of dQ, dK and dV; what is not needed has no elements.
struct NewGradients {
  Tensor q, k, v;
};
NewGradients new_gradients(Call& call, int64_t needs) {
  Params& p = call.p;
  STD_TORCH_CHECK(!(needs & metattn::kNeedBias) || call.bias, "metattn: a bias gradient is asked for without a bias");
  STD_TORCH_CHECK(!(needs & metattn::kNeedSinks) || call.sinks, "metattn: a sinks gradient is asked for without sinks");
  STD_TORCH_CHECK(!(needs & metattn::kNeedSinks) || call.sinks->scalar_type() == call.compute_type(),
                  "metattn: sinks must have the compute dtype");
  p.needs = needs;
  NewGradients made{call.nothing(), call.nothing(), call.nothing()};
  if (needs & metattn::kNeedQ) {
    made.q = torch::stable::empty_like(call.q);
    p.grad_q = call.query_like(made.q, "dq", p.d);
  }
  if (needs & metattn::kNeedK) {
    made.k = torch::stable::empty_like(call.k);
    p.grad_k = call.key_like(made.k, "dk", p.d);
  }
  if (needs & metattn::kNeedV) {
    made.v = torch::stable::empty_like(call.v);
    p.grad_v = call.key_like(made.v, "dv", p.dv);
  }
  return made;
}

// Sizes of the bias, and strides of its gradient as one part of a sum holds it, 0 where the bias is broadcast; how many
// elements a part has.
int64_t set_bias_gradient(Call& call) {
  int64_t step = 1;
  for (int dim = 3; dim >= 0; --dim) {
    const int64_t size = call.bias->size(dim);
    call.p.bias_size[dim] = size;
    call.p.grad_bias_stride[dim + 1] = size == 1 ? 0 : step;
    step *= size;
  }
  return step;
}

// tf32: whether float32 products may be taken in TF32; CPUs have none, and pass over it.
#define METATTN_DEFINE_OPERATORS(library)                                                                              \
  library.def("forward(" METATTN_PROBLEM_SCHEMA ", *, bool tf32=False) -> (Tensor o, Tensor lse, Tensor o_lo)");       \
  library.def("vjp(" METATTN_PROBLEM_SCHEMA ", Tensor o, Tensor lse, Tensor? o_lo, Tensor? do_, Tensor? dlse, "        \
              "int needs, *, bool tf32=False) -> "                                                                     \
              "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)");                                       \
  library.def("jvp(" METATTN_PROBLEM_SCHEMA ", Tensor o, Tensor lse, Tensor? o_lo, Tensor? tq, Tensor? tk, "           \
              "Tensor? tv, Tensor? tbias, Tensor? tsinks, *, bool tf32=False) -> "                                     \
              "(Tensor ot, Tensor lt, Tensor ot_lo)");                                                                 \
  library.def("vjp_jvp(" METATTN_PROBLEM_SCHEMA ", Tensor o, Tensor lse, Tensor? o_lo, Tensor? do_, Tensor? dlse, "    \
              "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias, Tensor? tsinks, Tensor ot, Tensor lt, "              \
              "Tensor? ot_lo, int needs, *, bool tf32=False) -> "                                                      \
              "(Tensor dqt, Tensor dkt, Tensor dvt, Tensor dbt, Tensor dst)");                                         \
  library.def("double_backward(" METATTN_PROBLEM_SCHEMA ", Tensor o, Tensor lse, Tensor? o_lo, Tensor? do_, "          \
              "Tensor? dlse, Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias, Tensor? tsinks, int needs, *, "        \
              "bool tf32=False) -> "                                                                                   \
              "(Tensor ot, Tensor lt, Tensor ot_lo, Tensor dqt, Tensor dkt, Tensor dvt, Tensor dbt, Tensor dst)")

#define METATTN_IMPLEMENT_OPERATORS(library)       \
  library.impl("forward", TORCH_BOX(&forward));    \
  library.impl("vjp", TORCH_BOX(&vjp));            \
  library.impl("jvp", TORCH_BOX(&jvp));            \
  library.impl("vjp_jvp", TORCH_BOX(&vjp_jvp));    \
  library.impl("double_backward", TORCH_BOX(&double_backward))

}  // namespace
