// Row passes: a block owns queries and visits the keys that they attend to. forward, jvp, and of the gradients dQ, the
// entries of a bias' own gradient, the shares of sinks and slopes, and the row statistics.
#pragma once

#include "cuda/derivatives.h"

namespace metattn::cuda {

// Where a block of queries is; whether it has any.
static METATTN_DEVICE bool place_rows(const Params& p, const Block& block, Place& place, int64_t& row0) {
  const int64_t rows = kWarpRows * block.warps(), blocks = (p.n + rows - 1) / rows;
  const int64_t pair = block.index() / blocks;
  place.seq = pair / p.heads;
  place.head = pair % p.heads;
  place.kv_head = place.head / (p.heads / p.kv_heads);
  place.s = sequence(p, place.seq);
  row0 = (blocks - 1 - block.index() % blocks) * rows;  // the last have the most keys under a causal mask: first
  return row0 < place.s.n;
}

// The keys that rows [row0, row0 + rows) attend to.
static METATTN_DEVICE Range keys_of_rows(const Params& p, const Place& place, int64_t row0, int64_t rows) {
  const int64_t last = smaller(row0 + rows, place.s.n) - 1;
  return {attended_keys(p, place.s, row0).lo, attended_keys(p, place.s, last).hi};
}

// Tiles of keys, values and their tangents, in shared memory; with two stages, so are those of the next block.
template <class S, int Tiles>
struct KeyTiles {
  Tile<S> k, b, v, c;  // of the first stage
  uint32_t* seen;
  int stages;
  int64_t step;  // elements from a stage to the next

  static METATTN_HD KeyTiles take(Pieces& pieces, const Params& p, int ld, bool with_v, bool tangents, int stages) {
    KeyTiles tiles;
    tiles.seen = pieces.take<uint32_t>(2);
    const size_t before = pieces.used;
    tiles.k = pieces.tile<S>(true, 8 * Tiles, ld);
    tiles.b = pieces.tile<S>(tangents && p.t_k, 8 * Tiles, ld);
    tiles.v = pieces.tile<S>(with_v, 8 * Tiles, ld);
    tiles.c = pieces.tile<S>(tangents && with_v && p.t_v, 8 * Tiles, ld);
    tiles.stages = stages;
    tiles.step = static_cast<int64_t>((pieces.used - before) / sizeof(S));
    pieces.take<S>((stages - 1) * tiles.step);
    return tiles;
  }
  METATTN_DEVICE KeyTiles at(int stage) const {
    const int64_t by = stage * step;
    return {k.from(by), b.from(by), v.from(by), c.from(by), seen, 1, step};
  }
  // Begins to copy the keys [key0, …) of [range.lo, range.hi).
  METATTN_DEVICE void start(Block& block, const Params& p, const Place& place, Range range, int64_t key0) const {
    const auto one = [&](Tile<S> tile, const View& view, int64_t width) {
      start_tile(block, tile, 8 * Tiles, view, offset_of(view, place.seq, place.kv_head, place.s.k0), key0, range.lo,
                 range.hi, width);
    };
    one(k, p.k, p.d);
    one(b, p.t_k, p.d);
    one(v, p.v, p.dv);
    one(c, p.t_v, p.dv);
    block.end_group();
  }
  METATTN_DEVICE void round(const Block& block) const { round_tiles(block, 8 * Tiles, {k, b, v, c}); }
  // Lets all threads see what each has waited for. Whether unseen keys must be cleared.
  template <bool Full>
  METATTN_DEVICE bool finish(Block& block, const Params& p) const {
    round(block);
    if (Full && (p.mask || p.bias)) {
      bool met = met_strange(block, k, 8 * Tiles);
      met |= met_strange(block, b, 8 * Tiles);
      met |= met_strange(block, v, 8 * Tiles);
      met |= met_strange(block, c, 8 * Tiles);
      return block.any(met);
    }
    block.sync();
    return false;
  }
  // visit(tiles, key0, whether unseen keys must be cleared) for each block of the keys of a range, and rest(visits) after it.
  template <bool Full, class Visit, class Rest>
  METATTN_DEVICE void sweep(Block& block, const Params& p, const Place& place, Range range, Visit visit, Rest rest) const {
    constexpr int64_t kStep = 8 * Tiles;
    const int64_t first = range.lo / kStep * kStep;
    const int visits = range.hi > first ? static_cast<int>((range.hi - first + kStep - 1) / kStep) : 0;
    for (int index = 1 - stages; index < visits; ++index) {
      const int next = index + stages - 1;
      if (next < visits) at(next % stages).start(block, p, place, range, first + next * kStep);
      else block.end_group();
      if (index < 0) continue;
      if (stages == 2) block.template wait<1>();
      else block.template wait<0>();
      const KeyTiles now = at(index % stages);
      const bool unclean = now.template finish<Full>(block, p);
      visit(now, first + index * kStep, unclean);
      rest(index + 1);
      block.sync();  // before anything is copied there
    }
  }
};

// Tiles of queries and what is shaped like them.
template <class S>
struct QueryTiles {
  Tile<S> q, a, d_o;

