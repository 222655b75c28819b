// Rotary position embedding on the card. The equations are in pyllm/reference/rope.py; the backward
// turns the other way.

#include <cstdint>

#include "cuda/rows.h"

namespace pyllm::cuda {
namespace {

// A row is one head of one token. x has strides, the result is contiguous.
template <class T, int count>
__global__ void __launch_bounds__(kRowBlock, 1)
    rope_kernel(bool inverse, const T* __restrict__ x, std::int64_t batch_stride,
                std::int64_t token_stride, std::int64_t head_stride,
                const Wide<T>* __restrict__ cosines, const Wide<T>* __restrict__ sines,
                std::int64_t table_stride, T* __restrict__ y, std::int64_t n_rows,
                std::int64_t n_tokens, std::int64_t n_heads, std::int64_t half) {
  using W = Wide<T>;
  const std::int64_t row = row_of_thread();
  if (row >= n_rows) return;
  const std::int64_t head = row % n_heads, token = row / n_heads % n_tokens;
  const std::int64_t batch = row / n_heads / n_tokens;
  x += batch * batch_stride + token * token_stride + head * head_stride;
  y += row * 2 * half;
  const std::int64_t table = batch * table_stride + token * half;
  for (std::int64_t i = threadIdx.x * count; i < half; i += blockDim.x * count) {
    auto first = load_pack<count>(x + i);
    auto second = load_pack<count>(x + half + i);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const W a = widen(first.values[k]), b = widen(second.values[k]);
      const W c = cosines[table + i + k];
      const W s = inverse ? -sines[table + i + k] : sines[table + i + k];
      first.values[k] = narrow<T>(a * c - b * s);
      second.values[k] = narrow<T>(a * s + b * c);
    }
    store_pack(y + i, first);
    store_pack(y + half + i, second);
  }
}

}  // namespace

void rope(DType dtype, bool inverse, const void* x, std::int64_t batch_stride,
          std::int64_t token_stride, std::int64_t head_stride, const void* cosines,
          const void* sines, std::int64_t table_stride, void* y, std::int64_t n_batch,
          std::int64_t n_tokens, std::int64_t n_heads, std::int64_t half, Stream stream) {
  const std::int64_t n_rows = n_batch * n_tokens * n_heads;
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    const bool strides_fit =
        batch_stride % kPack<T> == 0 && token_stride % kPack<T> == 0 && head_stride % kPack<T> == 0;
    with_flag(strides_fit && fits_packs<T>(half, x, y), [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      const dim3 threads = row_threads(half / count);
      launch("rope", rope_kernel<T, count>, {blocks_for(n_rows, threads.y)}, threads, 0, stream,
             inverse, static_cast<const T*>(x), batch_stride, token_stride, head_stride,
             static_cast<const Wide<T>*>(cosines), static_cast<const Wide<T>*>(sines), table_stride,
             static_cast<T*>(y), n_rows, n_tokens, n_heads, half);
    });
  });
}

}  // namespace pyllm::cuda
