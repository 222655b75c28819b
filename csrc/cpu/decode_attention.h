// Attention of few new queries to a kv cache, piece by piece. The equations are in
// pyllm/reference/decode_attention.py.
//
// The keys that a row of the batch sees are numbered in the order of their positions, the sinks
// first, and cut into chunks. Each chunk is one pass over its keys with all heads, so that the
// cache is read as it lies, and gives a maximum, a sum and a weighted sum of values for each query
// (online softmax: Milakov & Gimelshein 2018, arXiv:1805.02867). The chunks are then added in
// order. Where they are cut depends on the sizes only, never on the number of threads.
//
// An int8 cache has a scale for each position and kv head: that of a key multiplies its score, that
// of a value its weight, so that no number of the cache is multiplied twice.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/int8_cache.h"
#include "cpu/lanes.h"
#include "cpu/numeric.h"
#include "cpu/online_softmax.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Keys whose scores are kept before their values are added; room for whole vectors behind them.
constexpr std::int64_t kBlock = 64, kRoom = 16, kScores = kBlock + kRoom;

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
  // Of an int8 cache (Int8): (batch, slots, groups).
  const float *k_scales = nullptr, *v_scales = nullptr;
  std::int64_t slots = 0;

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

// What a range of chunks works in. Rows of queries and values are in the order of load_two.
template <class Storage>
struct Scratch {
  using W = Wide<Storage>;
  W *scores, *queries, *values, *shrink;

  Scratch(std::int64_t heads, std::int64_t width)
      : scores(new W[heads * (kScores + 2 * ordered_width<Storage>(width) + 1)]),
        queries(scores + heads * kScores),
        values(queries + heads * ordered_width<Storage>(width)),
        shrink(values + heads * ordered_width<Storage>(width)) {}
  // Called by hand, see block_attention.h.
  void free() const { delete[] scores; }
};

// Query heads that go through keys and values together, and keys whose products are added up
// together: as many products as a vector has lanes.
constexpr int kKeysTogether = 4;
template <class W>
constexpr int kHeadsTogether = kLanes<W> > kKeysTogether ? kLanes<W> / kKeysTogether : 1;
// Vectors of values of each head that are kept in registers.
constexpr int kVectors = 4;

// kHeadsTogether query heads: their numbers, and where their kv head begins in a slot.
template <class Storage>
struct Heads {
  static constexpr int n = kHeadsTogether<Wide<Storage>>;
  std::int64_t head[n], at[n];
};

// Products of the heads' queries with four keys: products[j * 4 + i] is head j's with key i.
// shared: all heads read one kv head, and it is loaded once for them.
template <bool shared, int kWidth, class Storage>
inline void multiply_keys(const Heads<Storage>& heads, const Wide<Storage>* queries,
                          const Storage* const* rows, std::int64_t any_width,
                          Wide<Storage>* __restrict products) {
  using W = Wide<Storage>;
  constexpr int n = Heads<Storage>::n, step = kTwo<Storage>;
  const std::int64_t width = kWidth > 0 ? kWidth : any_width;
  const std::int64_t ordered = ordered_width<Storage>(width);
  Vector<W> sums[n * kKeysTogether];
#pragma GCC unroll 16
  for (int k = 0; k < n * kKeysTogether; ++k) sums[k] = Vector<W>{};
  const W* q[n];
#pragma GCC unroll 4
  for (int j = 0; j < n; ++j) q[j] = queries + heads.head[j] * ordered;
  for (std::int64_t c = 0; c < width; c += step) {
    Vector<W> a, b;
    const auto load_row = [&](const Storage* from) {
      if (width - c < step) {
        load_part(from, width - c, a, b);
      } else {
        load_two(from, a, b);
      }
    };
    if constexpr (shared) {
#pragma GCC unroll 4
      for (int i = 0; i < kKeysTogether; ++i) {
        load_row(rows[i] + heads.at[0] + c);
#pragma GCC unroll 4
        for (int j = 0; j < n; ++j) {
          sums[j * kKeysTogether + i] += load(q[j] + c) * a;
          sums[j * kKeysTogether + i] += load(q[j] + c + step / 2) * b;
        }
      }
    } else {
#pragma GCC unroll 4
      for (int j = 0; j < n; ++j) {
        const Vector<W> q_a = load(q[j] + c), q_b = load(q[j] + c + step / 2);
#pragma GCC unroll 4
        for (int i = 0; i < kKeysTogether; ++i) {
          load_row(rows[i] + heads.at[j] + c);
          sums[j * kKeysTogether + i] += q_a * a;
          sums[j * kKeysTogether + i] += q_b * b;
        }
      }
    }
  }
  fold<1, n * kKeysTogether>(sums);
#pragma GCC unroll 4
  for (int k = 0; k < n * kKeysTogether / kLanes<W>; ++k) store(sums[k], products + k * kLanes<W>);
}

