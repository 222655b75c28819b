// The backward of attention on cards without tensor cores. The equations are in
// pyllm/reference/attention.py.
//
// One kernel walks over keys and has the gradient of its queries; another walks over the queries
// of all heads that share a kv head, and has the gradients of its keys and values. Both compute the
// scores once more, so that no sum leaves its block: there are no atomics, and the bits are always
// the same.

#include <cstdint>

#include "cuda/attention_tiles.cuh"
#include "cuda/reduce.h"

namespace pyllm::cuda {
namespace {

constexpr int kDeltaWarps = 8;

// delta = rowsum(dy * y), a warp for each row.
template <class T>
__global__ void __launch_bounds__(kDeltaWarps* kWarp)
    delta_kernel(const T* __restrict__ dy, const T* __restrict__ y, Wide<T>* __restrict__ delta,
                 std::int64_t rows, Sight sight) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kDeltaWarps + threadIdx.y;
  if (row >= rows) return;  // with the whole warp
  Wide<T> sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < sight.head; i += kWarp) {
    sum += widen(dy[row * sight.head + i]) * widen(y[row * sight.head + i]);
  }
  sum = warp_sum(sum);
  const std::int64_t at = row / sight.n_heads;  // batch and query
  const int batch = static_cast<int>(at / sight.n_queries);
  const int query = static_cast<int>(at % sight.n_queries);
  if (threadIdx.x == 0) {
    delta[sight.stat(batch, static_cast<int>(row % sight.n_heads), query)] = sum;
  }
}

template <class T>
struct BackwardInputs {
  const T *dy, *q, *k, *v;
  const Wide<T>*lse, *delta;
  Wide<T> scale;
};

// p and ds of a tile: the probabilities, and the gradient of the scores before they were scaled.
template <class T>
struct Probabilities {
  using W = Wide<T>;
  using Scores = ScoreTile<W>;
  typename Scores::Sums p, ds;

  __device__ __forceinline__ Probabilities(const BackwardInputs<T>& in, const Sight& sight,
                                           int batch, int head_of, int kv_head, int first,
                                           int start, W* shared) {
    multiply_heads<T>([&](int i) { return sight.query_row(in.q, batch, head_of, first + i); },
                      [&](int j) { return sight.key_row(in.k, batch, kv_head, start + j); }, sight,
                      shared, p);
    multiply_heads<T>([&](int i) { return sight.query_row(in.dy, batch, head_of, first + i); },
                      [&](int j) { return sight.key_row(in.v, batch, kv_head, start + j); }, sight,
                      shared, ds);
#pragma unroll
    for (int i = 0; i < Scores::kMicroRows; ++i) {
      const int query = first + Scores::row_of(i);
      const bool has = query < sight.n_queries;
      const W lse = has ? in.lse[sight.stat(batch, head_of, query)] : W(0);
      const W delta = has ? in.delta[sight.stat(batch, head_of, query)] : W(0);
#pragma unroll
      for (int j = 0; j < Scores::kMicroColumns; ++j) {
        const bool seen = sight.sees(query, start + Scores::column_of(j));
        const W e = seen ? exp(p.at[i][j] * in.scale - lse) : W(0);
        p.at[i][j] = e;
        ds.at[i][j] = e * (ds.at[i][j] - delta) * in.scale;
      }
    }
  }
};

template <class T, int head>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    queries_kernel(BackwardInputs<T> in, T* __restrict__ dq, Sight sight) {
  using W = Wide<T>;
  using Scores = ScoreTile<W>;
  using Heads = HeadTile<W, head>;
  constexpr int kSide = Scores::kRows;
  PYLLM_SHARED(W, shared, [kSlice * (kSide + (head > kSide ? head : kSide))]);
  PYLLM_SHARED(W, kept, [kSide * kKeptStride<W>]);
  const int n_tiles = (sight.n_queries + kSide - 1) / kSide;
  const int first = (n_tiles - 1 - static_cast<int>(blockIdx.x) % n_tiles) * kSide;
  const int head_of = static_cast<int>(blockIdx.x) / n_tiles, batch = static_cast<int>(blockIdx.y);
  const int kv_head = head_of / (sight.n_heads / sight.n_kv_heads);
  typename Heads::Sums sums;
  for (int start = 0; start < sight.n_keys; start += kSide) {
    if (!sight.meets(first, start, kSide)) continue;
    const Probabilities<T> tile(in, sight, batch, head_of, kv_head, first, start, shared);
    // The products above have barriers: `kept` of the tile before has been read.
    keep_by_key(tile.ds, kept);
    const auto key_at = [&](int j) { return sight.key_row(in.k, batch, kv_head, start + j); };
    multiply_kept<Heads, kKeptStride<W>>(
        kept, across<T, head, kAttentionThreads>(key_at, sight.head, sight.packed), kSide, shared,
        sums);
  }
  store_heads<T, head>(
      sums, [&](int i) { return sight.query_row(dq, batch, head_of, first + i); },
      [](int) { return W(1); }, sight);
}

