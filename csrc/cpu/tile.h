// Tiles of one (sequence, head): packing, scores with every option, dropout. Each option is written here once;
// the four maps only combine these helpers (docs/math.md has the formulas).
#pragma once

#include "gemm.h"
#include "geometry.h"
#include "lse.h"
#include "params.h"
#include "philox.h"

namespace metattn::METATTN_ISA {

// Tile size: query rows × keys. Keys are 64 so that a set of them is one machine word.
constexpr int64_t kRows = 96;
constexpr int64_t kKeys = 64;

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }
static inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
template <class T>
static inline int64_t padded(int64_t width) {
  return round_up(width, kPanel<T>);
}

// Hands out aligned pieces of a thread's scratch memory; over a null base it only counts them.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
    return piece;
  }
};

// ---- elements of the four dtypes ----

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
static inline To bit_cast(From x) {
  To y;
  static_assert(sizeof(To) == sizeof(From));
  memcpy(&y, &x, sizeof(To));
  return y;
}

template <class T>
static inline T widen(double x) { return static_cast<T>(x); }
template <class T>
static inline T widen(float x) { return static_cast<T>(x); }
template <class T>
static inline T widen(BFloat16 x) {
  return static_cast<T>(bit_cast<float>(static_cast<uint32_t>(x.bits) << 16));
}
template <class T>
static inline T widen(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  // 2^112 moves the exponent's bias, denormals included; infinities and NaN keep an exponent of ones
  const float value = bit_cast<float>(magnitude) * bit_cast<float>(0x77800000u);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return static_cast<T>(bit_cast<float>(bit_cast<uint32_t>(value) | special | sign));
}

template <class To>
struct Narrow {
  template <class T>
  static To from(T x) { return static_cast<To>(x); }
};
template <>
struct Narrow<BFloat16> {
  template <class T>
  static BFloat16 from(T value) {
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fc0};
    return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
  }
};
template <>
struct Narrow<Float16> {
  template <class T>
  static Float16 from(T value) {
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65,520 and above round to inf
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the rounded denormal in the last bits
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      return {static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1);
    return {static_cast<uint16_t>(sign | (rounded >> 13))};
  }
};

template <class T, class From>
static inline void load_row(const From* source, int64_t stride, int64_t count, T* row) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) row[i] = widen<T>(source[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) row[i] = widen<T>(source[i * stride]);
  }
}
template <class To, class T>
static inline void store_row(const T* row, int64_t count, T factor, int64_t stride, To* target) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) target[i] = Narrow<To>::from(row[i] * factor);
  } else {
    for (int64_t i = 0; i < count; ++i) target[i * stride] = Narrow<To>::from(row[i] * factor);
  }
}

// row[i] = view[offset + i·stride] for i < count.
template <class T>
static void load_row(const View& view, int64_t offset, int64_t stride, int64_t count, T* row) {
  switch (view.dtype) {
    case DType::f64: return load_row(reinterpret_cast<const double*>(view.data) + offset, stride, count, row);
    case DType::f32: return load_row(reinterpret_cast<const float*>(view.data) + offset, stride, count, row);
    case DType::bf16: return load_row(reinterpret_cast<const BFloat16*>(view.data) + offset, stride, count, row);
    case DType::f16: return load_row(reinterpret_cast<const Float16*>(view.data) + offset, stride, count, row);
  }
}
// view[offset + i·stride] = factor·row[i] for i < count.
template <class T>
static void store_row(const View& view, int64_t offset, int64_t stride, int64_t count, T factor, const T* row) {
  switch (view.dtype) {
    case DType::f64: return store_row(row, count, factor, stride, reinterpret_cast<double*>(view.data) + offset);
    case DType::f32: return store_row(row, count, factor, stride, reinterpret_cast<float*>(view.data) + offset);
    case DType::bf16: return store_row(row, count, factor, stride, reinterpret_cast<BFloat16*>(view.data) + offset);
    case DType::f16: return store_row(row, count, factor, stride, reinterpret_cast<Float16*>(view.data) + offset);
  }
}

template <class T>
static inline bool is_finite(T x) {
  return x - x == 0;
}

