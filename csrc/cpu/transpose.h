// Turns square blocks of 32-bit units, as packing rows for a product needs.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"

#if defined(__AVX2__)
// GCC 12 reports its own header, which leaves a register undefined on purpose (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

#if defined(__AVX512BW__)

constexpr int kTransposed = 16;  // rows and units of a block

// Turns 16 rows of 16 units.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC's bug 105593, in its own intrinsics
__attribute__((always_inline)) inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The bytes from `at` on, `left` or 64 of them, of the first n rows, turned: unit u of row i
// becomes to[u * stride + i], for i < stored; zeros for the rows from n on. Writes the units that
// `left` reaches into.
inline void transpose_units(const void* const* rows, int n, std::int64_t at, std::int64_t left,
                            void* to, std::int64_t stride, int stored) {
  const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
  __m512i r[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) {
    r[i] = _mm512_maskz_loadu_epi8(i < n ? mask : 0, static_cast<const char*>(rows[i]) + at);
  }
  transpose(r);
  const int units = left >= 64 ? 16 : static_cast<int>((left + 3) / 4);
  const auto lanes = static_cast<__mmask16>((1u << stored) - 1);
  auto* out = static_cast<std::uint32_t*>(to);
  if (units == 16) {
#pragma GCC unroll 16
    for (int u = 0; u < 16; ++u) _mm512_mask_storeu_epi32(out + u * stride, lanes, r[u]);
    return;
  }
  for (int u = 0; u < units; ++u) _mm512_mask_storeu_epi32(out + u * stride, lanes, r[u]);
}
#pragma GCC diagnostic pop

#else

constexpr int kTransposed = 0;

inline void transpose_units(const void* const*, int, std::int64_t, std::int64_t, void*,
                            std::int64_t, int) {}

#endif

}  // namespace
}  // namespace pyllm::PYLLM_ISA
