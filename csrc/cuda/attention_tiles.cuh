// What the attention kernels share: the tiles, and which keys a query may see.
#pragma once

#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "cuda/tile.cuh"

namespace pyllm::cuda {

// 64 queries by 64 keys (of doubles, 32) by 256 threads. Rows of `head` numbers are as wide as the
// widest head that a kernel serves.
template <class W>
constexpr int kAttentionSide = sizeof(W) == 8 ? 32 : 64;
template <class W>
using ScoreTile = Tile<W, kAttentionSide<W>, kAttentionSide<W>, 16>;
template <class W, int head>
using HeadTile = Tile<W, kAttentionSide<W>, head, 16>;
constexpr int kAttentionThreads = 256;
// Of what is kept of a tile in shared memory: columns in a row would share their banks.
template <class W>
constexpr int kKeptStride = kAttentionSide<W> + 4;

// Sizes, and the mask: query t stands at n_keys - n_queries + t. No window: 0.
struct Sight {
  int n_queries, n_keys, n_heads, n_kv_heads, head;
  bool causal, packed;
  int window, sinks;

  __device__ __forceinline__ bool sees(int query, int key) const {
    const int at = n_keys - n_queries + query;
    return query < n_queries && key < n_keys && (!causal || key <= at) &&
           (window == 0 || at - key < window || key < sinks);
  }
  // May any of the `side` queries from `query` on see any of the `side` keys from `key` on?
  __device__ __forceinline__ bool meets(int query, int key, int side) const {
    const int first = n_keys - n_queries + query;
    const int last = n_keys - n_queries + min(query + side, n_queries) - 1;
    return (!causal || key <= last) &&
           (window == 0 || first - (key + side - 1) < window || key < sinks);
  }

  // Rows of q, y and their gradients, and of k, v and theirs; null behind the last one.
  template <class T>
  __device__ __forceinline__ T* query_row(T* from, int batch, int head_of, int query) const {
    if (query >= n_queries) return nullptr;
    return from + ((std::int64_t{batch} * n_queries + query) * n_heads + head_of) * head;
  }
  template <class T>
  __device__ __forceinline__ T* key_row(T* from, int batch, int kv_head, int key) const {
    if (key >= n_keys) return nullptr;
    return from + ((std::int64_t{batch} * n_keys + key) * n_kv_heads + kv_head) * head;
  }
  __device__ __forceinline__ std::int64_t stat(int batch, int head_of, int query) const {
    return (std::int64_t{batch} * n_heads + head_of) * n_queries + query;
  }
};

// sums = products of rows of queries with rows of keys (or of dy with v).
template <class T, class QueryAt, class KeyAt>
__device__ __forceinline__ void multiply_heads(const QueryAt& query_at, const KeyAt& key_at,
                                               const Sight& sight, Wide<T>* shared,
                                               typename ScoreTile<Wide<T>>::Sums& sums) {
  using W = Wide<T>;
  constexpr int kSide = kAttentionSide<W>;
  const Along<T, W, kSide, kAttentionThreads> left(query_at, sight.packed);
  const Along<T, W, kSide, kAttentionThreads> right(key_at, sight.packed);
  multiply<ScoreTile<W>>(left, right, sight.head, shared, sums);
}

// A tile of scores to shared memory, key by key: entry (query, key) at key * kKeptStride + query.
template <class W>
__device__ __forceinline__ void keep_by_key(const typename ScoreTile<W>::Sums& entries, W* kept) {
  using Scores = ScoreTile<W>;
  constexpr int kGroup = Scores::kRowGroup;
#pragma unroll
  for (int i = 0; i < Scores::kMicroRows; i += kGroup) {
#pragma unroll
    for (int j = 0; j < Scores::kMicroColumns; ++j) {
      Pack<W, kGroup> pack;
#pragma unroll
      for (int n = 0; n < kGroup; ++n) pack.values[n] = entries.at[i + n][j];
      store_pack(kept + Scores::column_of(j) * kKeptStride<W> + Scores::row_of(i), pack);
    }
  }
}

// The same query by query.
template <class W>
__device__ __forceinline__ void keep_by_query(const typename ScoreTile<W>::Sums& entries, W* kept) {
  using Scores = ScoreTile<W>;
  constexpr int kGroup = Scores::kColumnGroup;
#pragma unroll
  for (int i = 0; i < Scores::kMicroRows; ++i) {
#pragma unroll
    for (int j = 0; j < Scores::kMicroColumns; j += kGroup) {
      Pack<W, kGroup> pack;
#pragma unroll
      for (int n = 0; n < kGroup; ++n) pack.values[n] = entries.at[i][j + n];
      store_pack(kept + Scores::row_of(i) * kKeptStride<W> + Scores::column_of(j), pack);
    }
  }
}

// Rows of a result, each of them times a number.
template <class T, int head, class RowAt, class ScaleOf>
__device__ __forceinline__ void store_heads(const typename HeadTile<Wide<T>, head>::Sums& sums,
                                            const RowAt& row_at, const ScaleOf& scale_of,
                                            const Sight& sight) {
  using Tile = HeadTile<Wide<T>, head>;
  constexpr int kGroup = Tile::kColumnGroup;
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    T* const row = row_at(Tile::row_of(i));
    if (row == nullptr) continue;
    const Wide<T> scale = scale_of(i);
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; j += kGroup) {
      const int column = Tile::column_group(j / kGroup);
      Pack<T, kGroup> pack;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) pack.values[k] = narrow<T>(sums.at[i][j + k] * scale);
      store_part(row + column, sight.head - column, sight.packed, pack);
    }
  }
}

inline Sight sight_of(std::int64_t n_queries, std::int64_t n_keys, std::int64_t n_heads,
                      std::int64_t n_kv_heads, std::int64_t head, bool causal, std::int64_t window,
                      std::int64_t sinks) {
  // No more than there is to see: such numbers can be added without leaving int.
  const std::int64_t most = n_queries + n_keys;
  if (most > 1000000000) throw std::invalid_argument("attention: too many positions");
  return {static_cast<int>(n_queries),
          static_cast<int>(n_keys),
          static_cast<int>(n_heads),
          static_cast<int>(n_kv_heads),
          static_cast<int>(head),
          causal,
          false,
          static_cast<int>(window < most ? window : most),
          static_cast<int>(sinks < most ? sinks : most)};
}

// Calls fn(T{}, width) with the storage type and, as a type, the width of a kernel for this head.
template <class Fn>
void with_head(DType dtype, int head, const Fn& fn) {
  if (head < 1 || head > 128) throw std::invalid_argument("attention: heads of 1 to 128 only");
  with_storage(dtype, [&](auto storage) {
    if (head <= 64) return fn(storage, std::integral_constant<int, 64>{});
    fn(storage, std::integral_constant<int, 128>{});
  });
}

}  // namespace pyllm::cuda
