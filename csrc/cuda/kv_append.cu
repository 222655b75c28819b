// New keys and values into a cache on the card. The slots and the rule of int8 are those of
// pyllm/reference/kv_append.py.
//
// A start or a count out of range cannot raise an error from here: nothing is written outside of
// the cache, and decode_attention gives NaN for such a row.

#include <cstdint>

#include "cuda/int8_row.h"
#include "cuda/rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kHeadWarps = 4;  // heads of a block that makes them int8, a warp for each

struct Strides {
  std::int64_t batch, token, head;
};

struct Shape {
  Strides k, v;
  std::int64_t sinks, ring, batch, n_tokens, n_slots, groups, width;
};

// The slot of token t of row b; -1 where nothing is to be written.
__device__ __forceinline__ std::int64_t slot_of(const Shape& shape, int start, int count,
                                                std::int64_t t) {
  if (start < 0 || t >= count || std::int64_t{start} + count > kLargestPosition) return -1;
  const std::int64_t position = start + t;
  std::int64_t slot = position;
  if (shape.ring > 0 && position >= shape.sinks) {
    // Of more than the ring holds, only the last are written.
    if (position < std::int64_t{start} + count - shape.ring) return -1;
    slot = shape.sinks + (position - shape.sinks) % shape.ring;
  }
  return slot < shape.n_slots ? slot : -1;
}

// A row is one head of one token; the grid's y chooses keys or values.
template <class T, int count>
__global__ void __launch_bounds__(kRowBlock, 1)
    copy_kernel(T* __restrict__ k_cache, T* __restrict__ v_cache, const T* __restrict__ k,
                const T* __restrict__ v, const int* __restrict__ starts,
                const int* __restrict__ counts, Shape shape) {
  const std::int64_t row = row_of_thread();
  if (row >= shape.batch * shape.n_tokens * shape.groups) return;
  const std::int64_t head = row % shape.groups, t = row / shape.groups % shape.n_tokens;
  const std::int64_t b = row / shape.groups / shape.n_tokens;
  const std::int64_t slot = slot_of(shape, starts[b], counts[b], t);
  if (slot < 0) return;
  const bool keys = blockIdx.y == 0;
  const Strides& strides = keys ? shape.k : shape.v;
  const T* const from =
      (keys ? k : v) + b * strides.batch + t * strides.token + head * strides.head;
  T* const to =
      (keys ? k_cache : v_cache) + ((b * shape.n_slots + slot) * shape.groups + head) * shape.width;
  for (std::int64_t i = threadIdx.x * count; i < shape.width; i += blockDim.x * count) {
    store_pack(to + i, load_pack<count>(from + i));
  }
}

template <class T>
__global__ void __launch_bounds__(kHeadWarps* kWarp, 1)
    int8_kernel(signed char* __restrict__ k_cache, signed char* __restrict__ v_cache,
                float* __restrict__ k_scales, float* __restrict__ v_scales, const T* __restrict__ k,
                const T* __restrict__ v, const int* __restrict__ starts,
                const int* __restrict__ counts, Shape shape) {
  const std::int64_t row = row_of_thread();
  if (row >= shape.batch * shape.n_tokens * shape.groups) return;  // with the whole warp
  const std::int64_t head = row % shape.groups, t = row / shape.groups % shape.n_tokens;
  const std::int64_t b = row / shape.groups / shape.n_tokens;
  const std::int64_t slot = slot_of(shape, starts[b], counts[b], t);
  if (slot < 0) return;
  const bool keys = blockIdx.y == 0;
  const Strides& strides = keys ? shape.k : shape.v;
  const T* const from =
      (keys ? k : v) + b * strides.batch + t * strides.token + head * strides.head;
  float largest = 0;
  for (std::int64_t i = threadIdx.x; i < shape.width; i += kWarp) {
    largest = larger(largest, fabsf(static_cast<float>(widen(from[i]))));
  }
  const float scale = scale_of_row(warp_max(largest)), inverse = inverse_of_scale(scale);
  const std::int64_t at = (b * shape.n_slots + slot) * shape.groups + head;
  signed char* const to = (keys ? k_cache : v_cache) + at * shape.width;
  for (std::int64_t i = threadIdx.x; i < shape.width; i += kWarp) {
    to[i] = to_int8(static_cast<float>(widen(from[i])), inverse);
  }
  if (threadIdx.x == 0) (keys ? k_scales : v_scales)[at] = scale;
}

}  // namespace

void kv_append(DType dtype, void* k_cache, void* v_cache, const void* k, std::int64_t k_batch,
               std::int64_t k_token, std::int64_t k_head, const void* v, std::int64_t v_batch,
               std::int64_t v_token, std::int64_t v_head, const void* starts, const void* counts,
               std::int64_t sinks, std::int64_t ring, std::int64_t batch, std::int64_t n_tokens,
               std::int64_t n_slots, std::int64_t groups, std::int64_t width, Stream stream) {
  const Shape shape{{k_batch, k_token, k_head},
                    {v_batch, v_token, v_head},
                    sinks,
                    ring,
                    batch,
                    n_tokens,
                    n_slots,
                    groups,
                    width};
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    bool packs = fits_packs<T>(width, k_cache, v_cache, k, v);
    for (const std::int64_t stride : {k_batch, k_token, k_head, v_batch, v_token, v_head}) {
      packs = packs && stride % kPack<T> == 0;
    }
    with_flag(packs, [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      const dim3 threads = row_threads(width / count);
      const std::int64_t blocks = blocks_for(batch * n_tokens * groups, threads.y);
      launch("kv_append", copy_kernel<T, count>, {blocks, 2}, threads, 0, stream,
             static_cast<T*>(k_cache), static_cast<T*>(v_cache), static_cast<const T*>(k),
             static_cast<const T*>(v), static_cast<const int*>(starts),
             static_cast<const int*>(counts), shape);
    });
  });
}

void kv_append_int8(DType dtype, void* k_cache, void* v_cache, void* k_scales, void* v_scales,
                    const void* k, std::int64_t k_batch, std::int64_t k_token, std::int64_t k_head,
                    const void* v, std::int64_t v_batch, std::int64_t v_token, std::int64_t v_head,
                    const void* starts, const void* counts, std::int64_t sinks, std::int64_t ring,
                    std::int64_t batch, std::int64_t n_tokens, std::int64_t n_slots,
                    std::int64_t groups, std::int64_t width, Stream stream) {
  const Shape shape{{k_batch, k_token, k_head},
                    {v_batch, v_token, v_head},
                    sinks,
                    ring,
                    batch,
                    n_tokens,
                    n_slots,
                    groups,
                    width};
  const Grid grid{blocks_for(batch * n_tokens * groups, kHeadWarps), 2};
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    launch("kv_append", int8_kernel<T>, grid, dim3(kWarp, kHeadWarps), 0, stream,
           static_cast<signed char*>(k_cache), static_cast<signed char*>(v_cache),
           static_cast<float*>(k_scales), static_cast<float*>(v_scales), static_cast<const T*>(k),
           static_cast<const T*>(v), static_cast<const int*>(starts),
           static_cast<const int*>(counts), shape);
  });
}

}  // namespace pyllm::cuda
