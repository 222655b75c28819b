// Dot products of int8 rows with int32 sums, which are exact.
//
// The activations are quantised into prepared rows: a scale, a correction and the numbers, padded
// with zeros, in the type that the instruction set multiplies fastest.
//
//   AVX-512 VNNI  vpdpbusd adds four products of an unsigned and a signed byte. The weights go in
//                 as w + 128, an exclusive or with 0x80; 128 times the sum of the activations is
//                 taken away at the end.
//   AVX2          vpmaddubsw would be the instruction, but it saturates at 16 bits. vpmaddwd, on
//                 both sides widened to int16, does not.
//   others        what the compiler makes of int16 products.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/ahead.h"
#include "cpu/count.h"
#include "cpu/int8_row.h"
#include "cpu/numeric.h"
#include "cpu/x86.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

#if defined(__AVX512VNNI__)
using Int8Number = std::int8_t;
constexpr int kInt8Tokens = 6;  // 24 sums, 4 rows of weights, an activation, 0x80: of 32 registers
#elif defined(__AVX2__)
using Int8Number = std::int16_t;
constexpr int kInt8Tokens = 2;  // 8 sums, 4 rows of weights, 2 activations: of 16
#else
using Int8Number = std::int16_t;
constexpr int kInt8Tokens = 1;
#endif
constexpr int kInt8Features = 4;

#if defined(__AVX512VNNI__)
// acc += four products of an unsigned and a signed byte, 16 times. In assembly, because GCC 12
// copies every sum before and after the intrinsic, through the stack where there are 24.
inline void add_fours(__m512i& acc, __m512i unsigned_bytes, __m512i signed_bytes) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(unsigned_bytes), "v"(signed_bytes));
}
#endif

struct Int8Header {
  float scale;
  std::int32_t correction;
};

constexpr std::int64_t kInt8Pad = 64;  // numbers
constexpr std::int64_t kInt8HeaderBytes = 64;

// Bytes of a prepared row, on the instruction set that needs most.
constexpr std::int64_t int8_row_bytes(std::int64_t width) {
  return kInt8HeaderBytes + (width + kInt8Pad - 1) / kInt8Pad * kInt8Pad * 2;
}

inline const Int8Header& header_of(const char* row) {
  return *reinterpret_cast<const Int8Header*>(row);
}

inline const Int8Number* numbers_of(const char* row) {
  return reinterpret_cast<const Int8Number*>(row + kInt8HeaderBytes);
}

// x in int8, see int8_row.h.
template <class Storage>
inline void prepare_int8_row(const Storage* x, std::int64_t width, char* row) {
  Int8Number* const q = reinterpret_cast<Int8Number*>(row + kInt8HeaderBytes);
  const std::int64_t padded = (width + kInt8Pad - 1) / kInt8Pad * kInt8Pad;
  const Int8Scale quantized = quantize_row(x, width, q);
  std::memset(q + width, 0, (padded - width) * sizeof *q);
  const Int8Header header{quantized.scale, 128 * quantized.sum};
  std::memcpy(row, &header, sizeof header);
}

#if defined(__AVX512VNNI__)
// The first n bytes of a vector, all where n is larger.
inline __mmask64 mask_of(std::int64_t n) {
  return n >= kInt8Pad ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
}

// One row of weights: acc[t] = its products with x[t], in 16 sums.
template <int tokens>
inline void dot_row(const char* const* x, const std::int8_t* row, std::int64_t width,
                    __m512i (&acc)[tokens]) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  // Two sums of a token: each waits for the one before it.
  __m512i other[tokens];
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) acc[t] = other[t] = _mm512_setzero_si512();
  const std::int64_t pairs = width / (2 * kInt8Pad) * (2 * kInt8Pad);
  for (std::int64_t d = 0; d < pairs; d += 2 * kInt8Pad) {
    fetch_ahead(row + d);
    fetch_ahead(row + d + kInt8Pad);
    const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(row + d), flip);
    const __m512i next = _mm512_xor_si512(_mm512_loadu_si512(row + d + kInt8Pad), flip);
#pragma GCC unroll 2
    for (int t = 0; t < tokens; ++t) {
      add_fours(acc[t], w, _mm512_load_si512(numbers_of(x[t]) + d));
      add_fours(other[t], next, _mm512_load_si512(numbers_of(x[t]) + d + kInt8Pad));
    }
  }
  for (std::int64_t d = pairs; d < width; d += kInt8Pad) {
    const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask_of(width - d), row + d), flip);
#pragma GCC unroll 2
    for (int t = 0; t < tokens; ++t) {
      add_fours(acc[t], w, _mm512_load_si512(numbers_of(x[t]) + d));
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) acc[t] = _mm512_add_epi32(acc[t], other[t]);
}

// Four vectors of 16 partial sums to one of four sums.
inline __m128i sum_each(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i abcd =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half =
      _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}
#endif

