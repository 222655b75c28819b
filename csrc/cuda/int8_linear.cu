// A linear layer with int8 weights and activations that become int8 on the card. The equations are
// in pyllm/reference/int8_linear.py.
//
// Products of int8 go four at a time through __dp4a, which every card from the GTX 10 series on
// has. Few rows are bound by the weights, which are read once: a warp for each output. Many rows
// are cut into tiles that a block multiplies from shared memory, or on tensor cores
// (int8_linear_tensor.cu). Sums of integers are exact, so that all ways give the same bits.
//
// One row is a step of decoding. It takes as long as its weights need to come, so nothing may come
// before them: one launch quantises the row and multiplies it, and the first weights are on their
// way while the row is quantised.

#include <cstdint>

#include "cuda/card.h"
#include "cuda/int8_linear.h"
#include "cuda/int8_row.h"
#include "cuda/rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 4;       // outputs of a block, a warp for each
constexpr int kRowsAtOnce = 8;  // rows that share a read of the weights
constexpr int kAhead = 4;       // loads of weights before the first of them is multiplied
constexpr int kStep = kInt8Step;
constexpr int kLargestTeam = 512;       // threads that quantise a row
constexpr int kLargestRow = 32 * 1024;  // that one_row_kernel keeps in shared memory
constexpr int kRowWarps = 32;           // of a block that multiplies one row, at most
constexpr int kTile = 64;               // rows, outputs, and numbers of a step of a tile
constexpr int kTileBlock = 256;         // threads, each of 4 rows and 4 outputs
constexpr int kPitch = kTile / 4 + 1;   // of a row of a tile in words; odd, for the banks

// Zeros where there is nothing.
template <int count, class T>
__device__ __forceinline__ Pack<T, count> load_if(const T* from, bool there) {
  if (there) return load_pack<count>(from);
  Pack<T, count> zeros;
#pragma unroll
  for (int k = 0; k < count; ++k) zeros.values[k] = narrow<T>(0);
  return zeros;
}

// What the largest of a row is, and the row as int8: by `team` threads, of which this is `thread`.
// Numbers are read `count` at once; q has zeros from `width` to `pitch`.
template <int count, class T>
__device__ __forceinline__ float largest_of_row(const T* x, int width, int thread, int team) {
  constexpr int kTogether = 4;  // loads, each of which takes long
  float largest = 0;
  for (int first = thread * count; first < width; first += kTogether * team * count) {
    Pack<T, count> packs[kTogether];
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
      const int i = first + n * team * count;
      packs[n] = load_if<count>(x + i, i < width);
    }
#pragma unroll
    for (int n = 0; n < kTogether; ++n) {
#pragma unroll
      for (int k = 0; k < count; ++k) {
        largest = larger(largest, fabsf(static_cast<float>(widen(packs[n].values[k]))));
      }
    }
  }
  return largest;
}
template <int count, class T>
__device__ __forceinline__ void quantize_row(const T* x, signed char* q, float scale, int width,
                                             int pitch, int thread, int team) {
  const float inverse = inverse_of_scale(scale);
  for (int i = thread * count; i < pitch; i += team * count) {
    Pack<signed char, count> bytes = {};
    if (i < width) {
      const auto pack = load_pack<count>(x + i);
#pragma unroll
      for (int k = 0; k < count; ++k) {
        bytes.values[k] = to_int8(static_cast<float>(widen(pack.values[k])), inverse);
      }
    }
    store_pack(q + i, bytes);
  }
}

