// Products of matrices on a tile of sums that stays in registers.
//
// C = A B: a tile of C is kTileRows rows by two vectors of columns. Both factors are packed first:
// of A one step of the reduction for all rows of a tile side by side, of B one step for all columns
// of a panel. A step is then two loads, a broadcast per row and two multiply-adds per row: on
// AVX-512 24 of these for 14 loads, which keeps the multipliers busy (the scheme of Goto and van de
// Geijn, doi:10.1145/1356052.1356053). Packing also gathers rows, widens or pairs half types and
// turns what lies the other way.
//
// A step is one number, or with AVX512-BF16 two bfloat16 of consecutive steps, whose products
// vdpbf16ps adds to a float in one instruction.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/numeric.h"
#include "cpu/transpose.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

#if defined(__AVX512BF16__)
constexpr int kTileBytes = 64, kTileRows = 12;  // 24 sums, 2 columns, a broadcast: of 32 registers
#elif defined(__AVX2__)
constexpr int kTileBytes = 32, kTileRows = 6;  // 12 sums, 2 columns, a broadcast: of 16
#else
constexpr int kTileBytes = 16, kTileRows = 4;
#endif

struct Pair {  // two bfloat16, the one of the earlier step in the lower bits
  std::uint32_t bits;
};

// What numbers of a type become when they are packed, and how many of them one step takes.
template <class Storage>
struct Packed {
  using Unit = Wide<Storage>;
  static constexpr int numbers = 1;
};
#if defined(__AVX512BF16__)
template <>
struct Packed<BFloat16> {
  using Unit = Pair;
  static constexpr int numbers = 2;
};
#endif
template <class Storage>
using Unit = typename Packed<Storage>::Unit;

// Columns of a tile.
template <class Storage>
constexpr int kTileColumns = 2 * kTileBytes / static_cast<int>(sizeof(Wide<Storage>));

// Steps of a reduction over so many numbers.
template <class Storage>
constexpr std::int64_t steps_of(std::int64_t numbers) {
  constexpr int per_step = Packed<Storage>::numbers;
  return (numbers + per_step - 1) / per_step;
}

typedef float TileFloats __attribute__((vector_size(kTileBytes)));
typedef double TileDoubles __attribute__((vector_size(kTileBytes)));

// sum += b * x, rounded once where the processor can. Not left to the compiler's contraction, which
// attention.cpp switches off.
inline void add_product(TileFloats& sum, TileFloats b, float x) {
#if defined(__AVX512BF16__)
  sum = _mm512_fmadd_ps(b, _mm512_set1_ps(x), sum);
#elif defined(__AVX2__)
  sum = _mm256_fmadd_ps(b, _mm256_set1_ps(x), sum);
#else
  sum += b * x;
#endif
}

inline void add_product(TileDoubles& sum, TileDoubles b, double x) {
#if defined(__AVX512BF16__)
  sum = _mm512_fmadd_pd(b, _mm512_set1_pd(x), sum);
#elif defined(__AVX2__)
  sum = _mm256_fmadd_pd(b, _mm256_set1_pd(x), sum);
#else
  sum += b * x;
#endif
}

#if defined(__AVX512BF16__)
inline void add_product(TileFloats& sum, TileFloats b, Pair x) {
  const __m512i pairs = _mm512_set1_epi32(static_cast<int>(x.bits));
  // Not the intrinsic: GCC 12 keeps such sums on the stack.
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(b), "v"(pairs));
}
#endif

template <class Unit>
struct Lanes {
  using Vector = TileFloats;
  using Number = float;
};
template <>
struct Lanes<double> {
  using Vector = TileDoubles;
  using Number = double;
};

// One long sum of floats loses digits: it is taken in parts of so many steps. Short ones where a
// tile has few rows and waits for memory anyway.
constexpr std::int64_t steps_per_sum(int rows) { return rows <= 4 ? 32 : 128; }

