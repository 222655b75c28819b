// The backward of a mixture of experts on cards without tensor cores. The equations are in
// pyllm/reference/moe_ffn.py.
//
// dh comes from gathered rows of dy; on the way out it becomes the gradient of the pre-activation,
// the weighted hidden rows that dw_out needs, and this tile's part of the routing weights'
// gradient. Sums are float (double for double): gradients in float16 are too small for halfs. A
// block owns what it writes, and nothing is added up in memory, so that the bits are always the
// same.

#include <cstdint>

#include "cuda/moe_tiles.cuh"

namespace pyllm::cuda {
namespace {

// dpre, weighted h, and per column tile a partial dot product of dh and h for each row.
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads)
    hidden_kernel(const T* __restrict__ dy, const T* __restrict__ w_out,
                  const Wide<T>* __restrict__ routing_weights, const T* __restrict__ pre,
                  Routing routing, T* __restrict__ dpre, T* __restrict__ weighted_h,
                  Wide<T>* __restrict__ partials, int width, int hidden, bool gated, bool packed) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  constexpr int kGroup = Tile::kColumnGroup;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const RowTile tile(routing, Tile::kRows);
  if (tile.rows == 0) return;
  const int first = static_cast<int>(blockIdx.y) * Tile::kColumns;
  typename Tile::Sums sums;
  if (tile.expert < routing.n_experts) {
    const T* const weights = w_out + std::int64_t{tile.expert} * width * hidden + first;
    const auto dy_at = [&](int i) -> const T* {
      if (i >= tile.rows) return nullptr;
      return dy + std::int64_t{routing.token_of(tile.first + i)} * width;
    };
    const auto weight_at = [=](int k) { return weights + std::int64_t{k} * hidden; };
    const Along<T, W, Tile::kRows, Tile::kThreads> left(dy_at, packed);
    const auto right = across<T, Tile::kColumns, Tile::kThreads>(weight_at, hidden - first, packed);
    multiply<Tile>(left, right, width, shared, sums);
  } else {
    fill_with_nan<Tile>(sums);
  }
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    const bool has = Tile::row_of(i) < tile.rows;
    const std::int64_t row = tile.first + (has ? Tile::row_of(i) : 0);
    const W weight = routing_weights[routing.order[row]];
    const std::int64_t pre_row = row * (gated ? 2 * hidden : hidden);
    W dot = 0;
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; j += kGroup) {
      const int f = first + Tile::column_group(j / kGroup);
      Pack<T, kGroup> dgates, dups, hiddens;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        const bool inside = has && f + k < hidden;
        const W gate = inside ? widen(pre[pre_row + f + k]) : W(0);
        const W up = inside && gated ? widen(pre[pre_row + hidden + f + k]) : W(0);
        const Activation<W> at(gated, gate, up);
        const W dh = sums.at[i][j + k];
        if (inside) dot += dh * at.hidden;
        dgates.values[k] = narrow<T>(dh * weight * at.dgate);
        dups.values[k] = narrow<T>(dh * weight * at.dup);
        hiddens.values[k] = narrow<T>(at.hidden * weight);
      }
      const int left = has ? hidden - f : 0;
      store_part(dpre + pre_row + f, left, packed, dgates);
      if (gated) store_part(dpre + pre_row + hidden + f, left, packed, dups);
      store_part(weighted_h + row * hidden + f, left, packed, hiddens);
    }
    dot = row_sum(dot);
    if (has && threadIdx.x % kThreadColumns == 0) {
      partials[std::int64_t{blockIdx.y} * routing.n_rows + row] = dot;
    }
  }
}

// The gradient of the gathered rows of x.
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads)
    rows_kernel(const T* __restrict__ dpre, const T* __restrict__ w_in, Routing routing,
                T* __restrict__ dx_rows, int width, int columns, bool packed) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const RowTile tile(routing, Tile::kRows);
  if (tile.rows == 0) return;
  const int first = static_cast<int>(blockIdx.y) * Tile::kColumns;
  typename Tile::Sums sums;
  if (tile.expert < routing.n_experts) {
    const T* const weights = w_in + std::int64_t{tile.expert} * columns * width + first;
    const auto dpre_at = [&](int i) -> const T* {
      return i < tile.rows ? dpre + std::int64_t{tile.first + i} * columns : nullptr;
    };
    const auto weight_at = [=](int k) { return weights + std::int64_t{k} * width; };
    const Along<T, W, Tile::kRows, Tile::kThreads> left(dpre_at, packed);
    const auto right = across<T, Tile::kColumns, Tile::kThreads>(weight_at, width - first, packed);
    multiply<Tile>(left, right, columns, shared, sums);
  } else {
    fill_with_nan<Tile>(sums);
  }
  T* const to = dx_rows + std::int64_t{tile.first} * width;
  store_rows<T, Tile>(sums, to, tile.rows, width, first, packed);
}

// Rows that are sorted already, or that are a token's.
template <class T>
struct Rows {
  const T* from;
  int width;
  bool gathered;

  __device__ __forceinline__ const T* at(const Routing& routing, int row) const {
    return from + std::int64_t{gathered ? routing.token_of(row) : row} * width;
  }
};

