// forward: O = softmax(S)∘Z·V and L = log-sum-exp, by the online softmax over key blocks.
#include "kernels.h"
#include "sweep.h"

namespace metattn::METATTN_ISA {
namespace {

template <class T>
struct Forward {
  const Params& p;
  Arena arena;
  T* row;
  PackedRows<T> q;
  PackedKeys<T> k, v;
  T *s, *tanh_tile, *z;
  T* acc;  // [kRows][padded(dv)] unnormalised output
  T *top, *total;  // [kRows] running maximum of the scores and sum of exponentials
  int64_t wide_dv;

  Forward(const Params& params, char* scratch) : p(params), arena{scratch}, wide_dv(padded<T>(params.dv)) {
    const int64_t blocks = row_sweep_blocks(p);
    row = arena.take<T>(larger(padded<T>(larger(p.d, p.dv)), kKeys));
    q = PackedRows<T>::take(arena, p.q, p.d);
    k = PackedKeys<T>::take(arena, p.k, p.d, blocks, false, true);
    v = PackedKeys<T>::take(arena, p.v, p.dv, blocks, true, false);
    s = arena.take<T>(kRows * kKeys);
    tanh_tile = p.softcap != 0 ? arena.take<T>(kRows * kKeys) : nullptr;
    z = p.rng != nullptr ? arena.take<T>(kRows * kKeys) : nullptr;
    acc = arena.take<T>(kRows * wide_dv);
    top = arena.take<T>(kRows);
    total = arena.take<T>(kRows);
  }

  void pack(int64_t seq, int64_t kv_head, const Sequence& at, int64_t key0, int64_t keys, int64_t block) {
    pack_key_block<T, 2>(p, seq, kv_head, at, key0, keys, block, {&k, &v}, {&p.k, &p.v}, row);
  }

  void begin(const Tile& tile) {
    q.pack(p, p.q, tile, static_cast<T>(p.scale), nullptr, row);
    memset(acc, 0, sizeof(T) * kRows * wide_dv);
    const T sink = p.sinks ? load_scalar<T>(p.sinks, offset_of(p.sinks, tile.seq, tile.head, 0)) : -kInfinity<T>;
    for (int64_t r = 0; r < tile.rows; ++r) {
      top[r] = sink;
      total[r] = sink == -kInfinity<T> ? 0 : 1;
    }
  }

  void visit(const Tile& tile, int64_t block) {
    scores(p, tile, q, k, block, s, tanh_tile, row);
    if (z != nullptr) dropout_tile(p, tile, z);
    for (int64_t r = 0; r < tile.rows; ++r) {
      T* s_row = s + r * kKeys;
      Vec<T> block_top = load(s_row);
      for (int64_t j = kLanes<T>; j < tile.cols; j += kLanes<T>) {
        const Vec<T> x = load(s_row + j);
        block_top = x > block_top ? x : block_top;
      }
      const T new_top = max_element<T>(block_top, top[r]);
      const T shift = new_top == -kInfinity<T> ? 0 : new_top;
      const T decay = top[r] == new_top ? 1 : exp(splat(top[r] - shift))[0];
      top[r] = new_top;
      Vec<T> block_total = {};
      for (int64_t j = 0; j < tile.cols; j += kLanes<T>) {
        Vec<T> weight = exp(load(s_row + j) - shift);
        block_total += weight;
        if (z != nullptr) weight *= load(z + r * kKeys + j);
        store(s_row + j, weight);
      }
      total[r] = total[r] * decay + sum<T>(block_total);
      if (decay != 1)
        for (int64_t c = 0; c < wide_dv; c += kLanes<T>) store(acc + r * wide_dv + c, load(acc + r * wide_dv + c) * decay);
    }
    gemm(tile.rows, p.dv, tile.keys, row_major(s, kKeys), v.natural_block(block), v.natural_stride(), acc, wide_dv, true);
  }

  bool end(const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t i = tile.s.q0 + tile.row0 + r;
      T* o = acc + r * wide_dv;
      const bool dead = total[r] == 0;
      if (dead) memset(o, 0, sizeof(T) * wide_dv);  // 0·NaN may have come in from a key that other rows see
      store_row_in_two(p.out_o, p.out_o_lo, offset_of(p.out_o, tile.seq, tile.head, i),
                       offset_of(p.out_o_lo, tile.seq, tile.head, i), p.dv, dead ? T{1} : 1 / total[r], o, row);
      *double_at(p.out_lse, tile.seq, tile.head, i) =
          dead ? -kInfinity<double> : join_lse(top[r], __builtin_log(static_cast<double>(total[r])));
    }
    return false;
  }
};

template <class T>
size_t scratch_bytes(const Params& p) {
  return Forward<T>(p, nullptr).arena.used;
}
template <class T>
void run_unit(const Params& p, int64_t unit, char* scratch) {
  Forward<T> map(p, scratch);
  row_sweep<T>(p, unit, map);
}

}  // namespace

extern const MapKernel forward[2] = {{scratch_bytes<float>, run_unit<float>}, {scratch_bytes<double>, run_unit<double>}};

}  // namespace metattn::METATTN_ISA
