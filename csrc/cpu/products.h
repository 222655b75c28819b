// Products of rows of activations with rows of weights, whatever these are stored as: a tile of
// sums for few tokens (float_dot.h, int8_dot.h), panels for many (panel.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/float_dot.h"
#include "cpu/int8_dot.h"
#include "cpu/numeric.h"
#include "cpu/panel.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

constexpr int kFeatures = 4;
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
  static void run(int tokens, const float* const* x, const Weight* const* w, std::int64_t width,
                  float (*sums)[kFeatures]) {
    float_dots(tokens, x, w, width, sums);
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
  static void run(int tokens, const char* const* x, const std::int8_t* const* w, std::int64_t width,
                  float (*sums)[kFeatures]) {
    std::int32_t whole[kTokens][kFeatures];
    int8_dots(tokens, x, w, width, whole);
    for (int t = 0; t < tokens; ++t) {
      const float scale = header_of(x[t]).scale;
      for (int f = 0; f < kFeatures; ++f) sums[t][f] = scale * static_cast<float>(whole[t][f]);
    }
  }
};

// Calls put(token, first feature, sums, how many) until all features of all tokens have been given:
// the products of weights(feature) with rows(token), not yet scaled by the features' scales.
template <class Weight, class Weights, class Rows, class Put>
inline void multiply_rows(std::int64_t n_features, const Weights& weights, std::int64_t n_tokens,
                          const Rows& rows, std::int64_t width, const Put& put) {
  using P = Products<Weight>;
  using Row = typename P::Row;
  if (n_tokens >= kPanelLeast) {
    char* const memory = new char[panel_bytes(width * static_cast<std::int64_t>(sizeof(Weight)))];
    char* const panel = memory + (64 - reinterpret_cast<std::uintptr_t>(memory) % 64) % 64;
    for (std::int64_t f = 0; f < n_features; f += kPanelFeatures) {
      const std::int64_t n = std::min<std::int64_t>(kPanelFeatures, n_features - f);
      const Weight* w[kPanelFeatures];  // the last one again where there are fewer
      for (std::int64_t k = 0; k < kPanelFeatures; ++k) w[k] = weights(f + std::min(k, n - 1));
      fill_panel(w, width, panel);
      for (std::int64_t t = 0; t < n_tokens;) {
        const std::int64_t left = std::min<std::int64_t>(kPanelTokens, n_tokens - t);
        const Row* x[kPanelTokens];
        for (std::int64_t i = 0; i < left; ++i) x[i] = rows(t + i);
        float sums[kPanelTokens][kPanelFeatures];
        const int m = multiply_panel(left, x, w[0], panel, width, sums);
        for (int i = 0; i < m; ++i) put(t + i, f, sums[i], n);
        t += m;
      }
    }
    delete[] memory;
    return;
  }
  for (std::int64_t f = 0; f < n_features; f += kFeatures) {
    const std::int64_t n = std::min<std::int64_t>(kFeatures, n_features - f);
    const Weight* w[kFeatures];
    for (std::int64_t k = 0; k < kFeatures; ++k) w[k] = weights(f + std::min(k, n - 1));
    for (std::int64_t t = 0; t < n_tokens; t += P::kTokens) {
      const int m = static_cast<int>(std::min<std::int64_t>(P::kTokens, n_tokens - t));
      const Row* x[P::kTokens];
      for (int i = 0; i < m; ++i) x[i] = rows(t + i);
      float sums[P::kTokens][kFeatures];
      P::run(m, x, w, width, sums);
      for (int i = 0; i < m; ++i) put(t + i, f, sums[i], n);
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
