// A linear layer with int8 weights on the card. The equations are in
// pyllm/reference/int8_linear.py.
//
// Activations are quantised by a warp for each row. Products of int8 go four at a time through
// __dp4a, which every card from the GTX 10 series on has. Few rows are bound by the weights, which
// are read once: a warp for each output. Many rows are cut into tiles that a block multiplies from
// shared memory. Sums of integers are exact, so that both ways give the same bits.

#include <cstdint>

#include "cuda/int8_row.h"
#include "cuda/rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 4;              // outputs of a block, a warp for each
constexpr int kRowsAtOnce = 8;         // rows that share a read of the weights
constexpr int kFewRows = 32;           // above that, tiles
constexpr int kAhead = 4;              // loads of weights before the first of them is multiplied
constexpr int kStep = 16;              // numbers of int8 in 16 bytes
constexpr int kTile = 64;              // rows, outputs, and numbers of a step of a tile
constexpr int kTileBlock = 256;        // threads, each of 4 rows and 4 outputs
constexpr int kPitch = kTile / 4 + 1;  // of a row of a tile in words; odd, for the banks

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    quantize_kernel(const T* __restrict__ x, signed char* __restrict__ q,
                    float* __restrict__ scales, std::int64_t rows, std::int64_t width,
                    std::int64_t pitch) {
  const std::int64_t row = row_of_thread();
  if (row >= rows) return;  // with the whole warp
  x += row * width;
  q += row * pitch;
  float largest = 0;
  for (std::int64_t i = threadIdx.x; i < width; i += kWarp) {
    largest = larger(largest, fabsf(static_cast<float>(widen(x[i]))));
  }
  const float scale = scale_of_row(warp_max(largest)), inverse = inverse_of_scale(scale);
  for (std::int64_t i = threadIdx.x; i < pitch; i += kWarp) {
    q[i] =
        i < width ? to_int8(static_cast<float>(widen(x[i])), inverse) : static_cast<signed char>(0);
  }
  if (threadIdx.x == 0) scales[row] = scale;
}