// sums[t * stride + f] = sum_d x[t][d] * rows[f][d] for four rows. x: prepared rows. streamed: no
// cache holds the weights, which are read row by row (see ahead.h).
template <int tokens, bool streamed>
__attribute__((always_inline)) inline void int8_dots(const char* const* x,
                                                     const std::int8_t* const* rows,
                                                     std::int64_t width, std::int32_t* sums,
                                                     std::int64_t stride) {
#if defined(__AVX512VNNI__)
  __m512i acc[kInt8Features][tokens];
  if constexpr (streamed) {
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) dot_row<tokens>(x, rows[f], width, acc[f]);
  } else {
    const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) {
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) acc[f][t] = _mm512_setzero_si512();
    }
    const std::int64_t whole = width / kInt8Pad * kInt8Pad;
    for (std::int64_t d = 0; d < whole; d += kInt8Pad) {
      __m512i w[kInt8Features];
#pragma GCC unroll 4
      for (int f = 0; f < kInt8Features; ++f) {
        fetch_soon(rows[f] + kInt8Features * width + d);
        w[f] = _mm512_xor_si512(_mm512_loadu_si512(rows[f] + d), flip);
      }
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const __m512i x_t = _mm512_load_si512(numbers_of(x[t]) + d);
#pragma GCC unroll 4
        for (int f = 0; f < kInt8Features; ++f) add_fours(acc[f][t], w[f], x_t);
      }
    }
    if (whole < width) {
      const __mmask64 mask = mask_of(width - whole);
#pragma GCC unroll 4
      for (int f = 0; f < kInt8Features; ++f) {
        const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, rows[f] + whole), flip);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; ++t) {
          add_fours(acc[f][t], w, _mm512_load_si512(numbers_of(x[t]) + whole));
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < tokens; ++t) {
    const __m128i four = sum_each(acc[0][t], acc[1][t], acc[2][t], acc[3][t]);
    const __m128i correction = _mm_set1_epi32(header_of(x[t]).correction);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + t * stride),
                     _mm_sub_epi32(four, correction));
  }
#elif defined(__AVX2__)
  __m256i acc[tokens][kInt8Features];
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) acc[t][f] = _mm256_setzero_si256();
  }
  const auto load_whole = [](const std::int8_t* from) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  const std::int64_t whole = width / 16 * 16;
  if constexpr (streamed) {
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) {
      for (std::int64_t d = 0; d < whole; d += 16) {
        if (d % kInt8Pad == 0) fetch_ahead(rows[f] + d);
        const __m256i w = _mm256_cvtepi8_epi16(load_whole(rows[f] + d));
#pragma GCC unroll 2
        for (int t = 0; t < tokens; ++t) {
          const __m256i x_t =
              _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers_of(x[t]) + d));
          acc[t][f] = _mm256_add_epi32(acc[t][f], _mm256_madd_epi16(w, x_t));
        }
      }
    }
  } else {
    for (std::int64_t d = 0; d < whole; d += 16) {
      __m256i w[kInt8Features];
#pragma GCC unroll 4
      for (int f = 0; f < kInt8Features; ++f) w[f] = _mm256_cvtepi8_epi16(load_whole(rows[f] + d));
#pragma GCC unroll 2
      for (int t = 0; t < tokens; ++t) {
        const __m256i x_t =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers_of(x[t]) + d));
#pragma GCC unroll 4
        for (int f = 0; f < kInt8Features; ++f) {
          acc[t][f] = _mm256_add_epi32(acc[t][f], _mm256_madd_epi16(w[f], x_t));
        }
      }
    }
  }
  if (whole < width) {
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) {
      alignas(16) std::int8_t rest[16] = {};
      std::memcpy(rest, rows[f] + whole, width - whole);
      const __m256i w = _mm256_cvtepi8_epi16(load_whole(rest));
#pragma GCC unroll 2
      for (int t = 0; t < tokens; ++t) {
        const __m256i x_t =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(numbers_of(x[t]) + whole));
        acc[t][f] = _mm256_add_epi32(acc[t][f], _mm256_madd_epi16(w, x_t));
      }
    }
  }
#pragma GCC unroll 2
  for (int t = 0; t < tokens; ++t) {
    const __m256i* a = acc[t];
    const __m256i abcd =
        _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256(abcd, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + t * stride), four);
  }
#else
  for (int t = 0; t < tokens; ++t) {
    const Int8Number* __restrict numbers = numbers_of(x[t]);
    for (int f = 0; f < kInt8Features; ++f) {
      const std::int8_t* __restrict row = rows[f];
      std::int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t d = 0; d < width; ++d) {
        sum += static_cast<std::int16_t>(row[d]) * numbers[d];
      }
      sums[t * stride + f] = sum;
    }
  }
#endif
}

// The same for n_groups times four rows. Not inlined: in some callers GCC 12 keeps the sums on the
// stack.
template <int tokens, bool streamed>
__attribute__((noinline)) void int8_groups(const char* const* x, const std::int8_t* const* rows,
                                           int n_groups, std::int64_t width, std::int32_t* sums,
                                           std::int64_t stride) {
  for (int g = 0; g < n_groups; ++g) {
    int8_dots<tokens, streamed>(x, rows + g * kInt8Features, width, sums + g * kInt8Features,
                                stride);
  }
}

// The same for a token count that is known at run time only, up to kInt8Tokens.
inline void int8_groups(int tokens, const char* const* x, const std::int8_t* const* rows,
                        int n_groups, std::int64_t width, bool streamed, std::int32_t* sums,
                        std::int64_t stride) {
  with_count<kInt8Tokens>(tokens, [=](auto count) {
    if constexpr (count <= kFewTokens) {
      if (streamed) {
        return int8_groups<count, true>(x, rows, n_groups, width, sums, stride);
      }
    }
    int8_groups<count, false>(x, rows, n_groups, width, sums, stride);
  });
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
