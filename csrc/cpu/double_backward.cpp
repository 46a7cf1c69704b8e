// double_backward: jvp and vjp_jvp together, for problems whose keys are all in one block. A row's statistics are then at
// hand when its tile has been seen once: twelve products instead of fifteen, and every tensor is read once.
// Ot = (Pt∘Z)V + (P∘Z)C, Dt = rowsum(Pt∘dP + P∘E); the rest as in vjp_jvp.
#include "kernels.h"
#include "second_order.h"

namespace metattn::METATTN_ISA {
namespace {

template <class A>
struct DoubleBackward : SecondOrder<A> {
  using T = Compute<A>;
  T* tangents;  // [kKeys] T of a row
  T* acc;       // [kRows][padded(dv)] Ot
  double tau[kRows];
  int64_t wide_dv;

  DoubleBackward(const Params& params, char* scratch)
      : SecondOrder<A>(params, scratch, true), wide_dv(padded<T>(params.dv)) {
    tangents = this->arena.template take<T>(kKeys);
    acc = this->arena.template take<T>(kRows * wide_dv);
  }

  void begin(const Tile& tile) {
    SecondOrder<A>::begin(tile);
    memset(acc, 0, sizeof(T) * tile.rows * wide_dv);
  }

  // T of a row, and its τ: first a guess, then what is left around it, which does not cancel.
  template <bool Capped>
  void find_tau(const Tile& tile, int64_t r) {
    const T* weights = this->s + r * kKeys;
    Vec<T> guess = {}, excess = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> t = rounded(this->template tangent<Capped>(r * kKeys, j));
      store(tangents + j, t);
      guess += load(weights + j) * t;
    }
    const T base = sum<T>(guess);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) excess += load(weights + j) * (load(tangents + j) - base);
    tau[r] = this->lse.dead[r] ? 0 : static_cast<double>(base) + static_cast<double>(sum<T>(excess));
  }

  // Beside what differentiate leaves, e = P∘Z.
  template <bool Capped>
  void differentiate_row(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    const T row_tau = static_cast<T>(tau[r]);
    const T* weights = this->s + at;
    Vec<T> total = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>)
      total += load(weights + j) * ((load(tangents + j) - row_tau) * this->d_p_kept(at, j) + this->e_kept(at, j));
    const T Dt = this->lse.dead[r] ? 0 : sum<T>(total);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight_kept = load(weights + j) * this->kept(at, j);
      this->template differentiate<Capped>(at, j, load(tangents + j) - row_tau, this->D[r], Dt);
      store(this->e + at + j, weight_kept);
    }
  }

  void visit(const Tile& tile, int64_t block) {
    this->multiply(tile, block);
    for (int64_t r = 0; r < tile.rows; ++r) {
      this->begin_row(tile, r);
      if (this->p.softcap != 0) {
        find_tau<true>(tile, r);
        differentiate_row<true>(tile, r);
      } else {
        find_tau<false>(tile, r);
        differentiate_row<false>(tile, r);
      }
      if (this->results.want_bias) this->results.add_bias(tile, r, this->d_s_t);
    }
    this->results.sums.over_keys(tile, this->d_p, this->v, block, acc);
    if (this->c) this->results.sums.over_keys(tile, this->e, this->c, block, acc);
    this->add(tile, block, this->results.sums.exact());  // a peaked row of few keys averages nothing out
  }

  void end(const Tile& tile, int64_t chunk, bool visited) {
    const Params& p = this->p;
    this->results.end_rows(tile, chunk, visited);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.s.q0 + tile.row0 + r;
      const bool dead = !visited || this->lse.dead[r];
      if (dead) memset(acc + r * wide_dv, 0, sizeof(T) * wide_dv);  // 0·NaN may have come in
      store_row_in_two(p.out_o, p.out_o_lo, offset_of(p.out_o, tile.seq, tile.head, i),
                       offset_of(p.out_o_lo, tile.seq, tile.head, i), p.dv, T{1}, acc + r * wide_dv, this->row);
      *double_at(p.out_lse, tile.seq, tile.head, i) = dead ? 0 : tau[r];
    }
  }
};

}  // namespace

extern const MapKernel double_backward[kArithmetics] = METATTN_MAP_KERNELS(DoubleBackward, key_sweep);
extern const int64_t keys_at_once = kKeys;

}  // namespace metattn::METATTN_ISA
