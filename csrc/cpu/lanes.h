// Vectors of the type sums are kept in, in the width of the instruction set, as GCC and clang have
// them: no intrinsic for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

#if defined(__AVX512F__)
constexpr int kLaneBytes = 64;
#elif defined(__AVX2__)
constexpr int kLaneBytes = 32;
#else
constexpr int kLaneBytes = 16;
#endif

template <class W>
constexpr int kLanes = kLaneBytes / static_cast<int>(sizeof(W));

template <class W>
struct VectorOf {
  typedef W type __attribute__((vector_size(kLaneBytes)));
};
template <class W>
using Vector = typename VectorOf<W>::type;

template <class W>
inline Vector<W> load(const W* from) {
  Vector<W> vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

template <class W>
inline void store(const Vector<W>& vector, W* to) {
  std::memcpy(to, &vector, sizeof vector);
}

// Two vectors of numbers that lie side by side. Those of bfloat16 come out in two instructions
// where their order does not matter: the even ones, then the odd ones.
inline void load_two(const float* from, Vector<float>& first, Vector<float>& second) {
  first = load(from);
  second = load(from + kLanes<float>);
}

inline void load_two(const double* from, Vector<double>& first, Vector<double>& second) {
  first = load(from);
  second = load(from + kLanes<double>);
}

inline void load_two(const BFloat16* from, Vector<float>& even, Vector<float>& odd) {
  const Vector<std::uint32_t> both = load(reinterpret_cast<const std::uint32_t*>(from));
  const Vector<std::uint32_t> low = both << 16, high = both & 0xffff0000u;
  std::memcpy(&even, &low, sizeof even);
  std::memcpy(&odd, &high, sizeof odd);
}

inline void load_two(const Float16* from, Vector<float>& first, Vector<float>& second) {
  constexpr int n = kLanes<float>;
  float wide[2 * n];
#pragma omp simd
  for (int i = 0; i < 2 * n; ++i) wide[i] = widen(from[i]);
  load_two(wide, first, second);
}

template <class Storage>
constexpr int kTwo = 2 * kLanes<Wide<Storage>>;

// The first n < kTwo of them, then zeros.
template <class Storage>
inline void load_part(const Storage* from, std::int64_t n, Vector<Wide<Storage>>& first,
                      Vector<Wide<Storage>>& second) {
  Storage part[kTwo<Storage>] = {};
  std::memcpy(part, from, n * sizeof(Storage));
  load_two(part, first, second);
}

// How many numbers a row has in the order in which load_two has them, with zeros at its end.
template <class Storage>
inline std::int64_t ordered_width(std::int64_t width) {
  return (width + kTwo<Storage> - 1) / kTwo<Storage> * kTwo<Storage>;
}

template <int... i>
inline void pull_apart(const float* from, float* to, std::integer_sequence<int, i...>) {
  const Vector<float> a = load(from), b = load(from + sizeof...(i));
  store(Vector<float>(__builtin_shufflevector(a, b, 2 * i...)), to);
  store(Vector<float>(__builtin_shufflevector(a, b, (2 * i + 1)...)), to + sizeof...(i));
}

template <int... i>
inline void put_together(const float* from, float* to, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const Vector<float> a = load(from), b = load(from + n);
  store(Vector<float>(__builtin_shufflevector(a, b, (i / 2 + (i % 2) * n)...)), to);
  store(Vector<float>(__builtin_shufflevector(a, b, ((i + n) / 2 + (i % 2) * n)...)), to + n);
}

// A row into the order of load_two, and the way back.
template <class Storage>
inline void to_order(const Wide<Storage>* from, std::int64_t width, Wide<Storage>* to) {
  using W = Wide<Storage>;
  constexpr int n = kTwo<Storage>;
  for (std::int64_t c = 0; c < width; c += n) {
    W part[n] = {};
    std::memcpy(part, from + c, (width - c < n ? width - c : n) * sizeof(W));
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      pull_apart(part, to + c, std::make_integer_sequence<int, n / 2>{});
    } else {
      std::memcpy(to + c, part, sizeof part);
    }
  }
}

template <class Storage>
inline void from_order(const Wide<Storage>* from, std::int64_t width, Wide<Storage>* to) {
  using W = Wide<Storage>;
  constexpr int n = kTwo<Storage>;
  for (std::int64_t c = 0; c < width; c += n) {
    W part[n];
    if constexpr (std::is_same_v<Storage, BFloat16>) {
      put_together(from + c, part, std::make_integer_sequence<int, n / 2>{});
    } else {
      std::memcpy(part, from + c, sizeof part);
    }
    std::memcpy(to + c, part, (width - c < n ? width - c : n) * sizeof(W));
  }
}

// r[i] = a[i] + a[i ^ distance] where bit `distance` of i is 0, else the same of b: after a level
// for each bit, as many vectors as there are lanes have become one of their sums, in order.
template <int distance, class V, int... i>
inline V fold_two(const V& a, const V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const V straight = __builtin_shufflevector(a, b, (i & distance ? i + n : i)...);
  const V crossed = __builtin_shufflevector(a, b, ((i ^ distance) + (i & distance ? n : 0))...);
  return straight + crossed;
}

template <int distance, int n, class V>
inline void fold(V* vectors) {
  constexpr int lanes = sizeof(V) / sizeof(vectors[0][0]);
  if constexpr (distance < lanes) {
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) {
      vectors[i] = fold_two<distance>(vectors[2 * i], vectors[2 * i + 1],
                                      std::make_integer_sequence<int, lanes>{});
    }
    fold<2 * distance, n / 2>(vectors);
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
