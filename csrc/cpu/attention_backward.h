// The backward of attention. A thread takes a pair, or a lane of its keys where pairs are few, and
// goes through blocks of scores once: each gives its part of dq, dk and dv. dk and dv belong to the
// lane; of dq each lane has a sum of its own, and these are added in order.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/allocator.h"
#include "cpu/attention_forward.h"
#include "cpu/attention_problem.h"
#include "cpu/attention_tile.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Keys of a block of scores, a multiple of the rows and the columns of every tile, and blocks whose
// keys, values and gradients are kept together: what fits into a second-level cache.
constexpr std::int64_t kBlockKeys = 96, kChunkBlocks = 6;
// So many lanes there are at least, if there are keys enough.
constexpr std::int64_t kLeastLanes = 8;

static_assert(kQueryRows % kTileRows == 0 && kBlockKeys % kTileRows == 0);

// How the work is cut: by the sizes alone.
template <class Storage>
struct Lanes {
  std::int64_t blocks, per_pair, dq_size;

  explicit Lanes(const Attention<Storage>& problem)
      : blocks(parts_of(problem.keys, kBlockKeys)),
        per_pair(clamp(parts_of(kLeastLanes, problem.pairs()), 1, blocks)),
        dq_size(rounded_up(problem.rows(), kQueryRows) * problem.columns()) {}
};

template <class Storage>
struct Gradients {
  const Storage *dy, *y;
  const Wide<Storage>* lse;
  Storage *dq, *dk, *dv;
};

template <class Storage>
struct BackwardScratch {
  using U = Unit<Storage>;
  using W = Wide<Storage>;
  // Of a chunk of keys.
  U *key_columns, *value_columns, *key_steps;
  W *dk, *dv;
  // Of a block of queries: by strips as columns, and as steps.
  U *query_columns, *dy_columns, *query_steps, *dy_steps;
  W *lse, *delta;
  // Of a block of scores (kQueryRows, kBlockKeys). Elements along the keys for dq, down the queries
  // for dk and dv; where elements are numbers, all of them are the same memory.
  W *p, *ds;
  U *p_down, *ds_down, *ds_along;

  BackwardScratch(const Attention<Storage>& problem, Allocator& allocator) {
    constexpr std::int64_t keys = kChunkBlocks * kBlockKeys, depth = kDepth<U>;
    const std::int64_t steps = problem.steps(), columns = problem.columns();
    key_columns = allocator.take<U>(keys * steps);
    value_columns = allocator.take<U>(keys * steps);
    key_steps = allocator.take<U>(keys / depth * columns);
    dk = allocator.take<W>(keys * columns);
    dv = allocator.take<W>(keys * columns);
    query_columns = allocator.take<U>(kQueryRows * steps);
    dy_columns = allocator.take<U>(kQueryRows * steps);
    query_steps = allocator.take<U>(kQueryRows / depth * columns);
    dy_steps = allocator.take<U>(kQueryRows / depth * columns);
    lse = allocator.take<W>(kQueryRows);
    delta = allocator.take<W>(kQueryRows);
    p = allocator.take<W>(kQueryRows * kBlockKeys);
    ds = allocator.take<W>(kQueryRows * kBlockKeys);
    if constexpr (std::is_same_v<U, W>) {
      p_down = p;
      ds_down = ds_along = ds;
    } else {
      p_down = allocator.take<U>(kQueryRows * kBlockKeys / depth);
      ds_down = allocator.take<U>(kQueryRows * kBlockKeys / depth);
      ds_along = allocator.take<U>(kQueryRows * kBlockKeys / depth);
    }
  }
};

