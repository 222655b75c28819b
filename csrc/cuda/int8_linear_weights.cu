// A linear layer with int8 weights and activations as they are (W8A16). The equations are in
// pyllm/reference/int8_linear.py.
//
// Few rows are bound by the weights: a warp takes one or two outputs of eight rows, with loads far
// ahead. Many rows are cut into tiles (tile.cuh), whose sums are float whatever x is stored as, or
// on tensor cores (int8_linear_tensor.cu).

#include <cstdint>
#include <type_traits>

#include "cuda/int8_linear.h"
#include "cuda/reduce.h"
#include "cuda/rows.h"
#include "cuda/tile.cuh"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 4;               // of a block
constexpr int kRowsAtOnce = 8;          // rows that share a read of the weights
constexpr int kLargestWidth = 1 << 30;  // an int counts a bit further than that

// `count` weights as they come from memory. In words where that goes: of single bytes the compiler
// would keep each in a register of its own.
template <int count>
using Word = std::conditional_t<count % 4 == 0, unsigned, signed char>;
template <int count>
using Weights = Pack<Word<count>, count / static_cast<int>(sizeof(Word<count>))>;

// Weights as numbers of the type that sums are kept in. A card converts integers at a fraction of
// the speed at which it adds: 0x4b000000 is the float 2^23, whose neighbours differ by one, so that
// weight + 128 in the low byte makes 2^23 + 128 + weight.
template <class W, int count>
__device__ __forceinline__ void widen_weights(const Weights<count>& weights, W (&wide)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) {
    if constexpr (count % 4 == 0) {
      const unsigned word = weights.values[i / 4] ^ 0x80808080u;
      const unsigned bits = __byte_perm(word, 0x4b000000u, 0x7540u + static_cast<unsigned>(i % 4));
      wide[i] = __uint_as_float(bits) - 8388736.0f;
    } else {
      wide[i] = static_cast<W>(weights.values[i]);
    }
  }
}

// n_rows rows and n_features outputs for each warp; `whole` rows can be read in packs. The weights
// of the next kAhead steps are on their way: some 64 bytes for each lane where there is one row.
template <class T, bool whole, int n_rows, int n_features>
__global__ void __launch_bounds__(kWarps* kWarp, n_rows == 1 && sizeof(T) < 8 ? 8 : 1)
    weights_kernel(const T* __restrict__ x, const signed char* __restrict__ weight,
                   const Wide<T>* __restrict__ weight_scale, T* __restrict__ y, std::int64_t rows,
                   std::int64_t features, int width) {
  using W = Wide<T>;
  constexpr int count = whole ? kPack<T> : 1;
  constexpr int kAhead = n_rows > 1 ? 2 : count == 8 ? 4 : 8;
  constexpr int kWords = count / static_cast<int>(sizeof(Word<count>));
  constexpr int kStep = kWarp * count;
  const std::int64_t first_feature = row_of_thread() * n_features;
  if (first_feature >= features) return;  // with the whole warp
  const std::int64_t first_row = std::int64_t{blockIdx.y} * n_rows;
  x += first_row * width;
  int i = static_cast<int>(threadIdx.x) * count;
  const signed char* from[n_features];  // the last output again where there are no more
#pragma unroll
  for (int f = 0; f < n_features; ++f) {
    const std::int64_t feature = first_feature + f;
    from[f] = weight + (feature < features ? feature : features - 1) * width + i;
  }
  const auto load = [&](const signed char* at, bool there) {
    Weights<count> loaded = {};
    if (there) loaded = load_pack<kWords>(reinterpret_cast<const Word<count>*>(at));
    return loaded;
  };
  Weights<count> ring[kAhead][n_features];
  W sums[n_rows][n_features] = {};
  const auto add_products = [&](const Weights<count>(&loaded)[n_features], int at) {
    W weights[n_features][count];
#pragma unroll
    for (int f = 0; f < n_features; ++f) widen_weights<W, count>(loaded[f], weights[f]);
#pragma unroll
    for (int r = 0; r < n_rows; ++r) {
      if (n_rows > 1 && first_row + r >= rows) break;
      const auto pack = load_pack<count>(x + std::int64_t{r} * width + at);
#pragma unroll
      for (int f = 0; f < n_features; ++f) {
#pragma unroll
        for (int c = 0; c < count; ++c) sums[r][f] += widen(pack.values[c]) * weights[f][c];
      }
    }
  };
#pragma unroll
  for (int k = 0; k < kAhead; ++k) {
#pragma unroll
    for (int f = 0; f < n_features; ++f) {
      ring[k][f] = load(from[f] + k * kStep, i + k * kStep < width);
    }
  }
  for (; i + (kAhead - 1) * kStep < width; i += kAhead * kStep) {
    // Pointers that move, or the compiler multiplies them out again for every load.
#pragma unroll
    for (int f = 0; f < n_features; ++f) from[f] += kAhead * kStep;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const bool there = i + (kAhead + k) * kStep < width;
      add_products(ring[k], i + k * kStep);
#pragma unroll
      for (int f = 0; f < n_features; ++f) ring[k][f] = load(from[f] + k * kStep, there);
    }
  }
