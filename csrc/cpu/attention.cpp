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

// A block of scores (n_pairs, padded_rows, padded_keys): the queries of `tokens` tokens from
// first_token on, against the keys from first_key on.
struct AttentionBlock {
  double scale;
  bool causal;
  std::int64_t window, sinks, shared, total_tokens, total_keys;
  std::int64_t first_pair, n_pairs, first_token, tokens, padded_rows, first_key, padded_keys;
};

// Elements (an exponential each) and bytes (copied) in a range handed to a thread.
constexpr std::int64_t kElementsPerRange = per_range(8192);
constexpr std::int64_t kBytesPerRange = per_range(32768);

// Where a row of scores stands: which keys it may see, as columns of the block, and where its
// log-sum-exp is kept. The sinks are columns [0, end_sinks), all before first_column.
struct Row {
  std::int64_t end_sinks, first_column, end_column, at_statistics;
};

Row locate(const AttentionBlock& block, std::int64_t pair_in_block, std::int64_t row) {
  const std::int64_t token = block.first_token + row / block.shared;
  const std::int64_t pair = block.first_pair + pair_in_block;
  const std::int64_t position = block.total_keys - block.total_tokens + token;
  // Compared first: a position before the keys, less a window of 2^63 - 1, is not an int64.
  const bool cut = block.window > 0 && block.window <= position;
  std::int64_t first = (cut ? position - block.window + 1 : 0) - block.first_key;
  std::int64_t end = block.causal ? position + 1 : block.total_keys;
  end = (end < block.total_keys ? end : block.total_keys) - block.first_key;
  first = first > 0 ? first : 0;
  std::int64_t sinks = block.sinks - block.first_key;
  sinks = sinks < end ? sinks : end;
  if (sinks >= first) first = 0;  // no key lies between them
  sinks = first > 0 && sinks > 0 ? sinks : 0;
  end = end > first ? end : first;
  // Heads of all groups are numbered g * shared + j, so (b, head) is pair * shared + j.
  const std::int64_t head = pair * block.shared + row % block.shared;
  return {sinks, first, end, head * block.total_tokens + token};
}

template <class Storage>
void fill_zero(Storage* row, std::int64_t begin, std::int64_t end) {
  for (std::int64_t i = begin; i < end; ++i) row[i] = narrow<Storage>(0);
}

// The columns a row sees, and the same range widened to whole vectors. The loops run over the
// second and select by the first: rows are short, and a scalar remainder of exponentials would cost
// more than all the rest.
struct Columns {
  std::int32_t end_sinks, first, count, begin, end;

  bool sees(std::int32_t column) const {
    // `|`, not `||`: without a branch the loops vectorise.
    return (static_cast<std::uint32_t>(column - first) < static_cast<std::uint32_t>(count)) |
           (column < end_sinks);
  }
};

Columns widened(const Row& row, std::int64_t columns) {
  constexpr std::int64_t kVector = 16;
  const std::int64_t begin = row.end_sinks > 0 ? 0 : row.first_column / kVector * kVector;
  const std::int64_t end = (row.end_column + kVector - 1) / kVector * kVector;
  return {static_cast<std::int32_t>(row.end_sinks), static_cast<std::int32_t>(row.first_column),
          static_cast<std::int32_t>(row.end_column - row.first_column),
          static_cast<std::int32_t>(begin < columns ? begin : columns),
          static_cast<std::int32_t>(end < columns ? end : columns)};
}

// Scores to probabilities in place; returns the log-sum-exp. `e` has room for the row.
template <class Storage>
Wide<Storage> softmax_row(Storage* __restrict s, Columns range, Wide<Storage> scale,
                          Wide<Storage>* __restrict e) {
  using W = Wide<Storage>;
  W largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (std::int32_t i = range.begin; i < range.end; ++i) {
    const W value = range.sees(i) ? widen(s[i]) * scale : W(-INFINITY);
    e[i] = value;
    largest = value > largest ? value : largest;
  }
  // Nothing to see, or only -inf: -inf - -inf would be NaN where it should be 0.
  const W shift = largest == -INFINITY ? W(0) : largest;
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int32_t i = range.begin; i < range.end; ++i) {
    e[i] = exp_of(e[i] - shift);
    sum += e[i];
  }
  const W norm = sum == 0 ? W(0) : W(1) / sum;
#pragma omp simd
  for (std::int32_t i = range.begin; i < range.end; ++i) s[i] = narrow<Storage>(e[i] * norm);
  return shift + W(::log(static_cast<double>(sum)));
}

// Scores to probabilities and dP to dS, both in place.
template <class Storage>
void gradient_row(Storage* __restrict s, Storage* __restrict dp, Columns range, Wide<Storage> scale,
                  Wide<Storage> lse, Wide<Storage> delta) {
  using W = Wide<Storage>;
  const W shift = lse == -INFINITY ? W(0) : lse;
  // The softmax of a single score is 1 whatever the score: no gradient, not even a rounding error.
  const W slope = range.count + range.end_sinks == 1 ? W(0) : scale;
#pragma omp simd
  for (std::int32_t i = range.begin; i < range.end; ++i) {
    const W p = exp_of(widen(s[i]) * scale - shift);
    const W ds = p * (widen(dp[i]) - delta) * slope;
    s[i] = narrow<Storage>(range.sees(i) ? p : W(0));
    dp[i] = narrow<Storage>(range.sees(i) ? ds : W(0));
  }
}

