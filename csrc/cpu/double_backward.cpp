// double_backward: jvp and vjp_jvp together, for problems of few keys. What a row's statistics are sums over is kept for all
// its keys until they are known: twelve products instead of fifteen, and every tensor is read once.
// Ot = (Pt∘Z)V + (P∘Z)C, Dt = rowsum(Pt∘dP + P∘E); the rest as in vjp_jvp.
#include "kernels.h"
#include "second_order.h"

namespace metattn::METATTN_ISA {
namespace {

// Blocks of keys at most. Products in bfloat16 are so fast that more of them cost less than more tiles do.
#ifdef METATTN_PAIRS
constexpr int64_t kBlocks = 1;
#else
constexpr int64_t kBlocks = 4;
#endif
constexpr int64_t kRowsOfMany = 48;   // of a tile, where there are several
constexpr int64_t kRowsTogether = 4;  // their long chains of operations run side by side

static inline int64_t tiles_of(const Params& p) { return smaller(kBlocks, larger(1, (p.m + kKeys - 1) / kKeys)); }
static inline int64_t rows_of(const Params& p) { return tiles_of(p) > 1 ? kRowsOfMany : rows_at_once(p); }

template <class A>
struct DoubleBackward : SecondOrder<A> {
  using T = Compute<A>;
  T* tangents;  // tiles: T
  T* acc;       // [kRows][padded(dv)] Ot
  double tau[kRows];
  T guess[kRows], Dt[kRows];  // guess: the mean of T by P
  int64_t wide_dv;
  const int64_t tile_size;
  // The tiles of a block of rows: of blocks [first, first + seen). Pointers to tiles point to that of block `selected`.
  Tile tiles[kBlocks];
  int64_t first, seen, selected = 0;

  DoubleBackward(const Params& params, char* scratch)
      : SecondOrder<A>(params, scratch, true, rows_of(params), tiles_of(params)),
        wide_dv(padded<T>(params.dv)),
        tile_size(rows_of(params) * kKeys) {
    tangents = this->arena.template take<T>(tiles_of(params) * tile_size);
    acc = this->arena.template take<T>(kRows * wide_dv);
  }

  void begin(const Tile& tile) {
    SecondOrder<A>::begin(tile);
    memset(acc, 0, sizeof(T) * tile.rows * wide_dv);
    for (int64_t r = 0; r < tile.rows; ++r) guess[r] = 0;
    seen = 0;
  }

  void select(int64_t block) {
    T** const pointers[] = {&this->s, &this->bend_tile, &this->z, &this->d_p, &this->t_r, &this->e, &tangents};
    for (T** pointer : pointers)
      if (*pointer != nullptr) *pointer += (block - selected) * tile_size;
    selected = block;
  }
  // Where row r of the i-th tile begins, from the selected one on.
  int64_t place(int64_t i, int64_t r) const { return (first + i - selected) * tile_size + r * kKeys; }

  // ---- a tile: s = P, tangents = T, d_p = dP, e = E ----

