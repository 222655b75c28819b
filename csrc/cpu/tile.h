// Products of matrices on a tile of sums that stays in registers, and the layouts that they read.
//
// C = A B: a tile of C is kTileRows rows by two vectors of columns. A step of the reduction is two
// loads of B, an element of A for each row that is multiplied with both, and nothing else: on
// AVX-512 24 multiply-adds for 14 loads, which keeps the multipliers busy (the scheme of Goto and
// van de Geijn, doi:10.1145/1356052.1356053). Both factors are packed first, so that what one step
// takes lies side by side; packing also gathers rows, widens 16-bit numbers or pairs them up, and
// turns what lies the other way.
//
// What is packed are numbers of the type sums are kept in or, where the processor multiplies them,
// pairs of bfloat16 that follow one another along the reduction: half as many steps, two products
// with every instruction. 16-bit numbers are exact in both.
//
// AMX multiplies whole squares of pairs, 16 rows by 16 steps. There a step is as before in B, but
// a strip of A's rows lies square by square, each row of a square in one piece, and a reduction is
// filled up with zeros to whole squares.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/amx.h"
#include "cpu/count.h"
#include "cpu/lanes.h"
#include "cpu/numeric.h"
#include "cpu/transpose.h"
#include "cpu/x86.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

struct Pair {  // the number of the earlier step in the lower bits
  std::uint32_t bits;
};

template <class Storage>
struct UnitOf {
  using type = Wide<Storage>;
};
#if defined(__AVX512BF16__)
template <>
struct UnitOf<BFloat16> {
  using type = Pair;
};
#endif
// What numbers of a type become when they are packed.
template <class Storage>
using Unit = typename UnitOf<Storage>::type;

// Numbers in a unit, and the type of its products.
template <class U>
constexpr int kDepth = std::is_same_v<U, Pair> ? 2 : 1;
template <class U>
using SumOf = std::conditional_t<std::is_same_v<U, Pair>, float, U>;

// Does AMX multiply them? And the steps that every reduction is a multiple of.
#if defined(__AMX_BF16__)
template <class U>
constexpr bool kSquares = std::is_same_v<U, Pair>;
#else
template <class U>
constexpr bool kSquares = false;
#endif
template <class U>
constexpr std::int64_t kStepBlock = kSquares<U> ? 16 : 1;

// Steps of a reduction over so many numbers.
template <class Storage>
constexpr std::int64_t steps_of(std::int64_t numbers) {
  using U = Unit<Storage>;
  return parts_of(numbers, kDepth<U> * kStepBlock<U>) * kStepBlock<U>;
}

// Rows and columns of a tile: 24 sums, 2 vectors of B and an element of A in 32 registers; 12
// in 16. With AMX what one of its registers holds.
#if defined(__AMX_TILE__)
constexpr int kTileRows = 16;
#elif defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
template <class W>
constexpr int kTileColumns = 2 * kLanes<W>;

inline void multiply_add(float a, const Vector<float>& b, Vector<float>& sum) { sum += a * b; }
inline void multiply_add(double a, const Vector<double>& b, Vector<double>& sum) { sum += a * b; }

#if defined(__AVX512BF16__)
inline void multiply_add(Pair a, const Vector<float>& b, Vector<float>& sum) {
  const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a.bits)));
  sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, pairs, reinterpret_cast<__m512bh>(b));
}
#endif

inline Vector<float> load_units(const Pair* from) {
  Vector<float> vector;  // moved only, as bits
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
inline Vector<float> load_units(const float* from) { return load(from); }
inline Vector<double> load_units(const double* from) { return load(from); }

// c = scale * A B, or c += A B for `add`. Element (r, s) of A is a[r * kRowStride + s * a_step].
// Not inline: GCC would keep the sums in memory, and the product with `scale` must be rounded
// before anything is taken from it, as attention's backward has to do it once more.
template <int rows, int kRowStride, int kVectors, class U>
[[gnu::noinline]] void multiply_tile(const U* a, std::int64_t a_step, const U* b,
                                     std::int64_t b_step, std::int64_t steps, bool add,
                                     SumOf<U> scale, SumOf<U>* c, std::int64_t c_stride) {
  using W = SumOf<U>;
  Vector<W> sums[rows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector<W>{};
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    Vector<W> row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = load_units(b + v * kLanes<W>);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const U element = a[r * kRowStride];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) multiply_add(element, row[v], sums[r][v]);
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      W* to = c + r * c_stride + v * kLanes<W>;
      store(add ? load(to) + sums[r][v] : scale * sums[r][v], to);
    }
  }
}

