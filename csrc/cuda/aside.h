// Sums of very many terms: a running float sum of some hundred visits loses digits. A warp puts what it has come
// to aside in memory of its own, after so many visits, and goes on from zero.
#pragma once

#include "cuda/tile.h"

namespace metattn::cuda {

constexpr int kSpanVisits = 64, kLongVisits = 512;  // sums of fewer visits than the latter are not put aside

template <class T>
struct Aside {
  T* own = nullptr;    // [elements][kLanes], each lane's; null where sums are short
  bool begun = false;  // something lies there

  // Sums: elements that each lane of a warp puts aside.
  template <int Sums>
  static METATTN_DEVICE Aside of(const Params& p, const Block& block) {
    if (p.aside == nullptr) return {};
    const int64_t warp = (block.index() * p.aside_chunks + block.chunk()) * block.warps() + block.warp();
    return {reinterpret_cast<T*>(p.aside) + warp * Sums * kLanes, false};
  }
  METATTN_DEVICE bool is_due(int visits) const { return own != nullptr && visits % kSpanVisits == 0; }

  // What lies at `element`, and following, gains a lane's x, which becomes 0. decay: of each of the lane's two rows.
  template <int Tiles>
  METATTN_DEVICE void put(int element, Fragment<T, Tiles>& x, const Rows<T>& decay) const {
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int t = 0; t < Tiles; ++t)
        METATTN_UNROLL(int e = 0; e < 4; ++e) put_one(element + 4 * t + e, lane, x.x[slot][t][e], decay.x[slot][e / 2]);
  }
  METATTN_DEVICE void put(int element, Rows<T>& x, const Rows<T>& decay) const {
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h) put_one(element + h, lane, x.x[slot][h], decay.x[slot][h]);
  }
  // x gains what lies there.
  template <int Tiles>
  METATTN_DEVICE void settle(int element, Fragment<T, Tiles>& x, const Rows<T>& decay) const {
    if (!begun) return;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int t = 0; t < Tiles; ++t)
        METATTN_UNROLL(int e = 0; e < 4; ++e) x.x[slot][t][e] += at(element + 4 * t + e, lane) * decay.x[slot][e / 2];
  }
  METATTN_DEVICE void settle(int element, Rows<T>& x, const Rows<T>& decay) const {
    if (!begun) return;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL(int h = 0; h < 2; ++h) x.x[slot][h] += at(element + h, lane) * decay.x[slot][h];
  }

 private:
  METATTN_DEVICE T& at(int element, int lane) const { return own[element * kLanes + lane]; }
  METATTN_DEVICE void put_one(int element, int lane, T& x, T decay) const {
    T& to = at(element, lane);
    to = begun ? to * decay + x : x;
    x = 0;
  }
};

}  // namespace metattn::cuda
