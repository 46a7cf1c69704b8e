// The operators metattn::{forward, vjp, jvp, vjp_jvp, double_backward} on the CPU.
#include "call.h"

#include <pthread.h>

#include "cpu/dispatch.h"
#include "geometry.h"

namespace {

// ---- threads ----

// A forked child has no worker threads left, and OpenMP would wait for them for ever: it works alone.
bool forked = false;
const int fork_handler = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

// For a library that is loaded in a child: torch's threads may have been lost in the fork before.
extern "C" __attribute__((visibility("default"))) void metattn_work_alone() { forked = true; }

namespace {

void for_each_task(int tasks, void (*run)(void*, int), void* context) {
  if (tasks <= 1 || forked) {
    for (int task = 0; task < tasks; ++task) run(context, task);
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(context, static_cast<int>(task));
  });
}

metattn::Threads threads() { return {forked ? 1 : static_cast<int>(torch::stable::get_num_threads()), for_each_task}; }

void run(metattn::MapName map, MapCall& call) {
  const metattn::Outcome outcome = metattn::run_map(map, call.p, call.is_double, threads());
  STD_TORCH_CHECK(outcome != metattn::Outcome::no_memory, "metattn: no memory for a map's scratch");
  STD_TORCH_CHECK(outcome != metattn::Outcome::isa_changed, "metattn: the instruction set was changed during the call");
}

// ---- the four maps ----

template <bool plain>
void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, plain);
  const Inputs inputs = take_inputs(in);
  MapCall call = make_call(inputs);
  Results results = new_results(call, false);
  run(metattn::kForward, call);
  put(stack, call, std::move(results));
}

template <bool plain>
void jvp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, plain);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Tangents tangents = take_tangents(in);
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_tangents(call, tangents);
  Results results = new_results(call, true);
  run(metattn::kJvp, call);
  put(stack, call, std::move(results));
}

// Parts of dQ, one for each chunk of keys.
Tensor set_q_parts(MapCall& call) {
  Params& p = call.p;
  const std::initializer_list<int64_t> sizes{p.key_chunks, call.leading, p.heads, call.rows, p.d};
  // a short sequence of a packed problem has fewer chunks than the longest: its other parts stay zero
  Tensor parts = (call.packed ? zeros : empty)(call.inputs.q, sizes, call.compute_type());
  p.grad_q_parts = parts.data();
  p.grad_q_parts_stride[3] = p.d;
  p.grad_q_parts_stride[2] = call.rows * p.d;
  p.grad_q_parts_stride[1] = call.packed ? 0 : p.heads * call.rows * p.d;
  p.grad_q_parts_stride[0] = call.leading * p.heads * call.rows * p.d;
  return parts;
}

// Parts of dK or dV, one for each part of the rows.
Tensor set_key_parts(MapCall& call, char*& data, int64_t width) {
  Params& p = call.p;
  Tensor parts = empty(call.inputs.k, {p.row_parts, call.leading, p.kv_heads, call.keys, width}, call.compute_type());
  p.key_rows = call.keys;
  data = parts.data();
  return parts;
}

// Floats lose digits in sums of more terms.
constexpr double kFloatTerms = 128;

// Allocates the bias' gradient; the parts that it is the sum of, where it is not made in place.
Tensor set_bias_parts(MapCall& call, int64_t elements, Tensor& grad_bias) {
  Params& p = call.p;
  const Tensor& bias = call.inputs.bias;
  const int64_t* sizes = bias.sizes();
  const int64_t chunks = sizes[3] == 1 ? p.key_chunks : 1;
  const int64_t row_parts = p.all_batches || p.all_heads || sizes[2] == 1 ? p.row_parts : 1;
  p.grad_bias_parts = chunks * row_parts;
  p.grad_bias_stride[0] = chunks == 1 ? 0 : elements * row_parts;
  p.grad_bias_part_stride = row_parts == 1 ? 0 : elements;
  p.bias_in_double = 1.0 * p.batch * p.heads * p.n * p.m > kFloatTerms * elements;
  const int32_t dtype = p.bias_in_double ? codes.f64 : call.compute_type();
  if (p.grad_bias_parts == 1 && bias.dtype() == dtype) {
    grad_bias = zeros(bias, {sizes[0], sizes[1], sizes[2], sizes[3]}, bias.dtype());
    p.grad_bias = grad_bias.data();
    return {};
  }
  Tensor parts = zeros(bias, {p.grad_bias_parts, sizes[0], sizes[1], sizes[2], sizes[3]}, dtype);
  p.grad_bias = parts.data();
  grad_bias = empty(bias, {sizes[0], sizes[1], sizes[2], sizes[3]}, bias.dtype());
  p.grad_bias_out = strided(grad_bias, dtype_of(grad_bias, "dbias"), false, false);
  return parts;
}

