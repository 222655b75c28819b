// A row of numbers in int8 with a scale, by the rule of quantize_rows in
// pyllm/reference/int8_linear.py.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

struct Int8Scale {
  float scale;
  std::int32_t sum;  // of the numbers
};

// Writes the numbers of x to q. Number: a signed integer that holds -127 to 127.
template <class Storage, class Number>
inline Int8Scale quantize_row(const Storage* __restrict x, std::int64_t width,
                              Number* __restrict q) {
  // The bits of positive numbers grow with them, up to infinity and NaN: a maximum that keeps NaN.
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < width; ++i) {
    const std::uint32_t bits = bits_of(static_cast<float>(widen(x[i]))) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const float scale = float_of(largest) / 127.0f;
  std::int32_t sum = 0;
  if (scale >= FLT_MIN && scale <= FLT_MAX) {
    const float inverse = 1.0f / scale;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < width; ++i) {
      const float rounded = std::rint(static_cast<float>(widen(x[i])) * inverse);
      const std::int32_t number = static_cast<std::int32_t>(rounded);
      q[i] = static_cast<Number>(number);
      sum += number;
    }
  } else {
    std::memset(q, 0, width * sizeof *q);
  }
  return {scale, sum};
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