// Row `row` of an output in its dtype, times a factor, and what rounding lost of it in `low`, where that is kept.
template <class T>
static void store_row_in_two(const View& high, const View& low, int64_t high_at, int64_t low_at, int64_t count,
                             T factor, T* row, T* scratch) {
  store_row(high, high_at, high.stride[3], count, factor, row);
  if (!low) return;
  load_row(high, high_at, high.stride[3], count, scratch);
  // where float16 overflowed, low (bfloat16) is the value itself
  for (int64_t c = 0; c < count; ++c) row[c] = row[c] * factor - (is_finite(scratch[c]) ? scratch[c] : 0);
  store_row(low, low_at, low.stride[3], count, T{1}, row);
}

static inline int64_t offset_of(const View& view, int64_t seq, int64_t head, int64_t row) {
  return seq * view.stride[0] + head * view.stride[1] + row * view.stride[2];
}
template <class T>
static inline T load_scalar(const View& view, int64_t offset) {
  T value;
  load_row(view, offset, 1, 1, &value);
  return value;
}
static inline double* double_at(const View& view, int64_t seq, int64_t head, int64_t row) {
  return reinterpret_cast<double*>(view.data) + offset_of(view, seq, head, row);
}

template <class T>
static inline bool finite_row(const T* row, int64_t count) {
  using Word = Bits<T>;
  using Scalar = decltype(Word{}[0] + 0);
  constexpr Scalar exponent = sizeof(T) == 4 ? static_cast<Scalar>(0x7f800000) : static_cast<Scalar>(0x7ff0000000000000);
  Scalar bad = 0;
  for (int64_t i = 0; i < count; ++i) bad |= (bit_cast<Scalar>(row[i]) & exponent) == exponent;
  return bad == 0;
}

// ---- masks by position and by tensor ----

static inline bool mask_keeps(const Params& p, int64_t seq, int64_t head, int64_t i, int64_t j) {
  return !p.mask || p.mask.data[offset_of(p.mask, seq, head, i) + j * p.mask.stride[3]] != 0;
}

template <class T>
static bool attends(const Params& p, const Sequence& s, int64_t seq, int64_t head, int64_t i, int64_t j) {
  const Range range = attended_keys(p, s, i);
  return j >= range.lo && j < range.hi && mask_keeps(p, seq, head, i, j) &&
         (!p.bias || load_scalar<T>(p.bias, offset_of(p.bias, seq, head, i) + j * p.bias.stride[3]) != -kInfinity<T>);
}

// Whether a query attends to nothing. Asked for rows that hold an infinity or NaN and have a sink: without one, the
// log-sum-exp tells.
template <class T>
static bool dead_row(const Params& p, const Sequence& s, int64_t seq, int64_t head, int64_t i) {
  for (int64_t j = 0; j < s.m; ++j)
    if (attends<T>(p, s, seq, head, i, j)) return false;
  return true;
}

// Whether no query of any head that reads this key attends to it. Asked for keys that hold an infinity or NaN.
template <class T>
static bool dead_key(const Params& p, int64_t seq, int64_t kv_head, const Sequence& s, int64_t j) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head)
    for (int64_t i = 0; i < s.n; ++i)
      if (attends<T>(p, s, seq, head, i, j)) return false;
  return true;
}

// ---- a tile's place ----

struct Tile {
  int64_t seq, head, kv_head;
  Sequence s;
  int64_t row0, rows;  // within the sequence
  int64_t key0, keys;
  int64_t cols;        // keys rounded up to whole vectors: what elementwise passes walk
  bool partial;        // position masks some of it
};

template <class T>
static inline void place_keys(const Params& p, Tile& tile, int64_t key0, int64_t key_end) {
  tile.key0 = key0;
  tile.keys = smaller(kKeys, key_end - key0);
  tile.cols = round_up(tile.keys, kLanes<T>);
  tile.partial = tile_cover(p, tile.s, tile.row0, tile.rows, tile.key0, tile.keys) != Cover::full;
}

// ---- packing ----

// A block of rows as panels [width / kPanel][kRows][kPanel], times a factor: operand A (panels()) and operand B of a
// product over rows. `dead` rows (bit set) become zeros, so that what they hold can never leak.
template <class T>
struct PackedRows {
  T* data = nullptr;
  int64_t width = 0;

  static PackedRows take(Arena& arena, const View& view, int64_t width) {
    PackedRows packed;
    packed.width = width;
    if (view) packed.data = arena.take<T>(kRows * padded<T>(width));
    return packed;
  }
  explicit operator bool() const { return data != nullptr; }
  Operand<T> operand() const { return panels(data, kRows); }
  static constexpr int64_t panel_stride() { return kRows * kPanel<T>; }

