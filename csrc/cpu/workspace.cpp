#include "cpu/workspace.h"

#include <atomic>
#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pyllm {
namespace {

constexpr std::int64_t kPage = 4096, kLargePage = 2 << 20;

// Stands at the beginning of each block.
struct Header {
  std::int64_t bytes;  // behind the first page
};

std::atomic<Header*> kept{nullptr};
thread_local bool refused = false;

std::uintptr_t round_up(std::uintptr_t n, std::int64_t unit) {
  return (n + unit - 1) / unit * unit;
}

}  // namespace

void* take_workspace(std::int64_t bytes) noexcept {
  Header* block = kept.exchange(nullptr, std::memory_order_acq_rel);
  if (block != nullptr && block->bytes < bytes) {
    std::free(block);
    block = nullptr;
  }
  if (block == nullptr) {
    const std::int64_t unit = bytes < kLargePage ? kPage : kLargePage;
    const std::int64_t whole = static_cast<std::int64_t>(round_up(bytes + kPage, unit));
    block = static_cast<Header*>(std::aligned_alloc(unit, whole));
    if (block == nullptr) {
      refused = true;
      return nullptr;
    }
    prefer_large_pages(block, whole);
    block->bytes = whole - kPage;
  }
  return reinterpret_cast<char*>(block) + kPage;
}

bool was_out_of_memory() noexcept {
  const bool was = refused;
  refused = false;
  return was;
}

void give_workspace(void* memory) noexcept {
  if (memory == nullptr) return;
  auto* block = reinterpret_cast<Header*>(static_cast<char*>(memory) - kPage);
  std::free(kept.exchange(block, std::memory_order_acq_rel));
}

void prefer_large_pages(void* memory, std::int64_t bytes) noexcept {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::uintptr_t begin = round_up(reinterpret_cast<std::uintptr_t>(memory), kLargePage);
  const std::uintptr_t end =
      (reinterpret_cast<std::uintptr_t>(memory) + bytes) / kLargePage * kLargePage;
  if (end > begin) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace pyllm
