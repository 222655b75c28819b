// Rows copied and added up by blocks of short teams: how the threads of a block share them.
#pragma once

#include "cuda/numeric.h"

namespace pyllm::cuda {

constexpr int kRowBlock = 256;  // threads of a block
// Of a key in a cache; what is written to one and read from it must agree on this.
constexpr int kLargestPosition = 2147483647;

// A block of kRowBlock threads: `threadIdx.x` walks a row, `threadIdx.y` counts rows. `steps` is
// what a row has to do, one thread's step after the other.
inline dim3 row_threads(std::int64_t steps) {
  unsigned team = 1;
  while (team < kRowBlock && team < steps) team *= 2;
  return dim3(team, kRowBlock / team);
}

__device__ __forceinline__ std::int64_t row_of_thread() {
  return std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
}

// A NaN, for results that a wrong index leaves without a meaning.
template <class T>
__device__ __forceinline__ T not_a_number() {
  return narrow<T>(static_cast<Wide<T>>(NAN));
}

}  // namespace pyllm::cuda
