// RMSNorm on the card. The equations are in pyllm/reference/rms_norm.py.
//
// A team of threads walks each row twice; the second time it comes from the cache. Sums run in
// float (double for double) and in a fixed order: no atomics, the same bits every time.

#include <cstdint>

#include "cuda/numeric.h"
#include "cuda/reduce.h"

namespace pyllm::cuda {
namespace {

constexpr int kBlock = 128;          // threads of a block whose rows are short
constexpr int kMostTeam = 512;       // threads of one long row
constexpr int kColumnsOfThread = 8;  // of dweight, in registers

// Threads for a row: up to four packs each, so that short rows share a block.
int team_of(std::int64_t packs) {
  int team = kWarp;
  while (team < kMostTeam && team * 4 < packs) team *= 2;
  return team;
}

// Threads of the backward, which keeps its columns of dweight: the whole row if that is possible.
int backward_team_of(std::int64_t width) {
  const std::int64_t warps = blocks_for(width, kColumnsOfThread * kWarp);
  return static_cast<int>(warps * kWarp < kMostTeam ? warps * kWarp : kMostTeam);
}

template <class T, int count>
__global__ void __launch_bounds__(kMostTeam)
    forward_kernel(const T* __restrict__ x, const Wide<T>* __restrict__ weight, Wide<T> eps,
                   T* __restrict__ y, Wide<T>* __restrict__ rstd, std::int64_t rows,
                   std::int64_t width) {
  using W = Wide<T>;
  const std::int64_t row = std::int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (row >= rows) return;  // with the whole warp, and no barrier follows then
  x += row * width;
  y += row * width;
  const std::int64_t first = std::int64_t{threadIdx.x} * count;
  const std::int64_t step = std::int64_t{blockDim.x} * count;
  W sum = 0;
  for (std::int64_t i = first; i < width; i += step) {
    const auto pack = load_pack<count>(x + i);
#pragma unroll
    for (int k = 0; k < count; ++k) sum += widen(pack.values[k]) * widen(pack.values[k]);
  }
  const W scale = W(1) / sqrt(team_sum(sum) / W(width) + eps);
  if (threadIdx.x == 0) rstd[row] = scale;
  for (std::int64_t i = first; i < width; i += step) {
    auto pack = load_pack<count>(x + i);
#pragma unroll
    for (int k = 0; k < count; ++k) {
      pack.values[k] = narrow<T>(widen(pack.values[k]) * scale * weight[i + k]);
    }
    store_pack(y + i, pack);
  }
}

// A block takes some rows. Longer rows than its threads have registers for are walked in chunks of
// columns, the mean of a row being kept in between.
template <class T, int count>
__global__ void __launch_bounds__(kMostTeam, 1)
    backward_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                    const Wide<T>* __restrict__ weight, const Wide<T>* __restrict__ rstd,
                    T* __restrict__ dx, Wide<T>* __restrict__ means, Wide<T>* __restrict__ partials,
                    std::int64_t rows, std::int64_t width, std::int64_t rows_per_block) {
  using W = Wide<T>;
  constexpr int kPacks = kColumnsOfThread / count;
  const std::int64_t first = std::int64_t{threadIdx.x} * count;
  const std::int64_t step = std::int64_t{blockDim.x} * count;
  const std::int64_t begin = blockIdx.x * rows_per_block;
  const std::int64_t end = begin + rows_per_block < rows ? begin + rows_per_block : rows;
  for (std::int64_t chunk = 0; chunk < width; chunk += step * kPacks) {
    W dweight[kPacks][count] = {};
    for (std::int64_t row = begin; row < end; ++row) {
      const T* const dy_row = dy + row * width;
      const T* const x_row = x + row * width;
      const W scale = rstd[row];
      W mean = 0;
      if (chunk == 0) {
        for (std::int64_t i = first; i < width; i += step) {
          const auto dy_pack = load_pack<count>(dy_row + i);
          const auto x_pack = load_pack<count>(x_row + i);
#pragma unroll
          for (int k = 0; k < count; ++k) {
            mean += widen(dy_pack.values[k]) * weight[i + k] * (widen(x_pack.values[k]) * scale);
          }
        }
        mean = team_sum(mean) / W(width);
        if (threadIdx.x == 0) means[row] = mean;
      } else {
        mean = means[row];
      }
#pragma unroll
      for (int part = 0; part < kPacks; ++part) {
        const std::int64_t i = chunk + part * step + first;
        if (i >= width) continue;
        const auto dy_pack = load_pack<count>(dy_row + i);
        auto pack = load_pack<count>(x_row + i);
#pragma unroll
        for (int k = 0; k < count; ++k) {
          const W x_hat = widen(pack.values[k]) * scale;
          const W dy_here = widen(dy_pack.values[k]);
          pack.values[k] = narrow<T>(scale * (dy_here * weight[i + k] - x_hat * mean));
          dweight[part][k] += dy_here * x_hat;
        }
        store_pack(dx + row * width + i, pack);
      }
    }
    __syncthreads();  // the means are written
#pragma unroll
    for (int part = 0; part < kPacks; ++part) {
      const std::int64_t i = chunk + part * step + first;
      if (i >= width) continue;
#pragma unroll
      for (int k = 0; k < count; ++k) partials[blockIdx.x * width + i + k] = dweight[part][k];
    }
  }
}

template <class W>
__global__ void __launch_bounds__(kBlock)
    sum_kernel(const W* __restrict__ partials, W* __restrict__ dweight, std::int64_t n_partials,
               std::int64_t width) {
  const std::int64_t column = std::int64_t{blockIdx.x} * kWarp + threadIdx.x;
  PYLLM_SHARED(W, sums, [kBlock / kWarp][kWarp]);
  W sum = 0;
  if (column < width) {
    for (std::int64_t i = threadIdx.y; i < n_partials; i += kBlock / kWarp) {
      sum += partials[i * width + column];
    }
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= width) return;
  for (int i = 1; i < kBlock / kWarp; ++i) sum += sums[i][threadIdx.x];
  dweight[column] = sum;
}

}  // namespace

