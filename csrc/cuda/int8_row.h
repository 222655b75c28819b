// A row of numbers in int8 with a scale of its own, by the rule of pyllm/reference/int8_linear.py.
#pragma once

#include "cuda/numeric.h"
#include "cuda/reduce.h"

namespace pyllm::cuda {

constexpr float kLargestInt8 = 127.0f;
constexpr float kSmallestScale = 1.17549435e-38f;  // of the normal numbers

// The largest of two magnitudes; a NaN stays.
__device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

// Divisions are the exact ones, whatever the compiler's flags: the integers depend on them.
__device__ __forceinline__ float scale_of_row(float largest) {
  return __fdiv_rn(largest, kLargestInt8);
}

// What the numbers of a row are multiplied by; 0 below the normal numbers.
__device__ __forceinline__ float inverse_of_scale(float scale) {
  return scale >= kSmallestScale ? __fdiv_rn(1.0f, scale) : 0.0f;
}

// Not finite gives 0: its scale is not finite either, and carries that into every result.
__device__ __forceinline__ signed char to_int8(float value, float inverse) {
  const float rounded = rintf(__fmul_rn(value, inverse));
  return rounded >= -kLargestInt8 && rounded <= kLargestInt8
             ? static_cast<signed char>(static_cast<int>(rounded))
             : static_cast<signed char>(0);
}

}  // namespace pyllm::cuda
