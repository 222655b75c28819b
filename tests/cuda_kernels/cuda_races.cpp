// Races between threads of a kernel that runs on the CPU, whether or not they change a result, and
// accesses to memory outside of the launch's tensors.
//
// The kernels are compiled with -fsanitize=thread, whose calls for each access to memory come here
// and not to that sanitizer's library. Two accesses to a byte, one of them a write, are a race if
// they are by different threads and nothing is between them: of a block, __syncthreads or, in one
// warp, __syncwarp with all lanes; of two blocks, nothing can be, but they share no shared memory.
// This file itself is compiled without the flag.

#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_on_cpu.h"

// Address and bytes of each tensor that the next launches may touch; of none, anything may be.
std::vector<std::pair<std::uintptr_t, std::size_t>> watched_tensors;

namespace {

using cuda_on_cpu::machine;

struct Access {
  long block = -1;
  int thread = 0, barriers = 0, warp_barriers = 0;
  void* from = nullptr;  // the instruction
};

// Of a byte: the last write and reads, also by another thread and by another block than the last.
struct Byte {
  Access write, read, of_another_thread, of_another_block;
};

std::unordered_map<std::uintptr_t, Byte> bytes;
long launch = -1;
bool busy = false;

bool is_ordered(const Access& before, const Access& now, bool shared) {
  if (before.block < 0) return true;
  if (before.block != now.block) return shared;
  if (before.thread == now.thread || before.barriers != now.barriers) return true;
  const int warp = cuda_on_cpu::kWarp;
  return before.thread / warp == now.thread / warp && before.warp_barriers != now.warp_barriers;
}

std::string place(void* instruction) {
  Dl_info info;
  if (dladdr(instruction, &info) == 0) return "?";
  char text[32];
  std::snprintf(text, sizeof text, "0x%lx",
                static_cast<unsigned long>(static_cast<char*>(instruction) -
                                           static_cast<char*>(info.dli_fbase)));
  return text;
}

void require_ordered(const Access& before, const Access& now, bool shared, const char* what) {
  if (is_ordered(before, now, shared)) return;
  machine.fail(std::string("a race: ") + what + ", at " + place(now.from) + " in thread " +
               std::to_string(now.thread) + " and before at " + place(before.from) + " in thread " +
               std::to_string(before.thread) +
               (before.block == now.block ? "" : " of another block"));
}

// The arguments of a kernel are read where its launch left them, on the stack of its caller.
const char* stack_of_caller = nullptr;

void require_inside(void* address, std::size_t size, void* from) {
  constexpr std::ptrdiff_t kNear = 64 * 1024;
  const std::ptrdiff_t distance = static_cast<char*>(address) - stack_of_caller;
  if (watched_tensors.empty() || (distance > -kNear && distance < kNear)) return;
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  for (const auto& [begin, bytes] : watched_tensors) {
    if (at >= begin && at + size <= begin + bytes) return;
  }
  machine.fail("memory outside of every tensor, at " + place(from) + " in thread " +
               std::to_string(machine.current->number));
}

void remember_read(Byte& byte, const Access& now) {
  if (byte.read.block >= 0 && byte.read.thread != now.thread) byte.of_another_thread = byte.read;
  if (byte.read.block >= 0 && byte.read.block != now.block) byte.of_another_block = byte.read;
  byte.read = now;
}

void see(void* address, std::size_t size, bool writes, void* from) {
  const auto* const fiber = machine.current;
  if (fiber == nullptr || machine.is_own(address)) return;
  if (launch != machine.launches) {
    bytes.clear();
    launch = machine.launches;
    busy = false;
  }
  if (busy) return;
  busy = true;  // until the launch ends, if this ends it
  const bool shared = machine.is_shared(address);
  if (!shared) require_inside(address, size, from);
  const int warp = fiber->number / cuda_on_cpu::kWarp;
  const Access now{machine.block_count, fiber->number, machine.barriers,
                   machine.warp_barriers[warp], from};
  for (std::size_t i = 0; i < size; ++i) {
    Byte& byte = bytes[reinterpret_cast<std::uintptr_t>(address) + i];
    require_ordered(byte.write, now, shared, writes ? "two writes" : "a read of what was written");
    if (!writes) {
      remember_read(byte, now);
      continue;
    }
    for (const Access& read : {byte.read, byte.of_another_thread, byte.of_another_block}) {
      require_ordered(read, now, shared, "a write to what was read");
    }
    byte.write = now;
  }
  busy = false;
}

}  // namespace

void watch_tensors(std::vector<std::pair<std::uintptr_t, std::size_t>> tensors) {
  watched_tensors = std::move(tensors);
  stack_of_caller = static_cast<const char*>(__builtin_frame_address(0));
}

#define PYLLM_SEE(name, size, writes)                        \
  extern "C" void __tsan_##name(void* address) {             \
    see(address, size, writes, __builtin_return_address(0)); \
  }
#define PYLLM_SEE_BOTH(size)                   \
  PYLLM_SEE(read##size, size, false)           \
  PYLLM_SEE(write##size, size, true)           \
  PYLLM_SEE(unaligned_read##size, size, false) \
  PYLLM_SEE(unaligned_write##size, size, true) \
  PYLLM_SEE(volatile_read##size, size, false)  \
  PYLLM_SEE(volatile_write##size, size, true)
PYLLM_SEE_BOTH(1)
PYLLM_SEE_BOTH(2)
PYLLM_SEE_BOTH(4)
PYLLM_SEE_BOTH(8)
PYLLM_SEE_BOTH(16)

extern "C" void __tsan_read_range(void* address, std::size_t size) {
  see(address, size, false, __builtin_return_address(0));
}
extern "C" void __tsan_write_range(void* address, std::size_t size) {
  see(address, size, true, __builtin_return_address(0));
}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_vptr_read(void**) {}
