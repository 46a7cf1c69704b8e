// Chooses an ISA's kernels at run time and walks a map's units over threads. Torch-free: the host says how to thread.
#pragma once

#include "kernels.h"

namespace metattn {

// run(context, task) for every task in [0, tasks), each on a thread of its own where there are several.
struct Threads {
  int count;
  void (*for_each)(int tasks, void (*run)(void* context, int task), void* context);
};

// isa_changed: another instruction set was chosen since fits_double_backward said yes.
enum class Outcome { done, no_memory, isa_changed };

// Completes p's plan, walks the map and what follows it.
Outcome run_map(MapName map, Params& p, bool is_double, const Threads& threads);

// Whether kDoubleBackward serves a problem: its keys, tensors set.
bool fits_double_backward(const Params& p);

// Parts of the gradients that the key sweeps of this problem leave: key_chunks and row_parts of run_map's plan. Asks for
// `needs`, and for the bias' sizes where its gradient is wanted.
void plan_key_sweep(Params& p, MapName map);

}  // namespace metattn
