// The forward of attention: FlashAttention-2 (Dao 2023, arXiv:2307.08691) on tiles of
// tile.h.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/attention_problem.h"
#include "cpu/attention_tile.h"
#include "cpu/numeric.h"
#include "cpu/online_softmax.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Rows of queries that a thread takes at a time, and keys whose scores it keeps for a strip of
// them.
constexpr std::int64_t kQueryRows = 48, kScoreKeys = 480;

// Keys as columns, kTileColumns of them in a panel, and values as steps; of all pairs.
template <class Storage>
struct PackedCache {
  using U = Unit<Storage>;
  static constexpr std::int64_t kPanel = kTileColumns<Wide<Storage>>;
  std::int64_t panels, panel_size, values_size;
  U *keys, *values;

  explicit PackedCache(const Attention<Storage>& problem)
      : panels(parts_of(problem.keys, kPanel)),
        panel_size(problem.steps() * kPanel),
        values_size(panels * kPanel / kDepth<U> * problem.columns()),
        keys(new U[problem.pairs() * (panels * panel_size + values_size)]),
        values(keys + problem.pairs() * panels * panel_size) {}

  const U* panel(std::int64_t pair, std::int64_t key) const {
    return keys + (pair * panels + key / kPanel) * panel_size;
  }
  const U* value(std::int64_t pair, std::int64_t key, std::int64_t columns) const {
    return values + pair * values_size + key / kDepth<U> * columns;
  }

  void pack(const Attention<Storage>& problem, std::int64_t item) const {
    const std::int64_t pair = item / panels, first = item % panels * kPanel;
    const std::int64_t n = problem.keys - first < kPanel ? problem.keys - first : kPanel;
    pack_lines<kPanel, Storage>([&](std::int64_t r) { return problem.key(pair, first + r); }, n,
                                problem.width, keys + item * panel_size);
    pack_steps<Storage>([&](std::int64_t r) { return problem.value(pair, first + r); }, n, kPanel,
                        problem.width, problem.columns(),
                        values + pair * values_size + first / kDepth<U> * problem.columns());
  }
};

// What a thread works in: queries as columns, weighted sums of values, scores of a strip, the
// largest score and the sum of the weights of each row.
template <class Storage>
struct ForwardScratch {
  using U = Unit<Storage>;
  using W = Wide<Storage>;
  U *queries, *weights;
  W *values, *scores, *largest, *sum;

  explicit ForwardScratch(const Attention<Storage>& problem)
      : queries(new U[kQueryRows * problem.steps() + kTileRows * kScoreKeys]()),
        weights(queries + kQueryRows * problem.steps()),
        values(new W[kQueryRows * problem.columns() + kTileRows * kScoreKeys + 2 * kQueryRows]),
        scores(values + kQueryRows * problem.columns()),
        largest(scores + kTileRows * kScoreKeys),
        sum(largest + kQueryRows) {}
  // Called by hand, see block_attention.h.
  void free() const {
    delete[] queries;
    delete[] values;
  }
};

// A strip of rows against keys [begin, end), all of which are in its scores.
template <class Storage>
inline void attend_run(const Attention<Storage>& problem, const PackedCache<Storage>& cache,
                       std::int64_t pair, std::int64_t first_row, std::int64_t n_rows,
                       std::int64_t strip, std::int64_t begin, std::int64_t end,
                       const ForwardScratch<Storage>& scratch) {
  using U = Unit<Storage>;
  using W = Wide<Storage>;
  constexpr std::int64_t panel = PackedCache<Storage>::kPanel;
  const std::int64_t columns = problem.columns(), steps = problem.steps(), n = end - begin;
  const U* queries = scratch.queries + strip * steps;
  for (std::int64_t key = begin; key < end; key += panel) {
    multiply_tile<kTileRows, 1, 2>(queries, kTileRows, cache.panel(pair, key), panel, steps, false,
                                   problem.scale, scratch.scores + key - begin, kScoreKeys);
  }
  for (std::int64_t r = strip; r < n_rows && r < strip + kTileRows; ++r) {
    W* s = scratch.scores + (r - strip) * kScoreKeys;
    hide(problem.seen(first_row + r), begin, n, W(-INFINITY), s);
    const W shrink = to_weights(s, n, scratch.largest + r, scratch.sum + r);
    W* __restrict values = scratch.values + r * columns;
    if (shrink == 1) continue;
#pragma omp simd
    for (std::int64_t c = 0; c < columns; ++c) values[c] *= shrink;
  }
  const U* weights;
  if constexpr (std::is_same_v<U, W>) {
    weights = scratch.scores;
  } else {
    for (std::int64_t r = 0; r < kTileRows; ++r) {
      to_pairs(scratch.scores + r * kScoreKeys, n, scratch.weights + r * kScoreKeys / kDepth<U>);
    }
    weights = scratch.weights;
  }
  add_product<kScoreKeys / kDepth<U>>(weights, 1, cache.value(pair, begin, columns), columns,
                                      n / kDepth<U>, scratch.values + strip * columns);
}

