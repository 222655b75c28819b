// What becomes of a tile's sums, and products whose reduction runs over rows: gradients of weights.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/tile.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// The sums of a tile as numbers of `Storage`, to rows that lie `stride` apart.
template <class Storage>
void put_rows(const Wide<Storage>* sums, int rows, std::int64_t n, Storage* to,
              std::int64_t stride) {
  constexpr int columns = kTileColumns<Wide<Storage>>;
  for (int r = 0; r < rows; ++r) {
    const Wide<Storage>* __restrict from = sums + r * columns;
    Storage* __restrict out = to + r * stride;
    if (n == columns) {
      for (int i = 0; i < columns; ++i) out[i] = narrow<Storage>(from[i]);
    } else {
      for (std::int64_t i = 0; i < n; ++i) out[i] = narrow<Storage>(from[i]);
    }
  }
}

// The same past the cache, for what is larger than it: a line that is written whole need not be
// read.
template <class Storage>
void stream_rows(const Wide<Storage>* sums, int rows, std::int64_t n, Storage* to,
                 std::int64_t stride) {
#if defined(__AVX512F__)
  constexpr int columns = kTileColumns<Wide<Storage>>;
  constexpr int kBytes = columns * sizeof(Storage);
  const auto at = reinterpret_cast<std::uintptr_t>(to) | stride * sizeof(Storage);
  if (n == columns && at % 64 == 0) {
    for (int r = 0; r < rows; ++r) {
      alignas(64) Storage row[columns];
      for (int i = 0; i < columns; ++i) row[i] = narrow<Storage>(sums[r * columns + i]);
      for (int b = 0; b < kBytes; b += 64) {
        const auto* from = reinterpret_cast<const char*>(row) + b;
        auto* out = reinterpret_cast<char*>(to + r * stride) + b;
        _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_load_si512(from));
      }
    }
    return;
  }
#endif
  put_rows(sums, rows, n, to, stride);
}

inline void end_stream() {
#if defined(__AVX512F__)
  _mm_sfence();
#endif
}

// packed: [group of kTileRows lines][step][line] of columns [0, n_lines) of an expert's rows.
template <class Storage, class Rows>
void pack_columns(const Rows& rows, std::int64_t n_rows, std::int64_t group, std::int64_t n_lines,
                  Unit<Storage>* packed) {
  const std::int64_t first = group * kTileRows;
  const int n = static_cast<int>(std::min<std::int64_t>(kTileRows, n_lines - first));
  pack_steps<kTileRows, Storage>([&](std::int64_t k) { return rows(k) + first; }, n_rows, n,
                                 packed + group * steps_of<Storage>(n_rows) * kTileRows);
}

// One panel of columns of an expert's weight gradient: the sum over its rows of left times right.
// left: all columns packed by pack_columns. right: rows(k) is row k from the panel's column on.
template <class Storage, class Rows>
void weight_gradient(const Unit<Storage>* left, std::int64_t n_lines, const Rows& right,
                     std::int64_t n_rows, int n, Unit<Storage>* panel, Storage* out,
                     std::int64_t stride) {
  alignas(64) Wide<Storage> sums[kTileRows * kTileColumns<Wide<Storage>>];
  const std::int64_t steps = steps_of<Storage>(n_rows);
  pack_steps<kTileColumns<Wide<Storage>>, Storage>(right, n_rows, n, panel);
  for (std::int64_t line = 0; line < n_lines; line += kTileRows) {
    const int rows = static_cast<int>(std::min<std::int64_t>(kTileRows, n_lines - line));
    tile_products(rows, left + line * steps, panel, steps, sums);
    stream_rows(sums, rows, n, out + line * stride, stride);
  }
  end_stream();
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
