// Combine on the card: a token's rows are gathered and added up, so that there are no atomics. The
// equations are in pyllm/reference/moe_combine.py. Dispatch's backward is the same sum without
// weights.
//
// A position out of range cannot raise an error from here: its token gets NaN.

#include <cstdint>

#include "cuda/reduce.h"
#include "cuda/rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kSlotWarps = 4;  // slots of a block of the backward, a warp for each

template <class T, int count>
__global__ void __launch_bounds__(kRowBlock, 1)
    sum_rows_kernel(const T* __restrict__ rows, const Wide<T>* __restrict__ weights,
                    const int* __restrict__ position, T* __restrict__ y, std::int64_t n_tokens,
                    std::int64_t top_k, std::int64_t width) {
  using W = Wide<T>;
  const std::int64_t token = row_of_thread();
  if (token >= n_tokens) return;
  const std::int64_t n_rows = n_tokens * top_k;
  for (std::int64_t i = threadIdx.x * count; i < width; i += blockDim.x * count) {
    W sums[count] = {};
    for (std::int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
      const std::int64_t row = position[slot];
      const bool inside = row >= 0 && row < n_rows;
      const W weight = !inside ? W(NAN) : weights == nullptr ? W(1) : weights[slot];
      const auto pack = load_pack<count>(rows + (inside ? row : 0) * width + i);
#pragma unroll
      for (int k = 0; k < count; ++k) sums[k] += weight * widen(pack.values[k]);
    }
    Pack<T, count> result;
#pragma unroll
    for (int k = 0; k < count; ++k) result.values[k] = narrow<T>(sums[k]);
    store_pack(y + token * width + i, result);
  }
}

template <class T, int count>
__global__ void __launch_bounds__(kSlotWarps* kWarp, 1)
    backward_kernel(const T* __restrict__ dy, const T* __restrict__ rows,
                    const Wide<T>* __restrict__ weights, const int* __restrict__ position,
                    T* __restrict__ drows, Wide<T>* __restrict__ dweights, std::int64_t n_slots,
                    std::int64_t top_k, std::int64_t width) {
  using W = Wide<T>;
  const std::int64_t slot = row_of_thread();
  if (slot >= n_slots) return;  // with the whole warp
  const std::int64_t row = position[slot];
  if (row < 0 || row >= n_slots) {
    if (threadIdx.x == 0) dweights[slot] = W(NAN);
    return;
  }
  const T* const dy_row = dy + slot / top_k * width;
  const W weight = weights[slot];
  W sum = 0;
  for (std::int64_t i = threadIdx.x * count; i < width; i += kWarp * count) {
    const auto dy_pack = load_pack<count>(dy_row + i);
    auto pack = load_pack<count>(rows + row * width + i);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const W dy_here = widen(dy_pack.values[k]);
      sum += dy_here * widen(pack.values[k]);
      pack.values[k] = narrow<T>(weight * dy_here);
    }
    store_pack(drows + row * width + i, pack);
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) dweights[slot] = sum;
}

}  // namespace

void moe_combine_forward(DType dtype, const void* rows, const void* weights, const void* position,
                         void* y, std::int64_t n_tokens, std::int64_t top_k, std::int64_t width,
                         Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    with_flag(fits_packs<T>(width, rows, y), [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      const dim3 threads = row_threads(width / count);
      launch("moe_combine_forward", sum_rows_kernel<T, count>, {blocks_for(n_tokens, threads.y)},
             threads, 0, stream, static_cast<const T*>(rows), static_cast<const Wide<T>*>(weights),
             static_cast<const int*>(position), static_cast<T*>(y), n_tokens, top_k, width);
    });
  });
}

void moe_combine_backward(DType dtype, const void* dy, const void* rows, const void* weights,
                          const void* position, void* drows, void* dweights, std::int64_t n_tokens,
                          std::int64_t top_k, std::int64_t width, Stream stream) {
  const std::int64_t n_slots = n_tokens * top_k;
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    with_flag(fits_packs<T>(width, dy, rows, drows), [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      launch("moe_combine_backward", backward_kernel<T, count>, {blocks_for(n_slots, kSlotWarps)},
             dim3(kWarp, kSlotWarps), 0, stream, static_cast<const T*>(dy),
             static_cast<const T*>(rows), static_cast<const W*>(weights),
             static_cast<const int*>(position), static_cast<T*>(drows), static_cast<W*>(dweights),
             n_slots, top_k, width);
    });
  });
}

}  // namespace pyllm::cuda
