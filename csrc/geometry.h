// Which keys a query attends to, by position alone. Host and device.
#pragma once

#include "params.h"

namespace metattn {

// One sequence: where its rows and keys start in memory, and how many there are.
struct Sequence {
  int64_t q0, n, k0, m;
};

static METATTN_HD Sequence sequence(const Params& p, int64_t seq) {
  if (p.cu_q == nullptr) return {0, p.n, 0, p.m};
  const int64_t q0 = p.cu_q[seq], k0 = p.cu_k[seq];
  // a GPU's offsets are not read on the host: nothing is longer than it was said to be
  const int64_t n = p.cu_q[seq + 1] - q0, m = p.cu_k[seq + 1] - k0;
  return {q0, n < p.n ? n : p.n, k0, m < p.m ? m : p.m};
}

// Rows of a head: of all sequences of a packed problem. Where those of a split of the keys leave their sums.
static inline int64_t split_rows(const Params& p) { return p.cu_q == nullptr ? p.n : p.cu_q[p.batch]; }
static inline int64_t split_row(const Params& p, int64_t split, int64_t seq, int64_t head, int64_t row) {
  const int64_t batch = p.cu_q == nullptr ? p.batch : 1;
  return ((split * batch + (p.cu_q == nullptr ? seq : 0)) * p.heads + head) * split_rows(p) + row;
}

struct Range {
  int64_t lo, hi;  // lo <= j < hi
};

// A thread packs so many keys at a time, and a running sum has about so many terms before it is put aside. Float sums of
// more terms lose digits; packed keys of more would outgrow the caches, and be as many copies as there are threads.
constexpr int64_t kSpan = 1024;

// Keys that position alone leaves to row i; both ends never decrease as i grows. Empty: lo >= hi.
static METATTN_HD Range attended_keys(const Params& p, const Sequence& s, int64_t i) {
  const int64_t offset = p.causal == Causal::top_left ? 0 : s.m - s.n;
  int64_t lo = 0, hi = s.m;
  if (p.causal != Causal::none && i + offset + 1 < hi) hi = i + offset + 1;
  if (p.window_right >= 0 && i + offset + p.window_right + 1 < hi) hi = i + offset + p.window_right + 1;
  if (p.window_left >= 0 && i + offset - p.window_left > lo) lo = i + offset - p.window_left;
  return {lo, hi > 0 ? hi : 0};
}

enum class Cover { empty, partial, full };

// How position covers the tile rows [row0, row0 + rows) x keys [key0, key0 + keys).
static METATTN_HD Cover tile_cover(const Params& p, const Sequence& s, int64_t row0, int64_t rows, int64_t key0, int64_t keys) {
  const Range first = attended_keys(p, s, row0), last = attended_keys(p, s, row0 + rows - 1);
  if (key0 + keys <= first.lo || key0 >= last.hi) return Cover::empty;
  return last.lo <= key0 && key0 + keys <= first.hi ? Cover::full : Cover::partial;
}

// ALiBi's distance |i + M - N - j|.
static METATTN_HD int64_t alibi_distance(const Sequence& s, int64_t i, int64_t j) {
  const int64_t delta = i + s.m - s.n - j;
  return delta < 0 ? -delta : delta;
}

// What dS, and dSt, sum to over the keys is as small as what a sink leaves of a row's weight. With a cotangent of lse it is a
// difference of large numbers (docs/math.md, "What all keys share"): it counts as unknown where less than kLeastKnown is
// left, and distances are counted from 0 where less than half is.
static METATTN_HD bool is_difference(const Params& p) { return p.sinks && p.d_lse; }
constexpr double kLeastKnown = 1.0 / 4096, kLeastFar = 0.5;

// The least that position leaves to row i: sums of dS·distance are taken around it, for a row's dS sum to little.
static METATTN_HD int64_t nearest_distance(const Params& p, const Sequence& s, int64_t i) {
  const Range range = attended_keys(p, s, i);
  const int64_t own = i + s.m - s.n;
  if (range.lo >= range.hi) return 0;
  return own < range.lo ? range.lo - own : own < range.hi ? 0 : own - (range.hi - 1);
}

}  // namespace metattn
