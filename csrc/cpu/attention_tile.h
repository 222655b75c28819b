// What attention does with tiles (tile.h): products over a whole width, and weights and gradients
// of scores as pairs of bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/lanes.h"
#include "cpu/numeric.h"
#include "cpu/tile.h"
#include "cpu/x86.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// c += A B over all columns, a multiple of a vector. Element (r, s) of A is a[r * kRowStride + s *
// a_step].
template <int kRowStride, class U>
inline void add_product(const U* a, std::int64_t a_step, const U* b, std::int64_t columns,
                        std::int64_t steps, SumOf<U>* c) {
  using W = SumOf<U>;
  std::int64_t n = 0;
  for (; n + kTileColumns<W> <= columns; n += kTileColumns<W>) {
    multiply_tile<kTileRows, kRowStride, 2>(a, a_step, b + n, columns, steps, true, W(1), c + n,
                                            columns);
  }
  if (n < columns) {
    multiply_tile<kTileRows, kRowStride, 1>(a, a_step, b + n, columns, steps, true, W(1), c + n,
                                            columns);
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

}  // namespace
}  // namespace pyllm::PYLLM_ISA
