// Reading weights that no cache holds.
#pragma once

#include <cstdint>

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Up to so many tokens, a product waits for memory rather than for arithmetic: weights are read in
// the order they lie in, row by row. Across four rows at once, as a tile has it, the processor's
// own prefetching sees no stream (measured on Zen 4: 16 against 25 GB/s; with the next line, 29 of
// 31).
constexpr int kFewTokens = 2;

// Asks for what comes two pages later. It may lie beyond the end, which is nothing but wasted.
inline void fetch_ahead(const void* at) {
  constexpr std::uintptr_t kBytes = 4096;
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(at) + kBytes),
                     0, 2);
}

// The same for weights that the third level of cache may hold: into the first level, where a tile
// or a panel of the next rows will look for them.
inline void fetch_soon(const void* at) { __builtin_prefetch(at, 0, 3); }

}  // namespace
}  // namespace pyllm::PYLLM_ISA
