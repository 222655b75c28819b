// The forward of a mixture of experts on cards without tensor cores. The equations are in
// pyllm/reference/moe_ffn.py.
//
// Two products over tiles of sorted rows (tile.cuh): the first one gathers its rows and ends in the
// activation, the second one's rows are added up by moe_combine.cu. In float16 both multiply pairs
// of halfs, which gives twice as many products on Turing; a tile in which such a sum left the range
// of half is computed once more in float.

#include <cstdint>
#include <type_traits>

#include "cuda/moe_tiles.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kListBlock = kWarp;

// One warp; 32 experts at a time, each lane writes the tiles of one.
__global__ void __launch_bounds__(kListBlock)
    tiles_kernel(const int* __restrict__ offsets, int2* __restrict__ tiles, int n_experts,
                 int n_rows, int tile_rows, int most_tiles) {
  const int lane = static_cast<int>(threadIdx.x);
  int written = 0;
  for (int first = 0; first <= n_experts; first += kWarp) {
    const int expert = first + lane;
    int begin = 0, end = 0;
    if (expert <= n_experts) {
      begin = offsets[expert];
      end = expert < n_experts ? offsets[expert + 1] : n_rows;
    }
    const int count = (end - begin + tile_rows - 1) / tile_rows;
    int sum = count;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    int2* const to = tiles + written + sum - count;
    for (int i = 0; i < count; ++i) to[i] = make_int2(expert, begin + i * tile_rows);
    written += __shfl_sync(kAllLanes, sum, kWarp - 1);
  }
  for (int i = written + lane; i < most_tiles; i += kWarp) tiles[i] = make_int2(-1, 0);
}

// sums = the rows that left_at gives times those that right_at gives.
template <class T, class Tile, class LeftAt, class RightAt>
__device__ __forceinline__ void multiply_rows(const LeftAt& left_at, const RightAt& right_at,
                                              int depth, bool packed, Wide<T>* shared,
                                              typename Tile::Sums& sums) {
  using W = Wide<T>;
  constexpr int kThreads = Tile::kThreads;
  if constexpr (std::is_same_v<T, __half>) {
    Along<T, __half2, Tile::kRows, kThreads> left(left_at, packed);
    Along<T, __half2, Tile::kColumns, kThreads> right(right_at, packed);
    multiply<Tile>(left, right, depth, reinterpret_cast<__half2*>(shared), sums);
    W probe = 0;
#pragma unroll
    for (int i = 0; i < Tile::kMicroRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kMicroColumns; ++j) probe += sums.at[i][j] * W(0);  // or a NaN
    }
    if (!__syncthreads_or(probe != W(0))) return;
    sums = {};
  }
  Along<T, W, Tile::kRows, kThreads> left(left_at, packed);
  Along<T, W, Tile::kColumns, kThreads> right(right_at, packed);
  multiply<Tile>(left, right, depth, shared, sums);
}

// pre and h of a tile. Where gated, the left half of its columns are gates and the right half the
// ups of the same hidden numbers.
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads)
    up_kernel(const T* __restrict__ x, const T* __restrict__ w_in, Routing routing,
              T* __restrict__ pre, T* __restrict__ h, int width, int hidden, bool gated,
              bool packed) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  constexpr int kGroup = Tile::kColumnGroup, kHalf = Tile::kMicroColumns / 2;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const RowTile tile(routing, Tile::kRows);
  if (tile.rows == 0) return;
  const int of_tile = gated ? Tile::kColumns / 2 : Tile::kColumns;
  const int first = static_cast<int>(blockIdx.y) * of_tile, columns = gated ? 2 * hidden : hidden;
  typename Tile::Sums sums;
  if (tile.expert < routing.n_experts) {
    const T* const weights = w_in + std::int64_t{tile.expert} * columns * width;
    const auto x_at = [&](int i) -> const T* {
      if (i >= tile.rows) return nullptr;
      return x + std::int64_t{routing.token_of(tile.first + i)} * width;
    };
    const auto weight_at = [&](int j) -> const T* {
      const int f = first + j % of_tile;
      if (f >= hidden) return nullptr;
      return weights + std::int64_t{j < of_tile ? f : hidden + f} * width;
    };
    multiply_rows<T, Tile>(x_at, weight_at, width, packed, shared, sums);
  } else {
    fill_with_nan<Tile>(sums);
  }
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    if (Tile::row_of(i) >= tile.rows) continue;
    const std::int64_t row = tile.first + Tile::row_of(i);
    T* const pre_row = pre + row * columns;
    T* const h_row = h + row * hidden;
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; j += kGroup) {
      if (gated && j >= kHalf) continue;
      const int f = first + Tile::column_group(j / kGroup);
      Pack<T, kGroup> gates, ups, hiddens;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) {
        gates.values[k] = narrow<T>(sums.at[i][j + k]);
        ups.values[k] = narrow<T>(sums.at[i][(j + kHalf) % Tile::kMicroColumns + k]);
        const Activation<W> at(gated, widen(gates.values[k]), widen(ups.values[k]));
        hiddens.values[k] = narrow<T>(at.hidden);
      }
      store_part(pre_row + f, hidden - f, packed, gates);
      if (gated) store_part(pre_row + hidden + f, hidden - f, packed, ups);
      store_part(h_row + f, hidden - f, packed, hiddens);
    }
  }
}

