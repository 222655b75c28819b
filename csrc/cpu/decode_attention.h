// Attention of few new queries to a kv cache, piece by piece. The equations are in
// pyllm/reference/decode_attention.py.
//
// The keys that a row of the batch sees are numbered in the order of their positions, the sinks
// first, and cut into chunks. Each chunk is one pass over its keys with all heads, so that the
// cache is read as it lies, and gives a maximum, a sum and a weighted sum of values for each query
// (online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867). The chunks are then added in
// order. Where they are cut depends on the sizes only, never on the number of threads.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/numeric.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Keys whose scores are kept before their values are added.
constexpr std::int64_t kBlock = 64;
// Keys whose products are added up together, and how many running sums each product has.
constexpr std::int64_t kFold = 16, kFoldLanes = 16;
// Values added at once: a sum is loaded and stored once for them.
constexpr int kTogether = 4;

struct Strides {
  std::int64_t batch, slot, head;
};

// Which keys the queries of one row of the batch see: positions [0, n_sinks), then
// [first, end); numbered without the gap.
struct Seen {
  std::int64_t start, count, n_sinks, first, n;

  Seen(std::int64_t start, std::int64_t count, std::int64_t window, std::int64_t sinks)
      : start(start), count(count), n_sinks(0), first(0), n(0) {
    const std::int64_t end = start + count;
    if (count == 0) return;
    if (window > 0) {
      n_sinks = sinks < end ? sinks : end;
      first = start - window + 1 > n_sinks ? start - window + 1 : n_sinks;
    }
    n = n_sinks + end - first;
  }

  std::int64_t position(std::int64_t i) const { return i < n_sinks ? i : first + i - n_sinks; }
};

// Up to kBlock keys that follow one another, all sinks or none.
struct Block {
  std::int64_t position, n;
  bool are_sinks;
  std::int64_t slots[kBlock];

  Block(const Seen& seen, std::int64_t begin, std::int64_t end, std::int64_t sinks,
        std::int64_t ring)
      : position(seen.position(begin)), are_sinks(begin < seen.n_sinks) {
    if (are_sinks && end > seen.n_sinks) end = seen.n_sinks;
    n = end - begin < kBlock ? end - begin : kBlock;
    const bool turns = ring > 0 && !are_sinks;
    std::int64_t slot = turns ? sinks + (position - sinks) % ring : position;
    for (std::int64_t i = 0; i < n; ++i) {
      slots[i] = slot++;
      if (turns && slot == sinks + ring) slot = sinks;
    }
  }
};

// The work of one call.
template <class Storage>
struct Problem {
  using W = Wide<Storage>;
  const W* q;
  const Storage *k_cache, *v_cache;
  Strides k_strides, v_strides;
  const std::int32_t *starts, *counts;
  W scale;
  std::int64_t window, sinks, ring, batch, tokens, groups, shared, width, chunk, n_chunks;
  // Where the queries of each row of the batch begin in q, counted in tokens; null: all have
  // `tokens` of them.
  const std::int64_t* first_queries = nullptr;

  std::int64_t heads() const { return groups * shared; }
  std::int64_t query(std::int64_t b, std::int64_t t) const {
    return (first_queries == nullptr ? b * tokens : first_queries[b]) + t;
  }
  std::int64_t rows() const { return tokens * heads(); }
  Seen seen(std::int64_t b) const { return Seen(starts[b], counts[b], window, sinks); }
};

// Of one chunk: for each query (token, head) the weighted sum of values, not yet divided by the sum
// of the weights; exp(score - largest) is a weight.
template <class W>
struct Partial {
  W *values, *largest, *sum;

  // The parts of all chunks lie in one workspace.
  Partial(W* workspace, std::int64_t item, std::int64_t n_items, std::int64_t rows,
          std::int64_t width)
      : values(workspace + item * rows * width),
        largest(workspace + n_items * rows * width + item * rows),
        sum(largest + n_items * rows) {}
};

