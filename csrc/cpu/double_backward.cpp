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
  T* tangents;  // tile: T
  T* acc;       // [kRows][padded(dv)] Ot
  double tau[kRows];
  T Dt[kRows];
  int64_t wide_dv;

  DoubleBackward(const Params& params, char* scratch)
      : SecondOrder<A>(params, scratch, true), wide_dv(padded<T>(params.dv)) {
    tangents = this->arena.template take<T>(kRows * kKeys);
    acc = this->arena.template take<T>(kRows * wide_dv);
  }

  void begin(const Tile& tile) {
    SecondOrder<A>::begin(tile);
    memset(acc, 0, sizeof(T) * tile.rows * wide_dv);
  }

  // T, and its mean by P: a guess of τ.
  template <bool Capped>
  T guess(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    Vec<T> total = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> t = rounded(this->template tangent<Capped>(at, j));
      store(tangents + at + j, t);
      total += load(this->s + at + j) * t;
    }
    return sum<T>(total);
  }
  // What is left around it does not cancel.
  double tau_around(const Tile& tile, int64_t r, T guessed) const {
    const int64_t at = r * kKeys;
    Vec<T> total = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>)
      total += load(this->s + at + j) * (load(tangents + at + j) - guessed);
    return static_cast<double>(guessed) + static_cast<double>(sum<T>(total));
  }
  T dt_of(const Tile& tile, int64_t r) const {
    const int64_t at = r * kKeys;
    const T row_tau = static_cast<T>(tau[r]);
    Vec<T> total = {};
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>)
      total += load(this->s + at + j) *
               ((load(tangents + at + j) - row_tau) * this->d_p_kept(at, j) + this->e_kept(at, j));
    return sum<T>(total);
  }
  // Beside what differentiate leaves, e = P∘Z.
  template <bool Capped>
  void differentiate_row(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    const T row_tau = static_cast<T>(tau[r]);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight_kept = load(this->s + at + j) * this->kept(at, j);
      this->template differentiate<Capped>(at, j, load(tangents + at + j) - row_tau, this->D[r], Dt[r]);
      store(this->e + at + j, weight_kept);
    }
  }
  // Each sum in a loop of its own: the rows' long chains of operations run side by side.
  template <bool Capped>
  void differentiate_rows(const Tile& tile) {
    T guessed[kRows];
    for (int64_t r = 0; r < tile.rows; ++r) {
      this->begin_row(tile, r);
      guessed[r] = guess<Capped>(tile, r);
    }
    for (int64_t r = 0; r < tile.rows; ++r) tau[r] = this->lse.dead[r] ? 0 : tau_around(tile, r, guessed[r]);
    for (int64_t r = 0; r < tile.rows; ++r) Dt[r] = this->lse.dead[r] ? 0 : dt_of(tile, r);
    for (int64_t r = 0; r < tile.rows; ++r) {
      differentiate_row<Capped>(tile, r);
      if (this->results.want_bias) this->results.add_bias(tile, r, this->d_s_t);
    }
  }

  // Σ P·(x, less a number) of a row in registers.
  template <int Vectors>
  [[gnu::always_inline]] static T mean(const Vec<T> (&weight)[Vectors], const Vec<T> (&x)[Vectors], T less) {
    Vec<T> total = {};
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) total += weight[v] * (x[v] - less);
    return sum<T>(total);
  }
  // The same as differentiate_rows of several rows that have all their keys in registers.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void differentiate_in_registers(const Tile& tile, int64_t block, int64_t r, int64_t j) {
    {
      Scores<T, Rows, Vectors> weight, tangent;
      this->weights_and_tangents(tile, block, r, j, weight, tangent);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const T guessed = mean<Vectors>(weight.at[i], tangent.at[i], 0);
        const double exact = static_cast<double>(guessed) + static_cast<double>(mean<Vectors>(weight.at[i], tangent.at[i], guessed));
        tau[r + i] = this->lse.dead[r + i] ? 0 : exact;
        const T row_tau = static_cast<T>(tau[r + i]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) tangent.at[i][v] -= row_tau;
        store_all<T>(this->e + (r + i) * kKeys + j, weight.at[i]);
        store_all<T>(tangents + (r + i) * kKeys + j, tangent.at[i]);
      }
    }
    Scores<T, Rows, Vectors> gain, gain_t;
    this->gains_of(block, r, j, gain, gain_t);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const int64_t at = (r + i) * kKeys + j;
      Vec<T> weight[Vectors], excess[Vectors];
      load_all<T>(this->e + at, weight);
      load_all<T>(tangents + at, excess);
      Vec<T> total = {};
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v)
        total += weight[v] * (excess[v] * gain.at[i][v] + gain_t.at[i][v]);  // D in gain: ΣP∘excess = 0
      const T d_t = this->lse.dead[r + i] ? 0 : sum<T>(total);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t here = at + v * kLanes<T>;
        const Vec<T> weight_t = weight[v] * excess[v];
        store(this->s + here, weight_t * gain.at[i][v] + weight[v] * (gain_t.at[i][v] - d_t));
        store(this->t_r + here, weight[v] * gain.at[i][v]);
        store(this->d_p + here, weight_t);
      }
    }
  }
  void differentiate_tile(const Tile& tile, int64_t block) {
    this->multiply(tile, block);
    if (this->p.softcap != 0) differentiate_rows<true>(tile);
    else differentiate_rows<false>(tile);
  }

  void visit(const Tile& tile, int64_t block) {
    bool done = false;
    if constexpr (kInRegisters<A>) {
      done = this->in_registers && tile.keys <= PackedKeys<T>::kKeyPanel;
      if (done)
        walk_registers<T>(tile, [&]<int Rows, int Vectors>(int64_t r, int64_t j) [[gnu::always_inline]] {
          differentiate_in_registers<Rows, Vectors>(tile, block, r, j);
        });
    }
    if (!done) differentiate_tile(tile, block);
    this->results.sums.over_keys(tile, this->d_p, this->v, block, acc);
    if (this->c) this->results.sums.over_keys(tile, this->e, this->c, block, acc);
    this->add(tile, block, this->results.sums.in_two_parts());  // a peaked row of few keys averages nothing out
  }

  void end(const Tile& tile, int64_t chunk, bool visited) {
    const Params& p = this->p;
    this->results.end_rows(tile, chunk, visited);
    this->results.sums.finish_over_keys(acc, tile.rows, p.dv);
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