void rms_norm_forward(DType dtype, const void* x, const void* weight, double eps, void* y,
                      void* rstd, std::int64_t rows, std::int64_t width, Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    with_flag(fits_packs<T>(width, x, y), [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      const int team = team_of(width / count);
      const dim3 threads(team, team == kWarp ? kBlock / kWarp : 1);
      launch("rms_norm_forward", forward_kernel<T, count>, {blocks_for(rows, threads.y)}, threads,
             0, stream, static_cast<const T*>(x), static_cast<const W*>(weight),
             static_cast<W>(eps), static_cast<T*>(y), static_cast<W*>(rstd), rows, width);
    });
  });
}

void rms_norm_backward(DType dtype, const void* dy, const void* x, const void* weight,
                       const void* rstd, void* dx, void* dweight, void* means, void* partials,
                       std::int64_t rows, std::int64_t width, std::int64_t rows_per_block,
                       Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    const std::int64_t blocks = blocks_for(rows, rows_per_block);
    with_flag(fits_packs<T>(width, dy, x, dx), [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      launch("rms_norm_backward", backward_kernel<T, count>, {blocks}, backward_team_of(width), 0,
             stream, static_cast<const T*>(dy), static_cast<const T*>(x),
             static_cast<const W*>(weight), static_cast<const W*>(rstd), static_cast<T*>(dx),
             static_cast<W*>(means), static_cast<W*>(partials), rows, width, rows_per_block);
    });
    launch("rms_norm_backward", sum_kernel<W>, {blocks_for(width, kWarp)},
           dim3(kWarp, kBlock / kWarp), 0, stream, static_cast<const W*>(partials),
           static_cast<W*>(dweight), blocks, width);
  });
}

}  // namespace pyllm::cuda