  static METATTN_HD QueryTiles take(Pieces& pieces, const Params& p, int rows, int ld, bool with_d_o,
                                        bool tangents) {
    QueryTiles tiles;
    tiles.q = pieces.tile<S>(true, rows, ld);
    tiles.a = pieces.tile<S>(tangents && p.t_q, rows, ld);
    tiles.d_o = pieces.tile<S>(with_d_o && p.d_o, rows, ld);
    return tiles;
  }
  METATTN_DEVICE QueryTiles from(int64_t elements) const {
    return {q.from(elements), a.from(elements), d_o.from(elements)};
  }
  // Begins to copy rows [row0, row0 + rows).
  METATTN_DEVICE void start(Block& block, const Params& p, const Place& place, int64_t row0, int rows) const {
    const auto one = [&](Tile<S> tile, const View& view, int64_t width) {
      start_tile(block, tile, rows, view, offset_of(view, place.seq, place.head, place.s.q0), row0, 0, place.s.n, width);
    };
    one(q, p.q, p.d);
    one(a, p.t_q, p.d);
    one(d_o, p.d_o, p.dv);
    block.end_group();
  }
  METATTN_DEVICE void round(const Block& block, int rows) const { round_tiles(block, rows, {q, a, d_o}); }
  // Zeros for NaN in the idle rows; each thread has waited for what it copied.
  template <class T>
  METATTN_DEVICE void clear_idle(const Block& block, const Params& p, const Place& place, const Statistics<T>& known,
                                 int rows) const {
    const auto idle = [&](int r) { return is_idle(p, place, known.reference[r], known.log_total[r]); };
    clear_rows(block, q, rows, idle);
    clear_rows(block, a, rows, idle);
    clear_rows(block, d_o, rows, idle);
  }
};

static METATTN_DEVICE int depth_of(int64_t width) { return static_cast<int>(round_up(width, 16)); }

// ---- what all keys share ----

// Derivatives of scores sum to 0 over the keys, or to what dL and a sink leave, and so cancel what all keys share. Their
// rounded values do not, nor those of a D that comes of an O whose weights were rounded. What the weights of a row lack is
// the weight of a mean of some keys that it attends to: another key would bring in what is masked.

// lack loses the weights as they are multiplied; where a softcap hides their sum, it gains what they lost.
template <class S, class T, int Tiles>
static METATTN_DEVICE void count_weights(const Params& p, Rows<T>& lack, const Fragment<T, Tiles>& weights) {
  if constexpr (kRounds<S>) {
    const Rows<T> multiplied = sums_as_multiplied<S>(weights, p.twice);
    const Rows<T> sums = p.softcap != 0 ? weights.row_sums() : Rows<T>::filled(0);
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL for (int h = 0; h < 2; ++h) lack.x[slot][h] += sums.x[slot][h] - multiplied.x[slot][h];
  }
}

// What rows' dS or, tangent, dSt sum to: dL + D·Ps, and Dt·Ps + D·Pst with Pst = Ps·(σ − τ). NaN where few digits are
// left of that: nothing is taken for lacking then.
template <class T>
static METATTN_DEVICE void add_known_sums(const Params& p, const Place& place, const Statistics<T>& known, int warp_row,
                                          int64_t mine, bool tangent, Rows<T>& sums) {
  METATTN_EACH_LANE(slot, lane)
    METATTN_UNROLL for (int h = 0; h < 2; ++h) {
      const int r = warp_row + lane / 4 + 8 * h;
      const int64_t i = mine + lane / 4 + 8 * h;
      if (i >= place.s.n || known.idle(r)) continue;
      T sum = 0;
      if (p.d_lse && !tangent) sum = static_cast<T>(*double_at(p.d_lse, place.seq, place.head, place.s.q0 + i));
      if (p.sinks) {
        const T moved = (p.t_sinks ? per_head<T>(p.t_sinks, place) : 0) - known.tau[r];
        sum += sink_probability(p, place, known.reference[r], known.log_total[r]) *
               (tangent ? known.dt[r] + known.d[r] * moved : known.d[r]);
      }
      constexpr T kLeast = T{1} / 4096;
      const bool known_well = beside_sink(p, place, known.reference[r], known.log_total[r]) > kLeast;
      sums.x[slot][h] += known_well ? sum : kInfinity<T> - kInfinity<T>;
    }
}

// acc += lack·(a mean key of each row), of features [first, …) of one of the tiles: of those keys of one block that the row
// attends to, or of the first block that has such.
template <class S, bool Full, class T, int Columns, int Tiles>
static METATTN_DEVICE void add_mean_key(const Params& p, Block& block, const Place& place, const KeyTiles<S, Tiles>& keys,
                                        Tile<S> KeyTiles<S, Tiles>::*which, Range range, int64_t row0, int first,
                                        const Rows<T>& lack, Fragment<T, Columns>& acc) {
  constexpr int64_t kStep = 8 * Tiles;
  const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
  const int64_t last = smaller(row0 + rows, place.s.n) - 1;
  const int64_t begin = range.lo / kStep * kStep;
  // the nearest to the rows that all attend to: the first key of all is often unlike the others
  const int64_t lo = attended_keys(p, place.s, last).lo, hi = attended_keys(p, place.s, row0).hi;
  int64_t key0 = lo < hi ? larger(lo, hi - kStep) / kStep * kStep : begin;
  Fragment<T, Columns> mean;
  Rows<T> found = Rows<T>::filled(0);
  mean.fill(0);
  bool missing = range.hi > begin;
  for (int64_t following = begin; missing; key0 = following, following += kStep) {
    keys.start(block, p, place, range, key0);
    block.template wait<0>();
    const bool unclean = keys.template finish<Full>(block, p);
    const Window<false> window{p, place, row0 + warp_row, key0, reach_of(p, place.s)};
    Fragment<T, Tiles> s, bend;
    s.fill(0);
    finish_scores<Full>(window, s, bend);
    s.each([&](T& value, int, int, int slot, int, int e) {
      if (found.x[slot][e / 2] != 0) value = -kInfinity<T>;
    });
    if (unclean) clear_unseen(block, keys.seen, s, {keys.*which});
    s.each([&](T& value, int, int, int, int, int) { value = value == -kInfinity<T> ? 0 : 1; });
    add_weighted(mean, s, keys.*which, first, false);
    const Rows<T> more = s.row_sums();
    bool mine_missing = false;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL for (int h = 0; h < 2; ++h) {
        found.x[slot][h] += more.x[slot][h];
        mine_missing |= found.x[slot][h] == 0 && lack.x[slot][h] != 0;
      }
    missing = block.any(mine_missing) && following < range.hi;
    block.sync();  // before anything is copied there
  }
  acc.each([&](T& value, int, int, int slot, int t, int e) {
    const T weight = lack.x[slot][e / 2] / larger_of(found.x[slot][e / 2], T{1}), key = mean.x[slot][t][e];
    if (is_finite(weight) && is_finite(key)) value += weight * key;
  });
}

// ---- forward: O = (P∘Z)V and L = logsumexp(S), by the online softmax ----

template <class S, int Columns, int Tiles, bool Full>
struct ForwardRows {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = 2 * Tiles;
  static constexpr int kSums = 4 * Columns + 6;  // that each lane may put aside
  using T = Compute<S>;
  Tile<S> q;
  KeyTiles<S, kTiles> keys;

