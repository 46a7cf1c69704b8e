// What remains after the sweeps: sums over the parts that units left behind, and the gradients of sinks and slopes.
#pragma once

#include "params.h"

namespace metattn {

// target[i] = factor·Σ_part parts[part·part_stride + i], for the rows [begin, end) of a contiguous [rows, width]
// array seen through `target`'s strides over (0, 1, 2, 3) = the four `sizes`; parts hold doubles or floats.
struct PartSum {
  const char* parts;
  int64_t count, part_stride;
  bool is_double;
  double factor;
  View target;
  int64_t sizes[4];
};
void sum_parts(const PartSum& job, int64_t begin, int64_t end);

// O and its log-sum-exp of rows [begin, end) of all, counted over (batch, head, row), from the sums of key splits.
void join_splits(const Params& p, bool is_double, int64_t begin, int64_t end);

// Slot (batch, head) of the sinks' gradient: Σ −Ps∘D over its rows, and with `second` the tangent of that,
// Σ −Pts∘D − Ps∘Dt.
void sink_gradient(const Params& p, bool is_double, bool second, int64_t slot);

// Slot (batch, head) of the slopes' gradient, −Σ dS·distance, from what the units left.
void slope_gradient(const Params& p, bool is_double, int64_t slot);

}  // namespace metattn
