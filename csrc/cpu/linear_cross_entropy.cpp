// One chunk of logits to its losses, and to its gradient in place. The equations are in
// pyllm/reference/linear_cross_entropy.py; the launcher does the matrix products.

#include <cmath>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Elements in a range handed to a thread: enough to hide the hand-over (about 1 us).
constexpr std::int64_t kElementsPerRange = per_range(16384);

template <class Storage>
Wide<Storage> log_sum_exp(const Storage* __restrict z, std::int64_t width) {
  using W = Wide<Storage>;
  W largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < width; ++i) {
    const W value = widen(z[i]);
    largest = value > largest ? value : largest;
  }
  // With an infinite largest value, z - largest would be NaN where it should be 0 or inf.
  const W shift = largest - largest == 0 ? largest : W(0);
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) sum += exp_of(widen(z[i]) - shift);
  return shift + W(::log(static_cast<double>(sum)));
}

template <class Storage>
void forward(const Storage* logits, const std::int64_t* targets, std::int64_t ignore_index,
             Wide<Storage>* loss, Wide<Storage>* lse, std::int64_t rows, std::int64_t width,
             int n_threads) {
  parallel_for(rows, rows_per_range(kElementsPerRange, width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   const Storage* z = logits + row * width;
                   lse[row] = log_sum_exp(z, width);
                   const std::int64_t target = targets[row];
                   loss[row] = target == ignore_index ? 0 : lse[row] - widen(z[target]);
                 }
               });
}

template <class Storage>
void backward(Storage* logits, const std::int64_t* targets, std::int64_t ignore_index,
              const Wide<Storage>* lse, const Wide<Storage>* dloss, std::int64_t rows,
              std::int64_t width, int n_threads) {
  using W = Wide<Storage>;
  parallel_for(rows, rows_per_range(kElementsPerRange, width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   Storage* __restrict z = logits + row * width;
                   const std::int64_t target = targets[row];
                   if (target == ignore_index) {
                     for (std::int64_t i = 0; i < width; ++i) z[i] = narrow<Storage>(0);
                     continue;
                   }
                   const W upstream = dloss[row], shift = lse[row];
                   const W at_target = (exp_of(widen(z[target]) - shift) - W(1)) * upstream;
#pragma omp simd
                   for (std::int64_t i = 0; i < width; ++i) {
                     z[i] = narrow<Storage>(exp_of(widen(z[i]) - shift) * upstream);
                   }
                   z[target] = narrow<Storage>(at_target);
                 }
               });
}

template <class Storage>
void add(bool first, const Storage* __restrict addend, Wide<Storage>* __restrict sum,
         std::int64_t n, int n_threads) {
  using W = Wide<Storage>;
  parallel_for(n, 4 * kElementsPerRange, n_threads, [=](std::int64_t begin, std::int64_t end) {
    if (first) {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) sum[i] = W(widen(addend[i]));
    } else {
#pragma omp simd
      for (std::int64_t i = begin; i < end; ++i) sum[i] += widen(addend[i]);
    }
  });
}

}  // namespace

void cross_entropy_forward(DType dtype, const void* logits, const void* targets,
                           std::int64_t ignore_index, void* loss, void* lse, std::int64_t rows,
                           std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    forward(static_cast<const S*>(logits), static_cast<const std::int64_t*>(targets), ignore_index,
            static_cast<W*>(loss), static_cast<W*>(lse), rows, width, n_threads);
  });
}

void cross_entropy_backward(DType dtype, void* logits, const void* targets,
                            std::int64_t ignore_index, const void* lse, const void* dloss,
                            std::int64_t rows, std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    backward(static_cast<S*>(logits), static_cast<const std::int64_t*>(targets), ignore_index,
             static_cast<const W*>(lse), static_cast<const W*>(dloss), rows, width, n_threads);
  });
}

void accumulate(DType dtype, bool first, const void* addend, void* sum, std::int64_t n,
                int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    add(first, static_cast<const S*>(addend), static_cast<Wide<S>*>(sum), n, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