// values[j] = shrink[j] * values[j] + sum_i weights[j][i] * rows[i], channels [c, c + kPairs *
// kTwo), of which the last `part` are there if that is not 0.
template <bool shared, int kPairs, class Storage>
inline void add_rows(const Heads<Storage>& heads, const Scratch<Storage>& scratch,
                     std::int64_t begin, std::int64_t end, const Storage* const* rows,
                     std::int64_t ordered, std::int64_t c, std::int64_t part) {
  using W = Wide<Storage>;
  constexpr int n = Heads<Storage>::n, lanes = kLanes<W>;
  Vector<W> sums[n][2 * kPairs];
  const W* weights[n];
#pragma GCC unroll 4
  for (int j = 0; j < n; ++j) {
    weights[j] = scratch.scores + heads.head[j] * kScores;
    const W shrink = scratch.shrink[heads.head[j]];
    const W* from = scratch.values + heads.head[j] * ordered + c;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * kPairs; ++v) sums[j][v] = shrink * load(from + v * lanes);
  }
  for (std::int64_t i = begin; i < end; ++i) {
    Vector<W> row[2 * kPairs];
#pragma GCC unroll 4
    for (int j = 0; j < n; ++j) {
      if (j == 0 || !shared) {
        const Storage* from = rows[i] + heads.at[j] + c;
#pragma GCC unroll 2
        for (int v = 0; v < kPairs; ++v) {
          if (kPairs == 1 && part > 0) {
            load_part(from, part, row[0], row[1]);
          } else {
            load_two(from + v * kTwo<Storage>, row[2 * v], row[2 * v + 1]);
          }
        }
      }
      const W weight = weights[j][i];
#pragma GCC unroll 4
      for (int v = 0; v < 2 * kPairs; ++v) sums[j][v] += weight * row[v];
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < n; ++j) {
    W* to = scratch.values + heads.head[j] * ordered + c;
#pragma GCC unroll 4
    for (int v = 0; v < 2 * kPairs; ++v) store(sums[j][v], to + v * lanes);
  }
}

// Calls use(heads, are_shared) for every query head, kHeadsTogether at a time; the last of them
// again where they do not come out even, which computes the same twice.
template <class Storage, class Use>
inline void for_each_heads(const Problem<Storage>& problem, std::int64_t head_stride,
                           const Use& use) {
  constexpr int n = Heads<Storage>::n;
  const std::int64_t total = problem.heads(), shared = problem.shared;
  for (std::int64_t first = 0; first < total; first += n) {
    Heads<Storage> heads;
    for (int j = 0; j < n; ++j) {
      heads.head[j] = first + j < total ? first + j : total - 1;
      heads.at[j] = heads.head[j] / shared * head_stride;
    }
    if (shared % n == 0) {
      use(heads, std::true_type{});
    } else {
      use(heads, std::false_type{});
    }
  }
}

// The scores of the queries with keys [begin, end) of a block.
template <int kWidth, class Storage>
void score(const Problem<Storage>& problem, const Storage* const* rows, std::int64_t begin,
           std::int64_t end, const Scratch<Storage>& scratch) {
  using W = Wide<Storage>;
  for (std::int64_t i = begin; i < end; i += kKeysTogether) {
    const Storage* keys[kKeysTogether];
    for (std::int64_t k = 0; k < kKeysTogether; ++k) keys[k] = rows[i + k < end ? i + k : i];
    for_each_heads<Storage>(problem, problem.k_strides.head,
                            [&](const Heads<Storage>& heads, auto shared) {
                              W products[Heads<Storage>::n * kKeysTogether];
                              multiply_keys<decltype(shared)::value, kWidth>(
                                  heads, scratch.queries, keys, problem.width, products);
                              for (int j = 0; j < Heads<Storage>::n; ++j) {
                                W* to = scratch.scores + heads.head[j] * kScores + i;
                                for (int k = 0; k < kKeysTogether; ++k) {
                                  to[k] = products[j * kKeysTogether + k] * problem.scale;
                                }
                              }
                            });
  }
}

template <int kWidth, class Storage>
void add_weighted(const Problem<Storage>& problem, const Storage* const* rows, std::int64_t begin,
                  std::int64_t end, const Scratch<Storage>& scratch) {
  constexpr int kPairs = kVectors / 2, step = kTwo<Storage>;
  const std::int64_t width = kWidth > 0 ? kWidth : problem.width;
  const std::int64_t ordered = ordered_width<Storage>(width);
  for_each_heads<Storage>(
      problem, problem.v_strides.head, [&](const Heads<Storage>& heads, auto is_shared) {
        constexpr bool shared = decltype(is_shared)::value;
        std::int64_t c = 0;
        for (; c + kPairs * step <= width; c += kPairs * step) {
          add_rows<shared, kPairs>(heads, scratch, begin, end, rows, ordered, c, 0);
        }
        for (; c < width; c += step) {
          const std::int64_t part = width - c < step ? width - c : 0;
          add_rows<shared, 1>(heads, scratch, begin, end, rows, ordered, c, part);
        }
      });
}

