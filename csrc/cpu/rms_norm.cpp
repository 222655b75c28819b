// RMSNorm on the CPU. The equations are in pyllm/reference/rms_norm.py.
//
// Both passes are bound by memory at training sizes: each row is read once from there and a second
// time from the first-level cache. Sums run in float (double for double) and in a fixed order.

#include <cmath>
#include <cstdint>
#include <new>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Elements in a range of rows handed to a thread: enough to hide the hand-over (about 1 us).
constexpr std::int64_t kElementsPerRange = per_range(16384);
// At most this many partial sums of dweight, so that adding them up stays cheap for any row count.
constexpr std::int64_t kMaxPartials = 256;
// Rows of dweight summed in float; their sums are added up in double, or long sums lose digits.
constexpr std::int64_t kRowsPerSum = 8;

std::int64_t at_least_one(std::int64_t value) { return value > 1 ? value : 1; }

template <class Storage>
void forward(const Storage* x, const Wide<Storage>* weight, double eps, Storage* y,
             Wide<Storage>* rstd, std::int64_t rows, std::int64_t width, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t grain = at_least_one(kElementsPerRange / at_least_one(width));
  parallel_for(rows, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      const Storage* __restrict x_row = x + row * width;
      Storage* __restrict y_row = y + row * width;
      const W sum = sum_of<W>(width, [=](std::int64_t i) {
        const W value = widen(x_row[i]);
        return value * value;
      });
      const W scale = W(1) / std::sqrt(sum / W(width) + W(eps));
      rstd[row] = scale;
#pragma omp simd
      for (std::int64_t i = 0; i < width; ++i) {
        y_row[i] = narrow<Storage>(widen(x_row[i]) * scale * weight[i]);
      }
    }
  });
}

// One row of dx; adds the row's share of dweight to `partial`.
template <class Storage>
void backward_row(const Storage* __restrict dy, const Storage* __restrict x,
                  const Wide<Storage>* __restrict weight, Wide<Storage> scale,
                  Storage* __restrict dx, Wide<Storage>* __restrict partial, std::int64_t width) {
  using W = Wide<Storage>;
  const W sum = sum_of<W>(width, [=](std::int64_t i) {
    const W x_hat = widen(x[i]) * scale;
    const W dy_i = widen(dy[i]);
    partial[i] += dy_i * x_hat;
    return dy_i * weight[i] * x_hat;
  });
  const W mean = sum / W(width);
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) {
    const W x_hat = widen(x[i]) * scale;
    dx[i] = narrow<Storage>(scale * (widen(dy[i]) * weight[i] - x_hat * mean));
  }
}

template <class Storage>
void backward(const Storage* dy, const Storage* x, const Wide<Storage>* weight,
              const Wide<Storage>* rstd, Storage* dx, Wide<Storage>* dweight, std::int64_t rows,
              std::int64_t width, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t by_size = at_least_one(kElementsPerRange / at_least_one(width));
  const std::int64_t by_count = (rows + kMaxPartials - 1) / kMaxPartials;
  const std::int64_t grain = by_size > by_count ? by_size : by_count;
  const std::int64_t n_partials = (rows + grain - 1) / grain;

  // For each range of rows the sum so far, and the sum over the last few rows.
  double* partials = new double[at_least_one(n_partials) * width]();
  W* recents = new W[at_least_one(n_partials) * width]();
  parallel_for(rows, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
    double* __restrict partial = partials + begin / grain * width;
    W* __restrict recent = recents + begin / grain * width;
    for (std::int64_t row = begin; row < end; ++row) {
      const std::int64_t at = row * width;
      backward_row(dy + at, x + at, weight, rstd[row], dx + at, recent, width);
      if ((row - begin) % kRowsPerSum == kRowsPerSum - 1 || row == end - 1) {
#pragma omp simd
        for (std::int64_t i = 0; i < width; ++i) {
          partial[i] += recent[i];
          recent[i] = 0;
        }
      }
    }
  });
  for (std::int64_t k = 1; k < n_partials; ++k) {
    const double* __restrict partial = partials + k * width;
#pragma omp simd
    for (std::int64_t i = 0; i < width; ++i) partials[i] += partial[i];
  }
  for (std::int64_t i = 0; i < width; ++i) dweight[i] = static_cast<W>(partials[i]);
  delete[] recents;
  delete[] partials;
}

}  // namespace

void rms_norm_forward(DType dtype, const void* x, const void* weight, double eps, void* y,
                      void* rstd, std::int64_t rows, std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    forward(static_cast<const S*>(x), static_cast<const W*>(weight), eps, static_cast<S*>(y),
            static_cast<W*>(rstd), rows, width, n_threads);
  });
}

void rms_norm_backward(DType dtype, const void* dy, const void* x, const void* weight,
                       const void* rstd, void* dx, void* dweight, std::int64_t rows,
                       std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    backward(static_cast<const S*>(dy), static_cast<const S*>(x), static_cast<const W*>(weight),
             static_cast<const W*>(rstd), static_cast<S*>(dx), static_cast<W*>(dweight), rows,
             width, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