  METATTN_HD ForwardRows(const Params& p, int warps, int stages, Pieces& pieces) {
    const int ld = leading<S>(p, 8 * Columns);
    q = pieces.tile<S>(true, kWarpRows * warps, ld);
    keys = KeyTiles<S, kTiles>::take(pieces, p, ld, true, false, stages);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    Place place;
    int64_t row0;
    if (!place_rows(p, block, place, row0)) return;
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    start_tile(block, q, rows, p.q, offset_of(p.q, place.seq, place.head, place.s.q0), row0, 0, place.s.n, p.d);
    block.end_group();
    if constexpr (kIsTf32<S>) {
      block.template wait<0>();
      round_tiles(block, rows, {q});
    }
    const T sink = p.sinks ? per_head<T>(p.sinks, place) : -kInfinity<T>;
    Rows<T> top = Rows<T>::filled(sink), total = Rows<T>::filled(sink == -kInfinity<T> ? 0 : 1);
    // of the weights that dropout leaves, and of these as they are multiplied
    Rows<T> kept_total = Rows<T>::filled(0), multiplied_total = Rows<T>::filled(0);
    const bool twice = p.twice || p.softcap != 0;  // what D lacks is found out, but with a softcap
    Aside<T> aside = Aside<T>::template of<kSums>(p, block);
    Rows<T> top_aside = Rows<T>::filled(-kInfinity<T>);  // from which what lies aside is counted
    const auto decay_aside = [&] {
      Rows<T> decay;
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL for (int h = 0; h < 2; ++h)
          decay.x[slot][h] = top_aside.x[slot][h] == top.x[slot][h] ? 1 : exponential(top_aside.x[slot][h] - top.x[slot][h]);
      return decay;
    };
    Fragment<T, Columns> acc;
    acc.fill(0);
    const int first = 8 * Columns * block.chunk();
    const Range range = keys_of_rows(p, place, row0, rows);
    keys.template sweep<Full>(block, p, place, range, [&](const auto& at, int64_t key0, bool unclean) {
      const Window<false> window{p, place, row0 + warp_row, key0, reach_of(p, place.s)};
      Fragment<T, kTiles> s, bend;
      s.fill(0);
      add_scores(s, q, warp_row, at.k, depth_of(p.d));
      finish_scores<Full>(window, s, bend);
      if (unclean) clear_unseen(block, at.seen, s, {at.v});
      const Kept<kTiles> kept = dropout<Full, false, kTiles>(window);
      const Rows<T> highest = s.joined(-kInfinity<T>, [](T a, T b) { return a > b ? a : b; });
      Rows<T> shift, decay;
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL for (int h = 0; h < 2; ++h) {
          // a NaN among the scores is no highest, and comes out of the sum
          const T now = larger_of(top.x[slot][h], highest.x[slot][h]);
          shift.x[slot][h] = now == -kInfinity<T> ? 0 : now;
          decay.x[slot][h] = exponential(top.x[slot][h] - shift.x[slot][h]);
          top.x[slot][h] = now;
        }
      s.each([&](T& value, int, int, int slot, int, int e) { value = exponential(value - shift.x[slot][e / 2]); });
      const Rows<T> sums = s.row_sums();
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL for (int h = 0; h < 2; ++h)
          total.x[slot][h] = total.x[slot][h] * decay.x[slot][h] + sums.x[slot][h];
      if (Full && p.rng != nullptr) apply_dropout(p, kept, s);
      acc.each([&](T& value, int, int, int slot, int, int e) { value *= decay.x[slot][e / 2]; });
      if constexpr (kRounds<S>) {
        const Rows<T> kept_sums = Full && p.rng != nullptr ? s.row_sums() : sums;
        const Rows<T> multiplied = sums_as_multiplied<S>(s, twice);
        METATTN_EACH_LANE(slot, lane)
          METATTN_UNROLL for (int h = 0; h < 2; ++h) {
            kept_total.x[slot][h] = kept_total.x[slot][h] * decay.x[slot][h] + kept_sums.x[slot][h];
            multiplied_total.x[slot][h] = multiplied_total.x[slot][h] * decay.x[slot][h] + multiplied.x[slot][h];
          }
      }
      add_weighted(acc, s, at.v, first, twice);
    }, [&](int visits) {
      if (!aside.is_due(visits)) return;
      const Rows<T> decay = decay_aside();
      aside.put(0, acc, decay);
      aside.put(4 * Columns, total, decay);
      aside.put(4 * Columns + 2, kept_total, decay);
      aside.put(4 * Columns + 4, multiplied_total, decay);
      aside.begun = true;
      top_aside = top;
    });
    if (aside.begun) {
      const Rows<T> decay = decay_aside();
      aside.settle(0, acc, decay);
      aside.settle(4 * Columns, total, decay);
      aside.settle(4 * Columns + 2, kept_total, decay);
      aside.settle(4 * Columns + 4, multiplied_total, decay);
    }
    // a row that attends to nothing gives zeros, whatever 0·NaN brought in from a key that others see; O is a mean by the
    // weights as they were multiplied: a row's errors then weigh V − O, not V
    acc.each([&](T& value, int, int, int slot, int, int e) {
      const T all = total.x[slot][e / 2], multiplied = multiplied_total.x[slot][e / 2];
      const T mean = multiplied == 0 ? 1 : kept_total.x[slot][e / 2] / multiplied;
      value = all == 0 ? 0 : value / all * mean;
    });
    const int64_t mine = row0 + warp_row;
    store_rows_in_two<S>(p.out_o, p.out_o_lo, offset_of(p.out_o, place.seq, place.head, place.s.q0),
                      offset_of(p.out_o_lo, place.seq, place.head, place.s.q0), mine, place.s.n, first, p.dv, acc);
    if (block.chunk() != 0) return;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL for (int h = 0; h < 2; ++h) {
        const int64_t i = mine + lane / 4 + 8 * h;
        if (lane % 4 != 0 || i >= place.s.n) continue;
        // counted from the number nearest to L, the log has few digits to lose in T
        const double log_total = log(static_cast<double>(total.x[slot][h]));
        const double before = top.x[slot][h] == -kInfinity<T> ? 0 : static_cast<double>(top.x[slot][h]);
        const double nearest =
            log_total > -kInfinity<double> ? static_cast<double>(static_cast<T>(before + log_total)) : before;
        double* lse = double_at(p.out_lse, place.seq, place.head, place.s.q0 + i);
        lse[0] = nearest;
        lse[p.out_lse.stride[3]] = log_total - (nearest - before);
      }
  }
};

// ---- jvp: Ot = (P∘(T − t)∘Z)V + (P∘Z)C − (τ − t)·O and τ, for any t ----

// With t = 0 the terms cancel where a sharply peaked row has large T: a block with a row that lost more than this is
// swept once more, with t = τ of the first sweep. Where weights are rounded, O's were: t is then the mean of T over the
// first keys of a row, and of O's errors little comes in.
constexpr float kCancellation = 16;

template <class S, int Columns, int Tiles, bool Full>
struct JvpRows {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = Tiles;
  static constexpr int kSums = 4 * Columns + 2;
  using T = Compute<S>;
  QueryTiles<S> queries;
  KeyTiles<S, kTiles> keys;
  Statistics<T> known;

