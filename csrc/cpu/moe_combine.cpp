// Sums over the k rows of each token, weighted or not. The equations are in
// pyllm/reference/moe_combine.py. Each output row has one writer, so nothing is atomic.

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Elements in a range of rows handed to a thread: enough to hide the hand-over (about 1 us).
constexpr std::int64_t kElementsPerRange = per_range(16384);
// Columns summed at a time in a local array, so that the output is rounded once.
constexpr std::int64_t kTile = 256;

template <class Storage>
void forward(const Storage* rows, const Wide<Storage>* weights, const std::int32_t* position,
             Storage* y, std::int64_t n_tokens, std::int64_t top_k, std::int64_t width,
             int n_threads) {
  using W = Wide<Storage>;
  parallel_for(n_tokens, rows_per_range(kElementsPerRange, top_k * width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 W sum[kTile];
                 for (std::int64_t token = begin; token < end; ++token) {
                   for (std::int64_t start = 0; start < width; start += kTile) {
                     const std::int64_t n = width - start < kTile ? width - start : kTile;
                     for (std::int64_t i = 0; i < n; ++i) sum[i] = 0;
                     for (std::int64_t a = 0; a < top_k; ++a) {
                       const std::int64_t slot = token * top_k + a;
                       const W weight = weights == nullptr ? W(1) : weights[slot];
                       const Storage* __restrict row = rows + position[slot] * width + start;
#pragma omp simd
                       for (std::int64_t i = 0; i < n; ++i) sum[i] += weight * widen(row[i]);
                     }
                     Storage* __restrict out = y + token * width + start;
#pragma omp simd
                     for (std::int64_t i = 0; i < n; ++i) out[i] = narrow<Storage>(sum[i]);
                   }
                 }
               });
}

template <class Storage>
void backward(const Storage* dy, const Storage* rows, const Wide<Storage>* weights,
              const std::int32_t* position, Storage* drows, Wide<Storage>* dweights,
              std::int64_t n_tokens, std::int64_t top_k, std::int64_t width, int n_threads) {
  using W = Wide<Storage>;
  parallel_for(n_tokens, rows_per_range(kElementsPerRange, 2 * top_k * width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t slot = begin * top_k; slot < end * top_k; ++slot) {
                   const std::int64_t at = position[slot] * width;
                   const Storage* __restrict dy_row = dy + slot / top_k * width;
                   const Storage* __restrict row = rows + at;
                   Storage* __restrict drow = drows + at;
                   const W weight = weights[slot];
                   W dot = 0;
#pragma omp simd reduction(+ : dot)
                   for (std::int64_t i = 0; i < width; ++i) {
                     const W dy_i = widen(dy_row[i]);
                     dot += dy_i * widen(row[i]);
                     drow[i] = narrow<Storage>(weight * dy_i);
                   }
                   dweights[slot] = dot;
                 }
               });
}

}  // namespace

void moe_combine_forward(DType dtype, const void* rows, const void* weights, const void* position,
                         void* y, std::int64_t n_tokens, std::int64_t top_k, std::int64_t width,
                         int n_threads) noexcept {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    forward(static_cast<const S*>(rows), static_cast<const Wide<S>*>(weights),
            static_cast<const std::int32_t*>(position), static_cast<S*>(y), n_tokens, top_k, width,
            n_threads);
  });
}

void moe_combine_backward(DType dtype, const void* dy, const void* rows, const void* weights,
                          const void* position, void* drows, void* dweights, std::int64_t n_tokens,
                          std::int64_t top_k, std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    backward(static_cast<const S*>(dy), static_cast<const S*>(rows),
             static_cast<const Wide<S>*>(weights), static_cast<const std::int32_t*>(position),
             static_cast<S*>(drows), static_cast<Wide<S>*>(dweights), n_tokens, top_k, width,
             n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