// Scores to probabilities and dP to dS, both in place, of keys [begin, end) of a block; zeros where
// a row sees nothing. The scores come rounded as they did in the forward, or the probabilities
// would not add up to one.
template <class W>
inline void gradient_row(const SeenKeys& seen, std::int64_t first_key, std::int64_t begin,
                         std::int64_t end, W scale, W lse, W delta, W* __restrict p,
                         W* __restrict ds) {
  const W shift = lse == -INFINITY ? W(0) : lse;
  // The softmax of a single score is 1 whatever the score: no gradient, not even a rounding error.
  const W slope = seen.count() == 1 ? W(0) : scale;
#pragma omp simd
  for (std::int64_t i = begin; i < end; ++i) {
    p[i] = exp_of(p[i] - shift);
    ds[i] = p[i] * (ds[i] - delta) * slope;
  }
  for (std::int64_t i = 0; i < begin; ++i) p[i] = ds[i] = 0;
  for (std::int64_t i = end; i < kBlockKeys; ++i) p[i] = ds[i] = 0;
  hide(seen, first_key, kBlockKeys, W(0), p);
  hide(seen, first_key, kBlockKeys, W(0), ds);
}

// The columns of a block that rows which see `seen` need, as whole panels: all between the first
// and the last.
struct Range {
  std::int64_t begin, end;

  Range(const SeenKeys& seen, std::int64_t first_key, std::int64_t panel) : begin(0), end(0) {
    for (std::int64_t i = kBlockKeys - panel; i >= 0; i -= panel) {
      if (!seen.meets(first_key + i, first_key + i + panel)) continue;
      begin = i;
      if (end == 0) end = i + panel;
    }
  }
};

// A block of scores: rows [first_row, first_row + n_rows) of a pair, kBlockKeys keys from
// chunk_first + at on.
template <class Storage>
inline void take_block(const Attention<Storage>& problem, std::int64_t first_row,
                       std::int64_t n_rows, std::int64_t chunk_first, std::int64_t at,
                       const BackwardScratch<Storage>& scratch, Wide<Storage>* dq) {
  using U = Unit<Storage>;
  using W = Wide<Storage>;
  constexpr std::int64_t panel = kTileColumns<W>, depth = kDepth<U>;
  const std::int64_t columns = problem.columns(), steps = problem.steps();
  const std::int64_t first_key = chunk_first + at;
  for (std::int64_t strip = 0; strip < n_rows; strip += kTileRows) {
    const std::int64_t last = clamp(strip + kTileRows, 0, n_rows);
    const Range range(problem.seen(first_row + strip, first_row + last), first_key, panel);
    W* const p = scratch.p + strip * kBlockKeys;
    W* const ds = scratch.ds + strip * kBlockKeys;
    for (std::int64_t i = range.begin; i < range.end; i += panel) {
      multiply_tile<kTileRows, 1, 2>(scratch.query_columns + strip * steps, kTileRows,
                                     scratch.key_columns + (at + i) * steps, panel, steps, false,
                                     problem.scale, p + i, kBlockKeys);
      multiply_tile<kTileRows, 1, 2>(scratch.dy_columns + strip * steps, kTileRows,
                                     scratch.value_columns + (at + i) * steps, panel, steps, false,
                                     W(1), ds + i, kBlockKeys);
    }
    for (std::int64_t r = strip; r < strip + kTileRows; ++r) {
      const std::int64_t row = (r - strip) * kBlockKeys;
      if (r < n_rows) {
        gradient_row(problem.seen(first_row + r), first_key, range.begin, range.end, problem.scale,
                     scratch.lse[r], scratch.delta[r], p + row, ds + row);
      } else {
        for (std::int64_t i = 0; i < kBlockKeys; ++i) p[row + i] = ds[row + i] = 0;
      }
    }
    if constexpr (!std::is_same_v<U, W>) {
      for (std::int64_t r = 0; r < kTileRows; r += 2) {
        const std::int64_t row = r * kBlockKeys, pair = (strip + r) / 2 * kBlockKeys;
        to_pairs(p + row, p + row + kBlockKeys, kBlockKeys, scratch.p_down + pair);
        to_pairs(ds + row, ds + row + kBlockKeys, kBlockKeys, scratch.ds_down + pair);
        to_pairs(ds + row, 2 * kBlockKeys, scratch.ds_along + pair);
      }
    }
    if (range.begin == range.end) continue;
    add_product<kBlockKeys / depth>(scratch.ds_along + (strip * kBlockKeys + range.begin) / depth,
                                    1, scratch.key_steps + (at + range.begin) / depth * columns,
                                    columns, (range.end - range.begin) / depth,
                                    dq + strip * columns);
  }
  // Which rows see a strip of keys: those from its first key on, and up to a window behind it.
  const std::int64_t position = problem.keys - problem.tokens, rows = rounded_up(n_rows, depth);
  const SeenKeys some = problem.seen(first_row, first_row + n_rows);
  for (std::int64_t i = 0; i < kBlockKeys; i += kTileRows) {
    const std::int64_t key = first_key + i;
    if (!some.meets(key, key + kTileRows)) continue;
    std::int64_t begin = 0, end = rows;
    if (problem.causal) begin = clamp((key - position) * problem.shared - first_row, 0, rows);
    if (problem.window > 0 && key >= problem.sinks) {
      end = (key + kTileRows - 1 + problem.window - position) * problem.shared - first_row;
      end = rounded_up(clamp(end, 0, n_rows), depth);
    }
    begin = begin / depth * depth;
    if (begin >= end) continue;
    const std::int64_t from = begin / depth * kBlockKeys + i, n = (end - begin) / depth;
    const std::int64_t to = (at + i) * columns;
    add_product<1>(scratch.p_down + from, kBlockKeys, scratch.dy_steps + begin / depth * columns,
                   columns, n, scratch.dv + to);
    add_product<1>(scratch.ds_down + from, kBlockKeys,
                   scratch.query_steps + begin / depth * columns, columns, n, scratch.dk + to);
  }
}