  METATTN_HD JvpRows(const Params& p, int warps, int stages, Pieces& pieces) {
    const int ld = leading<S>(p, 8 * Columns);
    queries = QueryTiles<S>::take(pieces, p, kWarpRows * warps, ld, false, true);
    keys = KeyTiles<S, kTiles>::take(pieces, p, ld, true, true, stages);
    known = Statistics<T>::take(pieces, kWarpRows * warps);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    Place place;
    int64_t row0;
    if (!place_rows(p, block, place, row0)) return;
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    for (int r = block.worker(); r < rows; r += block.workers()) {
      LogSumExp<T> lse{kInfinity<T>, 0};
      if (row0 + r < place.s.n) lse = known_lse<T>(p, place, row0 + r);
      known.reference[r] = lse.reference;
      known.log_total[r] = lse.log_total;
    }
    queries.start(block, p, place, row0, rows);
    block.template wait<0>();
    queries.round(block, rows);
    block.sync();
    queries.clear_idle(block, p, place, known, rows);
    const bool has_scores = p.t_q || p.t_k || p.t_bias || p.t_slopes;
    const int first = 8 * Columns * block.chunk();
    const int64_t mine = row0 + warp_row;
    Rows<T> base = Rows<T>::filled(0), based = Rows<T>::filled(!kRounds<S>);
    for (int sweep = 0; sweep < 2; ++sweep) {
      Aside<T> aside = Aside<T>::template of<kSums>(p, block);
      const Rows<T> same = Rows<T>::filled(1);
      Fragment<T, Columns> acc;
      Rows<T> excess = Rows<T>::filled(0);
      acc.fill(0);
      const Range range = keys_of_rows(p, place, row0, rows);
      keys.template sweep<Full>(block, p, place, range, [&](const auto& at, int64_t key0, bool unclean) {
        visit(p, block, place, at, row0, key0, unclean, has_scores, first, base, based, excess, acc);
      }, [&](int visits) {
        if (!aside.is_due(visits)) return;
        aside.put(0, acc, same);
        aside.put(4 * Columns, excess, same);
        aside.begun = true;
      });
      aside.settle(0, acc, same);
      aside.settle(4 * Columns, excess, same);
      based = Rows<T>::filled(1);
      if (p.sinks) {
        const T sigma = p.t_sinks ? per_head<T>(p.t_sinks, place) : 0;
        METATTN_EACH_LANE(slot, lane)
          METATTN_UNROLL for (int h = 0; h < 2; ++h) {
            const int r = warp_row + lane / 4 + 8 * h;
            if (!known.idle(r))
              excess.x[slot][h] += sink_probability(p, place, known.reference[r], known.log_total[r]) * (sigma - base.x[slot][h]);
          }
      }
      const bool lossy = finish(p, place, mine, warp_row, first, excess, acc);
      store_rows_in_two<S>(p.out_o, p.out_o_lo, offset_of(p.out_o, place.seq, place.head, place.s.q0),
                        offset_of(p.out_o_lo, place.seq, place.head, place.s.q0), mine, place.s.n, first, p.dv, acc);
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL for (int h = 0; h < 2; ++h) {
          const int r = lane / 4 + 8 * h;
          const bool idle = known.idle(warp_row + r);
          if (block.chunk() == 0 && lane % 4 == 0 && mine + r < place.s.n)
            *double_at(p.out_lse, place.seq, place.head, place.s.q0 + mine + r) =
                idle ? 0 : static_cast<double>(base.x[slot][h]) + static_cast<double>(excess.x[slot][h]);
          base.x[slot][h] = idle ? 0 : base.x[slot][h] + excess.x[slot][h];
        }
      if (!block.any(lossy && has_scores)) return;
    }
  }

