#include "finish.h"

#include "tile.h"

namespace metattn {
namespace {

using namespace METATTN_ISA;

template <class T>
void sum_parts_of(const PartSum& job, int64_t begin, int64_t end) {
  const int64_t width = job.sizes[3];
  const T* parts = reinterpret_cast<const T*>(job.parts);
  constexpr int64_t kSpan = 256;
  T total[kSpan];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i2 = row % job.sizes[2], i1 = row / job.sizes[2] % job.sizes[1], i0 = row / (job.sizes[2] * job.sizes[1]);
    for (int64_t c0 = 0; c0 < width; c0 += kSpan) {
      const int64_t span = smaller(kSpan, width - c0);
      const T* source = parts + row * width + c0;
      for (int64_t c = 0; c < span; ++c) total[c] = source[c];
      for (int64_t part = 1; part < job.count; ++part) {
        source += job.part_stride;
        for (int64_t c = 0; c < span; ++c) total[c] += source[c];
      }
      store_row(job.target, offset_of(job.target, i0, i1, i2) + c0 * job.target.stride[3], job.target.stride[3], span,
                static_cast<T>(job.factor), total);
    }
  }
}

// Σ (a + a_lo)∘b over a row.
double dot(const View& a, const View& a_lo, const View& b, int64_t seq, int64_t head, int64_t row, int64_t width) {
  constexpr int64_t kSpan = 256;
  double x[kSpan], y[kSpan], low[kSpan], total = 0;
  for (int64_t c0 = 0; c0 < width; c0 += kSpan) {
    const int64_t span = smaller(kSpan, width - c0);
    load_row(b, offset_of(b, seq, head, row) + c0 * b.stride[3], b.stride[3], span, y);
    load_row(a, offset_of(a, seq, head, row) + c0 * a.stride[3], a.stride[3], span, x);
    add_low(a_lo, seq, head, row, c0, span, x, low);
    for (int64_t c = 0; c < span; ++c) total += x[c] * y[c];
  }
  return total;
}

}  // namespace

void sum_parts(const PartSum& job, int64_t begin, int64_t end) {
  if (job.is_double) sum_parts_of<double>(job, begin, end);
  else sum_parts_of<float>(job, begin, end);
}

void sink_gradient(const Params& p, bool is_double, bool second, int64_t slot) {
  const int64_t head = slot % p.heads;
  const bool shared = p.sinks_batch == 1;
  double total = 0;
  for (int64_t seq = shared ? 0 : slot / p.heads; seq < (shared ? p.batch : slot / p.heads + 1); ++seq) {
    const Sequence s = sequence(p, seq);
    const double sink = load_scalar<double>(p.sinks, offset_of(p.sinks, seq, head, 0));
    const double sigma = p.t_sinks ? load_scalar<double>(p.t_sinks, offset_of(p.t_sinks, seq, head, 0)) : 0;
    for (int64_t i = 0; i < s.n; ++i) {
      const int64_t row = s.q0 + i;
      const double* lse = double_at(p.lse, seq, head, row);
      const double reference = lse[0], log_total = lse[p.lse.stride[3]];
      if (log_total == -kInfinity<double>) continue;
      const double weight = __builtin_exp((sink - reference) - log_total);
      const auto with_d_o = [&](const View& values, const View& low) {
        const double total = p.d_o ? dot(values, low, p.d_o, seq, head, row, p.dv) : 0;
        return is_finite(total) || !dead_row<double>(p, s, seq, head, i) ? total : 0;
      };
      double d = with_d_o(p.o, p.o_lo);
      if (p.d_lse) d -= *double_at(p.d_lse, seq, head, row);
      if (!second) {
        total -= weight * d;
      } else {
        const double d_t = with_d_o(p.o_t, p.o_t_lo);
        total -= weight * ((sigma - *double_at(p.lse_t, seq, head, row)) * d + d_t);
      }
    }
  }
  if (is_double) reinterpret_cast<double*>(p.grad_sinks)[slot] = total;
  else reinterpret_cast<float*>(p.grad_sinks)[slot] = static_cast<float>(total);
}

}  // namespace metattn
