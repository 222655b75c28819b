// New keys and values into a cache, contiguous or rolling. The equations are in
// pyllm/reference/kv_append.py. Bytes are moved and nothing is computed.

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Bytes copied in a range handed to a thread.
constexpr std::int64_t kBytesPerRange = per_range(65536);

// New rows and where they go: the keys, or the values.
struct Source {
  const char* rows;
  std::int64_t batch_stride, token_stride, head_stride;
  char* cache;
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
  const std::int64_t grain = rows_per_range(kBytesPerRange, groups * bytes);
  const Source sources[] = {
      {static_cast<const char*>(k), k_batch_stride, k_token_stride, k_head_stride,
       static_cast<char*>(k_cache)},
      {static_cast<const char*>(v), v_batch_stride, v_token_stride, v_head_stride,
       static_cast<char*>(v_cache)},
  };
  // All keys, then all values: in turns, rows that are 4,096 bytes apart hinder each other (twice
  // the time, measured).
  const std::int64_t n = batch * tokens;
  parallel_for(2 * n, grain, n_threads, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Source& source = sources[i / n];
      const std::int64_t b = i % n / tokens, t = i % tokens;
      const std::int64_t start = static_cast<const std::int32_t*>(starts)[b];
      const std::int64_t count = static_cast<const std::int32_t*>(counts)[b];
      if (t >= count) continue;
      std::int64_t slot = start + t;
      if (ring > 0 && slot >= sinks) {
        // A later position of this call goes to the same slot.
        if (t + ring < count) continue;
        slot = sinks + (slot - sinks) % ring;
      }
      const std::int64_t at = b * source.batch_stride + t * source.token_stride;
      copy_heads(source.rows + at * item_size, source.head_stride * item_size,
                 source.cache + (b * slots + slot) * groups * bytes, groups, bytes);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
