// The forward of attention on cards without tensor cores. The equations are in
// pyllm/reference/attention.py.
//
// A block has the queries of a tile and walks over the tiles of keys that any of them may see, with
// the largest score and the sum of each row so far (online softmax). Scores are products in float:
// those of half leave its range.

#include <cstdint>

#include "cuda/attention_tiles.cuh"

namespace pyllm::cuda {
namespace {

template <class T, int head>
__global__ void __launch_bounds__(kAttentionThreads)
    forward_kernel(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v,
                   Wide<T> scale, T* __restrict__ y, Wide<T>* __restrict__ lse, Sight sight) {
  using W = Wide<T>;
  using Scores = ScoreTile<W>;
  using Heads = HeadTile<W, head>;
  constexpr int kSide = Scores::kRows, kMicro = Scores::kMicroRows;
  PYLLM_SHARED(W, shared, [kSlice * (kSide + (head > kSide ? head : kSide))]);
  PYLLM_SHARED(W, exps, [kSide * kKeptStride<W>]);
  // The last queries see most, and begin first.
  const int n_tiles = (sight.n_queries + kSide - 1) / kSide;
  const int first = (n_tiles - 1 - static_cast<int>(blockIdx.x) % n_tiles) * kSide;
  const int head_of = static_cast<int>(blockIdx.x) / n_tiles, batch = static_cast<int>(blockIdx.y);
  const int kv_head = head_of / (sight.n_heads / sight.n_kv_heads);
  const auto query_at = [&](int i) { return sight.query_row(q, batch, head_of, first + i); };

  typename Heads::Sums sums;
  W largest[kMicro], total[kMicro];
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    largest[i] = -INFINITY;
    total[i] = 0;
  }
  for (int start = 0; start < sight.n_keys; start += kSide) {
    if (!sight.meets(first, start, kSide)) continue;
    typename Scores::Sums scores;
    multiply_heads<T>(
        query_at, [&](int j) { return sight.key_row(k, batch, kv_head, start + j); }, sight, shared,
        scores);
    // That has barriers: exps of the tile before have been read.
#pragma unroll
    for (int i = 0; i < kMicro; ++i) {
      const int row = Scores::row_of(i);
      W most = -INFINITY;
#pragma unroll
      for (int j = 0; j < Scores::kMicroColumns; ++j) {
        const bool seen = sight.sees(first + row, start + Scores::column_of(j));
        const W score = seen ? scores.at[i][j] * scale : W(-INFINITY);
        scores.at[i][j] = score;
        most = score > most || score != score ? score : most;
      }
      most = row_max(most);
      most = largest[i] > most || largest[i] != largest[i] ? largest[i] : most;
      // While nothing has been seen, -inf - -inf would be NaN.
      const W base = most == W(-INFINITY) ? W(0) : most;
      const W shrink = exp(largest[i] - base);
      W sum = 0;
#pragma unroll
      for (int j = 0; j < Scores::kMicroColumns; ++j) {
        const W e = exp(scores.at[i][j] - base);
        sum += e;
        scores.at[i][j] = e;
      }
      total[i] = total[i] * shrink + row_sum(sum);
      largest[i] = most;
#pragma unroll
      for (int j = 0; j < Heads::kMicroColumns; ++j) sums.at[i][j] *= shrink;
    }
    keep_by_key(scores, exps);
    const auto value_at = [&](int j) { return sight.key_row(v, batch, kv_head, start + j); };
    multiply_kept<Heads, kKeptStride<W>>(
        exps, across<T, head, kAttentionThreads>(value_at, sight.head, sight.packed), kSide, shared,
        sums);
  }
  store_heads<T, head>(
      sums, [&](int i) { return sight.query_row(y, batch, head_of, first + i); },
      [&](int i) { return total[i] == W(0) ? W(0) : W(1) / total[i]; }, sight);
#pragma unroll
  for (int i = 0; i < kMicro; ++i) {
    const int query = first + Scores::row_of(i);
    if (threadIdx.x % kThreadColumns != 0 || query >= sight.n_queries) continue;
    lse[sight.stat(batch, head_of, query)] = largest[i] + log(total[i]);
  }
}

}  // namespace

void attention_forward(DType dtype, const void* q, const void* k, const void* v, double scale,
                       void* y, void* lse, std::int64_t batch, std::int64_t n_queries,
                       std::int64_t n_keys, std::int64_t n_heads, std::int64_t n_kv_heads,
                       std::int64_t head, bool causal, std::int64_t window, std::int64_t sinks,
                       Stream stream) {
  const Sight sizes = sight_of(n_queries, n_keys, n_heads, n_kv_heads, head, causal, window, sinks);
  with_head(dtype, sizes.head, [=](auto storage, auto widest) {
    using T = decltype(storage);
    using W = Wide<T>;
    Sight sight = sizes;
    sight.packed = fits_packs<T>(head, q, k, v, y);
    const std::int64_t tiles = blocks_for(n_queries, kAttentionSide<W>);
    launch("attention_forward", forward_kernel<T, decltype(widest)::value>,
           {tiles * n_heads, batch}, kAttentionThreads, 0, stream, static_cast<const T*>(q),
           static_cast<const T*>(k), static_cast<const T*>(v), static_cast<W>(scale),
           static_cast<T*>(y), static_cast<W*>(lse), sight);
  });
}

}  // namespace pyllm::cuda
