// Parallel loops over the OpenMP runtime that is already in the process: torch's.
//
// This module links no OpenMP library of its own. Two runtimes in one process means two thread
// pools that fight for the cores, and a crash with some pairs; so parallel.cpp looks up the entry
// points in the libraries torch has loaded, and uses std::thread where it finds none.
#pragma once

#include <cstdint>

namespace pyllm {

// Calls body(context, block) once for each block in [0, n_blocks), on up to n_threads threads.
// Which thread gets which block is not fixed: results must not depend on it.
void parallel_blocks(std::int64_t n_blocks, int n_threads, void (*body)(void*, std::int64_t),
                     void* context) noexcept;

// "libgomp" style entry points found in torch ("openmp"), or "std::thread".
const char* parallel_backend();

#ifdef PYLLM_ISA
namespace PYLLM_ISA {

// How much of a loop is worth handing to a thread: what the kernel says, but next to nothing under
// ThreadSanitizer, where the small sizes of the tests have to run on several threads.
constexpr std::int64_t per_range(std::int64_t amount) {
#ifdef PYLLM_THREAD_SANITIZER
  (void)amount;
  return 1;
#else
  return amount;
#endif
}

// A grain for parallel_for: rows of about `elements_per_range` elements in all, one at least.
inline std::int64_t rows_per_range(std::int64_t elements_per_range, std::int64_t per_row) {
  return elements_per_range / (per_row > 0 ? per_row : 1) + 1;
}

// Calls fn(begin, end) for consecutive ranges of `grain` items that cover [0, n).
// The ranges depend on n and grain only, never on n_threads: a partial sum kept per range and added
// in order is bitwise the same on any number of threads. fn must not throw.
template <class Fn>
void parallel_for(std::int64_t n, std::int64_t grain, int n_threads, const Fn& fn) {
  if (n <= 0) return;
  struct Loop {
    const Fn& fn;
    std::int64_t n, grain;
  } loop{fn, n, grain};
  const std::int64_t n_blocks = (n + grain - 1) / grain;
  parallel_blocks(
      n_blocks, n_threads,
      [](void* context, std::int64_t block) {
        const Loop& self = *static_cast<const Loop*>(context);
        const std::int64_t begin = block * self.grain;
        const std::int64_t end = begin + self.grain;
        self.fn(begin, end < self.n ? end : self.n);
      },
      &loop);
}

}  // namespace PYLLM_ISA
#endif

}  // namespace pyllm
