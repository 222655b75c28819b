// Storage types, their conversion to the type the arithmetic runs in, and dispatch on a dtype code.
//
// Conversions are plain bit manipulation without branches, so that the compiler vectorises the
// loops they stand in on every instruction set. Rounding is to nearest even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

#ifndef PYLLM_ISA
#error "numeric.h is for kernel sources, which are compiled once per instruction set"
#endif

namespace pyllm::PYLLM_ISA {

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

// The type sums are kept in: float, but double for double.
template <class Storage>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class Storage>
using Wide = typename Accumulator<Storage>::type;

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }

inline float widen(BFloat16 value) { return float_of(std::uint32_t{value.bits} << 16); }

inline float widen(Float16 value) {
  const std::uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  // Normal numbers: move the exponent from bias 15 to bias 127; inf and NaN: twice that.
  const std::uint32_t bias = 112u << 23;
  const std::uint32_t special = magnitude >= (31u << 23) ? bias : 0u;
  const std::uint32_t normal = magnitude + bias + special;
  // Subnormal numbers are multiples of 2^-24: build 2^-14 + m and take 2^-14 away again.
  const std::uint32_t subnormal =
      bits_of(float_of(magnitude + (113u << 23)) - float_of(113u << 23));
  return float_of((magnitude < (1u << 23) ? subnormal : normal) | sign);
}

template <class Storage>
struct Narrow;

template <>
struct Narrow<float> {
  static float from(float value) { return value; }
};

template <>
struct Narrow<double> {
  static double from(double value) { return value; }
};

template <>
struct Narrow<BFloat16> {
  static BFloat16 from(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const std::uint32_t quiet_nan = (bits >> 16) | 0x40u;
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return {static_cast<std::uint16_t>(is_nan ? quiet_nan : rounded)};
  }
};

template <>
struct Narrow<Float16> {
  static Float16 from(float value) {
    const std::uint32_t bits = bits_of(value);
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    // Normal result: exponent to bias 15 and round the 13 bits that go; a carry out of the largest
    // finite number is infinity, as it should be.
    const std::uint32_t odd = (magnitude >> 13) & 1u;
    const std::uint32_t normal = (magnitude - (112u << 23) + 0xfffu + odd) >> 13;
    // Subnormal result: adding 0.5 leaves multiples of 2^-24 in the last bits, rounded by the FPU.
    const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    std::uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
    result = magnitude >= (143u << 23) ? 0x7c00u : result;
    result = magnitude > 0x7f800000u ? 0x7e00u : result;
    return {static_cast<std::uint16_t>(result | sign)};
  }
};

template <class Storage>
inline Storage narrow(Wide<Storage> value) {
  return Narrow<Storage>::from(value);
}

// The sum of term(0) to term(n - 1), in 32 running sums: what vectors keep anyway, and a build
// without them is then as exact. One sum of a long row of floats loses digits.
template <class W, class Term>
inline W sum_of(std::int64_t n, const Term& term) {
  constexpr std::int64_t kSums = 32;
  W sums[kSums] = {};
  std::int64_t i = 0;
  for (; i + kSums <= n; i += kSums) {
#pragma omp simd
    for (std::int64_t k = 0; k < kSums; ++k) sums[k] += term(i + k);
  }
  W total = 0;
#pragma omp simd reduction(+ : total)
  for (std::int64_t rest = i; rest < n; ++rest) total += term(rest);
#pragma omp simd reduction(+ : total)
  for (std::int64_t k = 0; k < kSums; ++k) total += sums[k];
  return total;
}

// Calls fn(Storage{}) with the storage type that the code stands for.
template <class Fn>
inline void with_storage(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::float32:
      return fn(float{});
    case DType::float64:
      return fn(double{});
    case DType::bfloat16:
      return fn(BFloat16{});
    case DType::float16:
      return fn(Float16{});
  }
}

}  // namespace pyllm::PYLLM_ISA
