// The forward of a mixture of experts for few tokens, as a decoding step has them: a warp for each
// hidden number and one for each output, which read the experts' rows once. Nothing is sorted;
// where a choice would stand in the sorted order is counted. The equations are in
// pyllm/reference/moe_ffn.py.

#include <cstdint>

#include "cuda/moe_tiles.cuh"
#include "cuda/reduce.h"

namespace pyllm::cuda {
namespace {

constexpr int kFewWarps = 4;  // rows of a matrix that a block works on

// The sorted row of a choice: those of smaller experts come first, and earlier ones of its own.
// Choices out of range come last. Called by whole warps.
__device__ __forceinline__ int sorted_row(const int* experts, int slot, int n_slots,
                                          int n_experts) {
  const auto bucket_of = [=](int s) {
    const int expert = experts[s];
    return expert < 0 || expert >= n_experts ? n_experts : expert;
  };
  const int mine = bucket_of(slot);
  int before = 0;
  for (int other = static_cast<int>(threadIdx.x); other < n_slots; other += kWarp) {
    const int bucket = bucket_of(other);
    before += bucket < mine || (bucket == mine && other < slot);
  }
  return warp_sum(before);
}

// The part of a dot product that a lane adds up.
template <class T, int count>
__device__ __forceinline__ Wide<T> dot_part(const T* a, const T* b, int length) {
  Wide<T> sum = 0;
  for (int i = static_cast<int>(threadIdx.x) * count; i < length; i += kWarp * count) {
    const auto left = load_pack<count>(a + i), right = load_pack<count>(b + i);
#pragma unroll
    for (int k = 0; k < count; ++k) sum += widen(left.values[k]) * widen(right.values[k]);
  }
  return sum;
}

template <class T, int count>
__global__ void __launch_bounds__(kFewWarps* kWarp, 1)
    few_up_kernel(const T* __restrict__ x, const T* __restrict__ w_in,
                  const int* __restrict__ experts, T* __restrict__ pre, T* __restrict__ h,
                  int* __restrict__ order, int* __restrict__ position, int* __restrict__ offsets,
                  int n_slots, int top_k, int n_experts, int width, int hidden, bool gated) {
  using W = Wide<T>;
  const int slot = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x);
  const int f = static_cast<int>(blockIdx.x) * kFewWarps + static_cast<int>(threadIdx.y);
  const int row = sorted_row(experts, slot, n_slots, n_experts);
  if (f == 0 && lane == 0) {
    order[row] = slot;
    position[slot] = row;
  }
  if (f == 0 && slot == 0) {
    for (int expert = lane; expert <= n_experts; expert += kWarp) {
      int before = 0;
      for (int s = 0; s < n_slots; ++s) before += experts[s] >= 0 && experts[s] < expert;
      offsets[expert] = before;
    }
  }
  if (f >= hidden) return;  // with the whole warp
  const int expert = experts[slot], columns = gated ? 2 * hidden : hidden;
  W gate = NAN, up = NAN;
  if (expert >= 0 && expert < n_experts) {
    const T* const x_row = x + std::int64_t{slot / top_k} * width;
    const T* const weights = w_in + (std::int64_t{expert} * columns + f) * width;
    gate = dot_part<T, count>(x_row, weights, width);
    up = gated ? dot_part<T, count>(x_row, weights + std::int64_t{hidden} * width, width) : W(0);
    gate = warp_sum(gate);
    up = warp_sum(up);
  }
  if (lane != 0) return;
  const T gate_stored = narrow<T>(gate), up_stored = narrow<T>(up);
  pre[std::int64_t{row} * columns + f] = gate_stored;
  if (gated) pre[std::int64_t{row} * columns + hidden + f] = up_stored;
  const Activation<W> at(gated, widen(gate_stored), widen(up_stored));
  h[std::int64_t{row} * hidden + f] = narrow<T>(at.hidden);
}

template <class T, int count>
__global__ void __launch_bounds__(kFewWarps* kWarp)
    few_down_kernel(const T* __restrict__ h, const T* __restrict__ w_out,
                    const Wide<T>* __restrict__ routing_weights, const int* __restrict__ experts,
                    const int* __restrict__ position, T* __restrict__ y, int top_k, int n_experts,
                    int width, int hidden) {
  using W = Wide<T>;
  const int token = static_cast<int>(blockIdx.y);
  const int d = static_cast<int>(blockIdx.x) * kFewWarps + static_cast<int>(threadIdx.y);
  if (d >= width) return;  // with the whole warp
  W sum = 0;
  for (int slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
    const int expert = experts[slot];
    if (expert < 0 || expert >= n_experts) {
      sum = NAN;
      continue;
    }
    const T* const weights = w_out + (std::int64_t{expert} * width + d) * hidden;
    const T* const h_row = h + std::int64_t{position[slot]} * hidden;
    sum += routing_weights[slot] * dot_part<T, count>(h_row, weights, hidden);
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) y[std::int64_t{token} * width + d] = narrow<T>(sum);
}

}  // namespace

void moe_ffn_few(DType dtype, const void* x, const void* w_in, const void* w_out,
                 const void* weights, const void* experts, void* y, void* pre, void* h, void* order,
                 void* position, void* offsets, std::int64_t n_tokens, std::int64_t top_k,
                 std::int64_t n_experts, std::int64_t width, std::int64_t hidden, bool gated,
                 Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    const bool fits = fits_packs<T>(width, x, w_in) && fits_packs<T>(hidden, w_out, h);
    const int d = static_cast<int>(width), f = static_cast<int>(hidden);
    const int k = static_cast<int>(top_k), e = static_cast<int>(n_experts);
    const int n_slots = static_cast<int>(n_tokens) * k;
    const dim3 threads(kWarp, kFewWarps);
    with_flag(fits, [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      launch("moe_ffn_few", few_up_kernel<T, count>, {blocks_for(hidden, kFewWarps), n_slots},
             threads, 0, stream, static_cast<const T*>(x), static_cast<const T*>(w_in),
             static_cast<const int*>(experts), static_cast<T*>(pre), static_cast<T*>(h),
             static_cast<int*>(order), static_cast<int*>(position), static_cast<int*>(offsets),
             n_slots, k, e, d, f, gated);
      launch("moe_ffn_few", few_down_kernel<T, count>, {blocks_for(width, kFewWarps), n_tokens},
             threads, 0, stream, static_cast<const T*>(h), static_cast<const T*>(w_out),
             static_cast<const Wide<T>*>(weights), static_cast<const int*>(experts),
             static_cast<const int*>(position), static_cast<T*>(y), k, e, d, f);
    });
  });
}

}  // namespace pyllm::cuda