// Rows [first_row, first_row + n_rows) of a pair.
template <class Storage>
inline void attend_rows(const Attention<Storage>& problem, const PackedCache<Storage>& cache,
                        std::int64_t pair, std::int64_t first_row, std::int64_t n_rows,
                        const ForwardScratch<Storage>& scratch, Storage* y, Wide<Storage>* lse) {
  using W = Wide<Storage>;
  constexpr std::int64_t panel = PackedCache<Storage>::kPanel;
  const std::int64_t columns = problem.columns(), width = problem.width;
  for (std::int64_t strip = 0; strip < n_rows; strip += kTileRows) {
    pack_lines<kTileRows, Storage>(
        [&](std::int64_t r) { return problem.query(pair, first_row + strip + r); }, n_rows - strip,
        width, scratch.queries + strip * problem.steps());
  }
  for (std::int64_t i = 0; i < kQueryRows * columns; ++i) scratch.values[i] = 0;
  for (std::int64_t r = 0; r < kQueryRows; ++r) scratch.largest[r] = -INFINITY, scratch.sum[r] = 0;
  const SeenKeys some = problem.seen(first_row, first_row + n_rows);
  for (std::int64_t block = 0; block < some.end; block += kScoreKeys) {
    const std::int64_t block_end = clamp(rounded_up(some.end, panel), 0, block + kScoreKeys);
    if (!some.meets(block, block_end)) continue;
    for (std::int64_t strip = 0; strip < n_rows; strip += kTileRows) {
      const std::int64_t last = clamp(strip + kTileRows, 0, n_rows);
      const SeenKeys seen = problem.seen(first_row + strip, first_row + last);
      // Panels that follow one another and are seen.
      for (std::int64_t key = block; key < block_end;) {
        std::int64_t end = key;
        while (end < block_end && seen.meets(end, end + panel)) end += panel;
        if (end > key) {
          attend_run(problem, cache, pair, first_row, n_rows, strip, key, end, scratch);
        }
        key = end > key ? end : key + panel;
      }
    }
  }
  for (std::int64_t r = 0; r < n_rows; ++r) {
    const W sum = scratch.sum[r], largest = scratch.largest[r];
    const W norm = sum == 0 ? W(0) : W(1) / sum;
    const W* __restrict from = scratch.values + r * columns;
    Storage* __restrict to = y + problem.place(pair, first_row + r) * width;
#pragma omp simd
    for (std::int64_t c = 0; c < width; ++c) to[c] = narrow<Storage>(from[c] * norm);
    lse[problem.statistic(pair, first_row + r)] =
        (largest == -INFINITY ? W(0) : largest) + W(::log(static_cast<double>(sum)));
  }
}

template <class Storage>
void forward(const Attention<Storage>& problem, Storage* y, Wide<Storage>* lse, int n_threads) {
  const PackedCache<Storage> cache(problem);
  constexpr std::int64_t kElementsPerRange = per_range(32768);
  parallel_for(problem.pairs() * cache.panels, rows_per_range(kElementsPerRange, cache.panel_size),
               n_threads, [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) cache.pack(problem, i);
               });
  const std::int64_t n_blocks = parts_of(problem.rows(), kQueryRows);
  parallel_for(problem.pairs() * n_blocks, 1, n_threads, [&](std::int64_t begin, std::int64_t end) {
    const ForwardScratch<Storage> scratch(problem);
    for (std::int64_t i = begin; i < end; ++i) {
      // The last rows of a pair see most keys, and come first.
      const std::int64_t first = (n_blocks - 1 - i % n_blocks) * kQueryRows;
      const std::int64_t left = problem.rows() - first;
      attend_rows(problem, cache, i / n_blocks, first, left < kQueryRows ? left : kQueryRows,
                  scratch, y, lse);
    }
    scratch.free();
  });
  delete[] cache.keys;
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