// sums[r][c] = sum over the steps of a[step][r] * b[step][c], for the first `rows` rows.
template <int rows, class Unit>
__attribute__((noinline)) void tile_products(const Unit* a, const Unit* b, std::int64_t steps,
                                             typename Lanes<Unit>::Number* sums) {
  using Vector = typename Lanes<Unit>::Vector;
  using Number = typename Lanes<Unit>::Number;
  constexpr int kLanes = kTileBytes / sizeof(Number);
  constexpr std::int64_t kStepsPerSum = steps_per_sum(rows);
  for (std::int64_t begin = 0; begin == 0 || begin < steps; begin += kStepsPerSum) {
    Vector acc[rows][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) acc[r][0] = acc[r][1] = Vector{};
    const std::int64_t end = begin + kStepsPerSum < steps ? begin + kStepsPerSum : steps;
    for (std::int64_t step = begin; step < end; ++step) {
      Vector first, second;
      std::memcpy(&first, b + step * 2 * kLanes, sizeof first);
      std::memcpy(&second, b + step * 2 * kLanes + kLanes, sizeof second);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const Unit x = a[step * kTileRows + r];
        add_product(acc[r][0], first, x);
        add_product(acc[r][1], second, x);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        Number* to = sums + (2 * r + v) * kLanes;
        if (begin > 0) {
          Vector before;
          std::memcpy(&before, to, sizeof before);
          acc[r][v] += before;
        }
        std::memcpy(to, &acc[r][v], sizeof acc[r][v]);
      }
    }
  }
}

template <class Unit, int most = kTileRows>
inline void tile_products(int rows, const Unit* a, const Unit* b, std::int64_t steps,
                          typename Lanes<Unit>::Number* sums) {
  if constexpr (most > 0) {
    if (rows == most) return tile_products<most>(a, b, steps, sums);
    return tile_products<Unit, most - 1>(rows, a, b, steps, sums);
  }
}

// Packing. `lines` are what a tile has as rows or a panel as columns; of `width` of them the first
// n are given, the others are zeros. packed: [step][width].

inline float pack_number(float value) { return value; }
inline double pack_number(double value) { return value; }
inline float pack_number(BFloat16 value) { return widen(value); }
inline float pack_number(Float16 value) { return widen(value); }

// Lines along which the reduction runs: lines[i] is where line i's `count` numbers begin.
template <int width, class Storage>
__attribute__((noinline)) void pack_lines(const Storage* const* lines, int n, std::int64_t count,
                                          Unit<Storage>* packed) {
  if constexpr (sizeof(Unit<Storage>) == sizeof(Storage) * Packed<Storage>::numbers &&
                sizeof(Unit<Storage>) == 4 && kTransposed > 0) {
    constexpr int per_step = Packed<Storage>::numbers;
    for (int first = 0; first < width; first += kTransposed) {
      const int here = n - first < kTransposed ? n - first : kTransposed;
      const int stored = width - first < kTransposed ? width - first : kTransposed;
      const void* from[kTransposed > 0 ? kTransposed : 1];
      for (int i = 0; i < kTransposed; ++i) from[i] = lines[i < here ? first + i : 0];
      for (std::int64_t at = 0; at < count; at += kTransposed * per_step) {
        transpose_units(from, here > 0 ? here : 0, at * sizeof(Storage),
                        (count - at) * sizeof(Storage), packed + at / per_step * width + first,
                        width, stored);
      }
    }
  } else {
    for (std::int64_t k = 0; k < count; ++k) {
      for (int i = 0; i < width; ++i) {
        packed[k * width + i] = i < n ? pack_number(lines[i][k]) : Unit<Storage>(0);
      }
    }
  }
}

constexpr std::int64_t kRowsAhead = 16;

template <int width, class Storage>
inline void fetch_row(const Storage* row) {
  for (std::size_t at = 0; at < width * sizeof(Storage); at += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(row) + at);
  }
}

// Lines side by side: rows(k) is where step k's number of line 0 stands, those of the others
// follow.
template <int width, class Storage, class Rows>
__attribute__((noinline)) void pack_steps(const Rows& rows, int n, std::int64_t count,
                                          Unit<Storage>* packed) {
  constexpr int per_step = Packed<Storage>::numbers;
  for (std::int64_t k = 0; k < count; k += per_step) {
    Unit<Storage>* to = packed + k / per_step * width;
    Storage part[per_step][width] = {};
    const Storage* from[per_step];
    for (int j = 0; j < per_step; ++j) {
      from[j] = part[j];
      if (k + j >= count) continue;
      from[j] = rows(k + j);
      // Two lines of each row and then a jump: no processor foresees that.
      if (k + j + kRowsAhead < count) fetch_row<width>(rows(k + j + kRowsAhead));
      if (n < width) {
        std::memcpy(part[j], from[j], n * sizeof(Storage));
        from[j] = part[j];
      }
    }
    if constexpr (per_step == 2) {
      for (int i = 0; i < width; ++i) {
        to[i].bits = from[0][i].bits | std::uint32_t{from[1][i].bits} << 16;
      }
    } else {
      for (int i = 0; i < width; ++i) to[i] = pack_number(from[0][i]);
    }
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
