// Attention of many new queries to a kv cache: a range of tokens by a block of keys at a time, with
// an online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867; in blocks: FlashAttention, Dao et
// al. 2022, arXiv:2205.14135). The query heads that share a kv head share each pass over its keys.
// Which keys a query sees is as in decode_attention.h, which is for few queries.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/decode_attention.h"
#include "cpu/decode_parts.h"
#include "cpu/float_dot.h"
#include "cpu/int8_cache.h"
#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Consecutive new tokens of one sequence with the heads of one group. Rows of queries and results
// are `stride` apart from token to token, `width` from head to head.
template <class Storage>
struct QueryRange {
  const float* q;
  float* y;
  std::int64_t stride, start, n_tokens, shared, width;
  const Storage *keys, *values;  // of this sequence and group
  std::int64_t slot_stride, window, sinks, ring;
  float scale;
  const float *key_scales, *value_scales;  // of this sequence and group, in an int8 cache
  std::int64_t scale_stride;
};

// out[r] += sum_i weights[r][i] * rows[i], channels [c, c + vectors).
template <int n_rows, int vectors, class Storage>
inline void add_values(const float* const* weights, const Storage* const* rows, std::int64_t n,
                       std::int64_t c, float* const* out) {
  FloatVector sums[n_rows][vectors];
#pragma GCC unroll 6
  for (int r = 0; r < n_rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sums[r][v] = load_vector(out[r] + c + v * kDotLanes);
  }
  for (std::int64_t i = 0; i < n; ++i) {
    FloatVector row[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) row[v] = load_vector(rows[i] + c + v * kDotLanes);
#pragma GCC unroll 6
    for (int r = 0; r < n_rows; ++r) {
      const float weight = weights[r][i];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sums[r][v] += weight * row[v];
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < n_rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      std::memcpy(out[r] + c + v * kDotLanes, &sums[r][v], sizeof sums[r][v]);
    }
  }
}

template <int n_rows, class Storage>
[[gnu::noinline]] void add_values(const float* const* weights, const Storage* const* rows,
                                  std::int64_t n, std::int64_t width, float* const* out) {
  constexpr int kVectors = kDotFeatures;
  std::int64_t c = 0;
  for (; c + kVectors * kDotLanes <= width; c += kVectors * kDotLanes) {
    add_values<n_rows, kVectors>(weights, rows, n, c, out);
  }
  for (; c + kDotLanes <= width; c += kDotLanes) add_values<n_rows, 1>(weights, rows, n, c, out);
  for (; c < width; ++c) {
    for (int r = 0; r < n_rows; ++r) {
      for (std::int64_t i = 0; i < n; ++i) out[r][c] += weights[r][i] * widen(rows[i][c]);
    }
  }
}

// What attend_range works in: for each row its scores with a block, the largest so far, the sum of
// the weights, and where it is. From an int8 cache, a block's keys and values as floats.
struct RowScratch {
  float *scores, *largest, *sum, *widened;
  const float **q, **weights;
  float** y;

  RowScratch(std::int64_t n, std::int64_t n_widened)
      : scores(new float[n * (kScores + 2) + n_widened]),
        largest(scores + n * kScores),
        sum(largest + n),
        widened(sum + n),
        q(new const float*[2 * n]),
        weights(q + n),
        y(new float*[n]) {}
  // Called by hand: a destructor would have to run where memory ends, and the code for that is the
  // standard library's, of which the linker keeps one copy for all instruction sets.
  void free() const {
    delete[] scores;
    delete[] q;
    delete[] y;
  }
};

// A key that a query does not see has weight 0 in its block: a value that is NaN or infinite
// reaches the queries of its block all the same.
template <class Storage>
inline void attend_range(const QueryRange<Storage>& range) {
  // All rows of queries go through a block's keys and values, which are widened for them once.
  using Row = std::conditional_t<kIsInt8<Storage>, float, Storage>;
  const std::int64_t n_rows = range.n_tokens * range.shared, width = range.width;
  const RowScratch scratch(n_rows, kIsInt8<Storage> ? 2 * kBlock * width : 0);
  float *const scores = scratch.scores, *const largest = scratch.largest, *const sum = scratch.sum;
  const float **const q = scratch.q, **const weights = scratch.weights;
  float** const y = scratch.y;
  for (std::int64_t r = 0; r < n_rows; ++r) {
    const std::int64_t at = r / range.shared * range.stride + r % range.shared * width;
    q[r] = range.q + at;
    y[r] = range.y + at;
    weights[r] = scores + r * kScores;
    largest[r] = -INFINITY;
    sum[r] = 0;
    std::fill(y[r], y[r] + width, 0.0f);
  }
  const Seen seen(range.start, range.n_tokens, range.window, range.sinks);
  for (std::int64_t first = 0; first < seen.n;) {
    const Block block(seen, first, seen.n, range.sinks, range.ring);
    first += block.n;
    const Row *keys[kBlock], *values[kBlock];
    for (std::int64_t i = 0; i < block.n; ++i) {
      const Storage* key = range.keys + block.slots[i] * range.slot_stride;
      const Storage* value = range.values + block.slots[i] * range.slot_stride;
      if constexpr (kIsInt8<Storage>) {
        const std::int64_t at = block.slots[i] * range.scale_stride;
        float* const key_row = scratch.widened + i * width;
        float* const value_row = key_row + kBlock * width;
        widen_row(key, width, range.key_scales[at], key_row);
        widen_row(value, width, range.value_scales[at], value_row);
        keys[i] = key_row;
        values[i] = value_row;
      } else {
        keys[i] = key;
        values[i] = value;
      }
    }
    multiply_rows<Row>(
        block.n, [&](std::int64_t i) { return keys[i]; }, n_rows,
        [&](std::int64_t r) { return q[r]; }, width,
        [&](std::int64_t r, std::int64_t i, const float* products, std::int64_t n) {
          float* to = scores + r * kScores + i;
          for (std::int64_t k = 0; k < n; ++k) to[k] = products[k] * range.scale;
        });
    for (std::int64_t r = 0; r < n_rows; ++r) {
      // What this query sees of the block has no gap.
      const std::int64_t at = range.start + r / range.shared - block.position;
      const std::int64_t end = std::min(at + 1, block.n);
      // Compared first: a position less a window of 2^63 - 1 is not an int64.
      const bool cut = range.window > 0 && !block.are_sinks && range.window <= at;
      const std::int64_t begin = cut ? at - range.window + 1 : 0;
      float* s = scores + r * kScores;
      if (begin >= end) {
        std::fill(s, s + block.n, 0.0f);
        continue;
      }
      const float shrink = to_weights(s + begin, end - begin, &largest[r], &sum[r]);
      for (std::int64_t c = 0; c < width; ++c) y[r][c] *= shrink;
      std::fill(s, s + begin, 0.0f);
      std::fill(s + end, s + block.n, 0.0f);
    }
    for (std::int64_t r = 0; r < n_rows;) {
      if (r + kDotTokens <= n_rows) {
        add_values<kDotTokens>(weights + r, values, block.n, width, y + r);
        r += kDotTokens;
      } else {
        add_values<1>(weights + r, values, block.n, width, y + r);
        ++r;
      }
    }
  }
  for (std::int64_t r = 0; r < n_rows; ++r) {
    const float norm = sum[r] == 0 ? 0.0f : 1.0f / sum[r];
    for (std::int64_t c = 0; c < width; ++c) y[r][c] *= norm;
  }
  scratch.free();
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