// What a range of chunks works in.
template <class W>
struct Scratch {
  W *scores, *wide, *lanes, *halves, *quarters, *sums;

  Scratch(std::int64_t heads, std::int64_t width)
      : scores(new W[heads * (kBlock + kFold * (2 * kFoldLanes - kFoldLanes / 4 + 1)) +
                     kTogether * width]),
        wide(scores + heads * kBlock),
        lanes(wide + kTogether * width),
        halves(lanes + heads * kFold * kFoldLanes),
        quarters(halves + heads * kFold * kFoldLanes / 2),
        sums(quarters + heads * kFold * kFoldLanes / 4) {}
  Scratch(const Scratch&) = delete;
  ~Scratch() { delete[] scores; }
};

// The products of a query and a key, in kFoldLanes running sums. They are added up later, for many
// keys at once: one by one that would cost more than the products.
template <int kWidth, class W, class Row>
void add_products(const W* __restrict q, const Row* __restrict row, std::int64_t any_width,
                  W* __restrict lanes) {
  const std::int64_t width = kWidth > 0 ? kWidth : any_width;
  W sums[kFoldLanes] = {};
  std::int64_t i = 0;
  for (; i + kFoldLanes <= width; i += kFoldLanes) {
#pragma omp simd
    for (std::int64_t k = 0; k < kFoldLanes; ++k) sums[k] += q[i + k] * widen(row[i + k]);
  }
  for (std::int64_t k = 0; k < width - i; ++k) sums[k] += q[i + k] * widen(row[i + k]);
#pragma omp simd
  for (std::int64_t k = 0; k < kFoldLanes; ++k) lanes[k] = sums[k];
}

// Adds the lanes of each of n rows up. Written so that the compiler needs few shuffles.
template <class W>
void fold(const W* __restrict lanes, std::int64_t n, W* __restrict halves, W* __restrict quarters,
          W* __restrict sums) {
  constexpr std::int64_t kHalf = kFoldLanes / 2, kQuarter = kFoldLanes / 4;
  for (std::int64_t r = 0; r < n; ++r) {
    for (std::int64_t k = 0; k < kHalf; ++k) {
      halves[r * kHalf + k] = lanes[r * kFoldLanes + k] + lanes[r * kFoldLanes + kHalf + k];
    }
  }
  for (std::int64_t r = 0; r < n; ++r) {
    for (std::int64_t k = 0; k < kQuarter; ++k) {
      quarters[r * kQuarter + k] = halves[r * kHalf + k] + halves[r * kHalf + kQuarter + k];
    }
  }
  static_assert(kQuarter == 4);
  for (std::int64_t r = 0; r < n; ++r) {
    const W* four = quarters + r * kQuarter;
    sums[r] = (four[0] + four[1]) + (four[2] + four[3]);
  }
}

template <int kWidth, class W, class Row>
void add_four(const W* weights, const Row* const* rows, std::int64_t any_width,
              W* __restrict values) {
  const std::int64_t width = kWidth > 0 ? kWidth : any_width;
  const Row* __restrict a = rows[0];
  const Row* __restrict b = rows[1];
  const Row* __restrict c = rows[2];
  const Row* __restrict d = rows[3];
  const W wa = weights[0], wb = weights[1], wc = weights[2], wd = weights[3];
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) {
    values[i] += (wa * widen(a[i]) + wb * widen(b[i])) + (wc * widen(c[i]) + wd * widen(d[i]));
  }
}

template <class W, class Row>
void add_one(W weight, const Row* __restrict row, std::int64_t width, W* __restrict values) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) values[i] += weight * widen(row[i]);
}

