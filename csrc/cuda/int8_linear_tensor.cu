// A linear layer with int8 weights on tensor cores (sm_80 and later), for many rows. The equations
// are in pyllm/reference/int8_linear.py, the instructions and their fragments in mma.h.
//
// A block makes a tile of y. It walks along the width in steps of 64; what the next steps need is
// on its way to shared memory while a step is multiplied. The weights stay int8 until they are in
// registers, where those for activations of 16 bits are converted, exactly.
//
// In a step lane `member` of a group takes the numbers 16 member ... 16 member + 15 of its rows of
// both operands. mma would have them in another order, but any will do that is the same for both.

#include <cstdint>
#include <type_traits>

#include "cuda/card.h"
#include "cuda/int8_linear.h"
#include "cuda/mma.h"

namespace pyllm::cuda {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr bool kForTensorCores = false;
#else
constexpr bool kForTensorCores = true;
#endif
constexpr int kDepth = 64;  // of a step, in numbers
constexpr int kChunk = 16;  // bytes that are copied at once

// Warps side by side, and the products of 16 x 8 that each of them has.
template <int warp_rows, int warp_columns, int products_down, int products_across, int stages>
struct Shape {
  static constexpr int kWarpColumns = warp_columns;
  static constexpr int kDown = products_down, kAcross = products_across;
  static constexpr int kRows = warp_rows * products_down * 16;
  static constexpr int kColumns = warp_columns * products_across * 8;
  static constexpr int kThreads = warp_rows * warp_columns * kWarp;
  static constexpr int kStages = stages;
};
using Large = Shape<2, 4, 4, 4, 3>;  // 128 x 128
using Small = Shape<2, 2, 2, 4, 4>;  // 64 x 64, where large ones would leave multiprocessors idle

template <class Left>
constexpr bool kQuantized = std::is_same_v<Left, signed char>;
template <class Left>
using MmaSum = std::conditional_t<kQuantized<Left>, int, float>;

// Where the 16 bytes `chunk` of a row lie in a stage, counted in numbers. The lanes of a quarter of
// a warp read two rows at once, from 64 bytes each they take all, from 128 every other chunk: there
// the rows are shuffled, so that the eight lanes meet all of the banks.
template <class T>
constexpr int kChunks = kDepth * static_cast<int>(sizeof(T)) / kChunk;
template <class T>
__device__ __forceinline__ int place(int row, int chunk) {
  const int shuffled = kChunks<T> == 8 ? chunk ^ (row & 7) : chunk;
  return (row * kChunks<T> + shuffled) * kPack<T>;
}

// Starts to copy numbers at ... at + 63 of the rows of a tile; zeros where there are none.
template <int tile_rows, int threads, class T>
__device__ __forceinline__ void fetch(const T* from, std::int64_t first, std::int64_t rows,
                                      std::int64_t width, std::int64_t at, T* stage) {
#pragma unroll
  for (int n = 0; n < tile_rows * kChunks<T> / threads; ++n) {
    const int piece = static_cast<int>(threadIdx.x) + n * threads;
    const int row = piece / kChunks<T>, chunk = piece % kChunks<T>;
    const std::int64_t k = at + chunk * kPack<T>;
    const bool there = first + row < rows && k < width;
    copy_async(stage + place<T>(row, chunk), there ? from + (first + row) * width + k : from,
               there ? kChunk : 0);
  }
}

// Four weights as they are, for one register and one product.
__device__ __forceinline__ void convert(unsigned first, unsigned second, unsigned (&b)[2],
                                        signed char) {
  b[0] = first, b[1] = second;
}

// Four weights as two pairs of halfs. Around 1024 = 0x6400 halfs are the whole numbers, so that
// weight + 128 in the low byte makes 1024 + 128 + weight.
__device__ __forceinline__ void convert(unsigned weights, unsigned (&b)[2], __half) {
  const unsigned away = 0x64806480u;  // 1024 + 128
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned bits =
        __byte_perm(weights ^ 0x80808080u, 0x64646464u, i == 0 ? 0x4140u : 0x4342u);
    const __half2 pair =
        __hsub2(reinterpret_cast<const __half2&>(bits), reinterpret_cast<const __half2&>(away));
    b[i] = reinterpret_cast<const unsigned&>(pair);
  }
}

// Bfloats are the whole numbers from 128 = 0x4300 to 256 = 0x4380 only: the low seven bits of a
// weight make 128 + bits, of which 128 is taken away, or 256 where the sign is set.
__device__ __forceinline__ void convert(unsigned weights, unsigned (&b)[2], __nv_bfloat16) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const unsigned bytes = __byte_perm(weights, 0u, i == 0 ? 0x4140u : 0x4342u);
    const unsigned bits = (bytes & 0x007f007fu) | 0x43004300u;
    const unsigned away = (bytes & 0x00800080u) | 0x43004300u;
    const __nv_bfloat162 pair = __hsub2(reinterpret_cast<const __nv_bfloat162&>(bits),
                                        reinterpret_cast<const __nv_bfloat162&>(away));
    b[i] = reinterpret_cast<const unsigned&>(pair);
  }
}

