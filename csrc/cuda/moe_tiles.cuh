// The rows of a mixture of experts, sorted by expert and cut into tiles that have one expert each.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/tile.cuh"

namespace pyllm::cuda {

// What moe_dispatch.cu's sort leaves behind, with a list of tiles from it: (expert, first row),
// expert -1 where the list has come to its end. Choices out of range stand last, under the number
// n_experts: their rows become NaN.
struct Routing {
  const int* order;    // sorted row to choice
  const int* offsets;  // (n_experts + 1,)
  const int2* tiles;
  int n_experts, n_rows, top_k;

  __device__ __forceinline__ int token_of(int row) const { return order[row] / top_k; }
};

// The sorted rows that a block works on.
struct RowTile {
  int expert, first, rows;

  __device__ __forceinline__ RowTile(const Routing& routing, int tile_rows) {
    const int2 tile = routing.tiles[blockIdx.x];
    expert = tile.x;
    first = tile.y;
    rows = 0;
    if (expert < 0) return;
    const int end = expert < routing.n_experts ? routing.offsets[expert + 1] : routing.n_rows;
    rows = min(end - first, tile_rows);
  }
};

template <class Tile>
__device__ __forceinline__ void fill_with_nan(typename Tile::Sums& sums) {
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; ++j) sums.at[i][j] = NAN;
  }
}

// The sums of a tile as the first `rows` rows of `to`, `width` apart, from column `first` on.
template <class T, class Tile>
__device__ __forceinline__ void store_rows(const typename Tile::Sums& sums, T* to, int rows,
                                           int width, int first, bool packed) {
  constexpr int kGroup = Tile::kColumnGroup;
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
    const int row = Tile::row_of(i);
    if (row >= rows) continue;
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; j += kGroup) {
      const int column = first + Tile::column_group(j / kGroup);
      Pack<T, kGroup> pack;
#pragma unroll
      for (int k = 0; k < kGroup; ++k) pack.values[k] = narrow<T>(sums.at[i][j + k]);
      store_part(to + std::int64_t{row} * width + column, width - column, packed, pack);
    }
  }
}

// swiglu: silu(gate) * up; gelu: its tanh form, `up` unused.
template <class W>
struct Activation {
  static constexpr W kScale = W(0.79788456080286535588), kCubic = W(0.044715);
  W hidden, dgate, dup;  // the hidden number and its derivatives

  __device__ __forceinline__ Activation(bool gated, W gate, W up) {
    if (gated) {
      const W s = W(1) / (W(1) + exp(-gate));
      hidden = gate * s * up;
      dgate = up * s * (W(1) + gate * (W(1) - s));
      dup = gate * s;
    } else {
      const W t = tanh(kScale * (gate + kCubic * gate * gate * gate));
      const W slope = kScale * (W(1) + W(3) * kCubic * gate * gate);
      hidden = W(0.5) * gate * (W(1) + t);
      dgate = W(0.5) * (W(1) + t + gate * (W(1) - t * t) * slope);
      dup = W(0);
    }
  }
};

}  // namespace pyllm::cuda
