// Products of many tokens with weights: 32 rows of weights are copied into a panel, turned so that
// a vector holds the same four bytes of 16 rows. A token's four bytes are then multiplied with all
// rows at once, the sums of 12 tokens stay in registers, and nothing has to be added across a
// vector. The copy costs as much as about five tokens.
//
// Four bytes are a float, two bfloat16, or four int8 (see int8_dot.h for their form).
//
// Of int8, AMX multiplies 16 steps of a panel with 16 tokens at once, whose rows are gathered
// first.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/amx.h"
#include "cpu/count.h"
#include "cpu/int8_dot.h"
#include "cpu/numeric.h"
#include "cpu/transpose.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

constexpr int kPanelFeatures = 32;
// The most that are multiplied with a panel at a time.
#if defined(__AMX_INT8__)
constexpr int kPanelTokens = 16;
#else
constexpr int kPanelTokens = 12;
#endif
// From so many tokens on; not without AVX-512, whose 32 registers it needs.
#if defined(__AVX512VNNI__)
constexpr std::int64_t kPanelLeast = 16;
#else
constexpr std::int64_t kPanelLeast = INT64_MAX;
#endif

// Bytes of a panel, and what it may begin with so that it is aligned.
inline std::int64_t panel_bytes(std::int64_t row_bytes) {
  return (row_bytes + 63) / 64 * 64 * kPanelFeatures + kLineBytes;
}

#if defined(__AVX512VNNI__)

// vpdpbusd takes the weights with another sign bit, as unsigned (int8_dot.h); AMX as they are.
#if defined(__AMX_INT8__)
constexpr char kInt8Flip = 0;
#else
constexpr char kInt8Flip = static_cast<char>(0x80);
#endif

// panel: [four bytes of a row][row], zeros behind the end of the rows.
template <class Weight>
inline void fill_panel(const Weight* const* rows, std::int64_t width, char* panel) {
  const std::int64_t row_bytes = width * static_cast<std::int64_t>(sizeof(Weight));
  const __m512i flip = _mm512_set1_epi8(sizeof(Weight) == 1 ? kInt8Flip : 0);
  for (std::int64_t at = 0; at < row_bytes; at += 64) {
    const std::int64_t left = row_bytes - at;
    const __mmask64 mask = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    for (int half = 0; half < 2; ++half) {
      Vector<float> square[16];  // moved only, as bits
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const char* from = reinterpret_cast<const char*>(rows[half * 16 + i]) + at;
        square[i] = (Vector<float>)_mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, from), flip);
      }
      transpose<1>(square);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        std::memcpy(panel + ((at / 4 + i) * 2 + half) * 64, &square[i], 64);
      }
    }
  }
}

inline __m512 scaled(__m512i sum, const Int8Header& header) {
  return _mm512_mul_ps(
      _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, _mm512_set1_epi32(header.correction))),
      _mm512_set1_ps(header.scale));
}

// sums[t][f] for prepared rows x. Not inlined: in some callers GCC 12 keeps the sums on the stack.
template <int tokens>
__attribute__((noinline)) void panel_products(const char* const* x, const std::int8_t*,
                                              const char* panel, std::int64_t width,
                                              float (*sums)[kPanelFeatures]) {
  __m512i acc[tokens][2];
#pragma GCC unroll 12
  for (int t = 0; t < tokens; ++t) acc[t][0] = acc[t][1] = _mm512_setzero_si512();
  const std::int64_t steps = (width + 3) / 4;
  for (std::int64_t k = 0; k < steps; ++k) {
    const __m512i first = _mm512_load_si512(panel + k * 128);
    const __m512i second = _mm512_load_si512(panel + k * 128 + 64);
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
      std::int32_t four;
      std::memcpy(&four, numbers_of(x[t]) + 4 * k, sizeof four);
      const __m512i x_t = _mm512_set1_epi32(four);
      add_fours(acc[t][0], first, x_t);
      add_fours(acc[t][1], second, x_t);
    }
  }
#pragma GCC unroll 12
  for (int t = 0; t < tokens; ++t) {
    const Int8Header& header = header_of(x[t]);
    _mm512_storeu_ps(sums[t], scaled(acc[t][0], header));
    _mm512_storeu_ps(sums[t] + 16, scaled(acc[t][1], header));
  }
}

// Adds the products of steps [begin, end), four bytes of weights each.
template <int tokens>
inline void add_steps(const float* const* x, const float*, const char* panel, std::int64_t begin,
                      std::int64_t end, __m512 (&acc)[tokens][2]) {
  for (std::int64_t k = begin; k < end; ++k) {
    const __m512 first = _mm512_load_ps(panel + k * 128);
    const __m512 second = _mm512_load_ps(panel + k * 128 + 64);
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
      const __m512 x_t = _mm512_set1_ps(x[t][k]);
      acc[t][0] = _mm512_fmadd_ps(first, x_t, acc[t][0]);
      acc[t][1] = _mm512_fmadd_ps(second, x_t, acc[t][1]);
    }
  }
}

