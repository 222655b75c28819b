// Row movements and the masked softmax of attention, forward and backward. The equations are in
// pyllm/reference/attention.py; the launcher cuts blocks that stay in cache and does the matrix
// products.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Elements (an exponential each) and bytes (copied) in a range handed to a thread.
constexpr std::int64_t kElementsPerRange = 8192;
constexpr std::int64_t kBytesPerRange = 32768;

std::int64_t per_range(std::int64_t budget, std::int64_t size) {
  return budget / (size > 0 ? size : 1) + 1;
}

}  // namespace

void pack_heads(const void* heads, std::int64_t item_size, std::int64_t batch_stride,
                std::int64_t token_stride, std::int64_t head_stride, std::int64_t groups,
                std::int64_t shared, std::int64_t width, std::int64_t first_pair,
                std::int64_t n_pairs, std::int64_t first_token, std::int64_t tokens,
                std::int64_t padded_rows, void* packed, int n_threads) {
  const auto* from = static_cast<const char*>(heads);
  auto* to = static_cast<char*>(packed);
  const std::int64_t bytes = width * item_size;
  const std::int64_t grain = per_range(kBytesPerRange, bytes);
  parallel_for(n_pairs * padded_rows, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t pair = first_pair + i / padded_rows, row = i % padded_rows;
      if (row >= tokens * shared) {
        std::memset(to + i * bytes, 0, bytes);
        continue;
      }
      const std::int64_t head = pair % groups * shared + row % shared;
      const std::int64_t at = pair / groups * batch_stride +
                              (first_token + row / shared) * token_stride + head * head_stride;
      std::memcpy(to + i * bytes, from + at * item_size, bytes);
    }
  });
}

void unpack_heads(const void* packed, std::int64_t item_size, std::int64_t groups,
                  std::int64_t shared, std::int64_t width, std::int64_t total_tokens,
                  std::int64_t first_pair, std::int64_t n_pairs, std::int64_t first_token,
                  std::int64_t tokens, std::int64_t padded_rows, void* heads, int n_threads) {
  const auto* from = static_cast<const char*>(packed);
  auto* to = static_cast<char*>(heads);
  // The heads of a group lie side by side on both sides: one copy per token.
  const std::int64_t bytes = shared * width * item_size;
  const std::int64_t grain = per_range(kBytesPerRange, bytes);
  parallel_for(n_pairs * tokens, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t pair = i / tokens, token = i % tokens;
      const std::int64_t b = (first_pair + pair) / groups, g = (first_pair + pair) % groups;
      const std::int64_t target = (b * total_tokens + first_token + token) * groups + g;
      std::memcpy(to + target * bytes,
                  from + pair * padded_rows * width * item_size + token * bytes, bytes);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