template <class T, int head>
__global__ void __launch_bounds__(kAttentionThreads, 1)
    keys_kernel(BackwardInputs<T> in, T* __restrict__ dk, T* __restrict__ dv, Sight sight) {
  using W = Wide<T>;
  using Scores = ScoreTile<W>;
  using Heads = HeadTile<W, head>;
  constexpr int kSide = Scores::kRows;
  PYLLM_SHARED(W, shared, [kSlice * (kSide + (head > kSide ? head : kSide))]);
  PYLLM_SHARED(W, kept, [kSide * kKeptStride<W>]);
  const int n_tiles = (sight.n_keys + kSide - 1) / kSide;
  const int start = static_cast<int>(blockIdx.x) % n_tiles * kSide;
  const int kv_head = static_cast<int>(blockIdx.x) / n_tiles, batch = static_cast<int>(blockIdx.y);
  const int sharing = sight.n_heads / sight.n_kv_heads;
  typename Heads::Sums dk_sums, dv_sums;
  for (int head_of = kv_head * sharing; head_of < (kv_head + 1) * sharing; ++head_of) {
    for (int first = 0; first < sight.n_queries; first += kSide) {
      if (!sight.meets(first, start, kSide)) continue;
      const Probabilities<T> tile(in, sight, batch, head_of, kv_head, first, start, shared);
      const auto dy_at = [&](int i) { return sight.query_row(in.dy, batch, head_of, first + i); };
      const auto query_at = [&](int i) { return sight.query_row(in.q, batch, head_of, first + i); };
      keep_by_query(tile.p, kept);
      multiply_kept<Heads, kKeptStride<W>>(
          kept, across<T, head, kAttentionThreads>(dy_at, sight.head, sight.packed), kSide, shared,
          dv_sums);
      __syncthreads();  // p has been read
      keep_by_query(tile.ds, kept);
      multiply_kept<Heads, kKeptStride<W>>(
          kept, across<T, head, kAttentionThreads>(query_at, sight.head, sight.packed), kSide,
          shared, dk_sums);
    }
  }
  const auto one = [](int) { return W(1); };
  store_heads<T, head>(
      dk_sums, [&](int j) { return sight.key_row(dk, batch, kv_head, start + j); }, one, sight);
  store_heads<T, head>(
      dv_sums, [&](int j) { return sight.key_row(dv, batch, kv_head, start + j); }, one, sight);
}

}  // namespace

void attention_backward(DType dtype, const void* dy, const void* q, const void* k, const void* v,
                        const void* y, const void* lse, double scale, void* delta, void* dq,
                        void* dk, void* dv, std::int64_t batch, std::int64_t n_queries,
                        std::int64_t n_keys, std::int64_t n_heads, std::int64_t n_kv_heads,
                        std::int64_t head, bool causal, std::int64_t window, std::int64_t sinks,
                        Stream stream) {
  const Sight sizes = sight_of(n_queries, n_keys, n_heads, n_kv_heads, head, causal, window, sinks);
  with_head(dtype, sizes.head, [=](auto storage, auto widest) {
    using T = decltype(storage);
    using W = Wide<T>;
    constexpr int kHead = decltype(widest)::value;
    const char* const name = "attention_backward";
    Sight sight = sizes;
    sight.packed = fits_packs<T>(head, dy, q, k, v, dq, dk, dv);
    const BackwardInputs<T> in{static_cast<const T*>(dy),  static_cast<const T*>(q),
                               static_cast<const T*>(k),   static_cast<const T*>(v),
                               static_cast<const W*>(lse), static_cast<const W*>(delta),
                               static_cast<W>(scale)};
    const std::int64_t rows = batch * n_queries * n_heads;
    const std::int64_t query_tiles = blocks_for(n_queries, kAttentionSide<W>);
    const std::int64_t key_tiles = blocks_for(n_keys, kAttentionSide<W>);
    launch(name, delta_kernel<T>, {blocks_for(rows, kDeltaWarps)}, dim3(kWarp, kDeltaWarps), 0,
           stream, static_cast<const T*>(dy), static_cast<const T*>(y), static_cast<W*>(delta),
           rows, sight);
    launch(name, queries_kernel<T, kHead>, {query_tiles * n_heads, batch}, kAttentionThreads, 0,
           stream, in, static_cast<T*>(dq), sight);
    launch(name, keys_kernel<T, kHead>, {key_tiles * n_kv_heads, batch}, kAttentionThreads, 0,
           stream, in, static_cast<T*>(dk), static_cast<T*>(dv), sight);
  });
}

}  // namespace pyllm::cuda