// A team of threads for each row: of a warp, or of the block.
template <class T, bool whole>
__global__ void __launch_bounds__(kLargestTeam, 1)
    quantize_kernel(const T* __restrict__ x, signed char* __restrict__ q,
                    float* __restrict__ scales, std::int64_t rows, int width, int pitch) {
  constexpr int count = whole ? kPack<T> : 1;
  const std::int64_t row = row_of_thread();
  if (row >= rows) return;  // with the whole team
  const int thread = static_cast<int>(threadIdx.x), team = static_cast<int>(blockDim.x);
  x += row * width;
  const float scale = scale_of_row(team_max(largest_of_row<count>(x, width, thread, team)));
  quantize_row<count>(x, q + row * pitch, scale, width, pitch, thread, team);
  if (thread == 0) scales[row] = scale;
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

// One row, whole in shared memory as int8. There are as many blocks as multiprocessors; a warp
// makes one output after the other, the weights of the next kRing steps on their way all the time,
// beyond the end of an output, too. On an H200 that is 128 KiB of each multiprocessor, where 4.8
// TB/s times a microsecond are 36 KiB: enough to go on through the first microseconds, in which the
// row is quantised. No hint keeps the weights out of the second level cache: they may all fit in
// it.
constexpr int kRing = 8;
template <class T>
__global__ void __launch_bounds__(kRowWarps* kWarp, 1)
    one_row_kernel(const T* __restrict__ x, const signed char* __restrict__ weight,
                   const Wide<T>* __restrict__ weight_scale, T* __restrict__ y,
                   std::int64_t features, int width) {
  PYLLM_DYNAMIC_SHARED(int4, q);
  PYLLM_SHARED(float, maxima, [kRowWarps]);
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int n_warps = static_cast<int>(blockDim.y);
  const int packs = width / kStep, steps = (packs + kWarp - 1) / kWarp;  // of an output
  const std::int64_t stride = std::int64_t{gridDim.x} * n_warps;
  std::int64_t feature = row_of_thread(), coming = feature;
  int coming_step = 0;
  const auto next = [&] {
    const int at = coming_step * kWarp + lane;
    int4 weights = make_int4(0, 0, 0, 0);
    if (coming < features && at < packs) {
      const auto* const row = reinterpret_cast<const int4*>(weight + coming * width);
      weights = load_pack<1>(row + at).values[0];
    }
    // An output has a whole number of rings, so that the place of each step in it is known.
    if (++coming_step % kRing == 0 && coming_step >= steps) {
      coming_step = 0;
      coming += stride;
    }
    return weights;
  };
  int4 ring[kRing];
#pragma unroll
  for (int k = 0; k < kRing; ++k) ring[k] = next();
  const int thread = warp * kWarp + lane, team = n_warps * kWarp;
  float largest = warp_max(largest_of_row<kPack<T>>(x, width, thread, team));
  if (lane == 0) maxima[warp] = largest;
  __syncthreads();
  largest = warp_max(lane < n_warps ? maxima[lane] : 0.0f);
  const float scale = scale_of_row(largest);
  quantize_row<kPack<T>>(x, reinterpret_cast<signed char*>(q), scale, width, width, thread, team);
  __syncthreads();

  for (; feature < features; feature += stride) {
    const Wide<T> factor = weight_scale[feature];
    int sum = 0;
    for (int first = 0; first < packs; first += kRing * kWarp) {
#pragma unroll
      for (int k = 0; k < kRing; ++k) {
        const int at = first + k * kWarp + lane;
        if (at < packs) sum = dot16(ring[k], q[at], sum);
        ring[k] = next();
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) y[feature] = scaled<T>(sum, scale, factor);
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

}  // namespace

void quantize_rows(DType dtype, const void* x, void* q, void* scales, std::int64_t rows,
                   std::int64_t width, std::int64_t pitch, Stream stream) {
  int team = kWarp;
  while (team < kLargestTeam && team * kStep < width) team *= 2;
  const int rows_of_block = team == kWarp ? kWarps : 1;
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    with_flag(fits_packs<T>(width, x), [=](auto whole) {
      launch("int8_linear", quantize_kernel<T, whole.kValue>, {blocks_for(rows, rows_of_block)},
             dim3(team, rows_of_block), 0, stream, static_cast<const T*>(x),
             static_cast<signed char*>(q), static_cast<float*>(scales), rows,
             static_cast<int>(width), static_cast<int>(pitch));
    });
  });
}

void int8_one_row(DType dtype, const void* x, const void* weight, const void* weight_scale, void* y,
                  std::int64_t features, std::int64_t width, Stream stream) {
  const bool whole = whole_weights(weight, width) && reinterpret_cast<std::uintptr_t>(x) % 16 == 0;
  if (!whole || width > kLargestRow) {
    throw std::invalid_argument("int8_one_row: a row of " + std::to_string(width) +
                                " numbers, or a misaligned one, is not for it");
  }
  const std::int64_t most = multiprocessors();
  int warps = 4;  // few outputs are spread over the multiprocessors
  while (warps < kRowWarps && warps * most < features) warps *= 2;
  const std::int64_t needed = blocks_for(features, warps);
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    launch("int8_linear", one_row_kernel<T>, {needed < most ? needed : most}, dim3(kWarp, warps),
           static_cast<std::size_t>(width), stream, static_cast<const T*>(x),
           static_cast<const signed char*>(weight), static_cast<const Wide<T>*>(weight_scale),
           static_cast<T*>(y), features, static_cast<int>(width));
  });
}

void int8_matmul(DType dtype, const void* q, const void* scales, const void* weight,
                 const void* weight_scale, void* y, std::int64_t rows, std::int64_t features,
                 std::int64_t width, std::int64_t pitch, bool tensor_cores, Stream stream) {
  if (tensor_cores && rows > kFewRowsOfTensors &&
      int8_matmul_on_tensors(dtype, q, scales, weight, weight_scale, y, rows, features, width,
                             stream)) {
    return;
  }
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    with_flag(whole_weights(weight, width), [=](auto whole) {
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

}  // namespace pyllm::cuda