// The products of a step. Halves: of the 16 numbers of a lane, 16 bytes are one half of 16 bits, or
// all of int8. Either way they make two products.
template <class Tile, class Left>
__device__ __forceinline__ void multiply_stage(
    const Left* left, const signed char* right,
    MmaSum<Left> (&sums)[Tile::kDown][Tile::kAcross][4]) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int group = static_cast<int>(threadIdx.x) % kWarp / 4;
  const int member = static_cast<int>(threadIdx.x) % 4;
  const int first_row = warp / Tile::kWarpColumns * Tile::kDown * 16 + group;
  const int first_column = warp % Tile::kWarpColumns * Tile::kAcross * 8 + group;
  constexpr int kHalves = sizeof(Left);
  uint4 weights[Tile::kAcross];
#pragma unroll
  for (int j = 0; j < Tile::kAcross; ++j) {
    const int at = place<signed char>(first_column + 8 * j, member);
    weights[j] = load_pack<1>(reinterpret_cast<const uint4*>(right + at)).values[0];
  }
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    unsigned b[Tile::kAcross][2][2];
#pragma unroll
    for (int j = 0; j < Tile::kAcross; ++j) {
      if constexpr (kQuantized<Left>) {
        convert(weights[j].x, weights[j].y, b[j][0], Left{});
        convert(weights[j].z, weights[j].w, b[j][1], Left{});
      } else {
        convert(half == 0 ? weights[j].x : weights[j].z, b[j][0], Left{});
        convert(half == 0 ? weights[j].y : weights[j].w, b[j][1], Left{});
      }
    }
#pragma unroll
    for (int i = 0; i < Tile::kDown; ++i) {
      uint4 upper, lower;
      const int row = first_row + 16 * i, chunk = member * kHalves + half;
      const Left* const at = left + place<Left>(row, chunk);
      upper = load_pack<1>(reinterpret_cast<const uint4*>(at)).values[0];
      const Left* const below = left + place<Left>(row + 8, chunk);
      lower = load_pack<1>(reinterpret_cast<const uint4*>(below)).values[0];
      const unsigned first[4] = {upper.x, lower.x, upper.y, lower.y};
      const unsigned second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (int j = 0; j < Tile::kAcross; ++j) mma(sums[i][j], first, b[j][0], Left{});
#pragma unroll
      for (int j = 0; j < Tile::kAcross; ++j) mma(sums[i][j], second, b[j][1], Left{});
    }
  }
}

template <class Tile, class Left>
constexpr int kStageBytes =
    kDepth * (Tile::kRows * static_cast<int>(sizeof(Left)) + Tile::kColumns);

template <class T, class Left>
__device__ __forceinline__ T result(MmaSum<Left> sum, const float* scales, std::int64_t row,
                                    Wide<T> weight_scale) {
  if constexpr (kQuantized<Left>) {
    return scaled<T>(sum, scales[row], weight_scale);
  } else {
    return narrow<T>(sum * weight_scale);
  }
}