// A whole product of packed factors: sums[r][c] over the steps of a[step][r] * b[step][c], for the
// first `rows` of kTileRows rows. One long sum of floats loses digits, so it is taken in parts:
// short ones where a tile has few rows and waits for memory anyway.
template <class U>
inline void tile_products(int rows, const U* a, const U* b, std::int64_t steps, SumOf<U>* sums) {
  constexpr int columns = kTileColumns<SumOf<U>>;
#if defined(__AMX_BF16__)
  if constexpr (kSquares<U>) {  // all rows; each part goes to two sums, and may be longer
    constexpr std::int64_t kPart = 512, kSteps = kStepBlock<U>, kSquare = kSteps * kTileRows;
    for (std::int64_t begin = 0; begin == 0 || begin < steps; begin += kPart) {
      const std::int64_t here = steps - begin < kPart ? steps - begin : kPart;
      multiply_squares(a + begin * kTileRows, kSteps * sizeof(U), kSquare * sizeof(U),
                       b + begin * columns, here / kSteps, begin > 0, sums);
    }
    return;
  }
#endif
  const std::int64_t part = rows <= 4 ? 32 : 128;
  with_count<kTileRows>(rows, [=](auto count) {
    for (std::int64_t begin = 0; begin == 0 || begin < steps; begin += part) {
      multiply_tile<count, 1, 2>(a + begin * kTileRows, kTileRows, b + begin * columns, columns,
                                 steps - begin < part ? steps - begin : part, begin > 0,
                                 SumOf<U>(1), sums, columns);
    }
  });
}

// Calls fn(Storage{}) as with_storage does; among the AMX kernels for what AMX multiplies, as they
// are called for nothing else (kernels.h).
template <class Fn>
inline void with_tile_storage(DType dtype, const Fn& fn) {
#if defined(__AMX_BF16__)
  (void)dtype;
  fn(BFloat16{});
#else
  with_storage(dtype, fn);
#endif
}

// n numbers as units along them, zeros behind up to n_units units.
template <class Storage>
inline void to_units(const Storage* __restrict from, std::int64_t n, std::int64_t n_units,
                     Unit<Storage>* __restrict to) {
  using U = Unit<Storage>;
  if constexpr (std::is_same_v<U, Pair> || std::is_same_v<U, Storage>) {
    std::memcpy(to, from, n * sizeof(Storage));
    std::memset(reinterpret_cast<char*>(to) + n * sizeof(Storage), 0,
                n_units * sizeof(U) - n * sizeof(Storage));
  } else {
#pragma omp simd
    for (std::int64_t c = 0; c < n; ++c) to[c] = widen(from[c]);
    for (std::int64_t c = n; c < n_units; ++c) to[c] = 0;
  }
}

// The same out of line: where few numbers are left, which a loop comes to once.
template <class Storage>
[[gnu::noinline]] void to_last_units(const Storage* from, std::int64_t n, std::int64_t n_units,
                                     Unit<Storage>* to) {
  to_units(from, n, n_units, to);
}

// A square of units: of kLanes lines their numbers from the first on, `count` of them or as many as
// there is room for. Turned, it is what a few steps take.
template <class Storage>
inline void load_square(const Storage* const* lines, int n_lines, std::int64_t first,
                        std::int64_t count, Vector<Wide<Storage>>* square) {
  using U = Unit<Storage>;
  constexpr int lanes = kLanes<Wide<Storage>>;
  constexpr std::int64_t whole = lanes * kDepth<U>;
  U line[lanes];
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) {
    if (r >= n_lines) {
      square[r] = Vector<Wide<Storage>>{};
    } else if (count >= whole) {
      to_units(lines[r] + first, whole, lanes, line);
      square[r] = load_units(line);
    } else {
      to_last_units(lines[r] + first, count, lanes, line);
      square[r] = load_units(line);
    }
  }
}