  void pack(const Params& p, const View& view, const Tile& tile, T factor, const bool* dead, T* row) {
    const int64_t wide = padded<T>(width);
    for (int64_t c = width; c < wide; ++c) row[c] = 0;
    for (int64_t r = 0; r < tile.rows; ++r) {
      if (dead != nullptr && dead[r]) {
        for (int64_t c = 0; c < width; ++c) row[c] = 0;
      } else {
        load_row(view, offset_of(view, tile.seq, tile.head, tile.s.q0 + tile.row0 + r), view.stride[3], width, row);
        if (p.sinks && !finite_row(row, width) && dead_row<T>(p, tile.s, tile.seq, tile.head, tile.row0 + r))
          for (int64_t c = 0; c < width; ++c) row[c] = 0;
        if (factor != 1)
          for (int64_t c = 0; c < width; ++c) row[c] *= factor;
      }
      for (int64_t c = 0; c < wide; c += kPanel<T>) {
        store(data + c * kRows + r * kPanel<T>, load(row + c));
        store(data + c * kRows + r * kPanel<T> + kLanes<T>, load(row + c + kLanes<T>));
      }
    }
  }
  // Σ over columns of this row times `other`, a padded plain row.
  T dot(int64_t r, const T* other) const {
    Vec<T> total = {};
    for (int64_t c = 0; c < padded<T>(width); c += kPanel<T>) {
      const T* mine = data + c * kRows + r * kPanel<T>;
      total += load(mine) * load(other + c) + load(mine + kLanes<T>) * load(other + c + kLanes<T>);
    }
    return sum<T>(total);
  }
};

// Key blocks of a unit, each as panels over the width (natural: [width / kPanel][kKeys][kPanel], for products over
// keys) and as panels over the keys (turned: [kKeys / kPanel][width][kPanel], for scores), whichever is wanted.
template <class T>
struct PackedKeys {
  T* natural = nullptr;
  T* turned = nullptr;
  int64_t width = 0;

  static PackedKeys take(Arena& arena, const View& view, int64_t width, int64_t blocks, bool natural, bool turned) {
    PackedKeys packed;
    packed.width = width;
    if (view && natural) packed.natural = arena.take<T>(blocks * kKeys * padded<T>(width));
    if (view && turned) packed.turned = arena.take<T>(blocks * kKeys * width);
    return packed;
  }
  explicit operator bool() const { return natural != nullptr || turned != nullptr; }
  const T* natural_block(int64_t block) const { return natural + block * kKeys * padded<T>(width); }
  const T* turned_block(int64_t block) const { return turned + block * kKeys * width; }
  static constexpr int64_t natural_stride() { return kKeys * kPanel<T>; }
  int64_t turned_stride() const { return width * kPanel<T>; }

  void put(int64_t block, int64_t key, const T* row) {
    if (natural != nullptr) {
      T* target = natural + block * kKeys * padded<T>(width) + key * kPanel<T>;
      for (int64_t c = 0; c < padded<T>(width); c += kPanel<T>) {
        store(target + c * kKeys, load(row + c));
        store(target + c * kKeys + kLanes<T>, load(row + c + kLanes<T>));
      }
    }
    if (turned != nullptr) {
      T* target = turned + block * kKeys * width + (key / kPanel<T>)*(width * kPanel<T>) + key % kPanel<T>;
      for (int64_t c = 0; c < width; ++c) target[c * kPanel<T>] = row[c];
    }
  }
  // Packs keys [key0, key0 + keys) of a sequence; the rest of the block is zeros. Returns the set of keys that
  // hold an infinity or a NaN.
  uint64_t pack(const View& view, int64_t seq, int64_t kv_head, int64_t first, int64_t keys, int64_t block, T* row) {
    uint64_t strange = 0;
    for (int64_t c = width; c < padded<T>(width); ++c) row[c] = 0;
    for (int64_t key = 0; key < keys; ++key) {
      load_row(view, offset_of(view, seq, kv_head, first + key), view.stride[3], width, row);
      if (!finite_row(row, width)) strange |= uint64_t{1} << key;
      put(block, key, row);
    }
    if (keys < kKeys) {
      for (int64_t c = 0; c < width; ++c) row[c] = 0;
      for (int64_t key = keys; key < kKeys; ++key) put(block, key, row);
    }
    return strange;
  }
};

