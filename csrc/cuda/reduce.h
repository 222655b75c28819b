// Sums and maxima over a warp and over a block, always in the same order.
#pragma once

#include "cuda/launch.h"

namespace pyllm::cuda {

// Every lane gets the result.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int flip = kWarp / 2; flip > 0; flip /= 2) value += __shfl_xor_sync(kAllLanes, value, flip);
  return value;
}
template <class T>
__device__ __forceinline__ T warp_max(T value) {
  for (int flip = kWarp / 2; flip > 0; flip /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, flip);
    value = value > other || value != value ? value : other;  // a NaN stays
  }
  return value;
}

// Over the threadIdx.x of a row of threads; every thread gets the result. A block of one row may be
// of many warps; with more rows, each is one warp and they do not meet.
template <class T>
__device__ __forceinline__ T team_sum(T value) {
  value = warp_sum(value);
  if (blockDim.x == kWarp) return value;
  PYLLM_SHARED(T, sums, [kWarp]);
  const int n_warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // the sums of the call before have been read
  if (lane == 0) sums[warp] = value;
  __syncthreads();
  return warp_sum(lane < n_warps ? sums[lane] : T(0));
}

// The largest of numbers that are not negative, over a team in the same way.
template <class T>
__device__ __forceinline__ T team_max(T value) {
  value = warp_max(value);
  if (blockDim.x == kWarp) return value;
  PYLLM_SHARED(T, maxima, [kWarp]);
  const int n_warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  __syncthreads();  // the maxima of the call before have been read
  if (lane == 0) maxima[warp] = value;
  __syncthreads();
  return warp_max(lane < n_warps ? maxima[lane] : T(0));
}

}  // namespace pyllm::cuda