  METATTN_DEVICE void visit(const Params& p, Block& block, const Place& place, const KeyTiles<S, kTiles>& at,
                            int64_t row0, int64_t key0, bool unclean, bool has_scores, int first, Rows<T>& base,
                            Rows<T>& based, Rows<T>& excess, Fragment<T, Columns>& acc) const {
    const int warp_row = kWarpRows * block.warp();
    const Window<false> window{p, place, row0 + warp_row, key0, reach_of(p, place.s)};
    Fragment<T, kTiles> s, bend, t;
    s.fill(0);
    t.fill(0);
    add_scores(s, queries.q, warp_row, at.k, depth_of(p.d));
    finish_scores<Full>(window, s, bend);
    if (unclean) clear_unseen(block, at.seen, s, {at.v, at.c});
    const Kept<kTiles> kept = dropout<Full, false, kTiles>(window);
    add_scores(t, queries.a, warp_row, at.k, depth_of(p.d));
    add_scores(t, queries.q, warp_row, at.b, depth_of(p.d));
    s.each([&](T& value, int r, int c, int slot, int tile, int e) {
      const T score = value, weight = probability(score, known.reference[warp_row + r], known.log_total[warp_row + r]);
      const T tangent = score_tangent<Full>(window, score, t.x[slot][tile][e], bend.x[slot][tile][e], r, c);
      value = weight;
      t.x[slot][tile][e] = score == -kInfinity<T> ? 0 : tangent;
    });
    if (kRounds<S> && has_scores && may_be_first(p, block, place, row0, key0)) find_base(s, t, base, based);
    t.each([&](T& value, int, int, int slot, int tile, int e) {
      value = s.x[slot][tile][e] * (value - base.x[slot][e / 2]);
    });
    if (has_scores) {
      const Rows<T> sums = t.row_sums();
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL for (int h = 0; h < 2; ++h) excess.x[slot][h] += sums.x[slot][h];
      if (Full && p.rng != nullptr) apply_dropout(p, kept, t);
      add_weighted(acc, t, at.v, first, true);  // in two parts: Dt = rowsum(dO∘Ot) is to cancel with what is not rounded
    }
    if (at.c) {
      if (Full && p.rng != nullptr) apply_dropout(p, kept, s);
      add_weighted(acc, s, at.c, first, true);
    }
  }

