// Products of rows of activations with rows of weights, whatever these are stored as: a tile of
// sums for few tokens (float_dot.h, int8_dot.h), panels for many (panel.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/count.h"
#include "cpu/float_dot.h"
#include "cpu/int8_dot.h"
#include "cpu/numeric.h"
#include "cpu/panel.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

constexpr int kFeatures = 4;
// Rows of weights taken at a time.
constexpr int kTileFeatures = 16;
static_assert(kFeatures == kDotFeatures && kFeatures == kInt8Features, "");
// A loop over weights is cut into a few blocks for each thread, of so many bytes: the first lines
// of a block are waited for, and a block that is too large leaves the other threads waiting. How it
// is cut changes no bit: every number is computed from one row of weights.
constexpr std::int64_t kBlocksPerThread = 2, kLeastBytes = 8 * 1024, kMostBytes = 256 * 1024;

// How weights of a type are multiplied: what a row of activations has to look like, and the tile.
template <class Weight>
struct Products {  // float, bfloat16: a row is float, as it is
  using Row = float;
  static constexpr int kTokens = kDotTokens;
  static std::int64_t row_size(std::int64_t width) { return width; }
  static void prepare(const float* x, std::int64_t width, float* row) {
    std::memcpy(row, x, width * sizeof(float));
  }
  static void run(int tokens, const float* const* x, const Weight* const* w, int n_groups,
                  std::int64_t width, bool, float (*sums)[kTileFeatures]) {
    for (int g = 0; g < n_groups; ++g) {
      float_dots(tokens, x, w + g * kFeatures, width, sums[0] + g * kFeatures, kTileFeatures);
    }
  }
};

template <>
struct Products<std::int8_t> {  // a row is prepared
  using Row = char;
  static constexpr int kTokens = kInt8Tokens;
  static std::int64_t row_size(std::int64_t width) { return int8_row_bytes(width); }
  static void prepare(const float* x, std::int64_t width, char* row) {
    prepare_int8_row(x, width, row);
  }
  static void run(int tokens, const char* const* x, const std::int8_t* const* w, int n_groups,
                  std::int64_t width, bool streamed, float (*sums)[kTileFeatures]) {
    std::int32_t whole[kTokens][kTileFeatures];
    int8_groups(tokens, x, w, n_groups, width, streamed, whole[0], kTileFeatures);
    // Four at a time, as they were stored: a wider load would have to wait for all of the stores.
    for (int t = 0; t < tokens; ++t) {
      const float scale = header_of(x[t]).scale;
      for (int g = 0; g < n_groups; ++g) {
        for (int f = g * kFeatures; f < (g + 1) * kFeatures; ++f) {
          sums[t][f] = scale * static_cast<float>(whole[t][f]);
        }
      }
    }
  }
};

// Calls put(token, first feature, sums, how many) until all features of all tokens have been given:
// the products of weights(feature) with rows(token), not yet scaled by the features' scales.
// streamed: do the weights come from memory, rather than from a cache?
template <class Weight, class Weights, class Rows, class Put>
inline void multiply_rows(std::int64_t n_features, const Weights& weights, std::int64_t n_tokens,
                          const Rows& rows, std::int64_t width, const Put& put,
                          bool streamed = true) {
  using P = Products<Weight>;
  using Row = typename P::Row;
  if (kPanelLeast < INT64_MAX && n_tokens >= kPanelLeast) {
    char* const memory = new char[panel_bytes(width * static_cast<std::int64_t>(sizeof(Weight)))];
    char* const panel = at_line(memory);
    const PanelRows<Row, Weight> panel_rows(rows, n_tokens, width);
    for (std::int64_t f = 0; f < n_features; f += kPanelFeatures) {
      const std::int64_t n = std::min<std::int64_t>(kPanelFeatures, n_features - f);
      const Weight* w[kPanelFeatures];  // the last one again where there are fewer
      for (std::int64_t k = 0; k < kPanelFeatures; ++k) w[k] = weights(f + std::min(k, n - 1));
      fill_panel(w, width, panel);
      for (std::int64_t k = 0; f + kPanelFeatures < n_features && k < kPanelFeatures; ++k) {
        const Weight* next = weights(std::min(f + kPanelFeatures + k, n_features - 1));
        for (std::int64_t d = 0; d < width; d += kLineBytes / sizeof(Weight)) fetch_soon(next + d);
      }
      for (std::int64_t t = 0; t < n_tokens;) {
        float sums[kPanelTokens][kPanelFeatures];
        const int m = panel_rows.multiply(rows, t, n_tokens, panel, sums);
        for (int i = 0; i < m; ++i) put(t + i, f, sums[i], n);
        t += m;
      }
    }
    panel_rows.free();
    delete[] memory;
    return;
  }
  // Tiles of like size: one of two tokens takes as long as one of four.
  const std::int64_t n_tiles = (n_tokens + P::kTokens - 1) / P::kTokens;
  const int least = n_tiles > 0 ? static_cast<int>(n_tokens / n_tiles) : 0;
  const std::int64_t n_larger = n_tokens - n_tiles * least;
  for (std::int64_t f = 0; f < n_features; f += kTileFeatures) {
    const std::int64_t n = std::min<std::int64_t>(kTileFeatures, n_features - f);
    const int n_groups = static_cast<int>((n + kFeatures - 1) / kFeatures);
    const Weight* w[kTileFeatures];
    for (std::int64_t k = 0; k < kTileFeatures; ++k) w[k] = weights(f + std::min(k, n - 1));
    for (std::int64_t tile = 0, t = 0; tile < n_tiles; ++tile) {
      const int m = least + (tile < n_larger ? 1 : 0);
      const Row* x[P::kTokens];
      for (int i = 0; i < m; ++i) x[i] = rows(t + i);
      float sums[P::kTokens][kTileFeatures];
      P::run(m, x, w, n_groups, width, streamed, sums);
      for (int i = 0; i < m; ++i) put(t + i, f, sums[i], n);
      t += m;
    }
  }
}

// The number of rows of weights in a block of a loop, a multiple of a tile's.
inline std::int64_t rows_per_block(std::int64_t rows, std::int64_t row_bytes, int n_threads) {
  const std::int64_t share = rows * row_bytes / (kBlocksPerThread * n_threads);
  const std::int64_t block = std::clamp(share, kLeastBytes, kMostBytes) / row_bytes;
  return std::max<std::int64_t>(1, (block + kFeatures - 1) / kFeatures) * kFeatures;
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