// In an int8 cache: the scores with each key, or the weights of each value, times its scale.
template <class Storage>
inline void apply_scales(const Problem<Storage>& problem, const float* scales, const Block& block,
                         std::int64_t b, std::int64_t begin, std::int64_t end,
                         const Scratch<Storage>& scratch) {
  const std::int64_t groups = problem.groups;
  const float* of_row = scales + b * problem.slots * groups;
  for (std::int64_t g = 0; g < groups; ++g) {
    float here[kBlock];
    for (std::int64_t i = begin; i < end; ++i) {
      here[i] = nan_if_infinite(of_row[block.slots[i] * groups + g]);
    }
    for (std::int64_t j = 0; j < problem.shared; ++j) {
      Wide<Storage>* __restrict s = scratch.scores + (g * problem.shared + j) * kScores;
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) s[i] *= here[i];
    }
  }
}

template <int kWidth, class Storage>
void take_in_block(const Problem<Storage>& problem, const Block& block, std::int64_t b,
                   std::int64_t position, const Partial<Wide<Storage>>& partial, std::int64_t row,
                   const Scratch<Storage>& scratch) {
  // What this query sees of the block has no gap.
  const std::int64_t at = position - block.position;
  const std::int64_t end = at + 1 < block.n ? at + 1 : block.n;
  // Compared first: a position less a window of 2^63 - 1 is not an int64.
  const bool cut = problem.window > 0 && !block.are_sinks && problem.window <= at;
  const std::int64_t begin = cut ? at - problem.window + 1 : 0;
  if (begin >= end) return;
  const Storage* rows[kBlock];
  const Storage* keys = problem.k_cache + b * problem.k_strides.batch;
  for (std::int64_t i = begin; i < end; ++i)
    rows[i] = keys + block.slots[i] * problem.k_strides.slot;
  score<kWidth>(problem, rows, begin, end, scratch);
  if constexpr (kIsInt8<Storage>) {
    apply_scales(problem, problem.k_scales, block, b, begin, end, scratch);
  }
  for (std::int64_t head = 0; head < problem.heads(); ++head) {
    scratch.shrink[head] = to_weights(scratch.scores + head * kScores + begin, end - begin,
                                      partial.largest + row + head, partial.sum + row + head);
  }
  if constexpr (kIsInt8<Storage>) {
    apply_scales(problem, problem.v_scales, block, b, begin, end, scratch);
  }
  const Storage* values = problem.v_cache + b * problem.v_strides.batch;
  for (std::int64_t i = begin; i < end; ++i) {
    rows[i] = values + block.slots[i] * problem.v_strides.slot;
  }
  add_weighted<kWidth>(problem, rows, begin, end, scratch);
}

template <int kWidth, class Storage>
void take_in_chunk(const Problem<Storage>& problem, std::int64_t item,
                   const Partial<Wide<Storage>>& partial, const Scratch<Storage>& scratch) {
  const std::int64_t b = item / problem.n_chunks, heads = problem.heads(), width = problem.width;
  const std::int64_t wide = ordered_width<Storage>(width);
  const Seen seen = problem.seen(b);
  const std::int64_t first = item % problem.n_chunks * problem.chunk;
  const std::int64_t end = first + problem.chunk < seen.n ? first + problem.chunk : seen.n;
  for (std::int64_t t = 0; t < problem.tokens; ++t) {
    const std::int64_t row = t * heads;
    for (std::int64_t i = row; i < row + heads; ++i) {
      partial.largest[i] = -INFINITY, partial.sum[i] = 0;
    }
    for (std::int64_t i = 0; i < heads * wide; ++i) scratch.values[i] = 0;
    if (t < seen.count && first < end) {
      for (std::int64_t head = 0; head < heads; ++head) {
        to_order<Storage>(problem.q + (problem.query(b, t) * heads + head) * width, width,
                          scratch.queries + head * wide);
      }
    }
    for (std::int64_t i = first; t < seen.count && i < end;) {
      const Block block(seen, i, end, problem.sinks, problem.ring);
      take_in_block<kWidth>(problem, block, b, seen.start + t, partial, row, scratch);
      i += block.n;
    }
    for (std::int64_t head = 0; head < heads; ++head) {
      from_order<Storage>(scratch.values + head * wide, width,
                          partial.values + (row + head) * width);
    }
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