// Packs one block of keys for all the given tensors, and zeroes the keys that nobody may see.
template <class T, int Count>
static void pack_key_block(const Params& p, int64_t seq, int64_t kv_head, const Sequence& s, int64_t key0, int64_t keys,
                           int64_t block, PackedKeys<T>* const (&packed)[Count], const View* const (&views)[Count],
                           T* row) {
  uint64_t strange = 0;
  for (int t = 0; t < Count; ++t)
    if (*packed[t]) strange |= packed[t]->pack(*views[t], seq, kv_head, s.k0 + key0, keys, block, row);
  for (; strange != 0; strange &= strange - 1) {
    const int64_t key = __builtin_ctzll(strange);
    if (!dead_key<T>(p, seq, kv_head, s, key0 + key)) continue;
    for (int t = 0; t < Count; ++t) {
      if (!*packed[t]) continue;
      for (int64_t c = 0; c < padded<T>(packed[t]->width); ++c) row[c] = 0;
      packed[t]->put(block, key, row);
    }
  }
}

// ---- scores ----

// Where biased scores stop, so that the log-sum-exp can hold what it must (lse.h).
template <class T>
constexpr T kScoreFloor = sizeof(T) == sizeof(float) ? -kInfinity<T> : static_cast<T>(-kLarge<T>);

// A row of a [seq, head, row, key] view under a tile; columns past its keys become 0.
template <class T>
static void load_bias_row(const View& bias, const Tile& tile, int64_t r, T* row) {
  load_row(bias, offset_of(bias, tile.seq, tile.head, tile.row0 + r) + tile.key0 * bias.stride[3], bias.stride[3],
           tile.keys, row);
  for (int64_t j = tile.keys; j < tile.cols; ++j) row[j] = 0;
}

template <class T>
static void cap_row(T* s, T* tanh_row, int64_t cols, T cap) {
  for (int64_t j = 0; j < cols; j += kLanes<T>) {
    const Vec<T> t = tanh_of<T>(load(s + j) / cap);
    store(tanh_row + j, t);
    store(s + j, t * cap);
  }
}

// S [kRows][kKeys] of a tile: scale·QKᵀ (scale is folded into q), then softcap, bias, ALiBi, and −inf where masked.
// tanh_tile receives tanh(R / c) where there is a softcap; row is scratch.
template <class T>
static void scores(const Params& p, const Tile& tile, const PackedRows<T>& q, const PackedKeys<T>& k, int64_t block,
                   T* s, T* tanh_tile, T* row) {
  gemm(tile.rows, tile.keys, p.d, q.operand(), k.turned_block(block), k.turned_stride(), s, kKeys, false);
  if (p.softcap == 0 && !p.bias && !p.slopes && !p.mask && !tile.partial && tile.cols == tile.keys) return;
  const T slope = p.slopes ? load_scalar<T>(p.slopes, tile.seq * p.slopes.stride[0] + tile.head * p.slopes.stride[1]) : 0;
  for (int64_t r = 0; r < tile.rows; ++r) {
    T* s_row = s + r * kKeys;
    const int64_t i = tile.row0 + r;
    if (p.softcap != 0) cap_row<T>(s_row, tanh_tile + r * kKeys, tile.cols, static_cast<T>(p.softcap));
    if (p.bias) {
      load_bias_row(p.bias, tile, r, row);
      // a select, not a sum, where the bias is −inf: it must hide NaN as a mask does
      for (int64_t j = 0; j < tile.keys; ++j) {
        const T biased = s_row[j] + row[j];
        s_row[j] = row[j] == -kInfinity<T> ? row[j] : (biased < kScoreFloor<T> ? kScoreFloor<T> : biased);
      }
    }
    if (p.slopes)
      for (int64_t j = 0; j < tile.keys; ++j)
        s_row[j] -= slope * static_cast<T>(alibi_distance(tile.s, i, tile.key0 + j));
    if (p.mask) {
      const char* keep = p.mask.data + offset_of(p.mask, tile.seq, tile.head, i) + tile.key0 * p.mask.stride[3];
      if (p.mask.stride[3] == 1) {
        for (int64_t j = 0; j < tile.keys; ++j) s_row[j] = keep[j] ? s_row[j] : -kInfinity<T>;
      } else {
        for (int64_t j = 0; j < tile.keys; ++j) s_row[j] = keep[j * p.mask.stride[3]] ? s_row[j] : -kInfinity<T>;
      }
    }
    const Range range = tile.partial ? attended_keys(p, tile.s, i) : Range{tile.key0, tile.key0 + tile.keys};
    const int64_t lo = smaller(range.lo - tile.key0, tile.cols);
    for (int64_t j = 0; j < lo; ++j) s_row[j] = -kInfinity<T>;
    for (int64_t j = larger(0, smaller(range.hi - tile.key0, tile.keys)); j < tile.cols; ++j) s_row[j] = -kInfinity<T>;
  }
}