  // Whether some row of the block may meet its first keys here.
  static METATTN_DEVICE bool may_be_first(const Params& p, const Block& block, const Place& place, int64_t row0,
                                          int64_t key0) {
    const int64_t last = smaller(row0 + kWarpRows * block.warps(), place.s.n) - 1;
    return p.mask || p.bias || key0 <= attended_keys(p, place.s, last).lo;
  }
  // base = the mean of T by these weights, of rows that had none before.
  static METATTN_DEVICE void find_base(const Fragment<T, kTiles>& weights, const Fragment<T, kTiles>& tangents, Rows<T>& base,
                                       Rows<T>& based) {
    Fragment<T, kTiles> terms = tangents;
    terms.each([&](T& value, int, int, int slot, int tile, int e) { value *= weights.x[slot][tile][e]; });
    const Rows<T> total = weights.row_sums(), sum = terms.row_sums();
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL for (int h = 0; h < 2; ++h) {
        const T mean = sum.x[slot][h] / total.x[slot][h];
        if (based.x[slot][h] != 0 || !is_finite(mean)) continue;
        base.x[slot][h] = mean;
        based.x[slot][h] = 1;
      }
  }

  // Ot of each row in acc, 0 where nothing is attended. Whether too many digits were lost.
  METATTN_DEVICE bool finish(const Params& p, const Place& place, int64_t mine, int warp_row, int first,
                             const Rows<T>& excess, Fragment<T, Columns>& acc) const {
    Fragment<T, Columns> terms;
    acc.each([&](T& value, int r, int c, int slot, int t, int e) {
      T term = 0;
      const int64_t i = place.s.q0 + mine + r;
      if (mine + r < place.s.n && first + c < p.dv && !known.idle(warp_row + r)) {
        const T o = in_two<S, T>(p.o, p.o_lo, offset_of(p.o, place.seq, place.head, i) + (first + c) * p.o.stride[3],
                              offset_of(p.o_lo, place.seq, place.head, i) + (first + c) * p.o_lo.stride[3]);
        term = excess.x[slot][e / 2] * o;
        value -= term;
      } else {
        value = 0;
      }
      terms.x[slot][t][e] = term;
    });
    const auto larger_magnitude = [](T a, T b) {
      const T magnitude = b < 0 ? -b : b;
      return magnitude > a ? magnitude : a;
    };
    const Rows<T> largest_term = terms.joined(0, larger_magnitude), largest = acc.joined(0, larger_magnitude);
    bool lossy = false;
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL for (int h = 0; h < 2; ++h)
        lossy |= largest_term.x[slot][h] > static_cast<T>(kCancellation) * largest.x[slot][h];
    return lossy;
  }
};

// ---- the gradients' row passes: dQ or, Second, dQt ----

template <class S, int Columns, int Tiles, bool Full, bool Second>
struct GradientRows {
  using Element = S;
  static constexpr bool kFull = Full;
  static constexpr int kTiles = Tiles;
  static constexpr int kSums = 4 * Columns + 12;
  using T = Compute<S>;
  QueryTiles<S> queries;
  KeyTiles<S, kTiles> keys;
  Statistics<T> known;

