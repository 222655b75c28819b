// exp and sigmoid that the compiler vectorises: no branch, no table, no library call in float.
//
// A loop with a call to expf in it stays scalar, about ten times slower. Relative error of the
// float exp: below 1e-7 (a degree-6 polynomial on half an octave, as in Cephes' expf). inf, -inf
// and NaN give what std::exp gives; results below the normal range are rounded like any other.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Inlined always: a loop with a call in it is not vectorised, and in a large function GCC leaves it
// one.
__attribute__((always_inline)) inline float exp_of(float x) {
  // Beyond these the result is inf or 0 whatever the digits; a NaN fails both comparisons and
  // stays.
  x = x > 89.0f ? 89.0f : x;
  x = x < -105.0f ? -105.0f : x;
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const auto exponent = static_cast<std::int32_t>(bits_of(shifted) - bits_of(12582912.0f));
  // ln 2 in two parts: n * 0.693359375 is exact, so the remainder loses nothing.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // 2^exponent in two factors: neither over- nor underflows before the product does.
  const std::int32_t half = exponent >> 1;
  const float first = float_of(static_cast<std::uint32_t>(half + 127) << 23);
  const float second = float_of(static_cast<std::uint32_t>(exponent - half + 127) << 23);
  return p * first * second;
}

inline double exp_of(double x) { return ::exp(x); }

template <class W>
inline W sigmoid_of(W x) {
  return W(1) / (W(1) + exp_of(-x));
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
