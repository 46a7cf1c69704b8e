// What the maps ask of an arithmetic A: blocks of rows and of keys as its products want them, the products, and sums of them.
// float and double have all of it in that type (packed.h), Pairs operands in bfloat16 and sums in float (packed_pairs.h). The
// maps know no difference.
#pragma once

#include <concepts>

#include "common_keys.h"
#include "packed.h"
#ifdef METATTN_PAIRS
#include "packed_pairs.h"
#endif

namespace metattn::METATTN_ISA {

// A block of rows: operand of scores and, summed_over, of sums over rows.
template <class A, class T = Compute<A>>
concept PacksRows = requires(PackedRows<A> rows, const PackedRows<A>& packed, Arena& arena, const Params& p, const View& view,
                             const Tile& tile, int64_t n, bool summed_over, const bool* dead, T* row) {
  { PackedRows<A>::take(arena, view, n, summed_over) } -> std::same_as<PackedRows<A>>;
  { static_cast<bool>(packed) };  // false where there is no such tensor
  // `dead` rows, and those that nobody may see, become zeros, so that what they hold can never leak; row: scratch
  rows.pack(p, view, tile, dead, row);
  // Σ over columns of a row times another, plain one: padded, or of `width` elements and no more
  { packed.dot(n, row) } -> std::same_as<T>;
  { packed.dot_bare(n, row) } -> std::same_as<T>;
};

// Key blocks of a unit: natural, operands of sums over keys, and turned, operands of scores, whichever is wanted.
template <class A, class T = Compute<A>>
concept PacksKeys = requires(PackedKeys<A> keys, const PackedKeys<A>& packed, Arena& arena, const View& view, int64_t n,
                             bool natural, bool turned, T* row, bool* strange) {
  { PackedKeys<A>::take(arena, view, n, n, natural, turned) } -> std::same_as<PackedKeys<A>>;
  { static_cast<bool>(packed) };
  // (view, seq, kv_head, first, keys, block, row, strange): marks keys that hold an infinity or a NaN; whether there are any
  { keys.load_keys(view, n, n, n, n, n, row, strange) } -> std::same_as<bool>;
  keys.erase(n, n);   // (block, key) of what was loaded
  keys.finish(n, n);  // (block, keys): makes of what was loaded what is wanted
};

// Products of a tile of weights [kRows][kKeys], summed over its keys.
template <class A, class T = Compute<A>>
concept SumsWeighted =
    requires(const WeightedSums<A>& by, const PackedRows<A>& rows, const PackedKeys<A>& keys, Arena& arena, const Params& p,
             const Tile& tile, int64_t n, bool output, T* weights, Vec<T> weight, Vec<T>& added) {
      multiply_scores(tile, rows, keys, n, weights, output);  // C [kRows][kKeys] (+)= rows·keysᵀ of a tile
      { WeightedSums<A>::take(arena, p, output) } -> std::same_as<WeightedSums<A>>;  // output: the sums are O
      { by.in_two_parts() } -> std::same_as<WeightedSums<A>>;  // what rounding the weights lost is multiplied, too
      { WeightedSums<A>::kRounds } -> std::convertible_to<bool>;
      { by.knows_sums() } -> std::same_as<bool>;  // weights are in one part, and over all keys sum to what is known
  // sums [kRows][padded(width)] += weights·keys; lacking [kRows]: of CommonKeys, or null
      by.over_keys(tile, weights, keys, n, weights, weights);
      // the same of weights put one by one, from column j of row r on; `added` gains by how much they are multiplied as larger
      by.put(weights, n, n, weight, added);
      by.over_keys_put(tile, weights, keys, n, weights);
      WeightedSums<A>::finish_over_keys(weights, n, n);  // (sums, rows, width): then they are in their place
    };

// Sums over rows for each key of a unit, as SumsOfKeys holds them; terms: most rows of a sum.
template <class A, class T = Compute<A>>
concept SumsOverRows = std::derived_from<KeySums<A>, SumsOfKeys<T>> &&
                       requires(KeySums<A> sums, const WeightedSums<A>& by, const PackedRows<A>& rows, Arena& arena,
                                const Tile& tile, int64_t n, bool flag, const T* weights) {
                         { KeySums<A>::take(arena, flag, n, n, n) } -> std::same_as<KeySums<A>>;
                         sums.add(tile, weights, by, rows, n, flag);  // flag: weights cancel what all rows may share
                       };

// Sums over keys, whose weights cancel what all keys share: begin(…) before a block of rows, lacking [kRows] for over_keys.
template <class A, class T = Compute<A>>
concept CompletesKeys = requires(CommonKeys<A> common, const CommonKeys<A>& known, Arena& arena, const Params& p,
                                 const View& view, const Tile& tile, int64_t n, bool wanted, const bool* dead, T* row) {
  { CommonKeys<A>::take(arena, wanted, view, n) } -> std::same_as<CommonKeys<A>>;
  common.begin(p, view, tile, dead, row);  // row: scratch
  { common.lacking } -> std::convertible_to<T*>;
  // (rows, known, sums): sums [kRows][padded(width)] += what is lacking; known [kRows]: what a row's weights sum to, or null
  known.finish(n, row, wanted, row);
};

template <class A>
concept Computes = PacksRows<A> && PacksKeys<A> && SumsWeighted<A> && SumsOverRows<A> && CompletesKeys<A>;
static_assert(Computes<float> && Computes<double>);
#ifdef METATTN_PAIRS
static_assert(Computes<Pairs>);
#endif

}  // namespace metattn::METATTN_ISA
