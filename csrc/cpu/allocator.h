// Arrays cut from one piece of memory.
#pragma once

#include <cstdint>

#include "cpu/count.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// What lies behind each array and belongs to none. AddressSanitizer sees no end of an array inside
// of one piece of memory, unless there is such a gap.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::int64_t kGapBytes = kLineBytes;
inline void mark(char* at, std::int64_t bytes, std::int64_t room) {
  __asan_unpoison_memory_region(at, room);
  std::memset(at, 0xff, bytes);  // NaN: what the last call left would often be right
  __asan_poison_memory_region(at + bytes, room - bytes);
}
#else
constexpr std::int64_t kGapBytes = 0;
inline void mark(char*, std::int64_t, std::int64_t) {}
#endif

// Hands out parts of the memory, each from a cache line's beginning on; first without any, to
// measure it.
struct Allocator {
  char* base;
  std::int64_t used = 0;

  template <class T>
  T* take(std::int64_t n) {
    const std::int64_t bytes = n * static_cast<std::int64_t>(sizeof(T));
    const std::int64_t room = parts_of(bytes, kLineBytes) * kLineBytes + kGapBytes;
    char* const at = base == nullptr ? nullptr : base + used;
    if (at != nullptr) mark(at, bytes, room);
    used += room;
    return reinterpret_cast<T*>(at);
  }
};

// What `cut(allocator)` returns, an object with arrays in it, and the memory for them.
template <class Arrays>
class Workspace {
 public:
  template <class Cut>
  explicit Workspace(const Cut& cut) {
    Allocator measure{nullptr};
    cut(measure);
    memory_ = take_workspace(measure.used);
    Allocator allocator{static_cast<char*>(memory_)};
    arrays_ = cut(allocator);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() { give_workspace(memory_); }
  // Was there no memory? Then the arrays are not to be used.
  bool failed() const { return memory_ == nullptr; }
  const Arrays* operator->() const { return &arrays_; }

 private:
  void* memory_;
  Arrays arrays_;
};

}  // namespace
}  // namespace pyllm::PYLLM_ISA