#pragma unroll
  for (int k = 0; k < kAhead - 1; ++k) {
    if (i + k * kStep < width) add_products(ring[k], i + k * kStep);
  }
#pragma unroll
  for (int r = 0; r < n_rows; ++r) {
    if (first_row + r >= rows) break;
#pragma unroll
    for (int f = 0; f < n_features; ++f) {
      const std::int64_t feature = first_feature + f;
      const W sum = warp_sum(sums[r][f]);
      if (threadIdx.x == 0 && feature < features) {
        y[(first_row + r) * features + feature] = narrow<T>(sum * weight_scale[feature]);
      }
    }
  }
}

// A tile of y. packed_x, packed_w: their rows can be read 16 bytes at a time.
template <class T>
__global__ void __launch_bounds__(ProductTile<T>::kThreads, 1)
    weights_tile_kernel(const T* __restrict__ x, const signed char* __restrict__ weight,
                        const Wide<T>* __restrict__ weight_scale, T* __restrict__ y,
                        std::int64_t rows, std::int64_t features, int width, bool packed_x,
                        bool packed_w) {
  using W = Wide<T>;
  using Tile = ProductTile<T>;
  PYLLM_SHARED(W, shared, [Tile::kEntries]);
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Tile::kRows;
  const std::int64_t first_feature = std::int64_t{blockIdx.y} * Tile::kColumns;
  const auto x_at = [&](int i) -> const T* {
    return first_row + i < rows ? x + (first_row + i) * width : nullptr;
  };
  const auto weight_at = [&](int j) -> const signed char* {
    return first_feature + j < features ? weight + (first_feature + j) * width : nullptr;
  };
  Along<T, W, Tile::kRows, Tile::kThreads> left(x_at, packed_x);
  Along<signed char, W, Tile::kColumns, Tile::kThreads> right(weight_at, packed_w);
  typename Tile::Sums sums;
  multiply<Tile>(left, right, width, shared, sums);
#pragma unroll
  for (int j = 0; j < Tile::kMicroColumns; ++j) {
    const std::int64_t feature = first_feature + Tile::column_of(j);
    if (feature >= features) continue;
    const W scale = weight_scale[feature];
#pragma unroll
    for (int i = 0; i < Tile::kMicroRows; ++i) {
      const std::int64_t row = first_row + Tile::row_of(i);
      if (row < rows) y[row * features + feature] = narrow<T>(sums.at[i][j] * scale);
    }
  }
}

}  // namespace

void int8_weights(DType dtype, const void* x, const void* weight, const void* weight_scale, void* y,
                  std::int64_t rows, std::int64_t features, std::int64_t width, bool tensor_cores,
                  Stream stream) {
  if (width > kLargestWidth) {
    throw std::invalid_argument("int8_weights: rows of " + std::to_string(width) +
                                " numbers are too wide; split the call");
  }
  if (tensor_cores && rows > kFewRowsOfTensors &&
      int8_weights_on_tensors(dtype, x, weight, weight_scale, y, rows, features, width, stream)) {
    return;
  }
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using Tile = ProductTile<T>;
    const auto call = [=](auto kernel, Grid grid, dim3 threads, auto... more) {
      launch("int8_linear", kernel, grid, threads, 0, stream, static_cast<const T*>(x),
             static_cast<const signed char*>(weight), static_cast<const Wide<T>*>(weight_scale),
             static_cast<T*>(y), rows, features, static_cast<int>(width), more...);
    };
    const bool packed_x = fits_packs<T>(width, x);
    if (rows > kFewRows) {
      return call(weights_tile_kernel<T>,
                  {blocks_for(rows, Tile::kRows), blocks_for(features, Tile::kColumns)},
                  Tile::kThreads, packed_x, whole_weights(weight, width));
    }
    with_flag(packed_x && whole_weights(weight, kInt8Step), [=](auto whole) {
      const dim3 warps(kWarp, kWarps);
      if (rows == 1) {
        return call(weights_kernel<T, whole.kValue, 1, 2>, {blocks_for(features, 2 * kWarps)},
                    warps);
      }
      call(weights_kernel<T, whole.kValue, kRowsAtOnce, 1>,
           {blocks_for(features, kWarps), blocks_for(rows, kRowsAtOnce)}, warps);
    });
  });
}

}  // namespace pyllm::cuda
