// What the files of int8_linear share.
#pragma once

#include <cstdint>

#include "cuda/numeric.h"

namespace pyllm::cuda {

constexpr int kInt8Step = 16;         // numbers of int8 in 16 bytes
constexpr int kFewRows = 32;          // more of them are cut into tiles
constexpr int kFewRowsOfTensors = 8;  // on tensor cores, whose tiles cost less

// Rows of weights may be read 16 bytes at a time.
inline bool whole_weights(const void* weight, std::int64_t width) {
  return reinterpret_cast<std::uintptr_t>(weight) % kInt8Step == 0 && width % kInt8Step == 0;
}

template <class T>
__device__ __forceinline__ T scaled(int sum, float scale, Wide<T> weight_scale) {
  return narrow<T>(static_cast<Wide<T>>(sum) * (static_cast<Wide<T>>(scale) * weight_scale));
}

// int8_linear_tensor.cu: y by tiles on tensor cores, of rows that quantize_rows made, and of x as
// it is (16 bits). False where nothing was done: the card has none or the tiles do not serve.
bool int8_matmul_on_tensors(DType dtype, const void* q, const void* scales, const void* weight,
                            const void* weight_scale, void* y, std::int64_t rows,
                            std::int64_t features, std::int64_t width, Stream stream);
bool int8_weights_on_tensors(DType dtype, const void* x, const void* weight,
                             const void* weight_scale, void* y, std::int64_t rows,
                             std::int64_t features, std::int64_t width, Stream stream);

}  // namespace pyllm::cuda
