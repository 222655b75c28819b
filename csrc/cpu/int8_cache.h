// The numbers of an int8 kv cache in vectors. Each position and kv head has a scale, in float, that
// is no matter here: a key's goes into its score, a value's into its weight.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/lanes.h"
#include "cpu/numeric.h"
#include "cpu/x86.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// A number whose products are added up in W.
template <class W>
struct Int8 {
  std::int8_t value;
};

template <class Storage>
struct IsInt8 : std::false_type {};
template <class W>
struct IsInt8<Int8<W>> : std::true_type {};
template <class Storage>
constexpr bool kIsInt8 = IsInt8<Storage>::value;

template <class W>
struct Int8Lanes {
  typedef std::int8_t bytes __attribute__((vector_size(kLanes<W>)));
  typedef std::int16_t halves __attribute__((vector_size(2 * kLanes<W>)));
  typedef std::int32_t integers __attribute__((vector_size(4 * kLanes<W>)));
};

template <class W>
inline Vector<W> load_int8(const Int8<W>* from) {
  // In steps: GCC 12 converts the four times wider ones number by number.
  typename Int8Lanes<W>::bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  const auto halves = __builtin_convertvector(bytes, typename Int8Lanes<W>::halves);
  const auto integers = __builtin_convertvector(halves, typename Int8Lanes<W>::integers);
  return __builtin_convertvector(integers, Vector<W>);
}

#if defined(__AVX512F__)
inline Vector<float> load_int8(const Int8<float>* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return Vector<float>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
}
#elif defined(__AVX2__)
inline Vector<float> load_int8(const Int8<float>* from) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  return Vector<float>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
}
#endif

template <class W>
inline void load_two(const Int8<W>* from, Vector<W>& first, Vector<W>& second) {
  first = load_int8(from);
  second = load_int8(from + kLanes<W>);
}

// A scale that is not finite makes NaN of its row, whose numbers are zeros or anything.
inline float nan_if_infinite(float scale) { return scale * 0.0f + scale; }

// to = scale * from.
inline void widen_row(const Int8<float>* __restrict from, std::int64_t width, float scale,
                      float* __restrict to) {
  scale = nan_if_infinite(scale);
#pragma omp simd
  for (std::int64_t c = 0; c < width; ++c) to[c] = scale * static_cast<float>(from[c].value);
}

}  // namespace

template <class W>
struct Accumulator<Int8<W>> {
  using type = W;
};

}  // namespace pyllm::PYLLM_ISA
