// vjp_jvp: the tangent of the first backward, dO and dL held fixed, in one sweep of ten products (five of scores).
#include "kernels.h"
#include "second_order.h"

namespace metattn::METATTN_ISA {
namespace {

template <class A>
struct VjpJvp : SecondOrder<A> {
  using T = Compute<A>;
  T Dt[kRows], tau[kRows];
  T sums_of_dst[kRows];  // as sums_of_ds, of dSt

  VjpJvp(const Params& params, char* scratch) : SecondOrder<A>(params, scratch, false, rows_at_once(params), 1) {}

  void begin(const Tile& tile) {
    SecondOrder<A>::begin(tile);
    const Params& p = this->p;
    const auto& lse = this->lse;
    row_dots(p.o_t, p.o_t_lo, View{}, tile, this->d_o, lse.dead, p.dv, this->row, this->scratch_row, Dt);
    for (int64_t r = 0; r < tile.rows; ++r)
      tau[r] = lse.dead[r] ? 0 : static_cast<T>(*double_at(p.lse_t, tile.seq, tile.head, tile.s.q0 + tile.row0 + r));
    if (this->asks_sums()) find_tangents_of_sums(tile);
  }
  // The tangent of D·Ps: Dt·Ps + D·Pst, with Pst = Ps·(σ − τ).
  void find_tangents_of_sums(const Tile& tile) {
    const Params& p = this->p;
    memset(sums_of_dst, 0, sizeof(T) * tile.rows);
    for (int64_t r = 0; p.sinks && r < tile.rows; ++r) {
      if (this->lse.dead[r]) continue;
      const T moved = (p.t_sinks ? load_scalar<T>(p.t_sinks, offset_of(p.t_sinks, tile.seq, tile.head, 0)) : T{0}) - tau[r];
      sums_of_dst[r] = this->sink_probability(tile, r) * (Dt[r] + this->D[r] * moved);
      if (!(this->beside_sink(tile, r) > kLeastKnown)) sums_of_dst[r] = this->kUnknown;
    }
  }

  template <bool Bent>
  void differentiate_row(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>)
      this->template differentiate<Bent>(at, j, this->template tangent<Bent>(at, j) - tau[r], this->D[r], Dt[r]);
  }

  // Of several rows, in registers; P and Pt wait in memory while the rest is made.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void differentiate_rows(const Tile& tile, int64_t block, int64_t r, int64_t j) const {
    {
      RegisterTile<T, Rows, Vectors> weight, tangent;
      this->weights_and_tangents(tile, block, r, j, weight, tangent);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) tangent.at[i][v] = weight.at[i][v] * (tangent.at[i][v] - tau[r + i]);
        store_all<T>(this->s + (r + i) * kKeys + j, weight.at[i]);
        store_all<T>(this->d_p + (r + i) * kKeys + j, tangent.at[i]);
      }
    }
    RegisterTile<T, Rows, Vectors> gain, gain_t;
    this->gains_of(block, r, j, gain, gain_t);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = (r + i) * kKeys + j + v * kLanes<T>;
        const Vec<T> weight = load(this->s + at), weight_t = load(this->d_p + at);
        store(this->s + at, weight_t * gain.at[i][v] + weight * (gain_t.at[i][v] - Dt[r + i]));
        store(this->t_r + at, weight * gain.at[i][v]);
      }
    }
  }
  void differentiate_tile(const Tile& tile, int64_t block) {
    this->multiply(tile, block);
    for (int64_t r = 0; r < tile.rows; ++r) {
      this->begin_row(tile, r);
      for_bends(this->p, [&]<bool Bent>() { differentiate_row<Bent>(tile, r); });
      if (this->results.want_scores) this->results.add_scores(tile, r, this->d_s_t);
    }
  }

  void visit(const Tile& tile, int64_t block) {
    if constexpr (kInRegisters<A>) {
      if (this->in_registers)
        walk_registers<T>(tile, [&]<int Rows, int Vectors>(int64_t r, int64_t j)
                                    [[gnu::always_inline]] { differentiate_rows<Rows, Vectors>(tile, block, r, j); });
    }
    if (!this->in_registers) differentiate_tile(tile, block);
    this->add(tile, block, this->results.sums);
  }

  void end(const Tile& tile, const KeySpan& span, bool visited) {
    const WeightedSums<A>& by = this->results.sums;
    this->results.end_rows(tile, span, visited, this->known(by, sums_of_dst), this->known(by, this->sums_of_ds), sums_of_dst);
  }
};

}  // namespace

extern const MapKernel vjp_jvp[kArithmetics] = METATTN_MAP_KERNELS(VjpJvp, key_sweep);

}  // namespace metattn::METATTN_ISA
