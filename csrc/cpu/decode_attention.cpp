// Attention of few new queries to a kv cache: the pieces of decode_attention.h on threads.

#include "cpu/decode_attention.h"

#include <atomic>
#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Products of a query's and a key's channel in a range handed to a thread: a whole chunk is twice
// as much.
constexpr std::int64_t kProductsPerRange = per_range(32768);

// What the threads of a call share: queries in the type of the sums, the chunks' parts, and how
// many chunks of each row of the batch are done.
template <class W>
struct Workspace {
  W *queries, *parts;
  std::atomic<std::int64_t>* done;

  Workspace(std::int64_t n_queries, std::int64_t n_parts, std::int64_t batch)
      : queries(new W[n_queries + n_parts]),
        parts(queries + n_queries),
        done(new std::atomic<std::int64_t>[batch]()) {}
  // Called by hand, see block_attention.h.
  void free() const {
    delete[] queries;
    delete[] done;
  }
};

template <int kWidth, class Storage, class Query>
void decode(Problem<Storage> problem, const Query* q, Query* y, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t width = problem.width, rows = problem.rows();
  const std::int64_t n_items = problem.batch * problem.n_chunks,
                     n_queries = problem.batch * rows * width;
  const Workspace<W> workspace(n_queries, n_items * rows * (width + 2), problem.batch);
  for (std::int64_t i = 0; i < n_queries; ++i) workspace.queries[i] = widen(q[i]);
  problem.q = workspace.queries;
  const std::int64_t grain = rows_per_range(kProductsPerRange, problem.chunk * rows * width);
  parallel_for(n_items, grain, n_threads, [&](std::int64_t begin, std::int64_t end) {
    const Scratch<Storage> scratch(problem.heads(), width);
    for (std::int64_t item = begin; item < end; ++item) {
      take_in_chunk<kWidth>(problem, item, Partial<W>(workspace.parts, item, n_items, rows, width),
                            scratch);
      // Who finishes the last chunk of a row of the batch adds them up: no second parallel loop.
      const std::int64_t b = item / problem.n_chunks;
      if (workspace.done[b].fetch_add(1, std::memory_order_acq_rel) + 1 < problem.n_chunks)
        continue;
      for (std::int64_t row = 0; row < rows; ++row) {
        add_chunks(problem, workspace.parts, b, row, scratch.values, y + (b * rows + row) * width);
      }
    }
    scratch.free();
  });
  workspace.free();
}

// A width known to the compiler takes a third off: its loops become straight lines. Not of double,
// which nobody decodes with, and each width of a type takes seconds to compile.
template <class Storage, class Query>
void decode_any(const Problem<Storage>& problem, const void* q, void* y, int n_threads) {
  auto run = decode<0, Storage, Query>;
  if constexpr (!std::is_same_v<Query, double>) {
    if (problem.width == 64) run = decode<64, Storage, Query>;
    if (problem.width == 128) run = decode<128, Storage, Query>;
  }
  run(problem, static_cast<const Query*>(q), static_cast<Query*>(y), n_threads);
}

}  // namespace

void decode_attention(DType dtype, const void* q, const void* k_cache, std::int64_t k_batch_stride,
                      std::int64_t k_slot_stride, std::int64_t k_head_stride, const void* v_cache,
                      std::int64_t v_batch_stride, std::int64_t v_slot_stride,
                      std::int64_t v_head_stride, const void* k_scales, const void* v_scales,
                      std::int64_t slots, const void* starts, const void* counts, double scale,
                      std::int64_t window, std::int64_t sinks, std::int64_t ring, void* y,
                      std::int64_t batch, std::int64_t tokens, std::int64_t groups,
                      std::int64_t shared, std::int64_t width, std::int64_t chunk,
                      std::int64_t n_chunks, int n_threads) {
  const auto run = [=](auto stored, auto query) {
    using S = decltype(stored);
    using W = Wide<S>;
    const Problem<S> problem{nullptr,
                             static_cast<const S*>(k_cache),
                             static_cast<const S*>(v_cache),
                             {k_batch_stride, k_slot_stride, k_head_stride},
                             {v_batch_stride, v_slot_stride, v_head_stride},
                             static_cast<const std::int32_t*>(starts),
                             static_cast<const std::int32_t*>(counts),
                             static_cast<W>(scale),
                             window,
                             sinks,
                             ring,
                             batch,
                             tokens,
                             groups,
                             shared,
                             width,
                             chunk,
                             n_chunks,
                             nullptr,
                             static_cast<const float*>(k_scales),
                             static_cast<const float*>(v_scales),
                             slots};
    decode_any<S, decltype(query)>(problem, q, y, n_threads);
  };
  with_storage(dtype, [=](auto query) {
    if (k_scales == nullptr) {
      run(query, query);
    } else {
      run(Int8<Wide<decltype(query)>>{}, query);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
