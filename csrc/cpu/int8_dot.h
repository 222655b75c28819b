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
#include "cpu/numeric.h"

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

// x in int8, by the rule of quantize_rows in pyllm/reference/int8_linear.py.
template <class Storage>
inline void prepare_int8_row(const Storage* __restrict x, std::int64_t width, char* row) {
  // The bits of positive numbers grow with them, up to infinity and NaN: a maximum that keeps NaN.
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < width; ++i) {
    const std::uint32_t bits = bits_of(static_cast<float>(widen(x[i]))) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  const float scale = float_of(largest) / 127.0f;
  const bool usable = scale >= FLT_MIN && scale <= FLT_MAX;
  Int8Number* __restrict q = reinterpret_cast<Int8Number*>(row + kInt8HeaderBytes);
  const std::int64_t padded = (width + kInt8Pad - 1) / kInt8Pad * kInt8Pad;
  std::int32_t sum = 0;
  if (usable) {
    const float inverse = 1.0f / scale;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < width; ++i) {
      const float rounded = std::rint(static_cast<float>(widen(x[i])) * inverse);
      const std::int32_t number = static_cast<std::int32_t>(rounded);
      q[i] = static_cast<Int8Number>(number);
      sum += number;
    }
  } else {
    std::memset(q, 0, width * sizeof *q);
  }
  std::memset(q + width, 0, (padded - width) * sizeof *q);
  const Int8Header header{scale, 128 * sum};
  std::memcpy(row, &header, sizeof header);
}

// sums[t][f] = sum_d x[t][d] * rows[f][d]. x: prepared rows.
template <int tokens>
inline void int8_dots(const char* const* x, const std::int8_t* const* rows, std::int64_t width,
                      std::int32_t (*sums)[kInt8Features]) {
#if defined(__AVX512VNNI__)
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i acc[tokens][kInt8Features];
#pragma GCC unroll 6
  for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) acc[t][f] = _mm512_setzero_si512();
  }
  const std::int64_t whole = width / kInt8Pad * kInt8Pad;
  if (tokens <= kFewTokens) {
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) {
      for (std::int64_t d = 0; d < whole; d += kInt8Pad) {
        fetch_ahead(rows[f] + d);
        const __m512i w = _mm512_xor_si512(_mm512_loadu_si512(rows[f] + d), flip);
#pragma GCC unroll 6
        for (int t = 0; t < tokens; ++t) {
          const __m512i x_t = _mm512_load_si512(numbers_of(x[t]) + d);
          add_fours(acc[t][f], w, x_t);
        }
      }
    }
  } else {
    for (std::int64_t d = 0; d < whole; d += kInt8Pad) {
      __m512i w[kInt8Features];
#pragma GCC unroll 4
      for (int f = 0; f < kInt8Features; ++f) {
        w[f] = _mm512_xor_si512(_mm512_loadu_si512(rows[f] + d), flip);
      }
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        const __m512i x_t = _mm512_load_si512(numbers_of(x[t]) + d);
#pragma GCC unroll 4
        for (int f = 0; f < kInt8Features; ++f) add_fours(acc[t][f], w[f], x_t);
      }
    }
  }
  if (whole < width) {
    const __mmask64 mask = (std::uint64_t{1} << (width - whole)) - 1;
#pragma GCC unroll 4
    for (int f = 0; f < kInt8Features; ++f) {
      const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, rows[f] + whole), flip);
#pragma GCC unroll 6
      for (int t = 0; t < tokens; ++t) {
        add_fours(acc[t][f], w, _mm512_load_si512(numbers_of(x[t]) + whole));
      }
    }
  }
#pragma GCC unroll 6
  for (int t = 0; t < tokens; ++t) {
    // Four vectors of 16 partial sums to one of four sums.
    const __m512i* a = acc[t];
    const __m512i ab =
        _mm512_add_epi32(_mm512_unpacklo_epi32(a[0], a[1]), _mm512_unpackhi_epi32(a[0], a[1]));
    const __m512i cd =
        _mm512_add_epi32(_mm512_unpacklo_epi32(a[2], a[3]), _mm512_unpackhi_epi32(a[2], a[3]));
    const __m512i abcd =
        _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i half =
        _mm256_add_epi32(_mm512_castsi512_si256(abcd), _mm512_extracti64x4_epi64(abcd, 1));
    const __m128i four =
        _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i correction = _mm_set1_epi32(header_of(x[t]).correction);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[t]), _mm_sub_epi32(four, correction));
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
  if (tokens <= kFewTokens) {
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
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums[t]), four);
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
      sums[t][f] = sum;
    }
  }
#endif
}

// The same for a token count that is known at run time only, up to kInt8Tokens.
inline void int8_dots(int tokens, const char* const* x, const std::int8_t* const* rows,
                      std::int64_t width, std::int32_t (*sums)[kInt8Features]) {
  switch (tokens) {
#define PYLLM_CASE(n) \
  case n:             \
    return int8_dots<n>(x, rows, width, sums);
    PYLLM_CASE(1)
#if defined(__AVX2__)
    PYLLM_CASE(2)
#endif
#if defined(__AVX512VNNI__)
    PYLLM_CASE(3)
    PYLLM_CASE(4)
    PYLLM_CASE(5)
    PYLLM_CASE(6)
#endif
#undef PYLLM_CASE
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
