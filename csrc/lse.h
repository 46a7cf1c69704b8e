// The log-sum-exp of a row as it travels between the maps: one float64. Host and device.
#pragma once

#include <cstdint>
#include <cstring>

#include "geometry.h"

namespace metattn {

// P = exp((S − high) − low): what the kernels need, to the last digit, however large the scores are.
template <class T>
struct SplitLse {
  T high, low;
};

// A float64 holds top + log(total) to the digits that a compute type has, up to some size of top. The lowest float32 is
// a common mask, and a row of nothing else would lose log(total), and with it the derivatives. From `kLarge` on the
// largest score itself is kept, and log(total), which lies in [0, 128), goes into the last 29 bits. float32 scores leave
// those free. Biased float64 scores do not, and stop at −kLarge, which does.
template <class T>
constexpr double kLarge = 0;
template <>
constexpr double kLarge<float> = 1073741824.0;  // 2^30
template <>
constexpr double kLarge<double> = 1099511627776.0;  // 2^40
template <class T>
constexpr bool kPositiveToo = sizeof(T) == sizeof(float);

constexpr uint64_t kLowBits = (uint64_t{1} << 29) - 1;
constexpr double kLowUnit = 1.0 / (1 << 22);

template <class T>
static METATTN_HD bool is_large(double x) {
  constexpr double most = 3.5e38;
  return (x <= -kLarge<T> && x >= -most) || (kPositiveToo<T> && x >= kLarge<T> && x <= most);
}

template <class T>
static METATTN_HD double join_lse(T top, double log_total) {
  double joined = static_cast<double>(top);
  if (!is_large<T>(joined) || !(log_total < 128)) return joined + log_total;  // NaN stays NaN
  uint64_t bits;
  memcpy(&bits, &joined, sizeof bits);
  bits |= static_cast<uint64_t>(log_total / kLowUnit + 0.5) & kLowBits;
  memcpy(&joined, &bits, sizeof joined);
  return joined;
}

template <class T>
static METATTN_HD SplitLse<T> split_lse(double lse) {
  if (!is_large<T>(lse)) {
    const T high = static_cast<T>(lse);
    return {high, static_cast<T>(lse - static_cast<double>(high))};
  }
  uint64_t bits;
  memcpy(&bits, &lse, sizeof bits);
  const T low = static_cast<T>(static_cast<double>(bits & kLowBits) * kLowUnit);
  bits &= ~kLowBits;
  memcpy(&lse, &bits, sizeof lse);
  return {static_cast<T>(lse), low};
}

}  // namespace metattn
