// The output projection and the cross-entropy in one, on cards without tensor cores. The equations
// are in pyllm/reference/linear_cross_entropy.py.
//
// Logits never leave the block that computes them, and are never rounded to 16 bits. Forward: each
// tile of words leaves the largest logit and the sum of each row, a second kernel joins them.
// Backward: tiles of logits are computed once more, and their gradients are what is stored, for
// some of the words at a time: then all rows of dweight for these words are one plain product.

#include <cmath>
#include <cstdint>

#include "cuda/reduce.h"
#include "cuda/tile.cuh"

namespace pyllm::cuda {
namespace {

template <class T>
struct Projection {
  const T *x, *weight;
  int n_rows, n_words, width;
  bool packed;
};

// Logits of rows from `first` on and words from `first_word` on.
template <class T>
__device__ __forceinline__ void logits_of(const Projection<T>& in, int first, int first_word,
                                          Wide<T>* shared, typename ProductTile<T>::Sums& sums) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  const auto x_at = [&](int i) -> const T* {
    return first + i < in.n_rows ? in.x + std::int64_t{first + i} * in.width : nullptr;
  };
  const auto weight_at = [&](int j) -> const T* {
    const int word = first_word + j;
    return word < in.n_words ? in.weight + std::int64_t{word} * in.width : nullptr;
  };
  const Along<T, W, Tile::kRows, Tile::kThreads> left(x_at, in.packed);
  const Along<T, W, Tile::kColumns, Tile::kThreads> right(weight_at, in.packed);
  multiply<Tile>(left, right, in.width, shared, sums);
}

// partials: (tiles of words, 2, rows): the largest logit, and the sum of exp(logit - largest).
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads)
    forward_kernel(Projection<T> in, const std::int64_t* __restrict__ targets,
                   Wide<T>* __restrict__ partials, Wide<T>* __restrict__ picked) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const int first = static_cast<int>(blockIdx.x) * Tile::kRows;
  const int first_word = static_cast<int>(blockIdx.y) * Tile::kColumns;
  typename Tile::Sums logits;
  logits_of(in, first, first_word, shared, logits);
  W* const of_tile = partials + std::int64_t{blockIdx.y} * 2 * in.n_rows;
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    const int row = first + Tile::row_of(i);
    const std::int64_t target = row < in.n_rows ? targets[row] : -1;
    W largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; ++j) {
      const int word = first_word + Tile::column_of(j);
      if (word >= in.n_words) continue;
      const W logit = logits.at[i][j];
      if (word == target) picked[row] = logit;
      largest = logit > largest || logit != logit ? logit : largest;
    }
    largest = row_max(largest);
    W sum = 0;
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; ++j) {
      if (first_word + Tile::column_of(j) >= in.n_words) continue;
      // Not -inf - -inf.
      sum += largest == W(-INFINITY) ? W(0) : exp(logits.at[i][j] - largest);
    }
    sum = row_sum(sum);
    if (row < in.n_rows && threadIdx.x % kThreadColumns == 0) {
      of_tile[row] = largest;
      of_tile[in.n_rows + row] = sum;
    }
  }
}

constexpr int kJoinRows = 8;  // warps of a block, each with a share of the tiles of 32 rows

// Neighbours in a warp are rows; its warps take the tiles in turn.
template <class W>
__global__ void __launch_bounds__(kJoinRows* kWarp)
    join_kernel(const W* __restrict__ partials, const W* __restrict__ picked,
                const std::int64_t* __restrict__ targets, W* __restrict__ loss, W* __restrict__ lse,
                std::int64_t ignore_index, int n_rows, int n_words, int n_tiles) {
  PYLLM_SHARED(W, largest_of, [kJoinRows][kWarp]);
  PYLLM_SHARED(W, sum_of, [kJoinRows][kWarp]);
  const int row = static_cast<int>(blockIdx.x) * kWarp + static_cast<int>(threadIdx.x);
  W largest = -INFINITY, sum = 0;
  const auto join = [&](W other, W other_sum) {
    const W most = other > largest || other != other ? other : largest;
    const W base = most == W(-INFINITY) ? W(0) : most;
    sum = sum * exp(largest - base) + other_sum * exp(other - base);
    largest = most;
  };
  if (row < n_rows) {
    for (int tile = static_cast<int>(threadIdx.y); tile < n_tiles; tile += kJoinRows) {
      const W* const of_tile = partials + std::int64_t{tile} * 2 * n_rows;
      join(of_tile[row], of_tile[n_rows + row]);
    }
  }
  largest_of[threadIdx.y][threadIdx.x] = largest;
  sum_of[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || row >= n_rows) return;
  for (int i = 1; i < kJoinRows; ++i) join(largest_of[i][threadIdx.x], sum_of[i][threadIdx.x]);
  const std::int64_t target = targets[row];
  const W total = largest + log(sum);
  lse[row] = total;
  if (target == ignore_index) {
    loss[row] = 0;
  } else {
    // A target out of range cannot raise an error from here.
    loss[row] = target >= 0 && target < n_words ? total - picked[row] : W(NAN);
  }
}