// Runs a key sweep for the gradients that are needed.
Gradients run_key_sweep(metattn::MapName map, MapCall& call, int64_t needs) {
  Params& p = call.p;
  Gradients made = new_gradients(call, needs);
  Tensor q_parts, k_parts, v_parts, bias_parts, slope_sums;
  int64_t bias_elements = 0;
  if (needs & metattn::kNeedBias) {  // a broadcast bias has one owner for all that it is broadcast over
    p.all_batches = call.inputs.bias.size(0) == 1;
    p.all_heads = call.inputs.bias.size(1) == 1;
    bias_elements = set_bias_gradient(call);
  }
  metattn::plan_key_sweep(p, map);
  // spans of keys are added up in what has the compute type
  const bool q_in_place = p.key_chunks == 1 && (p.key_chunk <= metattn::kSpan || call.inputs.q.dtype() == call.compute_type());
  if (needs & metattn::kNeedQ && !q_in_place) q_parts = set_q_parts(call);
  const bool cuts_rows = p.row_parts > 1 && !p.all_batches && !p.all_heads;
  if (needs & metattn::kNeedK && cuts_rows) k_parts = set_key_parts(call, p.grad_k_parts, p.d);
  if (needs & metattn::kNeedV && cuts_rows) v_parts = set_key_parts(call, p.grad_v_parts, p.dv);
  if (needs & metattn::kNeedBias) bias_parts = set_bias_parts(call, bias_elements, made[3]);
  if (needs & metattn::kNeedSlopes) {
    slope_sums = zeros(call.inputs.q, {p.key_chunks * p.row_parts, p.batch, p.heads}, codes.f64);
    p.slope_sums = reinterpret_cast<double*>(slope_sums.data());
  }
  run(map, call);
  return made;
}

template <bool plain>
void vjp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, plain);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Cotangents cotangents = take_cotangents(in);
  const int64_t needs = in.integer();
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_cotangents(call, cotangents);
  put(stack, call, run_key_sweep(metattn::kVjp, call, needs));
}

template <bool plain>
void vjp_jvp(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, plain);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Cotangents cotangents = take_cotangents(in);
  const Tangents tangents = take_tangents(in);
  const Results given_t = take_results(in);
  const int64_t needs = in.integer();
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_cotangents(call, cotangents);
  set_tangents(call, tangents);
  set_tangent_results(call, given_t, bool(given_t[2]));
  put(stack, call, run_key_sweep(metattn::kVjpJvp, call, needs));
}

// jvp and vjp_jvp at once. Where keys are few, that is one sweep.
template <bool plain>
void double_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, plain);
  const Inputs inputs = take_inputs(in);
  const Results given = take_results(in);
  const Cotangents cotangents = take_cotangents(in);
  const Tangents tangents = take_tangents(in);
  const int64_t needs = in.integer();
  MapCall call = make_call(inputs);
  set_results(call, given);
  set_cotangents(call, cotangents);
  set_tangents(call, tangents);
  Results results = new_results(call, true);
  const bool at_once = !inputs.sinks && metattn::fits_double_backward(call.p);
  if (!at_once) {
    run(metattn::kJvp, call);
    set_tangent_results(call, results, bool(call.p.out_o_lo));
  }
  Gradients gradients = run_key_sweep(at_once ? metattn::kDoubleBackward : metattn::kVjpJvp, call, needs);
  put(put(stack, call, std::move(results)), call, std::move(gradients));
}

}  // namespace

#define METATTN_IMPLEMENT(library, prefix, plain) \
  library.impl(prefix "forward", forward<plain>); \
  library.impl(prefix "vjp", vjp<plain>);         \
  library.impl(prefix "jvp", jvp<plain>);         \
  library.impl(prefix "vjp_jvp", vjp_jvp<plain>); \
  library.impl(prefix "double_backward", double_backward<plain>)

STABLE_TORCH_LIBRARY(metattn, library) { METATTN_DEFINE_OPERATORS(library); }

STABLE_TORCH_LIBRARY_IMPL(metattn, CPU, library) { METATTN_IMPLEMENT(library, "", false); }

// The same without derivatives, for code whose derivatives were taken when it was compiled.
STABLE_TORCH_LIBRARY(metattn_bare, library) {
  METATTN_DEFINE_OPERATORS(library);
  METATTN_DEFINE_PLAIN_OPERATORS(library);
}

STABLE_TORCH_LIBRARY_IMPL(metattn_bare, CPU, library) {
  METATTN_IMPLEMENT(library, "", false);
  METATTN_IMPLEMENT(library, "plain_", true);
}
