// A call of an operator: schemas, checks, views, allocation. LibTorch's stable ABI only, so that one binary serves every
// torch from 2.10 on. Python (metattn/backends) validates a call for users; the checks here keep a raw call of an
// operator from reading memory that is not there.
//
// METATTN_ON_GPU: tensors must be on a GPU, and values that lie there are not read.
#pragma once

#include <array>
#include <cmath>

#include "params.h"
#include "tensor.h"

namespace {

using metattn::Causal;
using metattn::DType;
using metattn::Params;
using metattn::View;
using Results = std::array<Tensor, 3>;  // o, lse, o_lo; or their tangents
using Gradients = std::array<Tensor, 6>;

#ifdef METATTN_ON_GPU
thread_local int32_t gpu_of_call = 0;  // q's
bool is_here(const Tensor& x) { return x.device_type() == codes.cuda && x.device_index() == gpu_of_call; }
constexpr const char* kHere = "q's GPU";
#else
bool is_here(const Tensor& x) { return x.device_type() == codes.cpu; }
constexpr const char* kHere = "the CPU";
#endif

// ---- tensors as views ----

DType dtype_of(const Tensor& x, const char* name) {
  const int32_t code = x.dtype();
  if (code == codes.f32) return DType::f32;
  if (code == codes.f64) return DType::f64;
  if (code == codes.bf16) return DType::bf16;
  if (code == codes.f16) return DType::f16;
  STD_TORCH_CHECK(false, "metattn: ", name, " must be float64, float32, bfloat16 or float16");
}

// The last `dims` dimensions must have the given sizes; `broadcast` lets a size of 1 stand for any.
void check_sizes(const Tensor& x, const char* name, std::initializer_list<int64_t> sizes, bool broadcast) {
  STD_TORCH_CHECK(is_here(x), "metattn: ", name, " must be on ", kHere);
  STD_TORCH_CHECK(x.dim() == static_cast<int64_t>(sizes.size()), "metattn: ", name, " must have ", sizes.size(),
                  " dimensions, has ", x.dim());
  const int64_t* have = x.sizes();
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    const int64_t size = sizes.begin()[dim];
    STD_TORCH_CHECK(have[dim] == size || (broadcast && have[dim] == 1), "metattn: ", name, " must have size ", size,
                    " in dimension ", dim, ", has ", have[dim]);
  }
}

View strided(const Tensor& x, DType dtype, bool broadcast, bool packed) {
  View view{x.data(), dtype, {0, 0, 0, 0}};
  static char empty;
  if (view.data == nullptr) view.data = &empty;  // an empty tensor is present all the same
  const int64_t dims = x.dim(), *sizes = x.sizes(), *strides = x.strides();
  for (int64_t dim = 0; dim < dims; ++dim) view.stride[dim] = broadcast && sizes[dim] == 1 ? 0 : strides[dim];
  if (packed) view.stride[0] = 0;  // sequences follow each other along the rows
  return view;
}

// What every operator is given first.
struct Inputs {
  Tensor q, k, v, bias, sinks, slopes, mask, rng, cu_q, cu_k;
  int64_t max_q = 0, max_k = 0;
  double scale = 1, softcap = 0;
  int64_t causal = 0, window_left = -1, window_right = -1;
  double dropout_p = 0;
  bool plain = false;  // without options, and nothing is rounded
};
#define METATTN_INPUTS_SCHEMA                                                                                   \
  "Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? sinks, Tensor? slopes, Tensor? mask, Tensor? rng, "      \
  "Tensor? cu_q, Tensor? cu_k, int max_q, int max_k, float scale, float softcap, int causal, int window_left, " \
  "int window_right, float dropout_p"