template <class Storage>
inline void pack_chunk(const Attention<Storage>& problem, std::int64_t pair, std::int64_t first,
                       std::int64_t n_blocks, const BackwardScratch<Storage>& scratch) {
  constexpr std::int64_t panel = kTileColumns<Wide<Storage>>;
  const std::int64_t keys = n_blocks * kBlockKeys, n = clamp(problem.keys - first, 0, keys);
  const auto key = [&](std::int64_t r) { return problem.key(pair, first + r); };
  for (std::int64_t i = 0; i < keys; i += panel) {
    pack_lines<panel, Storage>([&](std::int64_t r) { return key(i + r); }, n - i, problem.width,
                               scratch.key_columns + i * problem.steps());
    pack_lines<panel, Storage>([&](std::int64_t r) { return problem.value(pair, first + i + r); },
                               n - i, problem.width, scratch.value_columns + i * problem.steps());
  }
  pack_steps<Storage>(key, n, keys, problem.width, problem.columns(), scratch.key_steps);
  for (std::int64_t i = 0; i < keys * problem.columns(); ++i) scratch.dk[i] = scratch.dv[i] = 0;
}

template <class Storage>
inline void pack_rows(const Attention<Storage>& problem, const Gradients<Storage>& gradients,
                      std::int64_t pair, std::int64_t first_row, std::int64_t n_rows,
                      const BackwardScratch<Storage>& scratch) {
  using W = Wide<Storage>;
  const std::int64_t width = problem.width, columns = problem.columns();
  const auto query = [&](std::int64_t r) { return problem.query(pair, first_row + r); };
  const auto dy = [&](std::int64_t r) {
    return gradients.dy + problem.place(pair, first_row + r) * width;
  };
  for (std::int64_t strip = 0; strip < n_rows; strip += kTileRows) {
    const std::int64_t at = strip * problem.steps();
    pack_lines<kTileRows, Storage>([&](std::int64_t r) { return query(strip + r); }, n_rows - strip,
                                   width, scratch.query_columns + at);
    pack_lines<kTileRows, Storage>([&](std::int64_t r) { return dy(strip + r); }, n_rows - strip,
                                   width, scratch.dy_columns + at);
  }
  pack_steps<Storage>(query, n_rows, kQueryRows, width, columns, scratch.query_steps);
  pack_steps<Storage>(dy, n_rows, kQueryRows, width, columns, scratch.dy_steps);
  for (std::int64_t r = 0; r < n_rows; ++r) {
    const Storage* __restrict a = dy(r);
    const Storage* __restrict b = gradients.y + problem.place(pair, first_row + r) * width;
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t c = 0; c < width; ++c) sum += widen(a[c]) * widen(b[c]);
    scratch.delta[r] = sum;
    scratch.lse[r] = gradients.lse[problem.statistic(pair, first_row + r)];
  }
}

