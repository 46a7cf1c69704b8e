// vjp_jvp: the tangent of the first backward, dO and dL held fixed, in one sweep of ten products (five of scores).
#include "kernels.h"
#include "second_order.h"

namespace metattn::METATTN_ISA {
namespace {

template <class A>
struct VjpJvp : SecondOrder<A> {
  using T = Compute<A>;
  T Dt[kRows], tau[kRows];

  VjpJvp(const Params& params, char* scratch) : SecondOrder<A>(params, scratch, false) {}

  void begin(const Tile& tile) {
    SecondOrder<A>::begin(tile);
    const Params& p = this->p;
    const auto& lse = this->lse;
    row_dots(p.o_t, p.o_t_lo, View{}, tile, this->d_o, lse.dead, p.dv, this->row, this->scratch_row, Dt);
    for (int64_t r = 0; r < tile.rows; ++r)
      tau[r] = lse.dead[r] ? 0 : static_cast<T>(*double_at(p.lse_t, tile.seq, tile.head, tile.s.q0 + tile.row0 + r));
  }

  template <bool Capped>
  void differentiate_row(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>)
      this->template differentiate<Capped>(at, j, this->template tangent<Capped>(at, j) - tau[r], this->D[r], Dt[r]);
  }

  void visit(const Tile& tile, int64_t block) {
    this->multiply(tile, block);
    for (int64_t r = 0; r < tile.rows; ++r) {
      this->begin_row(tile, r);
      if (this->p.softcap != 0) differentiate_row<true>(tile, r);
      else differentiate_row<false>(tile, r);
      if (this->results.want_bias) this->results.add_bias(tile, r, this->d_s_t);
    }
    this->add(tile, block, this->results.sums);
  }

  void end(const Tile& tile, int64_t chunk, bool visited) { this->results.end_rows(tile, chunk, visited); }
};

}  // namespace

extern const MapKernel vjp_jvp[kArithmetics] = METATTN_MAP_KERNELS(VjpJvp, key_sweep);

}  // namespace metattn::METATTN_ISA
