// The products of attention: a tile of sums that stays in registers, and the layouts it reads.
//
// Every product is C (rows, columns) = A (rows, steps) B (steps, columns): an element of A is
// broadcast, a row of B is read in whole vectors. Elements are numbers of the type sums are kept
// in, or, where the processor multiplies them, pairs of bfloat16 that lie next to each other in the
// direction that is summed over: half as many steps. 16-bit numbers are exact in both.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/numeric.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

struct Pair {
  std::uint32_t bits;
};

template <class Storage>
struct ElementOf {
  using type = Wide<Storage>;
};
#if defined(__AVX512BF16__)
template <>
struct ElementOf<BFloat16> {
  using type = Pair;
};
#endif
template <class Storage>
using Element = typename ElementOf<Storage>::type;

// Numbers in an element.
template <class E>
constexpr int kDepth = std::is_same_v<E, Pair> ? 2 : 1;
template <class E>
using SumOf = std::conditional_t<std::is_same_v<E, Pair>, float, E>;

// Rows and columns of a tile: 24 sums, 2 vectors of B and an element of A in 32 registers; 12
// in 16.
#if defined(__AVX512F__)
constexpr int kTileRows = 12;
#elif defined(__AVX2__)
constexpr int kTileRows = 6;
#else
constexpr int kTileRows = 4;
#endif
template <class W>
constexpr int kTileColumns = 2 * kLanes<W>;

template <class W>
inline std::int64_t whole_vectors(std::int64_t width) {
  return (width + kLanes<W> - 1) / kLanes<W> * kLanes<W>;
}

template <class E>
inline std::int64_t steps_of(std::int64_t width) {
  return (width + kDepth<E> - 1) / kDepth<E>;
}

inline void multiply_add(float a, const Vector<float>& b, Vector<float>& sum) { sum += a * b; }
inline void multiply_add(double a, const Vector<double>& b, Vector<double>& sum) { sum += a * b; }

#if defined(__AVX512BF16__)
inline void multiply_add(Pair a, const Vector<float>& b, Vector<float>& sum) {
  const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a.bits)));
  sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, pairs, reinterpret_cast<__m512bh>(b));
}
#endif

inline Vector<float> load_elements(const Pair* from) {
  Vector<float> vector;  // moved only, as bits
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}
inline Vector<float> load_elements(const float* from) { return load(from); }
inline Vector<double> load_elements(const double* from) { return load(from); }

// c = scale * A B, or c += A B for `add`. Element (r, s) of A is a[r * kRowStride + s * a_step].
// Not inline: GCC would keep the sums in memory, and the product with `scale` must be rounded
// before anything is taken from it: see softmax_row.
template <int kRowStride, int kVectors, class E>
[[gnu::noinline]] void multiply_tile(const E* a, std::int64_t a_step, const E* b,
                                     std::int64_t b_step, std::int64_t steps, bool add,
                                     SumOf<E> scale, SumOf<E>* c, std::int64_t c_stride) {
  using W = SumOf<E>;
  Vector<W> sums[kTileRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[r][v] = Vector<W>{};
  }
  for (std::int64_t s = 0; s < steps; ++s) {
    Vector<W> row[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) row[v] = load_elements(b + v * kLanes<W>);
#pragma GCC unroll 12
    for (int r = 0; r < kTileRows; ++r) {
      const E element = a[r * kRowStride];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) multiply_add(element, row[v], sums[r][v]);
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 12
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      W* to = c + r * c_stride + v * kLanes<W>;
      store(add ? load(to) + sums[r][v] : scale * sums[r][v], to);
    }
  }
}

// Over all columns, a multiple of a vector.
template <int kRowStride, class E>
inline void add_product(const E* a, std::int64_t a_step, const E* b, std::int64_t columns,
                        std::int64_t steps, SumOf<E>* c) {
  using W = SumOf<E>;
  std::int64_t n = 0;
  for (; n + kTileColumns<W> <= columns; n += kTileColumns<W>) {
    multiply_tile<kRowStride, 2>(a, a_step, b + n, columns, steps, true, W(1), c + n, columns);
  }
  if (n < columns) {
    multiply_tile<kRowStride, 1>(a, a_step, b + n, columns, steps, true, W(1), c + n, columns);
  }
}

#if defined(__AVX512BF16__)
// n numbers, a multiple of 32, as pairs along their row.
inline void to_pairs(const float* from, std::int64_t n, Pair* to) {
  for (std::int64_t i = 0; i < n; i += 32) {
    const auto pairs =
        _mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + i + 16), _mm512_loadu_ps(from + i));
    std::memcpy(to + i / 2, &pairs, sizeof pairs);
  }
}

inline Vector<std::uint32_t> rounded_bits(const float* from) {
  typedef std::uint16_t Bits __attribute__((vector_size(32)));
  const auto rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
  Bits bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return __builtin_convertvector(bits, Vector<std::uint32_t>);
}