// Blocks [begin, end) of the keys of a pair; dq: the lane's sum.
template <class Storage>
inline void take_lane(const Attention<Storage>& problem, const Gradients<Storage>& gradients,
                      std::int64_t pair, std::int64_t begin, std::int64_t end,
                      const BackwardScratch<Storage>& scratch, Wide<Storage>* dq) {
  const std::int64_t columns = problem.columns(), width = problem.width;
  for (std::int64_t chunk = begin; chunk < end; chunk += kChunkBlocks) {
    const std::int64_t n_blocks = clamp(end - chunk, 0, kChunkBlocks);
    const std::int64_t first = chunk * kBlockKeys;
    pack_chunk(problem, pair, first, n_blocks, scratch);
    for (std::int64_t row = 0; row < problem.rows(); row += kQueryRows) {
      const std::int64_t n_rows = clamp(problem.rows() - row, 0, kQueryRows);
      const SeenKeys some = problem.seen(row, row + n_rows);
      if (!some.meets(first, first + n_blocks * kBlockKeys)) continue;
      pack_rows(problem, gradients, pair, row, n_rows, scratch);
      for (std::int64_t at = 0; at < n_blocks * kBlockKeys; at += kBlockKeys) {
        if (!some.meets(first + at, first + at + kBlockKeys)) continue;
        take_block(problem, row, n_rows, first, at, scratch, dq + row * columns);
      }
    }
    for (std::int64_t i = 0; i < n_blocks * kBlockKeys && first + i < problem.keys; ++i) {
      const std::int64_t b = pair / problem.groups, g = pair % problem.groups;
      const std::int64_t to = ((b * problem.keys + first + i) * problem.groups + g) * width;
      for (std::int64_t c = 0; c < width; ++c) {
        gradients.dk[to + c] = narrow<Storage>(scratch.dk[i * columns + c]);
        gradients.dv[to + c] = narrow<Storage>(scratch.dv[i * columns + c]);
      }
    }
  }
}

template <class Storage>
void backward(const Attention<Storage>& problem, const Gradients<Storage>& gradients,
              int n_threads) {
  using W = Wide<Storage>;
  const Lanes<Storage> lanes(problem);
  const std::int64_t n_items = problem.pairs() * lanes.per_pair;
  Allocator measure{nullptr};
  const BackwardScratch<Storage> measured(problem, measure);
  (void)measured;
  W* const dq = new W[n_items * lanes.dq_size];
  parallel_for(n_items, 1, n_threads, [&](std::int64_t begin, std::int64_t end) {
    char* const memory = new char[measure.used + kLineBytes];
    Allocator allocator{at_line(memory)};
    const BackwardScratch<Storage> scratch(problem, allocator);
    for (std::int64_t item = begin; item < end; ++item) {
      W* const sums = dq + item * lanes.dq_size;
      for (std::int64_t i = 0; i < lanes.dq_size; ++i) sums[i] = 0;
      const std::int64_t lane = item % lanes.per_pair;
      take_lane(problem, gradients, item / lanes.per_pair, lane * lanes.blocks / lanes.per_pair,
                (lane + 1) * lanes.blocks / lanes.per_pair, scratch, sums);
    }
    delete[] memory;
  });
  constexpr std::int64_t kElementsPerRange = per_range(32768);
  const std::int64_t columns = problem.columns(), width = problem.width, rows = problem.rows();
  parallel_for(problem.pairs() * rows, rows_per_range(kElementsPerRange, width * lanes.per_pair),
               n_threads, [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) {
                   const std::int64_t pair = i / rows, row = i % rows;
                   const W* __restrict from =
                       dq + pair * lanes.per_pair * lanes.dq_size + row * columns;
                   Storage* __restrict to = gradients.dq + problem.place(pair, row) * width;
                   for (std::int64_t c = 0; c < width; ++c) {
                     W sum = from[c];
                     for (std::int64_t lane = 1; lane < lanes.per_pair; ++lane) {
                       sum += from[lane * lanes.dq_size + c];
                     }
                     to[c] = narrow<Storage>(sum);
                   }
                 }
               });
  delete[] dq;
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