// Lines along which the reduction runs, `width` of them side by side: to[step * width + i] is line
// i's unit, or as AMX takes a tile's rows; zeros for the lines from n on. lines[i] is where line
// i's `count` numbers begin.
template <int width, class Storage>
[[gnu::noinline]] void pack_lines(const Storage* const* lines, std::int64_t n, std::int64_t count,
                                  Unit<Storage>* to) {
  using W = Wide<Storage>;
  constexpr int lanes = kLanes<W>, depth = kDepth<Unit<Storage>>;
#pragma GCC unroll 4
  for (int first = 0; first < width; first += lanes) {
    const int bytes = (width - first < lanes ? width - first : lanes) * int{sizeof(W)};
    const int here = n - first < lanes ? static_cast<int>(n - first) : lanes;
    for (std::int64_t at = 0; at < count; at += lanes * depth) {
      Vector<W> square[lanes];
      load_square(lines + first, here, at, count - at, square);
      Unit<Storage>* const out = to + at / depth * width + first;
      if constexpr (kSquares<Unit<Storage>> && width == kTileRows) {
        std::memcpy(out, square, sizeof square);
        continue;
      }
      transpose<1>(square);
      const std::int64_t steps = steps_of<Storage>(count - at);
      if (steps >= lanes) {  // always, with AMX
#pragma GCC unroll 16
        for (int s = 0; s < lanes; ++s) std::memcpy(out + s * width, &square[s], bytes);
      } else {
        for (std::int64_t s = 0; s < steps; ++s) std::memcpy(out + s * width, &square[s], bytes);
      }
    }
  }
}

// The same of line(i), for i < n or `width`.
template <int width, class Storage, class Line>
inline void pack_lines(const Line& line, std::int64_t n, std::int64_t count, Unit<Storage>* to) {
  const Storage* lines[width];
  if (n > width) n = width;
  for (std::int64_t i = 0; i < n; ++i) lines[i] = line(i);
  pack_lines<width>(lines, n, count, to);
}

// Rows that follow one another along the reduction: to[step * columns + c] joins column c of row(r)
// and, in a pair, of the row behind it. Zeros in the columns from `width` on, and in rows from
// n_rows to padded_rows.
template <class Storage, class Row>
inline void pack_steps(const Row& row, std::int64_t n_rows, std::int64_t padded_rows,
                       std::int64_t width, std::int64_t columns, Unit<Storage>* to) {
  using U = Unit<Storage>;
  constexpr std::int64_t kRowsAhead = 16;
  const auto fetch = [&](std::int64_t r) {
    // A few lines of each row and then a jump: no processor foresees that.
    if (r >= n_rows) return;
    const auto* ahead = reinterpret_cast<const char*>(row(r));
    for (std::int64_t at = 0; at < width * std::int64_t{sizeof(Storage)}; at += kLineBytes) {
      __builtin_prefetch(ahead + at);
    }
  };
  for (std::int64_t r = 0; r < padded_rows; r += kDepth<U>, to += columns) {
    if (r >= n_rows) {
      std::memset(to, 0, columns * sizeof(U));
      continue;
    }
    for (int j = 0; j < kDepth<U>; ++j) fetch(r + kRowsAhead + j);
    if constexpr (std::is_same_v<U, Pair>) {
      const Storage* __restrict a = row(r);
      const Storage* __restrict b = r + 1 < n_rows ? row(r + 1) : a;
      const std::uint32_t keep = r + 1 < n_rows ? 0xffffffffu : 0x0000ffffu;
      std::uint32_t* __restrict bits = &to->bits;
#pragma omp simd
      for (std::int64_t c = 0; c < width; ++c) {
        bits[c] = (std::uint32_t{a[c].bits} | std::uint32_t{b[c].bits} << 16) & keep;
      }
      for (std::int64_t c = width; c < columns; ++c) bits[c] = 0;
    } else {
      to_units(row(r), width, columns, to);
    }
  }
}

// The same for as many columns as a tile has rows or columns, and a whole reduction.
template <int columns, class Storage, class Row>
[[gnu::noinline]] void pack_steps(const Row& row, std::int64_t n_rows, std::int64_t width,
                                  Unit<Storage>* to) {
  using U = Unit<Storage>;
  const std::int64_t padded_rows = kSquares<U> ? steps_of<Storage>(n_rows) * kDepth<U> : n_rows;
  if (width == columns) {
    pack_steps<Storage>(row, n_rows, padded_rows, columns, columns, to);
  } else {
    pack_steps<Storage>(row, n_rows, padded_rows, width, columns, to);
  }
  if constexpr (kSquares<U> && columns == kTileRows) {  // from steps to rows
    for (std::int64_t s = 0; s < steps_of<Storage>(n_rows); s += columns, to += columns * columns) {
      Vector<float> square[columns];
      for (int r = 0; r < columns; ++r) square[r] = load_units(to + r * columns);
      transpose<1>(square);
      std::memcpy(to, square, sizeof square);
    }
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