// dlogits: (rows, words from first_word to last_word).
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads)
    backward_kernel(Projection<T> in, const Wide<T>* __restrict__ dloss,
                    const std::int64_t* __restrict__ targets, const Wide<T>* __restrict__ lse,
                    T* __restrict__ dlogits, std::int64_t ignore_index, int first_word,
                    int last_word, bool packed) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  constexpr int kGroup = Tile::kColumnGroup;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const int first = static_cast<int>(blockIdx.x) * Tile::kRows;
  const int begin = static_cast<int>(blockIdx.y) * Tile::kColumns;
  typename Tile::Sums logits;
  logits_of(in, first, first_word + begin, shared, logits);
  const int n_words = last_word - first_word;
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    const int row = first + Tile::row_of(i);
    if (row >= in.n_rows) continue;
    const std::int64_t target = targets[row];
    const W upstream = target == ignore_index ? W(0) : dloss[row], log_sum = lse[row];
    T* const to = dlogits + std::int64_t{row} * n_words;
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; j += kGroup) {
      const int column = begin + Tile::column_group(j / kGroup);
      Pack<T, kGroup> pack;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const W p = exp(logits.at[i][j + k] - log_sum);
        const W one = first_word + column + k == target ? W(1) : W(0);
        pack.values[k] = narrow<T>((p - one) * upstream);
      }
      store_part(to + column, n_words - column, packed, pack);
    }
  }
}

template <class T>
Projection<T> projection(const void* x, const void* weight, std::int64_t n_rows,
                         std::int64_t n_words, std::int64_t width) {
  return {static_cast<const T*>(x), static_cast<const T*>(weight),
          static_cast<int>(n_rows), static_cast<int>(n_words),
          static_cast<int>(width),  fits_packs<T>(width, x, weight)};
}

}  // namespace

void linear_cross_entropy_forward(DType dtype, const void* x, const void* weight,
                                  const void* targets, void* loss, void* lse, void* partials,
                                  void* picked, std::int64_t ignore_index, std::int64_t n_rows,
                                  std::int64_t n_words, std::int64_t width, Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    using Tile = ProductTile<T>;
    const auto* const of_rows = static_cast<const std::int64_t*>(targets);
    const std::int64_t tiles = blocks_for(n_words, Tile::kColumns);
    launch("linear_cross_entropy_forward", forward_kernel<T>,
           {blocks_for(n_rows, Tile::kRows), tiles}, Tile::kThreads, 0, stream,
           projection<T>(x, weight, n_rows, n_words, width), of_rows, static_cast<W*>(partials),
           static_cast<W*>(picked));
    launch("linear_cross_entropy_forward", join_kernel<W>, {blocks_for(n_rows, kWarp)},
           dim3(kWarp, kJoinRows), 0, stream, static_cast<const W*>(partials),
           static_cast<const W*>(picked), of_rows, static_cast<W*>(loss), static_cast<W*>(lse),
           ignore_index, static_cast<int>(n_rows), static_cast<int>(n_words),
           static_cast<int>(tiles));
  });
}

void linear_cross_entropy_backward(DType dtype, const void* dloss, const void* x,
                                   const void* weight, const void* targets, const void* lse,
                                   void* dlogits, std::int64_t ignore_index, std::int64_t n_rows,
                                   std::int64_t width, std::int64_t first_word,
                                   std::int64_t last_word, Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    using Tile = ProductTile<T>;
    const std::int64_t n_words = last_word - first_word;
    launch("linear_cross_entropy_backward", backward_kernel<T>,
           {blocks_for(n_rows, Tile::kRows), blocks_for(n_words, Tile::kColumns)}, Tile::kThreads,
           0, stream, projection<T>(x, weight, n_rows, last_word, width),
           static_cast<const W*>(dloss), static_cast<const std::int64_t*>(targets),
           static_cast<const W*>(lse), static_cast<T*>(dlogits), ignore_index,
           static_cast<int>(first_word), static_cast<int>(last_word),
           fits_packs<T>(n_words, dlogits));
  });
}

}  // namespace pyllm::cuda
