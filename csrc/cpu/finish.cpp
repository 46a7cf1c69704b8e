#include "finish.h"

#include <vector>

#include "tile.h"

namespace metattn {
namespace {

using namespace METATTN_ISA;

template <class T>
void sum_parts_of(const PartSum& job, int64_t begin, int64_t end) {
  const int64_t width = job.sizes[3];
  const T* parts = reinterpret_cast<const T*>(job.parts);
  constexpr int64_t kPiece = 256;
  T total[kPiece];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i2 = row % job.sizes[2], i1 = row / job.sizes[2] % job.sizes[1], i0 = row / (job.sizes[2] * job.sizes[1]);
    for (int64_t c0 = 0; c0 < width; c0 += kPiece) {
      const int64_t piece = smaller(kPiece, width - c0);
      const T* source = parts + row * width + c0;
      for (int64_t c = 0; c < piece; ++c) total[c] = source[c];
      for (int64_t part = 1; part < job.count; ++part) {
        source += job.part_stride;
        for (int64_t c = 0; c < piece; ++c) total[c] += source[c];
      }
      store_row(job.target, offset_of(job.target, i0, i1, i2) + c0 * job.target.stride[3], job.target.stride[3], piece,
                static_cast<T>(job.factor), total);
    }
  }
}

// Σ (a + a_lo)∘b over a row.
double dot(const View& a, const View& a_lo, const View& b, int64_t seq, int64_t head, int64_t row, int64_t width) {
  constexpr int64_t kPiece = 256;
  double x[kPiece], y[kPiece], low[kPiece], total = 0;
  for (int64_t c0 = 0; c0 < width; c0 += kPiece) {
    const int64_t piece = smaller(kPiece, width - c0);
    load_row(b, offset_of(b, seq, head, row) + c0 * b.stride[3], b.stride[3], piece, y);
    load_row(a, offset_of(a, seq, head, row) + c0 * a.stride[3], a.stride[3], piece, x);
    add_low(a_lo, seq, head, row, c0, piece, x, low);
    for (int64_t c = 0; c < piece; ++c) total += x[c] * y[c];
  }
  return total;
}

template <class T>
void join_splits_of(const Params& p, int64_t begin, int64_t end) {
  const int64_t rows = split_rows(p);
  const Exponents<T> exponents(p);
  std::vector<T> o(padded<T>(p.dv)), scratch(padded<T>(p.dv));  // read by whole vectors
  for (int64_t at = begin; at < end; ++at) {
    const int64_t row = at % rows, head = at / rows % p.heads, seq = at / rows / p.heads;
    int64_t of = seq;  // the sequence whose sinks they are
    if (p.cu_q != nullptr)
      while (p.cu_q[of + 1] <= row) ++of;
    const double sink = p.sinks ? load_scalar<double>(p.sinks, offset_of(p.sinks, of, head, 0)) : -kInfinity<double>;
    double top = sink, total = 0, weight = 0;
    const auto weights_of = [&](int64_t split) { return p.split_weights + 3 * split_row(p, split, seq, head, row); };
    for (int64_t split = 0; split < p.key_splits; ++split)
      if (weights_of(split)[1] != 0 && !(weights_of(split)[0] <= top)) top = weights_of(split)[0];
    if (sink != -kInfinity<double>) total = weight = __builtin_exp(sink - top);  // with sinks, elements are scores
    for (T& x : o) x = 0;
    for (int64_t split = 0; split < p.key_splits; ++split) {
      const double* found = weights_of(split);
      if (found[1] == 0) continue;
      const double decay = found[0] == top ? 1 : __builtin_exp((found[0] - top) * exponents.natural);
      total += decay * found[1];
      weight += decay * found[2];
      const T* sums = reinterpret_cast<const T*>(p.split_sums) + split_row(p, split, seq, head, row) * p.dv;
      for (int64_t c = 0; c < p.dv; ++c) o[c] += static_cast<T>(decay) * sums[c];
    }
    store_row_in_two(p.out_o, p.out_o_lo, offset_of(p.out_o, seq, head, row), offset_of(p.out_o_lo, seq, head, row), p.dv,
                     static_cast<T>(total == 0 ? 1 : 1 / weight), o.data(), scratch.data());
    store_lse<T>(p.out_lse, exponents, total == 0 ? 0 : top, __builtin_log(total), double_at(p.out_lse, seq, head, row));
  }
}

void store_slot(char* target, bool is_double, int64_t slot, double value) {
  if (is_double) reinterpret_cast<double*>(target)[slot] = value;
  else reinterpret_cast<float*>(target)[slot] = static_cast<float>(value);
}

}  // namespace

void join_splits(const Params& p, bool is_double, int64_t begin, int64_t end) {
  if (is_double) join_splits_of<double>(p, begin, end);
  else join_splits_of<float>(p, begin, end);
}

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
  store_slot(p.grad_sinks, is_double, slot, total);
}

void slope_gradient(const Params& p, bool is_double, int64_t slot) {
  double total = 0;
  for (int64_t part = 0; part < p.key_chunks * p.row_parts; ++part)
    for (int64_t seq = slot / p.heads; seq < p.batch; seq += p.slopes_batch)
      total += p.slope_sums[(part * p.batch + seq) * p.heads + slot % p.heads];
  store_slot(p.grad_slopes, is_double, slot, -total);
}

}  // namespace metattn
