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
  const std::int64_t grain = rows_per_range(kBytesPerRange, 2 * groups * bytes);
  parallel_for(batch * tokens, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t b = i / tokens, t = i % tokens;
      const std::int64_t start = static_cast<const std::int32_t*>(starts)[b];
      const std::int64_t count = static_cast<const std::int32_t*>(counts)[b];
      const std::int64_t position = start + t;
      if (t >= count) continue;
      std::int64_t slot = position;
      if (ring > 0 && position >= sinks) {
        // A later position of this call goes to the same slot.
        if (t + ring < count) continue;
        slot = sinks + (position - sinks) % ring;
      }
      const std::int64_t to = (b * slots + slot) * groups * bytes;
      const std::int64_t k_at = b * k_batch_stride + t * k_token_stride;
      const std::int64_t v_at = b * v_batch_stride + t * v_token_stride;
      copy_heads(static_cast<const char*>(k) + k_at * item_size, k_head_stride * item_size,
                 static_cast<char*>(k_cache) + to, groups, bytes);
      copy_heads(static_cast<const char*>(v) + v_at * item_size, v_head_stride * item_size,
                 static_cast<char*>(v_cache) + to, groups, bytes);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