// The gradient of an expert's matrix (left.width, right.width): left^T right over its rows.
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1)
    weights_kernel(Rows<T> left_rows, Rows<T> right_rows, Routing routing, T* __restrict__ dw,
                   bool packed) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const int n_right = (right_rows.width + Tile::kColumns - 1) / Tile::kColumns;
  const int left_first = static_cast<int>(blockIdx.x) / n_right * Tile::kRows;
  const int right_first = static_cast<int>(blockIdx.x) % n_right * Tile::kColumns;
  const int expert = static_cast<int>(blockIdx.y);
  const int begin = routing.offsets[expert], rows = routing.offsets[expert + 1] - begin;
  const auto left_at = [&](int k) { return left_rows.at(routing, begin + k) + left_first; };
  const auto right_at = [&](int k) { return right_rows.at(routing, begin + k) + right_first; };
  const auto left =
      across<T, Tile::kRows, Tile::kThreads>(left_at, left_rows.width - left_first, packed);
  const auto right =
      across<T, Tile::kColumns, Tile::kThreads>(right_at, right_rows.width - right_first, packed);
  typename Tile::Sums sums;
  multiply<Tile>(left, right, rows, shared, sums);
  dw += (std::int64_t{expert} * left_rows.width + left_first) * right_rows.width;
  const int left_in_tile = left_rows.width - left_first;
  store_rows<T, Tile>(sums, dw, left_in_tile, right_rows.width, right_first, packed);
}

constexpr int kDotBlock = 256;

template <class W>
__global__ void __launch_bounds__(kDotBlock)
    dweights_kernel(const W* __restrict__ partials, const int* __restrict__ position,
                    W* __restrict__ dweights, int n_rows, int n_partials) {
  const std::int64_t slot = std::int64_t{blockIdx.x} * kDotBlock + threadIdx.x;
  if (slot >= n_rows) return;
  const W* const of_row = partials + position[slot];
  W sum = 0;
  for (int i = 0; i < n_partials; ++i) sum += of_row[std::int64_t{i} * n_rows];
  dweights[slot] = sum;
}

}  // namespace

void moe_ffn_backward(DType dtype, const void* dy, const void* x, const void* w_in,
                      const void* w_out, const void* weights, const void* pre, const void* order,
                      const void* position, const void* offsets, const void* tiles, void* dpre,
                      void* weighted_h, void* partials, void* dx_rows, void* dw_in, void* dw_out,
                      void* dweights, std::int64_t n_rows, std::int64_t top_k,
                      std::int64_t n_experts, std::int64_t width, std::int64_t hidden, bool gated,
                      std::int64_t most_tiles, Stream stream) {
  const Routing routing{static_cast<const int*>(order),  static_cast<const int*>(offsets),
                        static_cast<const int2*>(tiles), static_cast<int>(n_experts),
                        static_cast<int>(n_rows),        static_cast<int>(top_k)};
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    using Tile = ProductTile<T>;
    const char* const name = "moe_ffn_backward";
    const bool packed = fits_packs<T>(width, dy, x, w_in, dx_rows, dw_in) &&
                        fits_packs<T>(hidden, w_out, pre, dpre, weighted_h, dw_out);
    const int d = static_cast<int>(width), f = static_cast<int>(hidden);
    const int columns = gated ? 2 * f : f;
    const std::int64_t of_hidden = blocks_for(hidden, Tile::kColumns);
    const auto weights_gradient = [=](Rows<T> left, Rows<T> right, void* dw) {
      const std::int64_t blocks =
          blocks_for(left.width, Tile::kRows) * blocks_for(right.width, Tile::kColumns);
      launch(name, weights_kernel<T>, {blocks, n_experts}, Tile::kThreads, 0, stream, left, right,
             routing, static_cast<T*>(dw), packed);
    };
    launch(name, hidden_kernel<T>, {most_tiles, of_hidden}, Tile::kThreads, 0, stream,
           static_cast<const T*>(dy), static_cast<const T*>(w_out), static_cast<const W*>(weights),
           static_cast<const T*>(pre), routing, static_cast<T*>(dpre), static_cast<T*>(weighted_h),
           static_cast<W*>(partials), d, f, gated, packed);
    launch(name, dweights_kernel<W>, {blocks_for(n_rows, kDotBlock)}, kDotBlock, 0, stream,
           static_cast<const W*>(partials), static_cast<const int*>(position),
           static_cast<W*>(dweights), static_cast<int>(n_rows), static_cast<int>(of_hidden));
    launch(name, rows_kernel<T>, {most_tiles, blocks_for(width, Tile::kColumns)}, Tile::kThreads, 0,
           stream, static_cast<const T*>(dpre), static_cast<const T*>(w_in), routing,
           static_cast<T*>(dx_rows), d, columns, packed);
    weights_gradient({static_cast<const T*>(dy), d, true},
                     {static_cast<const T*>(weighted_h), f, false}, dw_out);
    weights_gradient({static_cast<const T*>(dpre), columns, false},
                     {static_cast<const T*>(x), d, true}, dw_in);
  });
}

}  // namespace pyllm::cuda