template <class Storage>
void softmax(const AttentionBlock& block, Storage* scores, Wide<Storage>* lse, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t rows = block.n_pairs * block.padded_rows, columns = block.padded_keys;
  parallel_for(rows, rows_per_range(kElementsPerRange, columns), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 W* buffer = new W[columns];
                 for (std::int64_t i = begin; i < end; ++i) {
                   Storage* s = scores + i * columns;
                   const std::int64_t r = i % block.padded_rows;
                   if (r >= block.tokens * block.shared) {
                     fill_zero(s, 0, columns);
                     continue;
                   }
                   const Row row = locate(block, i / block.padded_rows, r);
                   const Columns seen = widened(row, columns);
                   lse[row.at_statistics] =
                       softmax_row(s, seen, static_cast<W>(block.scale), buffer);
                   fill_zero(s, 0, seen.begin);
                   fill_zero(s, seen.end, columns);
                 }
                 delete[] buffer;
               });
}

template <class Storage>
void softmax_gradient(const AttentionBlock& block, Storage* scores, Storage* dp,
                      const Wide<Storage>* lse, const Wide<Storage>* delta, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t rows = block.n_pairs * block.padded_rows, columns = block.padded_keys;
  parallel_for(rows, rows_per_range(kElementsPerRange, columns), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   Storage* s = scores + i * columns;
                   Storage* ds = dp + i * columns;
                   const std::int64_t r = i % block.padded_rows;
                   Columns seen = {0, 0, 0, 0, 0};
                   if (r < block.tokens * block.shared) {
                     const Row row = locate(block, i / block.padded_rows, r);
                     seen = widened(row, columns);
                     gradient_row(s, ds, seen, static_cast<W>(block.scale), lse[row.at_statistics],
                                  delta[row.at_statistics]);
                   }
                   fill_zero(s, 0, seen.begin);
                   fill_zero(s, seen.end, columns);
                   fill_zero(ds, 0, seen.begin);
                   fill_zero(ds, seen.end, columns);
                 }
               });
}

template <class Storage>
void row_products(const Storage* dy, const Storage* y, Wide<Storage>* delta, std::int64_t batch,
                  std::int64_t tokens, std::int64_t heads, std::int64_t width, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t rows = batch * tokens * heads;
  parallel_for(rows, rows_per_range(kElementsPerRange, width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   const Storage* __restrict a = dy + row * width;
                   const Storage* __restrict b = y + row * width;
                   W sum = 0;
#pragma omp simd reduction(+ : sum)
                   for (std::int64_t i = 0; i < width; ++i) sum += widen(a[i]) * widen(b[i]);
                   const std::int64_t head = row % heads, token = row / heads % tokens;
                   delta[(row / heads / tokens * heads + head) * tokens + token] = sum;
                 }
               });
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
  const std::int64_t grain = rows_per_range(kBytesPerRange, bytes);
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
  const std::int64_t grain = rows_per_range(kBytesPerRange, bytes);
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

void attention_softmax(DType dtype, void* scores, void* lse, double scale, bool causal,
                       std::int64_t window, std::int64_t sinks, std::int64_t shared,
                       std::int64_t total_tokens, std::int64_t total_keys, std::int64_t first_pair,
                       std::int64_t n_pairs, std::int64_t first_token, std::int64_t tokens,
                       std::int64_t padded_rows, std::int64_t first_key, std::int64_t padded_keys,
                       int n_threads) {
  const AttentionBlock block{scale,        causal,      window,     sinks,      shared,
                             total_tokens, total_keys,  first_pair, n_pairs,    first_token,
                             tokens,       padded_rows, first_key,  padded_keys};
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    softmax(block, static_cast<S*>(scores), static_cast<Wide<S>*>(lse), n_threads);
  });
}

void attention_softmax_gradient(DType dtype, void* scores, void* dp, const void* lse,
                                const void* delta, double scale, bool causal, std::int64_t window,
                                std::int64_t sinks, std::int64_t shared, std::int64_t total_tokens,
                                std::int64_t total_keys, std::int64_t first_pair,
                                std::int64_t n_pairs, std::int64_t first_token, std::int64_t tokens,
                                std::int64_t padded_rows, std::int64_t first_key,
                                std::int64_t padded_keys, int n_threads) {
  const AttentionBlock block{scale,        causal,      window,     sinks,      shared,
                             total_tokens, total_keys,  first_pair, n_pairs,    first_token,
                             tokens,       padded_rows, first_key,  padded_keys};
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    softmax_gradient(block, static_cast<S*>(scores), static_cast<S*>(dp),
                     static_cast<const W*>(lse), static_cast<const W*>(delta), n_threads);
  });
}

void attention_delta(DType dtype, const void* dy, const void* y, void* delta, std::int64_t batch,
                     std::int64_t tokens, std::int64_t heads, std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    row_products(static_cast<const S*>(dy), static_cast<const S*>(y), static_cast<Wide<S>*>(delta),
                 batch, tokens, heads, width, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