  METATTN_HD GradientRows(const Params& p, int warps, int stages, Pieces& pieces) {
    const int ld = leading<S>(p, 8 * Columns);
    queries = QueryTiles<S>::take(pieces, p, kWarpRows * warps, ld, true, Second);
    keys = KeyTiles<S, kTiles>::take(pieces, p, ld, static_cast<bool>(p.d_o), Second, stages);
    known = Statistics<T>::take(pieces, kWarpRows * warps);
  }

  METATTN_DEVICE void run(const Params& p, Block& block) const {
    Place place;
    int64_t row0;
    if (!place_rows(p, block, place, row0)) return;
    const int rows = kWarpRows * block.warps(), warp_row = kWarpRows * block.warp();
    const int64_t mine = row0 + warp_row;
    find_statistics<S>(p, place, known, warp_row, mine, Second, block.chunk() == 0);
    if (!p.grad_q && !p.own_bias && p.grad_slopes == nullptr) return;
    queries.start(block, p, place, row0, rows);
    block.template wait<0>();
    queries.round(block, rows);
    block.sync();
    queries.clear_idle(block, p, place, known, rows);
    Fragment<T, Columns> acc;
    Rows<T> lack = Rows<T>::filled(0), lack_b = Rows<T>::filled(0);
    Distances far;
    if (Full && p.grad_slopes != nullptr) far.start(p, place, known, warp_row, mine);
    Aside<T> aside = Aside<T>::template of<kSums>(p, block);
    const Rows<T> same = Rows<T>::filled(1);
    const bool shares = Full && p.grad_slopes != nullptr && block.chunk() == 0;
    acc.fill(0);
    const int first = 8 * Columns * block.chunk();
    const Range range = keys_of_rows(p, place, row0, rows);
    keys.template sweep<Full>(block, p, place, range, [&](const auto& tiles, int64_t key0, bool unclean) {
      const Window<false> window{p, place, mine, key0, reach_of(p, place.s)};
      Scores<T, kTiles> at;
      scores_of<Full>(at, window, queries.q, warp_row, tiles.k, depth_of(p.d));
      if (unclean) clear_unseen(block, tiles.seen, at.s, {tiles.k, tiles.b});
      cotangents_of<Second>(at, queries.d_o, warp_row, tiles.v, tiles.c, depth_of(p.dv));
      if constexpr (Second) {
        add_scores(at.tr, queries.a, warp_row, tiles.k, depth_of(p.d));
        add_scores(at.tr, queries.q, warp_row, tiles.b, depth_of(p.d));
      }
      differentiate<Full, Second>(at, window, known, warp_row);
      if (p.own_bias && block.chunk() == 0) store_bias(p, place, mine, key0, at.ds);
      if (shares) far.add(place, known, warp_row, mine, key0, at);
      if (!p.grad_q) return;
      add_weighted(acc, at.outer, tiles.k, first, p.twice);
      count_weights<S>(p, lack, at.outer);
      if constexpr (Second) add_weighted(acc, at.inner, tiles.b, first, p.twice);
      if (Second && p.t_k) count_weights<S>(p, lack_b, at.inner);
    }, [&](int visits) {
      if (!aside.is_due(visits)) return;
      aside.put(0, acc, same);
      aside.put(4 * Columns, lack, same);
      aside.put(4 * Columns + 2, lack_b, same);
      far.each([&](int element, Rows<T>& sum) { aside.put(4 * Columns + 4 + element, sum, same); });
      aside.begun = true;
    });
    aside.settle(0, acc, same);
    aside.settle(4 * Columns, lack, same);
    aside.settle(4 * Columns + 2, lack_b, same);
    far.each([&](int element, Rows<T>& sum) { aside.settle(4 * Columns + 4 + element, sum, same); });
    if (shares) store_shares(p, place, warp_row, mine, far);
    if (!p.grad_q) return;
    if constexpr (kRounds<S>) {
      using Keys = KeyTiles<S, kTiles>;
      const bool is_known = p.softcap == 0;
      if (is_known) add_known_sums(p, place, known, warp_row, mine, Second, lack);
      add_mean_key<S, Full>(p, block, place, keys, &Keys::k, range, row0, first, lack, acc);
      if (Second && p.t_k) {
        if (is_known) add_known_sums(p, place, known, warp_row, mine, false, lack_b);
        add_mean_key<S, Full>(p, block, place, keys, &Keys::b, range, row0, first, lack_b, acc);
      }
    }
    store_rows<S>(p.grad_q, offset_of(p.grad_q, place.seq, place.head, place.s.q0), mine, place.s.n, first, p.d,
               static_cast<T>(p.scale), acc);
  }