template <int tokens>
inline void add_steps(const float* const* x, const BFloat16*, const char* panel, std::int64_t begin,
                      std::int64_t end, __m512 (&acc)[tokens][2]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (std::int64_t k = begin; k < end; ++k) {
    const __m512i pairs[2] = {_mm512_load_si512(panel + k * 128),
                              _mm512_load_si512(panel + k * 128 + 64)};
    const __m512 even[2] = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs[0], 16)),
                            _mm512_castsi512_ps(_mm512_slli_epi32(pairs[1], 16))};
    const __m512 odd[2] = {_mm512_castsi512_ps(_mm512_and_si512(pairs[0], upper)),
                           _mm512_castsi512_ps(_mm512_and_si512(pairs[1], upper))};
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
      const __m512 x_even = _mm512_set1_ps(x[t][2 * k]), x_odd = _mm512_set1_ps(x[t][2 * k + 1]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        acc[t][v] = _mm512_fmadd_ps(even[v], x_even, acc[t][v]);
        acc[t][v] = _mm512_fmadd_ps(odd[v], x_odd, acc[t][v]);
      }
    }
  }
}

// sums[t][f] for float rows x. One long sum of floats loses digits: it is taken in parts.
template <int tokens, class Weight>
__attribute__((noinline)) void panel_products(const float* const* x, const Weight* kind,
                                              const char* panel, std::int64_t width,
                                              float (*sums)[kPanelFeatures]) {
  constexpr std::int64_t kPerStep = 4 / sizeof(Weight), kSteps = 128;
  const std::int64_t steps = width / kPerStep;
  for (std::int64_t begin = 0; begin < steps || begin == 0; begin += kSteps) {
    __m512 acc[tokens][2];
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    const std::int64_t end = begin + kSteps < steps ? begin + kSteps : steps;
    add_steps<tokens>(x, kind, panel, begin, end, acc);
    if (kPerStep == 2 && end == steps && width % 2 == 1) {  // the last one of a pair
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        const __m512i pairs = _mm512_load_si512(panel + steps * 128 + v * 64);
        const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
#pragma GCC unroll 12
        for (int t = 0; t < tokens; ++t) {
          acc[t][v] = _mm512_fmadd_ps(even, _mm512_set1_ps(x[t][2 * steps]), acc[t][v]);
        }
      }
    }
#pragma GCC unroll 12
    for (int t = 0; t < tokens; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        float* to = sums[t] + 16 * v;
        _mm512_storeu_ps(to,
                         begin == 0 ? acc[t][v] : _mm512_add_ps(_mm512_loadu_ps(to), acc[t][v]));
      }
    }
  }
}

// The rows of n tokens, as a panel is multiplied with them.
template <class Row, class Weight>
class PanelRows {
 public:
  template <class Rows>
  PanelRows(const Rows&, std::int64_t, std::int64_t width) : width_(width) {}
  void free() const {}

  // sums[i] = the products of token t + i; how many tokens that were, of those from t on to n.
  template <class Rows>
  int multiply(const Rows& rows, std::int64_t t, std::int64_t n, const char* panel,
               float (*sums)[kPanelFeatures]) const {
    const Row* x[kPanelTokens];
    const std::int64_t left = n - t < kPanelTokens ? n - t : kPanelTokens;
    for (std::int64_t i = 0; i < left; ++i) x[i] = rows(t + i);
    const Weight* const kind = nullptr;
    if (left >= 12) return panel_products<12>(x, kind, panel, width_, sums), 12;
    if (left >= 8) return panel_products<8>(x, kind, panel, width_, sums), 8;
    if (left >= 4) return panel_products<4>(x, kind, panel, width_, sums), 4;
    if (left >= 2) return panel_products<2>(x, kind, panel, width_, sums), 2;
    return panel_products<1>(x, kind, panel, width_, sums), 1;
  }

 private:
  std::int64_t width_;
};

#if defined(__AMX_INT8__)
template <>
class PanelRows<char, std::int8_t> {
 public:
  template <class Rows>
  PanelRows(const Rows& rows, std::int64_t n, std::int64_t width)
      : row_bytes_(parts_of(width, kLineBytes) * kLineBytes),
        memory_(new char[parts_of(n, kPanelTokens) * kPanelTokens * row_bytes_ + kLineBytes]),
        gathered_(at_line(memory_)) {
    for (std::int64_t t = 0; t < n; ++t) {
      std::memcpy(gathered_ + t * row_bytes_, numbers_of(rows(t)), row_bytes_);
    }
  }
  void free() const { delete[] memory_; }

  template <class Rows>
  int multiply(const Rows& rows, std::int64_t t, std::int64_t n, const char* panel,
               float (*sums)[kPanelFeatures]) const {
    const int m = static_cast<int>(n - t < kPanelTokens ? n - t : kPanelTokens);
    alignas(64) std::int32_t whole[kPanelTokens][kPanelFeatures];
    multiply_squares(gathered_ + t * row_bytes_, row_bytes_, 64, panel, row_bytes_ / 64, false,
                     whole[0]);
    for (int i = 0; i < m; ++i) {
      const float scale = header_of(rows(t + i)).scale;
#pragma omp simd
      for (int f = 0; f < kPanelFeatures; ++f) {
        sums[i][f] = scale * static_cast<float>(whole[i][f]);
      }
    }
    return m;
  }

 private:
  std::int64_t row_bytes_;
  char *memory_, *gathered_;
};
#endif

#else

template <class Weight>
inline void fill_panel(const Weight* const*, std::int64_t, char*) {}
template <class Row, class Weight>
struct PanelRows {
  template <class Rows>
  PanelRows(const Rows&, std::int64_t, std::int64_t) {}
  void free() const {}
  template <class Rows>
  int multiply(const Rows&, std::int64_t t, std::int64_t n, const char*,
               float (*)[kPanelFeatures]) const {
    return static_cast<int>(n - t);
  }
};

#endif

}  // namespace
}  // namespace pyllm::PYLLM_ISA
