// The operators metattn::{forward, vjp, jvp, vjp_jvp, double_backward} on the CPU.
#include "call.h"

#include <pthread.h>

#include <vector>

#include "cpu/dispatch.h"

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

metattn::Threads threads() {
  return {forked ? 1 : static_cast<int>(torch::stable::get_num_threads()), for_each_task};
}

void run(metattn::MapName map, const Call& call) {
  STD_TORCH_CHECK(metattn::run_map(map, call.p, call.is_double, threads()), "metattn: out of scratch memory, or the instruction set was changed during the call");
}

// ---- the four maps ----

Results forward(METATTN_PROBLEM_ARGUMENTS, bool) {
  Call call = make_call(METATTN_PROBLEM_NAMES);
  Results results = new_results(call);
  run(metattn::kForward, call);
  return results;
}

Results jvp(METATTN_PROBLEM_ARGUMENTS, Tensor o, Tensor lse, Maybe o_lo, Maybe t_q, Maybe t_k, Maybe t_v, Maybe t_bias,
            Maybe t_sinks, bool) {
  Call call = make_call(METATTN_PROBLEM_NAMES);
  set_results(call, o, lse, o_lo);
  set_tangents(call, t_q, t_k, t_v, t_bias, t_sinks);
  Results results = new_results(call);
  run(metattn::kJvp, call);
  return results;
}

// Runs a key sweep for the gradients that are needed.
Gradients run_key_sweep(metattn::MapName map, Call& call, int64_t needs) {
  Params& p = call.p;
  const NewGradients made = new_gradients(call, needs);
  const ScalarType compute = call.compute_type();
  if (needs & metattn::kNeedBias) {  // a broadcast bias has one owner for all that it is broadcast over
    p.all_batches = call.bias->size(0) == 1;
    p.all_heads = call.bias->size(1) == 1;
  }
  metattn::plan_key_sweep(p);

  Tensor grad_bias = call.nothing(), grad_sinks = call.nothing(), q_parts = call.nothing(), bias_parts = call.nothing();
  if (needs & metattn::kNeedQ && p.key_chunks > 1) {
    const std::vector<int64_t> sizes{p.key_chunks, call.leading, p.heads, call.rows, p.d};
    // a short sequence of a packed problem has fewer chunks than the longest: its other parts stay zero
    q_parts = call.packed ? torch::stable::new_zeros(call.q, sizes, compute)
                          : torch::stable::new_empty(call.q, sizes, compute);
    p.grad_q_parts = static_cast<char*>(q_parts.data_ptr());
    p.grad_q_parts_stride[3] = p.d;
    p.grad_q_parts_stride[2] = call.rows * p.d;
    p.grad_q_parts_stride[1] = call.packed ? 0 : p.heads * call.rows * p.d;
    p.grad_q_parts_stride[0] = call.leading * p.heads * call.rows * p.d;
  }
  if (needs & metattn::kNeedBias) {
    const Tensor& bias = *call.bias;
    const std::vector<int64_t> sizes(bias.sizes().begin(), bias.sizes().end());
    p.grad_bias_parts = sizes[3] == 1 ? p.key_chunks : 1;
    const bool direct = p.grad_bias_parts == 1 && bias.scalar_type() == compute;
    bias_parts = torch::stable::new_zeros(bias, {p.grad_bias_parts, sizes[0], sizes[1], sizes[2], sizes[3]}, compute);
    p.grad_bias = static_cast<char*>(bias_parts.data_ptr());
    const int64_t elements = set_bias_gradient(call);
    p.grad_bias_stride[0] = p.grad_bias_parts == 1 ? 0 : elements;
    if (direct) {
      grad_bias = torch::stable::view(bias_parts, {sizes[0], sizes[1], sizes[2], sizes[3]});
    } else {
      grad_bias = torch::stable::new_empty(bias, {sizes[0], sizes[1], sizes[2], sizes[3]});
      p.grad_bias_out = strided(grad_bias, dtype_of(grad_bias, "dbias"), false, false);
    }
  }
  if (needs & metattn::kNeedSinks) {
    p.sinks_batch = call.sinks->size(0);
    grad_sinks = torch::stable::new_zeros(*call.sinks, {p.sinks_batch, p.heads});
    p.grad_sinks = static_cast<char*>(grad_sinks.data_ptr());
  }
  run(map, call);
  return {made.q, made.k, made.v, grad_bias, grad_sinks};
}

Gradients vjp(METATTN_PROBLEM_ARGUMENTS, Tensor o, Tensor lse, Maybe o_lo, Maybe d_o, Maybe d_lse, int64_t needs,
              bool) {
  Call call = make_call(METATTN_PROBLEM_NAMES);
  set_first_order(call, o, lse, o_lo, d_o, d_lse);
  return run_key_sweep(metattn::kVjp, call, needs);
}

Gradients vjp_jvp(METATTN_PROBLEM_ARGUMENTS, Tensor o, Tensor lse, Maybe o_lo, Maybe d_o, Maybe d_lse, Maybe t_q,
                  Maybe t_k, Maybe t_v, Maybe t_bias, Maybe t_sinks, Tensor o_t, Tensor lse_t, Maybe o_t_lo,
                  int64_t needs, bool) {
  Call call = make_call(METATTN_PROBLEM_NAMES);
  set_first_order(call, o, lse, o_lo, d_o, d_lse);
  set_tangents(call, t_q, t_k, t_v, t_bias, t_sinks);
  set_tangent_results(call, o_t, lse_t, o_t_lo);
  return run_key_sweep(metattn::kVjpJvp, call, needs);
}

// jvp and vjp_jvp at once. Where all keys are in one block, that is one sweep.
Both double_backward(METATTN_PROBLEM_ARGUMENTS, Tensor o, Tensor lse, Maybe o_lo, Maybe d_o, Maybe d_lse, Maybe t_q,
                     Maybe t_k, Maybe t_v, Maybe t_bias, Maybe t_sinks, int64_t needs, bool) {
  Call call = make_call(METATTN_PROBLEM_NAMES);
  set_first_order(call, o, lse, o_lo, d_o, d_lse);
  set_tangents(call, t_q, t_k, t_v, t_bias, t_sinks);
  Results results = new_results(call);
  if (!call.sinks && metattn::keys_fit_a_block(call.p))
    return std::tuple_cat(results, run_key_sweep(metattn::kDoubleBackward, call, needs));
  run(metattn::kJvp, call);
  const auto& [o_t, lse_t, o_t_lo] = results;
  set_tangent_results(call, o_t, lse_t, call.p.out_o_lo ? Maybe(o_t_lo) : Maybe());
  return std::tuple_cat(results, run_key_sweep(metattn::kVjpJvp, call, needs));
}

}  // namespace

STABLE_TORCH_LIBRARY(metattn, library) { METATTN_DEFINE_OPERATORS(library); }

STABLE_TORCH_LIBRARY_IMPL(metattn, CPU, library) { METATTN_IMPLEMENT_OPERATORS(library); }