// Z [kRows][kKeys]: 0 where dropout drops, 1/(1 − p) where it keeps.
template <class T>
static void dropout_tile(const Params& p, const Tile& tile, T* z) {
  const uint64_t seed = static_cast<uint64_t>(p.rng[tile.seq * p.rng_stride[0]]);
  const uint32_t batch = static_cast<uint32_t>(p.rng[tile.seq * p.rng_stride[0] + p.rng_stride[1]]);
  const T keep = static_cast<T>(p.dropout_keep_scale);
  for (int64_t r = 0; r < tile.rows; ++r) {
    for (int64_t j = 0; j < tile.cols; j += 4) {
      const PhiloxWords words = philox(seed, static_cast<uint32_t>((tile.key0 + j) / 4),
                                       static_cast<uint32_t>(tile.row0 + r), static_cast<uint32_t>(tile.head), batch);
      for (int w = 0; w < 4; ++w) z[r * kKeys + j + w] = words.w[w] >= p.dropout_threshold ? keep : 0;
    }
  }
}

// ---- row statistics ----

// log-sum-exp in two parts, so that P = exp((S − high) − low) keeps its digits where |S| is large. A row that attends
// to nothing is dead: high = +inf makes its P exactly 0.
template <class T>
struct LogSumExp {
  T high[kRows], low[kRows];
  bool dead[kRows];

  void load(const Params& p, const Tile& tile) {
    for (int64_t r = 0; r < tile.rows; ++r) {
      const double lse = *double_at(p.lse, tile.seq, tile.head, tile.s.q0 + tile.row0 + r);
      dead[r] = lse == -kInfinity<double>;
      const SplitLse<T> split = split_lse<T>(lse);
      high[r] = dead[r] ? kInfinity<T> : split.high;
      low[r] = dead[r] ? 0 : split.low;
    }
  }
};

template <class T>
static inline Vec<T> probability(const LogSumExp<T>& lse, int64_t r, const T* s) {
  return exp((metattn::METATTN_ISA::load(s) - lse.high[r]) - lse.low[r]);
}

// A row of a tensor that is kept in two parts: without the lost digits, D = rowsum(dO∘O) would be off by as much as
// the dP − D of a sharply peaked row is large.
template <class T>
static void load_row_in_two(const View& high, const View& low, int64_t seq, int64_t head, int64_t i, int64_t first,
                            int64_t count, T* row, T* scratch) {
  load_row(high, offset_of(high, seq, head, i) + first * high.stride[3], high.stride[3], count, row);
  if (!low) return;
  load_row(low, offset_of(low, seq, head, i) + first * low.stride[3], low.stride[3], count, scratch);
  for (int64_t c = 0; c < count; ++c) row[c] = (is_finite(row[c]) ? row[c] : 0) + scratch[c];
}

// Σ o∘cotangent over the columns of each row, less the cotangent of lse: D of docs/math.md, or Dt with o's tangent
// and none. `row` and `scratch` are padded<T>(dv) long. Dead rows get 0.
template <class T>
static void row_dots(const View& values, const View& low, const View& minus, const Tile& tile,
                     const PackedRows<T>& d_o, const bool* dead, int64_t dv, T* row, T* scratch, T* result) {
  for (int64_t r = 0; r < tile.rows; ++r) {
    result[r] = 0;
    if (dead[r]) continue;
    const int64_t i = tile.s.q0 + tile.row0 + r;
    if (d_o) {
      for (int64_t c = dv; c < padded<T>(dv); ++c) row[c] = 0;
      load_row_in_two(values, low, tile.seq, tile.head, i, 0, dv, row, scratch);
      result[r] = d_o.dot(r, row);
    }
    if (minus) result[r] -= static_cast<T>(*double_at(minus, tile.seq, tile.head, i));
  }
}

}  // namespace metattn::METATTN_ISA