template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads)
    down_kernel(const T* __restrict__ h, const T* __restrict__ w_out, Routing routing,
                T* __restrict__ y_rows, int width, int hidden, bool packed) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const RowTile tile(routing, Tile::kRows);
  if (tile.rows == 0) return;
  const int first = static_cast<int>(blockIdx.y) * Tile::kColumns;
  typename Tile::Sums sums;
  if (tile.expert < routing.n_experts) {
    const T* const weights = w_out + std::int64_t{tile.expert} * width * hidden;
    const auto h_at = [&](int i) -> const T* {
      return i < tile.rows ? h + std::int64_t{tile.first + i} * hidden : nullptr;
    };
    const auto weight_at = [&](int j) -> const T* {
      return first + j < width ? weights + std::int64_t{first + j} * hidden : nullptr;
    };
    multiply_rows<T, Tile>(h_at, weight_at, hidden, packed, shared, sums);
  } else {
    fill_with_nan<Tile>(sums);
  }
  T* const to = y_rows + std::int64_t{tile.first} * width;
  store_rows<T, Tile>(sums, to, tile.rows, width, first, packed);
}

}  // namespace

void moe_tiles(const void* offsets, void* tiles, std::int64_t n_experts, std::int64_t n_rows,
               std::int64_t tile_rows, std::int64_t most_tiles, Stream stream) {
  launch("moe_tiles", tiles_kernel, {1}, kListBlock, 0, stream, static_cast<const int*>(offsets),
         static_cast<int2*>(tiles), static_cast<int>(n_experts), static_cast<int>(n_rows),
         static_cast<int>(tile_rows), static_cast<int>(most_tiles));
}

void moe_ffn_forward(DType dtype, const void* x, const void* w_in, const void* w_out,
                     const void* order, const void* offsets, const void* tiles, void* pre, void* h,
                     void* y_rows, std::int64_t n_rows, std::int64_t top_k, std::int64_t n_experts,
                     std::int64_t width, std::int64_t hidden, bool gated, std::int64_t most_tiles,
                     Stream stream) {
  const Routing routing{static_cast<const int*>(order),  static_cast<const int*>(offsets),
                        static_cast<const int2*>(tiles), static_cast<int>(n_experts),
                        static_cast<int>(n_rows),        static_cast<int>(top_k)};
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using Tile = ProductTile<T>;
    const bool packed =
        fits_packs<T>(width, x, w_in, y_rows) && fits_packs<T>(hidden, w_out, pre, h);
    const int d = static_cast<int>(width), f = static_cast<int>(hidden);
    const int of_tile = gated ? Tile::kColumns / 2 : Tile::kColumns;
    launch("moe_ffn_forward", up_kernel<T>, {most_tiles, blocks_for(hidden, of_tile)},
           Tile::kThreads, 0, stream, static_cast<const T*>(x), static_cast<const T*>(w_in),
           routing, static_cast<T*>(pre), static_cast<T*>(h), d, f, gated, packed);
    launch("moe_ffn_forward", down_kernel<T>, {most_tiles, blocks_for(width, Tile::kColumns)},
           Tile::kThreads, 0, stream, static_cast<const T*>(h), static_cast<const T*>(w_out),
           routing, static_cast<T*>(y_rows), d, f, packed);
  });
}

}  // namespace pyllm::cuda