// Calls use(rows, head) for each query head: rows are those of its kv head in kRows slots. 16-bit
// rows that several heads share are widened once, into `wide`.
template <int kRows, class Storage, class Use>
void for_each_head(const Problem<Storage>& problem, const Storage* cache, const Strides& strides,
                   const std::int64_t* slots, Wide<Storage>* wide, const Use& use) {
  using W = Wide<Storage>;
  const std::int64_t width = problem.width, shared = problem.shared;
  for (std::int64_t g = 0; g < problem.groups; ++g) {
    const Storage* rows[kRows];
    for (int r = 0; r < kRows; ++r) rows[r] = cache + slots[r] * strides.slot + g * strides.head;
    if (sizeof(Storage) == sizeof(W) || shared == 1) {
      for (std::int64_t j = 0; j < shared; ++j) use(rows, g * shared + j);
      continue;
    }
    const W* wide_rows[kRows];
    for (int r = 0; r < kRows; ++r) {
      W* __restrict to = wide + r * width;
      const Storage* __restrict from = rows[r];
#pragma omp simd
      for (std::int64_t c = 0; c < width; ++c) to[c] = widen(from[c]);
      wide_rows[r] = to;
    }
    for (std::int64_t j = 0; j < shared; ++j) use(wide_rows, g * shared + j);
  }
}

// Takes the scores s of n more keys in: they become weights. What was summed before is scaled down
// where the largest score grows.
template <class W>
void take_in(W* __restrict s, std::int64_t n, std::int64_t width, W* largest, W* sum,
             W* __restrict values) {
  W new_largest = *largest;
#pragma omp simd reduction(max : new_largest)
  for (std::int64_t i = 0; i < n; ++i) new_largest = s[i] > new_largest ? s[i] : new_largest;
  // Only -inf so far: -inf - -inf would be NaN where it should be 0.
  const W shift = new_largest == -INFINITY ? W(0) : new_largest;
  const W shrink = exp_of(*largest - shift);
  W added = 0;
#pragma omp simd reduction(+ : added)
  for (std::int64_t i = 0; i < n; ++i) {
    s[i] = exp_of(s[i] - shift);
    added += s[i];
  }
  *largest = new_largest;
  *sum = *sum * shrink + added;
#pragma omp simd
  for (std::int64_t c = 0; c < width; ++c) values[c] *= shrink;
}

// The scores of keys [begin, end) of a block with the queries of one token: scores (heads, kBlock).
template <int kWidth, class Storage>
void score(const Problem<Storage>& problem, const Storage* keys, const Block& block,
           std::int64_t begin, std::int64_t end, const Wide<Storage>* q,
           const Scratch<Wide<Storage>>& scratch) {
  using W = Wide<Storage>;
  const std::int64_t width = problem.width, heads = problem.heads();
  W *lanes = scratch.lanes, *sums = scratch.sums;
  for (std::int64_t first = begin; first < end; first += kFold) {
    const std::int64_t last = first + kFold < end ? first + kFold : end;
    for (std::int64_t i = first; i < last; ++i) {
      W* to = lanes + (i - first) * heads * kFoldLanes;
      for_each_head<1>(problem, keys, problem.k_strides, block.slots + i, scratch.wide,
                       [=](auto rows, std::int64_t head) {
                         add_products<kWidth>(q + head * width, rows[0], width,
                                              to + head * kFoldLanes);
                       });
    }
    fold(lanes, (last - first) * heads, scratch.halves, scratch.quarters, sums);
    for (std::int64_t head = 0; head < heads; ++head) {
      W* scores = scratch.scores + head * kBlock + first;
      for (std::int64_t i = 0; i < last - first; ++i) {
        scores[i] = sums[i * heads + head] * problem.scale;
      }
    }
  }
}