// Left: int8 with a scale for each row, or T without. Blocks side by side in the grid share their
// columns, so that the weights come from memory once and from the second level cache after that.
template <class T, class Left, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    tensor_kernel(const Left* __restrict__ left, const float* __restrict__ scales,
                  const signed char* __restrict__ weight, const Wide<T>* __restrict__ weight_scale,
                  T* __restrict__ y, std::int64_t rows, std::int64_t features, std::int64_t width) {
  if (!kForTensorCores) return;  // nothing is left of the kernel then
  PYLLM_DYNAMIC_SHARED(signed char, shared);
  constexpr int kLeftBytes = Tile::kRows * kDepth * static_cast<int>(sizeof(Left));
  const std::int64_t first_row = std::int64_t{blockIdx.x} * Tile::kRows;
  const std::int64_t first_column = std::int64_t{blockIdx.y} * Tile::kColumns;
  const auto stage = [&](std::int64_t step) {
    return shared + static_cast<int>(step % Tile::kStages) * kStageBytes<Tile, Left>;
  };
  const std::int64_t steps = (width + kDepth - 1) / kDepth;
  const auto fetch_step = [&](std::int64_t step) {
    if (step < steps) {
      signed char* const to = stage(step);
      fetch<Tile::kRows, Tile::kThreads>(left, first_row, rows, width, step * kDepth,
                                         reinterpret_cast<Left*>(to));
      fetch<Tile::kColumns, Tile::kThreads>(weight, first_column, features, width, step * kDepth,
                                            to + kLeftBytes);
    }
    commit_copies();  // an empty group too, so that each step has its one
  };
  MmaSum<Left> sums[Tile::kDown][Tile::kAcross][4] = {};
#pragma unroll
  for (int step = 0; step < Tile::kStages - 1; ++step) fetch_step(step);
  for (std::int64_t step = 0; step < steps; ++step) {
    wait_for_copies<Tile::kStages - 2>();  // those of this step have come
    __syncthreads();  // and those of the other threads; the stage before has been read
    fetch_step(step + Tile::kStages - 1);
    const signed char* const now = stage(step);
    multiply_stage<Tile, Left>(reinterpret_cast<const Left*>(now), now + kLeftBytes, sums);
  }
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int down = warp / Tile::kWarpColumns * Tile::kDown * 16 + lane / 4;
  const int across = warp % Tile::kWarpColumns * Tile::kAcross * 8 + lane % 4 * 2;
#pragma unroll
  for (int j = 0; j < Tile::kAcross; ++j) {
    const std::int64_t column = first_column + across + 8 * j;
    if (column >= features) break;
    const bool both = column + 1 < features;
    const Wide<T> one_scale = weight_scale[column];
    const Wide<T> next_scale = both ? weight_scale[column + 1] : Wide<T>(0);
#pragma unroll
    for (int i = 0; i < 2 * Tile::kDown; ++i) {
      const std::int64_t row = first_row + down + 8 * i;
      if (row >= rows) break;
      const MmaSum<Left>* const pair = sums[i / 2][j] + i % 2 * 2;
      T* const to = y + row * features + column;
      Pack<T, 2> values;
      values.values[0] = result<T, Left>(pair[0], scales, row, one_scale);
      values.values[1] = result<T, Left>(pair[1], scales, row, next_scale);
      if (features % 2 == 0) {
        store_pack<2>(to, values);
      } else {
        to[0] = values.values[0];
        if (both) to[1] = values.values[1];
      }
    }
  }
}

template <class T, class Left, class Tile>
void launch_tiles(const void* left, const void* scales, const void* weight,
                  const void* weight_scale, void* y, std::int64_t rows, std::int64_t features,
                  std::int64_t width, Stream stream) {
  launch<80>("int8_linear", tensor_kernel<T, Left, Tile>,
             {blocks_for(rows, Tile::kRows), blocks_for(features, Tile::kColumns)}, Tile::kThreads,
             Tile::kStages * kStageBytes<Tile, Left>, stream, static_cast<const Left*>(left),
             static_cast<const float*>(scales), static_cast<const signed char*>(weight),
             static_cast<const Wide<T>*>(weight_scale), static_cast<T*>(y), rows, features, width);
}

template <class T, class Left>
bool launch_if_served(const void* left, const void* scales, const void* weight,
                      const void* weight_scale, void* y, std::int64_t rows, std::int64_t features,
                      std::int64_t width, Stream stream) {
  static OncePerCard known;
  if (!whole_weights(weight, width) || reinterpret_cast<std::uintptr_t>(left) % kChunk != 0 ||
      compiled_for(known, tensor_kernel<T, Left, Small>) < 80) {
    return false;
  }
  const std::int64_t large = blocks_for(rows, Large::kRows) * blocks_for(features, Large::kColumns);
  const auto tiles =
      large >= multiprocessors() ? launch_tiles<T, Left, Large> : launch_tiles<T, Left, Small>;
  tiles(left, scales, weight, weight_scale, y, rows, features, width, stream);
  return true;
}

}  // namespace

bool int8_matmul_on_tensors(DType dtype, const void* q, const void* scales, const void* weight,
                            const void* weight_scale, void* y, std::int64_t rows,
                            std::int64_t features, std::int64_t width, Stream stream) {
  bool served = false;
  with_storage(dtype, [&](auto storage) {
    served = launch_if_served<decltype(storage), signed char>(q, scales, weight, weight_scale, y,
                                                              rows, features, width, stream);
  });
  return served;
}

bool int8_weights_on_tensors(DType dtype, const void* x, const void* weight,
                             const void* weight_scale, void* y, std::int64_t rows,
                             std::int64_t features, std::int64_t width, Stream stream) {
  bool served = false;
  with_storage(dtype, [&](auto storage) {
    using T = decltype(storage);
    if constexpr (sizeof(T) == 2) {
      served = launch_if_served<T, T>(x, nullptr, weight, weight_scale, y, rows, features, width,
                                      stream);
    }
  });
  return served;
}

}  // namespace pyllm::cuda
