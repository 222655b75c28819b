// Dot products of float rows with rows of weights, float or bfloat16, on a tile of sums that stays
// in registers: four rows of weights by a few tokens. Both are read as they lie.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/ahead.h"
#include "cpu/count.h"
#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

#if defined(__AVX512F__)
constexpr int kDotBytes = 64;
constexpr int kDotTokens = 6;  // 24 sums, 4 rows of weights, an activation: of 32 registers
#elif defined(__AVX2__)
constexpr int kDotBytes = 32;
constexpr int kDotTokens = 2;  // 8 sums, 4 rows of weights, an activation: of 16
#else
constexpr int kDotBytes = 16;
constexpr int kDotTokens = 2;
#endif
constexpr int kDotFeatures = 4;
constexpr int kDotLanes = kDotBytes / sizeof(float);

typedef float FloatVector __attribute__((vector_size(kDotBytes)));
typedef std::uint32_t BitsVector __attribute__((vector_size(kDotBytes)));
typedef std::uint16_t HalfBitsVector __attribute__((vector_size(kDotBytes / 2)));

inline FloatVector load_vector(const float* from) {
  FloatVector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline FloatVector load_vector(const BFloat16* from) {
  HalfBitsVector bits;
  std::memcpy(&bits, from, sizeof bits);
  const BitsVector wide = __builtin_convertvector(bits, BitsVector) << 16;
  FloatVector vector;
  std::memcpy(&vector, &wide, sizeof vector);
  return vector;
}

// The first n numbers, then zeros.
template <class Number>
inline FloatVector load_part(const Number* from, std::int64_t n) {
  Number part[kDotLanes] = {};
  std::memcpy(part, from, n * sizeof(Number));
  return load_vector(part);
}

template <int n>
struct FloatsOf {
  typedef float type __attribute__((vector_size(n * sizeof(float))));
};

// The sum of n numbers: their upper half is added to the lower one until two are left.
template <int n = kDotLanes>
inline float sum_lanes(const typename FloatsOf<n>::type& vector) {
  if constexpr (n == 2) {
    return vector[0] + vector[1];
  } else {
    typename FloatsOf<n / 2>::type lower, upper;
    std::memcpy(&lower, &vector, sizeof lower);
    std::memcpy(&upper, reinterpret_cast<const char*>(&vector) + sizeof lower, sizeof upper);
    return sum_lanes<n / 2>(lower + upper);
  }
}

// sums[t * stride + f] = sum_d x[t][d] * rows[f][d].
template <int tokens, class Weight>
inline void float_dots(const float* const* x, const Weight* const* rows, std::int64_t width,
                       float* sums, std::int64_t stride) {
  FloatVector acc[tokens][kDotFeatures];
#pragma GCC unroll 6
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int f = 0; f < kDotFeatures; ++f) acc[t][f] = FloatVector{};
  }
  const std::int64_t whole = width / kDotLanes * kDotLanes;
  if (tokens <= kFewTokens) {
    constexpr std::int64_t kLine = 64 / sizeof(Weight);
#pragma GCC unroll 4
    for (int f = 0; f < kDotFeatures; ++f) {
      for (std::int64_t d = 0; d < whole; d += kDotLanes) {
        if (kDotLanes >= kLine || d % kLine == 0) fetch_ahead(rows[f] + d);
        const FloatVector w = load_vector(rows[f] + d);
#pragma GCC unroll 2
        for (int t = 0; t < tokens; ++t) acc[t][f] += w * load_vector(x[t] + d);
      }
    }
  } else {
    for (std::int64_t d = 0; d < whole; d += kDotLanes) {
      FloatVector w[kDotFeatures];
#pragma GCC unroll 4
      for (int f = 0; f < kDotFeatures; ++f) w[f] = load_vector(rows[f] + d);
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const FloatVector x_t = load_vector(x[t] + d);
#pragma GCC unroll 4
        for (int f = 0; f < kDotFeatures; ++f) acc[t][f] += w[f] * x_t;
      }
    }
  }
  if (whole < width) {
    FloatVector w[kDotFeatures];
    for (int f = 0; f < kDotFeatures; ++f) w[f] = load_part(rows[f] + whole, width - whole);
#pragma GCC unroll 6
    for (int t = 0; t < tokens; ++t) {
      const FloatVector x_t = load_part(x[t] + whole, width - whole);
#pragma GCC unroll 4
      for (int f = 0; f < kDotFeatures; ++f) acc[t][f] += w[f] * x_t;
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int f = 0; f < kDotFeatures; ++f) sums[t * stride + f] = sum_lanes(acc[t][f]);
  }
}

// The same for a token count that is known at run time only, up to kDotTokens. Not inline: each of
// the loops that call it would be compiled with a copy of all counts, for minutes in all.
template <class Weight>
[[gnu::noinline]] void float_dots(int tokens, const float* const* x, const Weight* const* rows,
                                  std::int64_t width, float* sums, std::int64_t stride) {
  with_count<kDotTokens>(tokens,
                         [=](auto count) { float_dots<count>(x, rows, width, sums, stride); });
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
