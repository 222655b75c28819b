// New keys and values into a cache, contiguous or rolling. The equations are in
// pyllm/reference/kv_append.py. Bytes are moved and nothing is computed, but for an int8 cache.

#include <cstdint>
#include <cstring>

#include "cpu/int8_row.h"
#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Bytes copied in a range handed to a thread.
constexpr std::int64_t kBytesPerRange = per_range(65536);

// Numbers quantised in one: about as long.
constexpr std::int64_t kNumbersPerRange = per_range(16384);

// Where the new positions stand, and in which slots.
struct Positions {
  const std::int32_t *starts, *counts;
  std::int64_t sinks, ring, batch, tokens, slots;
};

// Calls write(which, b, t, row of the cache) for the positions that stay: 0 for all keys, then 1
// for all values. In turns, rows that are 4,096 bytes apart hinder each other (twice the time,
// measured).
template <class Write>
void for_each_row(const Positions& at, std::int64_t grain, int n_threads, const Write& write) {
  const std::int64_t n = at.batch * at.tokens;
  parallel_for(2 * n, grain, n_threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t b = i % n / at.tokens, t = i % at.tokens, count = at.counts[b];
      if (t >= count) continue;
      std::int64_t slot = at.starts[b] + t;
      if (at.ring > 0 && slot >= at.sinks) {
        // A later position of this call goes to the same slot.
        if (t + at.ring < count) continue;
        slot = at.sinks + (slot - at.sinks) % at.ring;
      }
      write(i / n, b, t, b * at.slots + slot);
    }
  });
}

// New rows: the keys, or the values.
struct Source {
  const char* rows;
  std::int64_t batch_stride, token_stride, head_stride;

  std::int64_t row(std::int64_t b, std::int64_t t) const {
    return b * batch_stride + t * token_stride;
  }
};

// The heads of one position. Heads that lie side by side are one copy.
void copy_heads(const char* from, std::int64_t head_stride, char* to, std::int64_t heads,
                std::int64_t bytes) {
  if (head_stride == bytes) {
    std::memcpy(to, from, heads * bytes);
    return;
  }
  for (std::int64_t g = 0; g < heads; ++g) {
    std::memcpy(to + g * bytes, from + g * head_stride, bytes);
  }
}

}  // namespace

void kv_append(std::int64_t item_size, void* k_cache, void* v_cache, const void* k,
               std::int64_t k_batch_stride, std::int64_t k_token_stride, std::int64_t k_head_stride,
               const void* v, std::int64_t v_batch_stride, std::int64_t v_token_stride,
               std::int64_t v_head_stride, const void* starts, const void* counts,
               std::int64_t sinks, std::int64_t ring, std::int64_t batch, std::int64_t tokens,
               std::int64_t slots, std::int64_t groups, std::int64_t width, int n_threads) {
  const std::int64_t bytes = width * item_size;
  const Source sources[] = {
      {static_cast<const char*>(k), k_batch_stride, k_token_stride, k_head_stride},
      {static_cast<const char*>(v), v_batch_stride, v_token_stride, v_head_stride},
  };
  char* const caches[] = {static_cast<char*>(k_cache), static_cast<char*>(v_cache)};
  const Positions at{static_cast<const std::int32_t*>(starts),
                     static_cast<const std::int32_t*>(counts),
                     sinks,
                     ring,
                     batch,
                     tokens,
                     slots};
  for_each_row(at, rows_per_range(kBytesPerRange, groups * bytes), n_threads,
               [&](std::int64_t which, std::int64_t b, std::int64_t t, std::int64_t to) {
                 const Source& source = sources[which];
                 copy_heads(source.rows + source.row(b, t) * item_size,
                            source.head_stride * item_size, caches[which] + to * groups * bytes,
                            groups, bytes);
               });
}

void kv_append_int8(DType dtype, void* k_cache, void* v_cache, void* k_scales, void* v_scales,
                    const void* k, std::int64_t k_batch_stride, std::int64_t k_token_stride,
                    std::int64_t k_head_stride, const void* v, std::int64_t v_batch_stride,
                    std::int64_t v_token_stride, std::int64_t v_head_stride, const void* starts,
                    const void* counts, std::int64_t sinks, std::int64_t ring, std::int64_t batch,
                    std::int64_t tokens, std::int64_t slots, std::int64_t groups,
                    std::int64_t width, int n_threads) {
  const Source sources[] = {
      {static_cast<const char*>(k), k_batch_stride, k_token_stride, k_head_stride},
      {static_cast<const char*>(v), v_batch_stride, v_token_stride, v_head_stride},
  };
  std::int8_t* const caches[] = {static_cast<std::int8_t*>(k_cache),
                                 static_cast<std::int8_t*>(v_cache)};
  float* const scales[] = {static_cast<float*>(k_scales), static_cast<float*>(v_scales)};
  const Positions at{static_cast<const std::int32_t*>(starts),
                     static_cast<const std::int32_t*>(counts),
                     sinks,
                     ring,
                     batch,
                     tokens,
                     slots};
  with_storage(dtype, [&](auto storage) {
    using S = decltype(storage);
    for_each_row(at, rows_per_range(kNumbersPerRange, groups * width), n_threads,
                 [&](std::int64_t which, std::int64_t b, std::int64_t t, std::int64_t to) {
                   const Source& source = sources[which];
                   const S* from = reinterpret_cast<const S*>(source.rows) + source.row(b, t);
                   for (std::int64_t g = 0; g < groups; ++g) {
                     scales[which][to * groups + g] =
                         quantize_row(from + g * source.head_stride, width,
                                      caches[which] + (to * groups + g) * width)
                             .scale;
                   }
                 });
  });
}

}  // namespace pyllm::PYLLM_ISA
