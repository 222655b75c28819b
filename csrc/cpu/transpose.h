// Turns squares of vectors, as packing rows for a product needs.
#pragma once

#include <utility>

#include "cpu/lanes.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

template <int distance, class V, int... i>
[[gnu::always_inline]] inline void swap_lanes(V& a, V& b, std::integer_sequence<int, i...>) {
  constexpr int n = sizeof...(i);
  const V low = __builtin_shufflevector(a, b, (i & distance ? i - distance + n : i)...);
  b = __builtin_shufflevector(a, b, (i & distance ? i + n : i + distance)...);
  a = low;
}

// Transposes a square of as many vectors as they have lanes; distance is 1. Always inlined: the
// vectors stay in registers then.
template <int distance, class V>
[[gnu::always_inline]] inline void transpose(V* vectors) {
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

}  // namespace
}  // namespace pyllm::PYLLM_ISA