template <int kWidth, class Storage>
void take_in_block(const Problem<Storage>& problem, const Block& block, std::int64_t b,
                   const Seen& seen, const Partial<Wide<Storage>>& partial,
                   const Scratch<Wide<Storage>>& scratch) {
  using W = Wide<Storage>;
  const std::int64_t width = problem.width, heads = problem.heads();
  const Storage* keys = problem.k_cache + b * problem.k_strides.batch;
  const Storage* cached_values = problem.v_cache + b * problem.v_strides.batch;
  W* scores = scratch.scores;
  for (std::int64_t t = 0; t < seen.count; ++t) {
    // What this query sees of the block has no gap.
    const std::int64_t at = seen.start + t - block.position;
    const std::int64_t end = at + 1 < block.n ? at + 1 : block.n;
    // Compared first: a position less a window of 2^63 - 1 is not an int64.
    const bool cut = problem.window > 0 && !block.are_sinks && problem.window <= at;
    const std::int64_t begin = cut ? at - problem.window + 1 : 0;
    if (begin >= end) continue;
    score<kWidth>(problem, keys, block, begin, end, problem.q + problem.query(b, t) * heads * width,
                  scratch);
    W* values = partial.values + t * heads * width;
    for (std::int64_t head = 0; head < heads; ++head) {
      const std::int64_t row = t * heads + head;
      take_in(scores + head * kBlock + begin, end - begin, width, partial.largest + row,
              partial.sum + row, values + head * width);
    }
    std::int64_t i = begin;
    for (; i + kTogether <= end; i += kTogether) {
      for_each_head<kTogether>(problem, cached_values, problem.v_strides, block.slots + i,
                               scratch.wide, [=](auto rows, std::int64_t head) {
                                 add_four<kWidth>(scores + head * kBlock + i, rows, width,
                                                  values + head * width);
                               });
    }
    for (; i < end; ++i) {
      for_each_head<1>(problem, cached_values, problem.v_strides, block.slots + i, scratch.wide,
                       [=](auto rows, std::int64_t head) {
                         add_one(scores[head * kBlock + i], rows[0], width, values + head * width);
                       });
    }
  }
}

template <int kWidth, class Storage>
void take_in_chunk(const Problem<Storage>& problem, std::int64_t item,
                   const Partial<Wide<Storage>>& partial, const Scratch<Wide<Storage>>& scratch) {
  using W = Wide<Storage>;
  const std::int64_t b = item / problem.n_chunks, rows = problem.rows();
  for (std::int64_t i = 0; i < rows; ++i) partial.largest[i] = -INFINITY, partial.sum[i] = 0;
  for (std::int64_t i = 0; i < rows * problem.width; ++i) partial.values[i] = W(0);
  const Seen seen = problem.seen(b);
  std::int64_t i = item % problem.n_chunks * problem.chunk;
  const std::int64_t end = i + problem.chunk < seen.n ? i + problem.chunk : seen.n;
  while (i < end) {
    const Block block(seen, i, end, problem.sinks, problem.ring);
    take_in_block<kWidth>(problem, block, b, seen, partial, scratch);
    i += block.n;
  }
}

// Adds the chunks of one query up, in order.
template <class Storage, class Out>
void add_chunks(const Problem<Storage>& problem, Wide<Storage>* workspace, std::int64_t b,
                std::int64_t row, Wide<Storage>* __restrict total, Out* __restrict y) {
  using W = Wide<Storage>;
  const std::int64_t width = problem.width;
  const auto part = [&](std::int64_t chunk) {
    return Partial<W>(workspace, b * problem.n_chunks + chunk, problem.batch * problem.n_chunks,
                      problem.rows(), width);
  };
  W largest = -INFINITY, sum = 0;
  for (std::int64_t c = 0; c < width; ++c) total[c] = 0;
  for (std::int64_t chunk = 0; chunk < problem.n_chunks; ++chunk) {
    const W here = part(chunk).largest[row];
    largest = here > largest ? here : largest;
  }
  const W shift = largest == -INFINITY ? W(0) : largest;
  for (std::int64_t chunk = 0; chunk < problem.n_chunks; ++chunk) {
    const Partial<W> partial = part(chunk);
    const W factor = exp_of(partial.largest[row] - shift);
    const W* __restrict values = partial.values + row * width;
    sum += factor * partial.sum[row];
#pragma omp simd
    for (std::int64_t c = 0; c < width; ++c) total[c] += factor * values[c];
  }
  const W norm = sum == 0 ? W(0) : W(1) / sum;
#pragma omp simd
  for (std::int64_t c = 0; c < width; ++c) y[c] = narrow<Out>(total[c] * norm);
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