// 16 numbers of a row from `i` on, zeros behind its end; `whole` rows are aligned and have no tail.
template <bool whole>
__device__ __forceinline__ int4 load_weights(const signed char* row, std::int64_t i,
                                             std::int64_t width) {
  if (whole) return load_pack<1>(reinterpret_cast<const int4*>(row + i)).values[0];
  int words[4] = {};
#pragma unroll
  for (int k = 0; k < kStep; ++k) {
    if (i + k < width) words[k / 4] |= (row[i + k] & 255) << (k % 4 * 8);
  }
  return make_int4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ int dot16(int4 a, int4 b, int sum) {
  sum = __dp4a(a.x, b.x, sum);
  sum = __dp4a(a.y, b.y, sum);
  sum = __dp4a(a.z, b.z, sum);
  return __dp4a(a.w, b.w, sum);
}

template <class T>
__device__ __forceinline__ T scaled(int sum, float scale, Wide<T> weight_scale) {
  return narrow<T>(static_cast<Wide<T>>(sum) * (static_cast<Wide<T>>(scale) * weight_scale));
}

// The products of 16 weights with as many numbers of each row.
template <int n_rows>
__device__ __forceinline__ void add_products(const signed char* q, std::int64_t rows,
                                             std::int64_t pitch, int4 weights,
                                             int (&sums)[n_rows]) {
#pragma unroll
  for (int r = 0; r < n_rows; ++r) {
    if (n_rows > 1 && r >= rows) break;
    const auto* const at = reinterpret_cast<const int4*>(q + r * pitch);
    sums[r] = dot16(load_pack<1>(at).values[0], weights, sums[r]);
  }
}

// Up to n_rows rows, one output for each warp. Loads of weights are kAhead deep: one row is bound
// by how many bytes are on their way.
template <class T, bool whole, int n_rows>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    few_rows_kernel(const signed char* __restrict__ q, const float* __restrict__ scales,
                    const signed char* __restrict__ weight,
                    const Wide<T>* __restrict__ weight_scale, T* __restrict__ y, std::int64_t rows,
                    std::int64_t features, std::int64_t width, std::int64_t pitch) {
  constexpr std::int64_t kWarpStep = kWarp * kStep;
  const std::int64_t feature = row_of_thread();
  if (feature >= features) return;  // with the whole warp
  const std::int64_t first_row = std::int64_t{blockIdx.y} * n_rows;
  weight += feature * width;
  q += first_row * pitch;
  rows -= first_row;
  int sums[n_rows] = {};
  std::int64_t i = threadIdx.x * kStep;
  for (; i + (kAhead - 1) * kWarpStep < width; i += kAhead * kWarpStep) {
    int4 weights[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      weights[k] = load_weights<whole>(weight, i + k * kWarpStep, width);
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      add_products(q + i + k * kWarpStep, rows, pitch, weights[k], sums);
    }
  }
  for (; i < width; i += kWarpStep) {
    add_products(q + i, rows, pitch, load_weights<whole>(weight, i, width), sums);
  }
#pragma unroll
  for (int r = 0; r < n_rows; ++r) {
    if (r >= rows) break;
    const int sum = warp_sum(sums[r]);
    if (threadIdx.x == 0) {
      y[(first_row + r) * features + feature] =
          scaled<T>(sum, scales[first_row + r], weight_scale[feature]);
    }
  }
}

template <class T, bool whole>
__global__ void __launch_bounds__(kTileBlock, 1)
    tile_kernel(const signed char* __restrict__ q, const float* __restrict__ scales,
                const signed char* __restrict__ weight, const Wide<T>* __restrict__ weight_scale,
                T* __restrict__ y, std::int64_t rows, std::int64_t features, std::int64_t width,
                std::int64_t pitch) {
  PYLLM_SHARED(int, q_tile, [kTile * kPitch]);
  PYLLM_SHARED(int, w_tile, [kTile * kPitch]);
  const std::int64_t first_row = std::int64_t{blockIdx.y} * kTile;
  const std::int64_t first_feature = std::int64_t{blockIdx.x} * kTile;
  const int thread = static_cast<int>(threadIdx.x);
  // Of a tile's 64 rows of 64 bytes, a thread brings 16 bytes.
  const int load_row = thread / 4, load_at = thread % 4 * kStep;
  const int row = thread / 16, feature = thread % 16;  // and 16, 32, 48 further on
  int sums[4][4] = {};
  for (std::int64_t first = 0; first < width; first += kTile) {
    const std::int64_t i = first + load_at;
    int4 from_q = make_int4(0, 0, 0, 0), from_w = make_int4(0, 0, 0, 0);
    if (i < width && first_row + load_row < rows) {
      const auto* const at = reinterpret_cast<const int4*>(q + (first_row + load_row) * pitch + i);
      from_q = load_pack<1>(at).values[0];
    }
    if (i < width && first_feature + load_row < features) {
      from_w = load_weights<whole>(weight + (first_feature + load_row) * width, i, width);
    }
    int* const to_q = q_tile + load_row * kPitch + load_at / 4;
    int* const to_w = w_tile + load_row * kPitch + load_at / 4;
    to_q[0] = from_q.x, to_q[1] = from_q.y, to_q[2] = from_q.z, to_q[3] = from_q.w;
    to_w[0] = from_w.x, to_w[1] = from_w.y, to_w[2] = from_w.z, to_w[3] = from_w.w;
    __syncthreads();
#pragma unroll
    for (int word = 0; word < kTile / 4; ++word) {
      int left[4], right[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        left[k] = q_tile[(row + 16 * k) * kPitch + word];
        right[k] = w_tile[(feature + 16 * k) * kPitch + word];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int f = 0; f < 4; ++f) sums[r][f] = __dp4a(left[r], right[f], sums[r][f]);
      }
    }
    __syncthreads();  // the tiles are read
  }
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const std::int64_t n = first_row + row + 16 * r;
    if (n >= rows) break;
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const std::int64_t at = first_feature + feature + 16 * f;
      if (at < features) y[n * features + at] = scaled<T>(sums[r][f], scales[n], weight_scale[at]);
    }
  }
}

