// vjp: the first backward in one sweep of five products; D = rowsum(dO∘O) − dL, dS = P∘(Z∘(dO Vᵀ) − D).
#include "kernels.h"
#include "sweep.h"

namespace metattn::METATTN_ISA {
namespace {

template <class A>
struct Vjp : GradientSweep<A> {
  using T = Compute<A>;

  Vjp(const Params& params, char* scratch) : GradientSweep<A>(params, scratch, false, rows_at_once(params), 1) {}

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    const Params& p = this->p;
    pack_key_block<A, 2>(p, seq, kv_head, at, key0, keys, block, {&this->k, &this->v}, {&p.k, &p.v}, this->row);
  }

  // s = dR, d_p = P∘Z; returns dS in `row`, where it is wanted.
  template <bool Bent>
  void differentiate_row(const Tile& tile, int64_t r) {
    const int64_t at = r * kKeys;
    T *s_row = this->s + at, *p_row = this->d_p + at;
    this->probabilities(tile, r);
    for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
      const Vec<T> weight = load(s_row + j), keep = this->kept(at, j);
      Vec<T> d_s = weight * (this->d_p_kept(at, j) - this->D[r]);
      if (this->results.want_scores) store(this->row + j, d_s);
      if constexpr (Bent) d_s *= slope_at(this->bend_tile + at + j);
      store(s_row + j, d_s);
      store(p_row + j, weight * keep);
    }
  }

  // The same of several rows, in registers.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void differentiate_rows(const Tile& tile, int64_t block, int64_t r, int64_t j) const {
    RegisterTile<T, Rows, Vectors> weight, gain{};
    this->probabilities_of(tile, block, r, j, weight);
    if (this->gains) multiply_into(gain, this->d_o, r, this->v, block, j);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) {
        const int64_t at = (r + i) * kKeys + j + v * kLanes<T>;
        store(this->s + at, weight.at[i][v] * (gain.at[i][v] - this->D[r + i]));
        store(this->d_p + at, weight.at[i][v]);
      }
    }
  }

  void visit(const Tile& tile, int64_t block) {
    auto& results = this->results;
    if constexpr (kInRegisters<A>) {
      if (this->in_registers)
        walk_registers<T>(tile, [&]<int Rows, int Vectors>(int64_t r, int64_t j)
                                    [[gnu::always_inline]] { differentiate_rows<Rows, Vectors>(tile, block, r, j); });
    }
    if (!this->in_registers) {
      this->multiply(tile, block);
      for (int64_t r = 0; r < tile.rows; ++r) {
        for_bends(this->p, [&]<bool Bent>() { differentiate_row<Bent>(tile, r); });
        if (results.want_scores) results.add_scores(tile, r, this->row);
      }
    }
    results.add_q(tile, this->s, results.sums, this->k, block, results.common_k);
    results.add_k(tile, this->s, results.sums, this->q, block);
    if (this->d_o) results.add_v(tile, this->d_p, this->d_o, block);
  }

  void end(const Tile& tile, const KeySpan& span, bool visited) {
    this->results.end_rows(tile, span, visited, this->known(this->results.sums, this->sums_of_ds), nullptr, this->sums_of_ds);
  }
};

}  // namespace

extern const MapKernel vjp[kArithmetics] = METATTN_MAP_KERNELS(Vjp, key_sweep);

}  // namespace metattn::METATTN_ISA