#define METATTN_PLAIN_SCHEMA "Tensor q, Tensor k, Tensor v, float scale, int causal"
Inputs take_inputs(Arguments& in) {
  Inputs inputs;
  inputs.plain = in.plain();
  for (Tensor* x : {&inputs.q, &inputs.k, &inputs.v}) *x = in.tensor();
  for (Tensor* x : {&inputs.bias, &inputs.sinks, &inputs.slopes, &inputs.mask, &inputs.rng, &inputs.cu_q, &inputs.cu_k})
    *x = in.option();
  if (!inputs.plain) {
    inputs.max_q = in.integer();
    inputs.max_k = in.integer();
  }
  inputs.scale = in.real();
  if (!inputs.plain) inputs.softcap = in.real();
  inputs.causal = in.integer();
  if (!inputs.plain) {
    inputs.window_left = in.integer();
    inputs.window_right = in.integer();
    inputs.dropout_p = in.real();
  }
  return inputs;
}

// One call of a map, being filled in.
struct MapCall {
  const Inputs& inputs;
  Params p{};
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
    return doubles(x, name);
  }
  View lse_like(const Tensor& x) const {
    check_sizes(x, "lse", {leading, p.heads, rows, 2}, false);
    return doubles(x, "lse");
  }
  View doubles(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.dtype() == codes.f64, "metattn: ", name, " must be float64");
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
    if (width == p.d) return empty_like(inputs.q);
    return empty(inputs.q, {leading, p.heads, rows, width}, inputs.q.dtype());
  }
  Tensor new_statistic() const { return empty(inputs.q, {leading, p.heads, rows}, codes.f64); }
  Tensor new_lse() const { return empty(inputs.q, {leading, p.heads, rows, 2}, codes.f64); }
  int32_t compute_type() const { return is_double ? codes.f64 : codes.f32; }
};

// Leaves results on an operator's stack, tensors without elements for what there is not; where the next go. A plain call
// gives none that only options have: o_lo, and the gradients of bias, sinks and slopes.
template <class Tensors>
StableIValue* put(StableIValue* stack, const MapCall& call, Tensors results) {
  constexpr size_t kAll = std::tuple_size_v<Tensors>, kPlain = kAll == std::tuple_size_v<Results> ? 2 : 3;
  for (size_t i = 0; i < (call.inputs.plain ? kPlain : kAll); ++i) {
    Tensor& result = results[i];
    if (!result) result = empty(call.inputs.q, {0}, call.inputs.q.dtype());
    *stack++ = torch::stable::detail::from(result.release());
  }
  return stack;
}