  template <bool Bent>
  void tile_in_memory(const Tile& tile, int64_t block) {
    this->multiply(tile, block);
    for (int64_t r = 0; r < tile.rows; ++r) {
      this->begin_row(tile, r);
      const int64_t at = r * kKeys;
      Vec<T> total = {};
      for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
        const Vec<T> t = rounded(this->template tangent<Bent>(at, j));
        store(tangents + at + j, t);
        total += load(this->s + at + j) * t;
      }
      guess[r] += sum<T>(total);
    }
  }
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void rows_in_registers(const Tile& tile, int64_t block, int64_t r, int64_t j) {
    {
      RegisterTile<T, Rows, Vectors> weight, tangent;
      this->weights_and_tangents(tile, block, r, j, weight, tangent);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        guess[r + i] += mean<Vectors>(weight.at[i], tangent.at[i], 0);
        store_all<T>(this->s + (r + i) * kKeys + j, weight.at[i]);
        store_all<T>(tangents + (r + i) * kKeys + j, tangent.at[i]);
      }
    }
    if (!this->gains) return;
    RegisterTile<T, Rows, Vectors> gain{}, gain_t{};
    multiply_into(gain, this->d_o, r, this->v, block, j);
    if (this->c) multiply_into(gain_t, this->d_o, r, this->c, block, j);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      store_all<T>(this->d_p + (r + i) * kKeys + j, gain.at[i]);
      store_all<T>(this->e + (r + i) * kKeys + j, gain_t.at[i]);
    }
  }
  // Σ P·(x − less) of a row in registers.
  template <int Vectors>
  [[gnu::always_inline]] static T mean(const Vec<T> (&weight)[Vectors], const Vec<T> (&x)[Vectors], T less) {
    Vec<T> total = {};
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) total += weight[v] * (x[v] - less);
    return sum<T>(total);
  }

  // ---- rows, when all their tiles are there: s = dRt, t_r = dR, d_p = Pt∘Z, e = P∘Z ----

  // What is left around the guess does not cancel.
  double tau_around(int64_t r) const {
    Vec<T> total = {};
    for (int64_t i = 0; i < seen; ++i)
      for (int64_t at = place(i, r), j = 0; j < tiles[i].cols; j += kLanes<T>)
        total += load(this->s + at + j) * (load(tangents + at + j) - guess[r]);
    return static_cast<double>(guess[r]) + static_cast<double>(sum<T>(total));
  }
  T dt_of(int64_t r) const {
    const T row_tau = static_cast<T>(tau[r]);
    Vec<T> total = {};
    for (int64_t i = 0; i < seen; ++i)
      for (int64_t at = place(i, r), j = 0; j < tiles[i].cols; j += kLanes<T>)
        total += load(this->s + at + j) * ((load(tangents + at + j) - row_tau) * this->d_p_kept(at, j) + this->e_kept(at, j));
    return sum<T>(total);
  }
  template <bool Bent>
  void differentiate_row(int64_t r) {
    const T row_tau = static_cast<T>(tau[r]);
    for (int64_t i = 0; i < seen; ++i) {
      for (int64_t at = place(i, r), j = 0; j < tiles[i].cols; j += kLanes<T>) {
        const Vec<T> weight_kept = load(this->s + at + j) * this->kept(at, j);
        this->template differentiate<Bent>(at, j, load(tangents + at + j) - row_tau, this->D[r], Dt[r]);
        store(this->e + at + j, weight_kept);
      }
      if (this->results.want_scores) this->results.add_scores(tiles[i], r, this->d_s_t);
    }
  }
  template <bool Bent>
  void differentiate_rows(int64_t rows) {
    for (int64_t r0 = 0; r0 < rows; r0 += kRowsTogether) {
      const int64_t end = smaller(rows, r0 + kRowsTogether);
      for (int64_t r = r0; r < end; ++r) tau[r] = this->lse.dead[r] ? 0 : tau_around(r);
      for (int64_t r = r0; r < end; ++r) Dt[r] = this->lse.dead[r] ? 0 : dt_of(r);
      for (int64_t r = r0; r < end; ++r) differentiate_row<Bent>(r);
    }
  }
  // The same of rows that have all their keys in registers.
  template <int Rows, int Vectors>
  [[gnu::always_inline]] void all_in_registers(const Tile& tile, int64_t block, int64_t r, int64_t j) {
    {
      RegisterTile<T, Rows, Vectors> weight, tangent;
      this->weights_and_tangents(tile, block, r, j, weight, tangent);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const T guessed = mean<Vectors>(weight.at[i], tangent.at[i], 0);
        const T rest = mean<Vectors>(weight.at[i], tangent.at[i], guessed);
        tau[r + i] = this->lse.dead[r + i] ? 0 : static_cast<double>(guessed) + static_cast<double>(rest);
        const T row_tau = static_cast<T>(tau[r + i]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) tangent.at[i][v] -= row_tau;
        store_all<T>(this->e + (r + i) * kKeys + j, weight.at[i]);
        store_all<T>(tangents + (r + i) * kKeys + j, tangent.at[i]);
      }
    }
    RegisterTile<T, Rows, Vectors> gain, gain_t;
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
        total += weight[v] * (excess[v] * gain.at[i][v] + gain_t.at[i][v]);  // less D: ΣP∘excess = 0
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

  void visit(const Tile& tile, int64_t block) {
    if (seen == 0) first = block;
    tiles[seen++] = tile;
    select(block);
    if constexpr (kInRegisters<A>) {
      if (this->in_registers)
        return walk_registers<T>(tile, [&]<int Rows, int Vectors>(int64_t r, int64_t j) [[gnu::always_inline]] {
          if (all_at_once()) all_in_registers<Rows, Vectors>(tile, block, r, j);
          else rows_in_registers<Rows, Vectors>(tile, block, r, j);
        });
    }
    for_bends(this->p, [&]<bool Bent>() { tile_in_memory<Bent>(tile, block); });
  }
  bool all_at_once() const { return this->in_registers && this->p.m <= PackedKeys<T>::kKeyPanel; }

  void end(const Tile& tile, const KeySpan& span, bool visited) {
    const Params& p = this->p;
    if (!all_at_once()) for_bends(p, [&]<bool Bent>() { differentiate_rows<Bent>(visited ? tile.rows : 0); });
    for (int64_t i = 0; visited && i < seen; ++i) {
      select(first + i);
      // in two parts: Pt cancels what all values share, and a peaked row of few keys averages nothing out
      const WeightedSums<A> in_two_parts = this->results.sums.in_two_parts();
      in_two_parts.over_keys(tiles[i], this->d_p, this->v, selected, acc);
      if (this->c) this->results.sums.over_keys(tiles[i], this->e, this->c, selected, acc);
      this->add(tiles[i], selected, in_two_parts);
    }
    this->results.end_rows(tile, span, visited, nullptr, this->known(this->results.sums, this->sums_of_ds), nullptr);
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
extern const int64_t keys_at_once = kBlocks * kKeys;

}  // namespace metattn::METATTN_ISA