// n numbers, a multiple of 16, of two rows that follow one another as pairs down the columns.
inline void to_pairs(const float* first, const float* second, std::int64_t n, Pair* to) {
  for (std::int64_t i = 0; i < n; i += 16) {
    store(rounded_bits(first + i) | rounded_bits(second + i) << 16, &to[i].bits);
  }
}
#endif

// A row of storage as elements along its width, zeros behind it up to `steps`.
template <class Storage, class E>
inline void copy_elements(const Storage* __restrict from, std::int64_t width, std::int64_t steps,
                          E* __restrict to) {
  if constexpr (std::is_same_v<E, Pair> || std::is_same_v<E, Storage>) {
    std::memcpy(to, from, width * sizeof(Storage));
    std::memset(reinterpret_cast<char*>(to) + width * sizeof(Storage), 0,
                steps * sizeof(E) - width * sizeof(Storage));
  } else {
#pragma omp simd
    for (std::int64_t c = 0; c < width; ++c) to[c] = widen(from[c]);
    for (std::int64_t c = width; c < steps; ++c) to[c] = 0;
  }
}

template <int distance, class V, int... i>
inline void swap_lanes(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const V low = __builtin_shufflevector(a, b, (i & distance ? i - distance + n : i)...);
  b = __builtin_shufflevector(a, b, (i & distance ? i + n : i + distance)...);
  a = low;
}

// Transposes a square of as many vectors as they have lanes.
template <int distance, class V>
inline void transpose(V* vectors) {
  constexpr int n = sizeof(V) / sizeof(vectors[0][0]);
  if constexpr (distance < n) {
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if ((i & distance) != 0) continue;
      swap_lanes<distance>(vectors[i], vectors[i + distance], std::make_integer_sequence<int, n>{});
    }
    transpose<2 * distance>(vectors);
  }
}

// n_rows <= kColumns rows, row(r) the address of each, as columns: to[s * kColumns + r] is element
// s of row r, zero for the rows that are not there. `staged` has room for kLanes rows of
// whole_vectors(steps) elements.
template <int kColumns, class Storage, class Row>
inline void pack_columns(const Row& row, std::int64_t n_rows, std::int64_t width,
                         Element<Storage>* staged, Element<Storage>* to) {
  using E = Element<Storage>;
  using W = SumOf<E>;
  constexpr int lanes = kLanes<W>;
  const std::int64_t steps = steps_of<E>(width), padded = whole_vectors<W>(steps);
#pragma GCC unroll 4
  for (int first = 0; first < kColumns; first += lanes) {
    constexpr int whole = sizeof(Vector<W>);
    const int bytes =
        kColumns - first < lanes ? (kColumns - first) * static_cast<int>(sizeof(W)) : whole;
    for (int r = 0; r < lanes; ++r) {
      if (first + r < n_rows) {
        copy_elements(row(first + r), width, padded, staged + r * padded);
      } else {
        std::memset(staged + r * padded, 0, padded * sizeof(E));
      }
    }
    for (std::int64_t s = 0; s < steps; s += lanes) {
      Vector<W> square[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r) square[r] = load_elements(staged + r * padded + s);
      transpose<1>(square);
      const std::int64_t here = steps - s < lanes ? steps - s : lanes;
      E* at = to + s * kColumns + first;
      if (here == lanes) {
#pragma GCC unroll 16
        for (int k = 0; k < lanes; ++k) std::memcpy(at + k * kColumns, &square[k], bytes);
      } else {
        for (std::int64_t k = 0; k < here; ++k) std::memcpy(at + k * kColumns, &square[k], bytes);
      }
    }
  }
}

// n_rows rows as steps: element (s, c) joins column c of kDepth rows that follow one another; to
// has `columns` of them, zeros where there is no row (up to `padded_rows`) and no column.
template <class Storage, class Row>
inline void pack_steps(const Row& row, std::int64_t n_rows, std::int64_t padded_rows,
                       std::int64_t width, std::int64_t columns, Element<Storage>* to) {
  using E = Element<Storage>;
  if constexpr (std::is_same_v<E, Pair>) {
    for (std::int64_t r = 0; r < padded_rows; r += 2, to += columns) {
      if (r >= n_rows) {
        std::memset(to, 0, columns * sizeof(E));
        continue;
      }
      const Storage* __restrict a = row(r);
      const Storage* __restrict b = r + 1 < n_rows ? row(r + 1) : a;
      const std::uint32_t keep = r + 1 < n_rows ? 0xffffffffu : 0x0000ffffu;
      std::uint32_t* __restrict bits = &to->bits;
#pragma omp simd
      for (std::int64_t c = 0; c < width; ++c) {
        bits[c] = (std::uint32_t{a[c].bits} | std::uint32_t{b[c].bits} << 16) & keep;
      }
      for (std::int64_t c = width; c < columns; ++c) bits[c] = 0;
    }
  } else {
    for (std::int64_t r = 0; r < padded_rows; ++r, to += columns) {
      if (r < n_rows) {
        copy_elements(row(r), width, columns, to);
      } else {
        std::memset(to, 0, columns * sizeof(E));
      }
    }
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
