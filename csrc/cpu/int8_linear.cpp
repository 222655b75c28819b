// A linear layer with int8 weights. The equations are in pyllm/reference/int8_linear.py.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/count.h"
#include "cpu/int8_dot.h"
#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"
#include "cpu/products.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Products in a range of weight rows handed to a thread: about 5 us.
constexpr std::int64_t kProductsPerRange = per_range(1 << 19);
// Elements quantised in a range of rows: about 1 us.
constexpr std::int64_t kElementsPerRange = per_range(8192);

// Weight rows in a range: a multiple of the features of a tile.
std::int64_t features_per_range(std::int64_t rows, std::int64_t width) {
  const std::int64_t n = rows_per_range(kProductsPerRange, rows * width);
  return (n + kInt8Features - 1) / kInt8Features * kInt8Features;
}

template <class Storage>
struct Layer {
  const std::int8_t* weight;
  const Wide<Storage>* weight_scale;
  Storage* y;
  std::int64_t features, width;
};

// Features [f, f + n) of all rows, prepared `row_bytes` apart.
template <class Storage>
void multiply_tile(const Layer<Storage>& layer, const char* prepared, std::int64_t row_bytes,
                   std::int64_t rows, std::int64_t f, int n) {
  using W = Wide<Storage>;
  const std::int8_t* w[kInt8Features];  // the last one again where there are fewer
  for (int k = 0; k < kInt8Features; ++k) {
    w[k] = layer.weight + (f + std::min(k, n - 1)) * layer.width;
  }
  for (std::int64_t row = 0; row < rows; row += kInt8Tokens) {
    const int m = static_cast<int>(std::min<std::int64_t>(kInt8Tokens, rows - row));
    const char* x[kInt8Tokens];
    for (int i = 0; i < m; ++i) x[i] = prepared + (row + i) * row_bytes;
    std::int32_t sums[kInt8Tokens][kInt8Features];
    int8_groups(m, x, w, 1, layer.width, true, sums[0], kInt8Features);
    for (int i = 0; i < m; ++i) {
      const W scale = header_of(x[i]).scale;
      Storage* to = layer.y + (row + i) * layer.features + f;
      for (int k = 0; k < n; ++k) {
        to[k] = narrow<Storage>(static_cast<W>(sums[i][k]) * (scale * layer.weight_scale[f + k]));
      }
    }
  }
}

// Features [begin, end) of all rows.
template <class Storage>
void multiply_features(const Layer<Storage>& layer, const char* prepared, std::int64_t row_bytes,
                       std::int64_t rows, std::int64_t begin, std::int64_t end) {
  const std::int8_t* first = layer.weight + begin * layer.width;
  const Wide<Storage>* scales = layer.weight_scale + begin;
  multiply_rows<std::int8_t>(
      end - begin, [=](std::int64_t f) { return first + f * layer.width; }, rows,
      [=](std::int64_t row) { return prepared + row * row_bytes; }, layer.width,
      [=](std::int64_t row, std::int64_t f, const float* sums, std::int64_t n) {
        Storage* const to = layer.y + row * layer.features + begin + f;
        if (n == kTileFeatures) {  // read as it was written: four at a time
          for (std::int64_t k = 0; k < kTileFeatures; k += kFeatures) {
            Storage four[kFeatures];
#pragma GCC unroll 4
            for (int i = 0; i < kFeatures; ++i) {
              four[i] = narrow<Storage>(sums[k + i] * scales[f + k + i]);
            }
            std::memcpy(to + k, four, sizeof four);
          }
          return;
        }
        for (std::int64_t k = 0; k < n; ++k) to[k] = narrow<Storage>(sums[k] * scales[f + k]);
      },
      false);
}

// By the number of threads: every number is computed from one row of weights, so that no bit
// depends on it. Many rows are products enough to hand out weights a few at a time.
template <class Storage>
std::int64_t features_per_block(const Layer<Storage>& layer, std::int64_t rows, int n_threads) {
  if (rows < kPanelLeast) return rows_per_block(layer.features, layer.width, n_threads);
  const std::int64_t panels = (layer.features + kPanelFeatures - 1) / kPanelFeatures;
  return std::max<std::int64_t>(1, panels / (8 * n_threads)) * kPanelFeatures;
}

template <class Storage>
void in_int8(const Storage* x, const Layer<Storage>& layer, std::int64_t rows, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t width = layer.width, row_bytes = int8_row_bytes(width);
  char* const memory = new char[rows * row_bytes + kLineBytes];
  char* const workspace = at_line(memory);
  parallel_for(rows, rows_per_range(kElementsPerRange, width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t row = begin; row < end; ++row) {
                   prepare_int8_row(x + row * width, width, workspace + row * row_bytes);
                 }
               });
  parallel_for(layer.features, features_per_block(layer, rows, n_threads), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 if constexpr (sizeof(W) == sizeof(double)) {
                   // Whole sums: a float would round those beyond 2^24.
                   for (std::int64_t f = begin; f < end; f += kInt8Features) {
                     const int n = static_cast<int>(std::min<std::int64_t>(kInt8Features, end - f));
                     multiply_tile(layer, workspace, row_bytes, rows, f, n);
                   }
                 } else {
                   claim_tiles();
                   multiply_features(layer, workspace, row_bytes, rows, begin, end);
                   release_tiles();
                 }
               });
  delete[] memory;
}

template <class Storage>
void in_float(const Storage* x, const Layer<Storage>& layer, std::int64_t rows, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t width = layer.width, features = layer.features;
  parallel_for(features, features_per_range(rows, width), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 W* const wide = new W[width];  // one row of weights, for all rows of x
                 for (std::int64_t f = begin; f < end; ++f) {
                   const std::int8_t* __restrict from = layer.weight + f * width;
                   W* __restrict w = wide;
#pragma omp simd
                   for (std::int64_t d = 0; d < width; ++d) w[d] = static_cast<W>(from[d]);
                   for (std::int64_t t = 0; t < rows; ++t) {
                     const Storage* __restrict x_row = x + t * width;
                     const W sum =
                         sum_of<W>(width, [=](std::int64_t d) { return widen(x_row[d]) * w[d]; });
                     layer.y[t * features + f] = narrow<Storage>(sum * layer.weight_scale[f]);
                   }
                 }
                 delete[] wide;
               });
}

}  // namespace

void int8_linear(DType dtype, bool quantize, const void* x, const void* weight,
                 const void* weight_scale, void* y, std::int64_t rows, std::int64_t features,
                 std::int64_t width, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    const Layer<S> layer{static_cast<const std::int8_t*>(weight),
                         static_cast<const W*>(weight_scale), static_cast<S*>(y), features, width};
    if (quantize) {
      in_int8(static_cast<const S*>(x), layer, rows, n_threads);
    } else {
      in_float(static_cast<const S*>(x), layer, rows, n_threads);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
