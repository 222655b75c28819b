// A kernel's arrays in one piece of the workspace.
#pragma once

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/workspace.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Hands out consecutive arrays, each from a cache line's beginning on.
class Cutter {
 public:
  explicit Cutter(void* memory) : begin_(reinterpret_cast<std::uintptr_t>(memory)), at_(begin_) {}
  template <class Number>
  Number* take(std::int64_t n) {
    auto* array = reinterpret_cast<Number*>(at_);
    at_ += (n * sizeof(Number) + 63) / 64 * 64;
    return array;
  }
  std::int64_t bytes() const { return static_cast<std::int64_t>(at_ - begin_); }

 private:
  std::uintptr_t begin_, at_;
};

// What `cut(cutter)` returns, an object with arrays in it, and the memory for them.
template <class Arrays>
class Scratch {
 public:
  template <class Cut>
  explicit Scratch(const Cut& cut) {
    Cutter measure(nullptr);
    cut(measure);
    memory_ = take_workspace(measure.bytes());
    Cutter cutter(memory_);
    arrays_ = cut(cutter);
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { give_workspace(memory_); }
  const Arrays* operator->() const { return &arrays_; }

 private:
  void* memory_;
  Arrays arrays_;
};

}  // namespace
}  // namespace pyllm::PYLLM_ISA
