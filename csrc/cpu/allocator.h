// Arrays cut from one piece of memory.
#pragma once

#include <cstdint>

#include "cpu/count.h"
#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Hands out parts of the memory, each from a cache line's beginning on; first without any, to
// measure it.
struct Allocator {
  char* base;
  std::int64_t used = 0;

  template <class T>
  T* take(std::int64_t n) {
    T* at = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += parts_of(n * static_cast<std::int64_t>(sizeof(T)), kLineBytes) * kLineBytes;
    return at;
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
  const Arrays* operator->() const { return &arrays_; }

 private:
  void* memory_;
  Arrays arrays_;
};

}  // namespace
}  // namespace pyllm::PYLLM_ISA