// The offsets of packed sequences, checked; `longest` becomes that of the sequences there are.
const int32_t* offsets(const Tensor& cu, const char* name, int64_t total, int64_t most, int64_t& longest) {
  STD_TORCH_CHECK(is_here(cu) && cu.dim() == 1 && cu.size(0) >= 1 && cu.is_contiguous() && cu.dtype() == codes.i32,
                  "metattn: ", name, " must be a contiguous int32 tensor of at least one offset");
  const int32_t* data = reinterpret_cast<const int32_t*>(cu.data());
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

MapCall make_call(const Inputs& inputs) {
#ifdef METATTN_ON_GPU
  gpu_of_call = inputs.q.device_index();
#endif
  MapCall call{inputs};
  Params& p = call.p;
  const auto& [q, k, v, bias, sinks, slopes, mask, rng, cu_q, cu_k, max_q, max_k, scale, softcap, causal, window_left,
               window_right, dropout_p, plain] = inputs;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "metattn: q, k and v must have 4 dimensions");
  STD_TORCH_CHECK(q.dtype() == k.dtype() && q.dtype() == v.dtype(), "metattn: q, k and v must have one dtype");
  const DType dtype = dtype_of(q, "q");
  call.is_double = dtype == DType::f64;
  STD_TORCH_CHECK(!plain || dtype == DType::f64 || dtype == DType::f32, "metattn: a plain call rounds nothing");
  call.packed = bool(cu_q);
  STD_TORCH_CHECK(call.packed == bool(cu_k), "metattn: cu_q and cu_k go together");
  const int64_t *q_sizes = q.sizes(), *k_sizes = k.sizes();
  call.leading = q_sizes[0];
  call.rows = q_sizes[2];
  call.keys = k_sizes[2];
  p.heads = q_sizes[1];
  p.kv_heads = k_sizes[1];
  p.d = q_sizes[3];
  p.dv = v.size(3);
  STD_TORCH_CHECK(p.kv_heads > 0 ? p.heads % p.kv_heads == 0 : p.heads == 0, "metattn: ", p.heads,
                  " query heads are no multiple of ", p.kv_heads, " key heads");
  if (call.packed) {
    STD_TORCH_CHECK(call.leading == 1, "metattn: a packed problem has a leading dimension of 1");
    STD_TORCH_CHECK(cu_q.dim() == 1 && cu_k.dim() == 1 && cu_q.size(0) == cu_k.size(0),
                    "metattn: cu_q and cu_k must have one length");
    p.batch = cu_q.size(0) - 1;
    p.cu_q = offsets(cu_q, "cu_q", call.rows, max_q, p.n);
    p.cu_k = offsets(cu_k, "cu_k", call.keys, max_k, p.m);
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
  if (bias) p.bias = call.bias_like(bias, "bias");
  if (sinks) p.sinks = call.head_like(sinks, "sinks");
  if (slopes) p.slopes = call.head_like(slopes, "slopes");
  if (mask) {
    check_sizes(mask, "mask", {p.batch, p.heads, call.mask_rows, call.mask_keys}, true);
    STD_TORCH_CHECK(mask.dtype() == codes.boolean, "metattn: mask must be bool");
    p.mask = strided(mask, DType::f32, true, false);
  }
  if (rng) {
    check_sizes(rng, "rng", {p.batch, 2}, false);
    STD_TORCH_CHECK(rng.dtype() == codes.i64, "metattn: rng must be int64");
    p.rng = reinterpret_cast<const int64_t*>(strided(rng, DType::f64, false, false).data);
    p.rng_stride[0] = rng.strides()[0];
    p.rng_stride[1] = rng.strides()[1];
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

// Allocates o, lse and, for dtypes that o is rounded to, o_lo; or room for their tangents.
Results new_results(MapCall& call, bool tangents) {
  const bool rounded = call.inputs.q.dtype() != call.compute_type();
  Tensor o = call.new_query(call.p.dv), lse = tangents ? call.new_statistic() : call.new_lse();
  // bfloat16 for float16 too: where o overflows, o_lo holds it
  Tensor o_lo = rounded ? empty(o, {call.leading, call.p.heads, call.rows, call.p.dv}, codes.bf16) : Tensor();
  call.p.out_o = call.query_like(o, "o", call.p.dv);
  call.p.out_lse = tangents ? call.statistic(lse, "lt") : call.lse_like(lse);
  if (rounded) call.p.out_o_lo = call.query_like(o_lo, "o_lo", call.p.dv);
  return {std::move(o), std::move(lse), std::move(o_lo)};
}

// o, lse and o_lo, or their tangents, as a later map is given them.
Results take_results(Arguments& in) { return {in.tensor(), in.tensor(), in.option()}; }
void set_results(MapCall& call, const Results& results) {
  const auto& [o, lse, o_lo] = results;
  call.p.o = call.query_like(o, "o", call.p.dv);
  call.p.lse = call.lse_like(lse);
  if (o_lo) call.p.o_lo = call.query_like(o_lo, "o_lo", call.p.dv);
}
// Without o_t_lo where o is not rounded.
void set_tangent_results(MapCall& call, const Results& results, bool rounded) {
  const auto& [o_t, lse_t, o_t_lo] = results;
  call.p.o_t = call.query_like(o_t, "ot", call.p.dv);
  call.p.lse_t = call.statistic(lse_t, "lt");
  if (rounded) call.p.o_t_lo = call.query_like(o_t_lo, "ot_lo", call.p.dv);
}

struct Cotangents {
  Tensor o, lse;
};
Cotangents take_cotangents(Arguments& in) { return {in.maybe(), in.option()}; }
void set_cotangents(MapCall& call, const Cotangents& given) {
  if (given.o) call.p.d_o = call.query_like(given.o, "do", call.p.dv);
  if (given.lse) call.p.d_lse = call.statistic(given.lse, "dlse");
}

struct Tangents {
  Tensor q, k, v, bias, sinks, slopes;
};
Tangents take_tangents(Arguments& in) { return {in.maybe(), in.maybe(), in.maybe(), in.option(), in.option(), in.option()}; }
void set_tangents(MapCall& call, const Tangents& given) {
  if (given.q) call.p.t_q = call.query_like(given.q, "tq", call.p.d);
  if (given.k) call.p.t_k = call.key_like(given.k, "tk", call.p.d);
  if (given.v) call.p.t_v = call.key_like(given.v, "tv", call.p.dv);
  STD_TORCH_CHECK(!given.bias || call.inputs.bias, "metattn: tbias without a bias");
  if (given.bias) call.p.t_bias = call.bias_like(given.bias, "tbias");
  STD_TORCH_CHECK(!given.sinks || call.inputs.sinks, "metattn: tsinks without sinks");
  if (given.sinks) call.p.t_sinks = call.head_like(given.sinks, "tsinks");
  STD_TORCH_CHECK(!given.slopes || call.inputs.slopes, "metattn: tslopes without slopes");
  if (given.slopes) call.p.t_slopes = call.head_like(given.slopes, "tslopes");
}

// Allocates the gradient of what each head has one of.
Tensor head_gradient(const MapCall& call, const Tensor& given, const char* name, char*& data, int64_t& batch) {
  STD_TORCH_CHECK(bool(given), "metattn: a gradient is asked for of ", name, " that were not given");
  STD_TORCH_CHECK(given.dtype() == call.compute_type(), "metattn: ", name, " must have the compute dtype");
  batch = given.size(0);
  Tensor made = zeros(given, {batch, call.p.heads}, given.dtype());
  data = made.data();
  return made;
}

// Allocates what is needed of all but the bias' gradient.
Gradients new_gradients(MapCall& call, int64_t needs) {
  Params& p = call.p;
  const Inputs& inputs = call.inputs;
  STD_TORCH_CHECK(needs >= 0 && needs < 2 * metattn::kNeedSlopes, "metattn: needs names more gradients than there are");
  STD_TORCH_CHECK(!(needs & metattn::kNeedBias) || inputs.bias, "metattn: a bias gradient is asked for without a bias");
  p.needs = needs;
  Gradients made;
  auto& [q, k, v, bias, sinks, slopes] = made;
  if (needs & metattn::kNeedQ) p.grad_q = call.query_like(q = empty_like(inputs.q), "dq", p.d);
  if (needs & metattn::kNeedK) p.grad_k = call.key_like(k = empty_like(inputs.k), "dk", p.d);
  if (needs & metattn::kNeedV) p.grad_v = call.key_like(v = empty_like(inputs.v), "dv", p.dv);
  if (needs & metattn::kNeedSinks) sinks = head_gradient(call, inputs.sinks, "sinks", p.grad_sinks, p.sinks_batch);
  if (needs & metattn::kNeedSlopes) slopes = head_gradient(call, inputs.slopes, "slopes", p.grad_slopes, p.slopes_batch);
  return made;
}

// Sizes of the bias, and strides of its gradient as one part of a sum holds it, 0 where the bias is broadcast; how many
// elements a part has.
int64_t set_bias_gradient(MapCall& call) {
  int64_t step = 1;
  for (int dim = 3; dim >= 0; --dim) {
    const int64_t size = call.inputs.bias.size(dim);
    call.p.bias_size[dim] = size;
    call.p.grad_bias_stride[dim + 1] = size == 1 ? 0 : step;
    step *= size;
  }
  return step;
}

// tf32: whether float32 products may be taken in TF32; CPUs have none, and pass over it.
#define METATTN_TANGENTS_SCHEMA "Tensor? tq, Tensor? tk, Tensor? tv, Tensor? tbias, Tensor? tsinks, Tensor? tslopes"
#define METATTN_DEFINE_OPERATORS(library)                                                                       \
  library.def("forward(" METATTN_INPUTS_SCHEMA ", *, bool tf32=False) -> (Tensor o, Tensor lse, Tensor o_lo)"); \
  library.def("vjp(" METATTN_INPUTS_SCHEMA                                                                      \
              ", Tensor o, Tensor lse, Tensor? o_lo, Tensor? do_, Tensor? dlse, "                               \
              "int needs, *, bool tf32=False) -> "                                                              \
              "(Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks, Tensor dslopes)");                \
  library.def("jvp(" METATTN_INPUTS_SCHEMA ", Tensor o, Tensor lse, Tensor? o_lo, " METATTN_TANGENTS_SCHEMA     \
              ", *, bool tf32=False) -> (Tensor ot, Tensor lt, Tensor ot_lo)");                                 \
  library.def("vjp_jvp(" METATTN_INPUTS_SCHEMA                                                                  \
              ", Tensor o, Tensor lse, Tensor? o_lo, Tensor? do_, Tensor? dlse, " METATTN_TANGENTS_SCHEMA       \
              ", Tensor ot, Tensor lt, Tensor? ot_lo, int needs, *, bool tf32=False) -> "                       \
              "(Tensor dqt, Tensor dkt, Tensor dvt, Tensor dbt, Tensor dst, Tensor dslopest)");                 \
  library.def("double_backward(" METATTN_INPUTS_SCHEMA                                                          \
              ", Tensor o, Tensor lse, Tensor? o_lo, Tensor? do_, "                                             \
              "Tensor? dlse, " METATTN_TANGENTS_SCHEMA                                                          \
              ", int needs, *, bool tf32=False) -> (Tensor ot, Tensor lt, "                                     \
              "Tensor ot_lo, Tensor dqt, Tensor dkt, Tensor dvt, Tensor dbt, Tensor dst, Tensor dslopest)")

// The same for plain calls, of fewer arguments: to convert one from Python takes a tenth of a microsecond.
#define METATTN_DEFINE_PLAIN_OPERATORS(library)                                                       \
  library.def("plain_forward(" METATTN_PLAIN_SCHEMA ") -> (Tensor o, Tensor lse)");                   \
  library.def("plain_vjp(" METATTN_PLAIN_SCHEMA                                                       \
              ", Tensor o, Tensor lse, Tensor do_, int needs) -> "                                    \
              "(Tensor dq, Tensor dk, Tensor dv)");                                                   \
  library.def("plain_jvp(" METATTN_PLAIN_SCHEMA                                                       \
              ", Tensor o, Tensor lse, Tensor tq, Tensor tk, Tensor tv) -> "                          \
              "(Tensor ot, Tensor lt)");                                                              \
  library.def("plain_vjp_jvp(" METATTN_PLAIN_SCHEMA                                                   \
              ", Tensor o, Tensor lse, Tensor do_, Tensor tq, Tensor tk, "                            \
              "Tensor tv, Tensor ot, Tensor lt, int needs) -> (Tensor dqt, Tensor dkt, Tensor dvt)"); \
  library.def("plain_double_backward(" METATTN_PLAIN_SCHEMA                                           \
              ", Tensor o, Tensor lse, Tensor do_, Tensor tq, "                                       \
              "Tensor tk, Tensor tv, int needs) -> (Tensor ot, Tensor lt, Tensor dqt, Tensor dkt, Tensor dvt)")

}  // namespace
