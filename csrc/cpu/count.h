// Small helpers of kernels that work on tiles: a count as a constant, how often a size fits, memory
// at a cache line.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Calls fn(std::integral_constant<int, n>) for an n from 1 to `most` that is known at run time
// only.
template <int most, class Fn>
inline void with_count(int n, const Fn& fn) {
  if constexpr (most > 1) {
    if (n < most) return with_count<most - 1>(n, fn);
  }
  fn(std::integral_constant<int, most>{});
}

// How many parts of a size n is cut into, the last of which may be smaller.
constexpr std::int64_t parts_of(std::int64_t n, std::int64_t size) { return (n + size - 1) / size; }

// Bytes of a cache line, and what memory has to have more so that it can begin at one.
constexpr std::int64_t kLineBytes = 64;

// Where the first cache line in `memory` begins.
inline char* at_line(char* memory) {
  const auto line = static_cast<std::uintptr_t>(kLineBytes);
  return memory + (line - reinterpret_cast<std::uintptr_t>(memory) % line) % line;
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