  // Sums over the keys of dS·(distance − the nearest), of P times the same, and of dS and P themselves.
  struct Distances {
    Rows<T> of_ds = Rows<T>::filled(0), of_p = Rows<T>::filled(0), ds = Rows<T>::filled(0), mass = Rows<T>::filled(0);
    Rows<T> nearest = Rows<T>::filled(0);
    METATTN_DEVICE void start(const Params& p, const Place& place, const Statistics<T>& known, int warp_row, int64_t row0) {
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL for (int h = 0; h < 2; ++h) {
          const int r = lane / 4 + 8 * h, at = warp_row + r;
          if (row0 + r >= place.s.n || known.idle(at)) continue;
          if (beside_sink(p, place, known.reference[at], known.log_total[at]) < T{0.5}) continue;
          nearest.x[slot][h] = static_cast<T>(nearest_distance(p, place.s, row0 + r));
        }
    }
    template <class F>
    METATTN_DEVICE void each(F f) {
      f(0, of_ds);
      f(2, of_p);
      f(4, ds);
      f(6, mass);
    }
    METATTN_DEVICE void add(const Place& place, const Statistics<T>& known, int warp_row, int64_t row0, int64_t key0,
                            const Scores<T, kTiles>& at) {
      Fragment<T, kTiles> weights = at.s, terms = at.ds;
      gain(ds, terms);
      weights.each([&](T& value, int r, int c, int slot, int t, int e) {
        value = probability(value, known.reference[warp_row + r], known.log_total[warp_row + r]);
        terms.x[slot][t][e] *= static_cast<T>(alibi_distance(place.s, row0 + r, key0 + c)) - nearest.x[slot][e / 2];
      });
      gain(of_ds, terms);
      gain(mass, weights);
      weights.each([&](T& value, int r, int c, int slot, int, int e) {
        value *= static_cast<T>(alibi_distance(place.s, row0 + r, key0 + c)) - nearest.x[slot][e / 2];
      });
      gain(of_p, weights);
    }
    static METATTN_DEVICE void gain(Rows<T>& sum, const Fragment<T, kTiles>& terms) {
      const Rows<T> more = terms.row_sums();
      METATTN_EACH_LANE(slot, lane)
        METATTN_UNROLL for (int h = 0; h < 2; ++h) sum.x[slot][h] += more.x[slot][h];
    }
  };
  // Each row's −Σ dS·distance. What dS lacks of its known sum, by an error of D or Dt, is spread over the keys as P is.
  METATTN_DEVICE void store_shares(const Params& p, const Place& place, int warp_row, int64_t mine, const Distances& far) const {
    Rows<T> sums = Rows<T>::filled(0);
    add_known_sums(p, place, known, warp_row, mine, Second, sums);
    METATTN_EACH_LANE(slot, lane)
      METATTN_UNROLL for (int h = 0; h < 2; ++h) {
        const int64_t i = mine + lane / 4 + 8 * h;
        if (lane % 4 != 0 || i >= place.s.n) continue;
        const T mass = far.mass.x[slot][h], nearest = far.nearest.x[slot][h], sum = sums.x[slot][h];
        const T share = (sum - far.ds.x[slot][h]) / mass;  // of what is lacking, a unit of P's
        const bool sink_has_most = known.idle(warp_row + static_cast<int>(i - mine)) || mass < T{0.5};
        *statistic_at<T>(p, kSlopeShare, place, i) =
            -(far.of_ds.x[slot][h] + (sink_has_most || !is_finite(share) ? 0 : share * far.of_p.x[slot][h]) +
              (nearest == 0 ? 0 : sum * nearest));
      }
  }

  static METATTN_DEVICE void store_bias(const Params& p, const Place& place, int64_t row0, int64_t key0,
                                        Fragment<T, kTiles>& ds) {
    ds.each([&](T& value, int r, int c, int, int, int) {
      if (row0 + r < place.s.n && key0 + c < place.s.m)
        store<T>(p.grad_bias_out,
                 offset_of(p.grad_bias_out, place.seq, place.head, row0 + r) + (key0 + c) * p.grad_bias_out.stride[3],
                 value);
    });
  }
};

}  // namespace metattn::cuda
