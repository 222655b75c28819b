// The activation of the expert network and its gradient, for the rows of one expert. The equations
// are in pyllm/reference/moe_ffn.py; the launcher does the matrix products.
//
// Rows from n_rows to n_padded are written as zeros, because the products that follow take a row
// count rounded up: as rows they yield nothing, as a reduction they add nothing.

#include <cstdint>

#include "cpu/activation.h"
#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Elements in a range of rows handed to a thread: an exponential each, so about 5 us.
constexpr std::int64_t kElementsPerRange = per_range(8192);

template <class Storage>
void fill_zero(Storage* row, std::int64_t width) {
  for (std::int64_t i = 0; i < width; ++i) row[i] = narrow<Storage>(0);
}

template <class Activation, class Storage>
void forward(const Storage* pre, Storage* h, std::int64_t n_rows, std::int64_t n_padded,
             std::int64_t width, int n_threads) {
  parallel_for(n_padded, rows_per_range(kElementsPerRange, width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   Storage* __restrict h_row = h + row * width;
                   if (row >= n_rows) {
                     fill_zero(h_row, width);
                     continue;
                   }
                   const Storage* __restrict first = pre + row * Activation::columns * width;
                   const Storage* __restrict last = first + (Activation::columns - 1) * width;
#pragma omp simd
                   for (std::int64_t i = 0; i < width; ++i) {
                     h_row[i] =
                         narrow<Storage>(Activation::hidden(widen(first[i]), widen(last[i])));
                   }
                 }
               });
}

// One row. `dh` is not yet weighted. Returns <dh, h>, the gradient of the routing weight.
template <class Activation, class Storage>
Wide<Storage> backward_row(const Storage* __restrict dh, const Storage* __restrict pre,
                           Wide<Storage> weight, Storage* __restrict weighted_h,
                           Storage* __restrict dpre, std::int64_t width) {
  using W = Wide<Storage>;
  constexpr std::int64_t columns = Activation::columns;
  const std::int64_t to_last = (columns - 1) * width;
  W dot = 0;
#pragma omp simd reduction(+ : dot)
  for (std::int64_t i = 0; i < width; ++i) {
    W hidden, dfirst, dlast = 0;
    Activation::gradient(widen(pre[i]), widen(pre[to_last + i]), hidden, dfirst, dlast);
    const W dh_i = widen(dh[i]);
    dot += dh_i * hidden;
    weighted_h[i] = narrow<Storage>(weight * hidden);
    dpre[i] = narrow<Storage>(weight * dh_i * dfirst);
    if constexpr (columns == 2) dpre[to_last + i] = narrow<Storage>(weight * dh_i * dlast);
  }
  return dot;
}

template <class Activation, class Storage>
void backward(const Storage* dh, const Storage* pre, const Wide<Storage>* weights,
              const std::int32_t* order, Storage* weighted_h, Storage* dpre,
              Wide<Storage>* dweights, std::int64_t n_rows, std::int64_t n_padded,
              std::int64_t width, int n_threads) {
  constexpr std::int64_t columns = Activation::columns;
  parallel_for(n_padded, rows_per_range(kElementsPerRange, width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   const std::int64_t at = row * width;
                   if (row >= n_rows) {
                     fill_zero(weighted_h + at, width);
                     fill_zero(dpre + columns * at, columns * width);
                     continue;
                   }
                   const std::int32_t slot = order[row];
                   dweights[slot] =
                       backward_row<Activation>(dh + at, pre + columns * at, weights[slot],
                                                weighted_h + at, dpre + columns * at, width);
                 }
               });
}

}  // namespace

void moe_activation_forward(DType dtype, bool gated, const void* pre, void* h, std::int64_t n_rows,
                            std::int64_t n_padded, std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    const auto run = gated ? forward<SwiGlu, S> : forward<Gelu, S>;
    run(static_cast<const S*>(pre), static_cast<S*>(h), n_rows, n_padded, width, n_threads);
  });
}

void moe_activation_backward(DType dtype, bool gated, const void* dh, const void* pre,
                             const void* weights, const void* order, void* weighted_h, void* dpre,
                             void* dweights, std::int64_t n_rows, std::int64_t n_padded,
                             std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    const auto run = gated ? backward<SwiGlu, S> : backward<Gelu, S>;
    run(static_cast<const S*>(dh), static_cast<const S*>(pre), static_cast<const W*>(weights),
        static_cast<const std::int32_t*>(order), static_cast<S*>(weighted_h), static_cast<S*>(dpre),
        static_cast<W*>(dweights), n_rows, n_padded, width, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