// Activations as they are; `whole` rows can be read in steps of 16 numbers.
template <class T, bool whole>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    weights_kernel(const T* __restrict__ x, const signed char* __restrict__ weight,
                   const Wide<T>* __restrict__ weight_scale, T* __restrict__ y, std::int64_t rows,
                   std::int64_t features, std::int64_t width) {
  using W = Wide<T>;
  const std::int64_t feature = row_of_thread();
  if (feature >= features) return;  // with the whole warp
  const std::int64_t first_row = std::int64_t{blockIdx.y} * kRowsAtOnce;
  constexpr int count = whole ? kPack<T> : 1;
  W sums[kRowsAtOnce] = {};
  for (std::int64_t i = threadIdx.x * count; i < width; i += kWarp * count) {
    const auto weights = load_pack<count>(weight + feature * width + i);
#pragma unroll
    for (int r = 0; r < kRowsAtOnce; ++r) {
      if (first_row + r >= rows) break;
      const auto pack = load_pack<count>(x + (first_row + r) * width + i);
#pragma unroll
      for (int k = 0; k < count; ++k) {
        sums[r] += widen(pack.values[k]) * static_cast<W>(weights.values[k]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kRowsAtOnce; ++r) {
    if (first_row + r >= rows) break;
    const W sum = warp_sum(sums[r]);
    if (threadIdx.x == 0) {
      y[(first_row + r) * features + feature] = narrow<T>(sum * weight_scale[feature]);
    }
  }
}

}  // namespace

void quantize_rows(DType dtype, const void* x, void* q, void* scales, std::int64_t rows,
                   std::int64_t width, std::int64_t pitch, Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    launch("int8_linear", quantize_kernel<T>, {blocks_for(rows, kWarps)}, dim3(kWarp, kWarps), 0,
           stream, static_cast<const T*>(x), static_cast<signed char*>(q),
           static_cast<float*>(scales), rows, width, pitch);
  });
}

void int8_matmul(DType dtype, const void* q, const void* scales, const void* weight,
                 const void* weight_scale, void* y, std::int64_t rows, std::int64_t features,
                 std::int64_t width, std::int64_t pitch, Stream stream) {
  const bool aligned = reinterpret_cast<std::uintptr_t>(weight) % kStep == 0;
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    with_flag(aligned && width % kStep == 0, [=](auto whole) {
      const auto call = [=](auto kernel, Grid grid, dim3 threads) {
        launch("int8_linear", kernel, grid, threads, 0, stream, static_cast<const signed char*>(q),
               static_cast<const float*>(scales), static_cast<const signed char*>(weight),
               static_cast<const Wide<T>*>(weight_scale), static_cast<T*>(y), rows, features, width,
               pitch);
      };
      const std::int64_t blocks = blocks_for(features, kWarps);
      const dim3 warps(kWarp, kWarps);
      if (rows == 1) return call(few_rows_kernel<T, whole.kValue, 1>, {blocks}, warps);
      if (rows <= kFewRows) {
        return call(few_rows_kernel<T, whole.kValue, kRowsAtOnce>,
                    {blocks, blocks_for(rows, kRowsAtOnce)}, warps);
      }
      call(tile_kernel<T, whole.kValue>, {blocks_for(features, kTile), blocks_for(rows, kTile)},
           kTileBlock);
    });
  });
}

void int8_weights(DType dtype, const void* x, const void* weight, const void* weight_scale, void* y,
                  std::int64_t rows, std::int64_t features, std::int64_t width, Stream stream) {
  const Grid grid{blocks_for(features, kWarps), blocks_for(rows, kRowsAtOnce)};
  const bool aligned = reinterpret_cast<std::uintptr_t>(weight) % kStep == 0;
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    with_flag(aligned && fits_packs<T>(width, x), [=](auto whole) {
      launch("int8_linear", weights_kernel<T, whole.kValue>, grid, dim3(kWarp, kWarps), 0, stream,
             static_cast<const T*>(x), static_cast<const signed char*>(weight),
             static_cast<const Wide<T>*>(weight_scale), static_cast<T*>(y), rows, features, width);
    });
  });
}

}  // namespace pyllm::cuda
