// CUDA C++ executed on the CPU, for tests: the same .cu files compiled by a plain C++ compiler with
// `-x c++ -include cuda_on_cpu.h`.
//
// Each thread of a block is a fiber with a stack of its own, which runs until it has to wait for
// others: at __syncthreads, or at a collective operation of its warp. Blocks run one after the
// other. Shared memory is NaN (integers: -1) when a block begins. What ends in undefined
// behaviour on a card is an exception here: a barrier that some threads never reach, a collective
// that lanes of its mask do not take part in, a lane read from outside of the mask, a misaligned
// vector, more shared memory than a block has, a launch that a card refuses.
//
// set_order() changes in which order threads and blocks run: with a barrier missing, results change
// with it, in most cases; cuda_races.cpp sees the others. What this cannot show: contracted
// products (fma) and approximate functions of the hardware, speed.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_types.h"

#define PYLLM_CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(bytes) alignas(bytes)
#define __launch_bounds__(...)

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr int kMostThreads = 1024;
constexpr std::size_t kStackBytes = 128 * 1024;
// Shared memory of a block: without asking for more, and the most of a Turing card and of an sm_86.
constexpr std::size_t kShared = 48 * 1024, kTuringShared = 64 * 1024, kMostShared = 99 * 1024;

#ifdef PYLLM_CUDA_RACES  // compiled with -fsanitize=thread, see cuda_races.cpp
#define PYLLM_NOT_WATCHED __attribute__((noinline, no_sanitize("thread")))
#else
#define PYLLM_NOT_WATCHED
#endif

enum class State { ready, at_barrier, in_warp, done };
enum class Collective { sync, shuffle, ballot, match, together };

// 16 bytes on their way to shared memory, of which `given` come from `from`, the others being
// zeros; `group` counts the groups of the thread.
struct AsyncCopy {
  void* to;
  const void* from;
  int given;
  int group;
};

struct Fiber {
  uint3 index;
  int number;
  State state;
  // What it brings to a collective of its warp, and takes away.
  unsigned mask;
  Collective what;
  int source;
  std::uint64_t value, received;
  void (*work)(void* const*);
  std::vector<AsyncCopy> copies;
  int group;
#ifdef __x86_64__
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

// Shared memory that one declaration in a kernel stands for, in the block that runs now.
struct SharedSite {
  long block = -1;
  void* address = nullptr;
};

#ifdef __x86_64__
// Saves the registers that a function must keep on the stack, and goes on with another stack.
__attribute__((naked, noinline)) static void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

// The one multiprocessor there is.
class Machine {
 public:
  Fiber* current = nullptr;
  uint3 block{};
  dim3 grid, block_size;
  // For cuda_races.cpp: how often something was launched, blocks began, and all threads of a block
  // or of a warp met.
  long launches = 0, block_count = 0;
  int barriers = 0, warp_barriers[kMostThreads / kWarp] = {};

  // Calls `body(data)` in every thread of every block, as a card does that may give a block
  // `most_shared`.
  void run(const char* kernel, dim3 grid_size, dim3 threads, std::size_t dynamic_bytes,
           std::size_t most_shared, void (*body)(void*), void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    kernel_ = kernel;
    grid = grid_size;
    block_size = threads;
    require_valid(dynamic_bytes, most_shared);
    ++launches;
    n_threads_ = static_cast<int>(threads.x * threads.y * threads.z);
    body_ = body;
    data_ = data;
    if (stacks_ == nullptr) make_stacks();
    if (shared_.empty()) shared_.resize(kMostShared + kAlignment);
    // launch() asks for more where the dynamic part alone is more.
    shared_end_ = dynamic_bytes > kShared ? most_shared : kShared;
    const long n_blocks = static_cast<long>(grid.x) * grid.y * grid.z;
    const long first = last_blocks_ > 0 ? std::max(n_blocks - last_blocks_, 0L) : 0;
    std::vector<long> blocks(n_blocks - first);
    for (std::size_t i = 0; i < blocks.size(); ++i) blocks[i] = first + static_cast<long>(i);
    arrange(blocks);
    for (const long number : blocks) {
      block = {static_cast<unsigned>(number % grid.x),
               static_cast<unsigned>(number / grid.x % grid.y),
               static_cast<unsigned>(number / grid.x / grid.y)};
      ++block_count;
      shared_used_ = dynamic_bytes;
      std::memset(aligned(shared_.data()), kPoison, dynamic_bytes);
      run_block();
    }
  }

  // 0: ascending, 1: descending, one warp after the other, others: shuffled by that seed, anew
  // whenever threads take turns.
  void set_order(unsigned order) {
    order_ = order;
    random_.seed(order);
  }

  // Of each launch only the last `count` blocks run, 0: all. For tensors too large for more.
  void set_last_blocks(long count) { last_blocks_ = count; }

  void* dynamic_shared() { return aligned(shared_.data()); }

  PYLLM_NOT_WATCHED void* static_shared(SharedSite& site, std::size_t bytes,
                                        std::size_t alignment) {
    if (site.block != block_count) {
      shared_used_ = (shared_used_ + alignment - 1) / alignment * alignment;
      if (shared_used_ + bytes > shared_end_) {
        fail("more than " + std::to_string(shared_end_ / 1024) + " KiB of shared memory");
      }
      site = {block_count, aligned(shared_.data()) + shared_used_};
      shared_used_ += bytes;
      std::memset(site.address, kPoison, bytes);
    }
    return site.address;
  }

  void barrier(const char* file, int line, bool vote) {
    Fiber& me = *current;
    if (waiting_ == 0) {
      barrier_file_ = file;
      barrier_line_ = line;
      votes_ = 0;
    } else if (line != barrier_line_ || std::strcmp(file, barrier_file_) != 0) {
      fail("threads of a block wait at different barriers: " + place(barrier_file_, barrier_line_) +
           " and " + place(file, line));
    }
    votes_ += vote;
    if (++waiting_ < n_threads_) {
      me.state = State::at_barrier;
      leave(me);
      return;
    }
    waiting_ = 0;
    ++barriers;
    result_ = votes_;
    for (int i = 0; i < n_threads_; ++i) fibers_[i].state = State::ready;
  }

  int votes() const { return result_; }

  // Takes part in a collective of the warp; returns what `source` brought. `work` is done on the
  // addresses that all lanes brought.
  std::uint64_t exchange(Collective what, unsigned mask, std::uint64_t value, int source,
                         void (*work)(void* const*) = nullptr) {
    Fiber& me = *current;
    const int lane = me.number % kWarp, first = me.number - lane;
    if ((mask >> lane & 1u) == 0) fail("a lane is not in the mask of its own collective");
    if (what == Collective::shuffle && (mask >> source & 1u) == 0) {
      fail("a shuffle reads lane " + std::to_string(source) + ", which is not in the mask");
    }
    me.what = what;
    me.mask = mask;
    me.value = value;
    me.source = source;
    me.work = work;
    me.state = State::in_warp;
    for (int other = 0; other < kWarp; ++other) {
      if ((mask >> other & 1u) == 0) continue;
      if (first + other >= n_threads_) fail("the mask names lanes that the block does not have");
      const Fiber& fiber = fibers_[first + other];
      if (fiber.state != State::in_warp || fiber.mask != mask) {
        leave(me);
        return me.received;
      }
      if (fiber.what != what || fiber.work != work) {
        fail("lanes of one mask are in different collectives");
      }
    }
    if (work != nullptr) {
      void* brought[kWarp];
      for (int i = 0; i < kWarp; ++i) {
        brought[i] = reinterpret_cast<void*>(fibers_[first + i].value);
      }
      work(brought);
    }
    // The last one to come hands out the results. Only __syncwarp orders accesses to memory.
    if (what == Collective::sync && mask == ~0u) ++warp_barriers[first / kWarp];
    for (int lane_of = 0; lane_of < kWarp; ++lane_of) {
      if ((mask >> lane_of & 1u) == 0) continue;
      Fiber& fiber = fibers_[first + lane_of];
      fiber.state = State::ready;
      fiber.received = 0;
      if (work != nullptr) continue;
      if (what == Collective::shuffle) {
        fiber.received = fibers_[first + fiber.source].value;
        continue;
      }
      for (int other = 0; other < kWarp; ++other) {
        if ((mask >> other & 1u) == 0) continue;
        const std::uint64_t brought = fibers_[first + other].value;
        const bool set = what == Collective::ballot ? brought != 0 : brought == fiber.value;
        if (set) fiber.received |= std::uint64_t{1} << other;
      }
    }
    return me.received;
  }

  // Ends the launch with an exception. Called by the code of a kernel.
  [[noreturn]] void fail(const std::string& reason) {
    failure_ = reason;
    for (;;) leave(*current);
  }

  bool is_shared(const void* address) const {
    const auto* const at = static_cast<const char*>(address);
    return at >= shared_.data() && at < shared_.data() + shared_.size();
  }
  // Is this memory of the machine itself, or the stack of a thread?
  bool is_own(const void* address) const {
    const auto* const at = static_cast<const char*>(address);
    const auto* const machine = reinterpret_cast<const char*>(this);
    const auto* const fibers = reinterpret_cast<const char*>(fibers_.get());
    return (at >= stacks_ && at < stacks_ + kStackBytes * kMostThreads) ||
           (at >= machine && at < machine + sizeof *this) ||
           (at >= fibers && at < fibers + sizeof(Fiber) * kMostThreads);
  }

 private:
  static constexpr std::size_t kAlignment = 128;
  static constexpr int kPoison = 0xff;  // NaN, as integers -1

  static char* aligned(char* address) {
    const auto number = reinterpret_cast<std::uintptr_t>(address);
    return address + (kAlignment - number % kAlignment) % kAlignment;
  }

  static std::string place(const char* file, int line) {
    const std::string path(file);
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(line);
  }

  template <class T>
  void arrange(std::vector<T>& order) {
    if (order_ == 1) std::reverse(order.begin(), order.end());
    if (order_ > 1) std::shuffle(order.begin(), order.end(), random_);
  }

  // What a card refuses with cudaErrorInvalidConfiguration or cudaErrorInvalidValue.
  void require_valid(std::size_t dynamic_bytes, std::size_t most_shared) const {
    const auto fits = [](dim3 size, unsigned x, unsigned y, unsigned z) {
      return size.x > 0 && size.x <= x && size.y > 0 && size.y <= y && size.z > 0 && size.z <= z;
    };
    const bool valid = fits(grid, 2147483647u, 65535u, 65535u) &&
                       fits(block_size, 1024, 1024, 64) &&
                       std::uint64_t{block_size.x} * block_size.y * block_size.z <= kMostThreads;
    if (!valid) throw std::logic_error(std::string(kernel_) + ": an invalid configuration");
    if (dynamic_bytes > most_shared) {
      throw std::logic_error(std::string(kernel_) + ": more than " +
                             std::to_string(most_shared / 1024) + " KiB of shared memory");
    }
  }

  void run_block() {
    failure_.clear();
    waiting_ = 0;
    barriers = 0;
    for (int& count : warp_barriers) count = 0;
    std::vector<int> order(n_threads_);
    for (int i = 0; i < n_threads_; ++i) {
      order[i] = i;
      Fiber& fiber = fibers_[i];
      const unsigned x = block_size.x, y = block_size.y, number = static_cast<unsigned>(i);
      fiber.index = {number % x, number / x % y, number / x / y};
      fiber.number = i;
      fiber.state = State::ready;
      fiber.copies.clear();
      fiber.group = 0;
      prepare(fiber);
    }
    if (order_ == 1) arrange(order);
    // Descending, a warp goes as far as it comes before the next one; else all take turns.
    const int together = order_ == 1 ? kWarp : n_threads_;
    for (int left = n_threads_; left > 0;) {
      if (order_ > 1) arrange(order);
      bool any = false;
      for (int first = 0; first < n_threads_; first += together) {
        const int last = std::min(first + together, n_threads_);
        while (take_turns(order.data() + first, order.data() + last, left)) {
          any = true;
          if (order_ != 1) break;
        }
      }
      if (!any && left > 0) raise(stuck(left));
    }
  }

  // Lets those go on that can; is there any?
  bool take_turns(const int* begin, const int* end, int& left) {
    bool any = false;
    for (const int* i = begin; i < end; ++i) {
      if (fibers_[*i].state != State::ready) continue;
      any = true;
      enter(fibers_[*i]);
      current = nullptr;
      if (!failure_.empty()) raise(failure_);
      left -= fibers_[*i].state == State::done;
    }
    return any;
  }

  std::string stuck(int left) const {
    int in_warp = 0;
    for (int i = 0; i < n_threads_; ++i) in_warp += fibers_[i].state == State::in_warp;
    std::string text = std::to_string(n_threads_ - left) + " of " + std::to_string(n_threads_) +
                       " threads have ended";
    if (waiting_ > 0) {
      text += ", " + std::to_string(waiting_) + " wait at the barrier " +
              place(barrier_file_, barrier_line_);
    }
    if (in_warp > 0) text += ", " + std::to_string(in_warp) + " in a collective of their warp";
    return text + ": the others never come";
  }

  [[noreturn]] void raise(const std::string& reason) {
    throw std::logic_error(std::string(kernel_) + ", block (" + std::to_string(block.x) + ", " +
                           std::to_string(block.y) + ", " + std::to_string(block.z) +
                           "): " + reason);
  }

  void make_stacks() {
    const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    void* const memory = mmap(nullptr, kStackBytes * kMostThreads, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks_ = static_cast<char*>(memory);
    // A stack that grows too long ends the process here, and not in the stack below.
    for (int i = 0; i < kMostThreads; ++i) mprotect(stacks_ + i * kStackBytes, page, PROT_NONE);
    fibers_.reset(new Fiber[kMostThreads]);
  }

  static void start() {
    Machine& machine = instance();
    machine.body_(machine.data_);
    machine.current->state = State::done;
    for (;;) machine.leave(*machine.current);
  }

#ifdef __x86_64__
  void prepare(Fiber& fiber) {
    char* const top = stacks_ + (fiber.number + 1) * kStackBytes;
    // Six registers, the address to return to, and an alignment as after a call.
    void** stack = reinterpret_cast<void**>(top) - 1;
    *--stack = reinterpret_cast<void*>(&Machine::start);
    stack -= 6;
    fiber.stack_pointer = stack;
  }
  void enter(Fiber& fiber) {
    current = &fiber;
    switch_stack(&host_, fiber.stack_pointer);
  }
  void leave(Fiber& fiber) { switch_stack(&fiber.stack_pointer, host_); }
  void* host_ = nullptr;
#else
  void prepare(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks_ + fiber.number * kStackBytes;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Machine::start, 0);
  }
  void enter(Fiber& fiber) {
    current = &fiber;
    swapcontext(&host_, &fiber.context);
  }
  void leave(Fiber& fiber) { swapcontext(&fiber.context, &host_); }
  ucontext_t host_;
#endif

  static Machine& instance();

  std::mutex mutex_;
  std::mt19937 random_;
  unsigned order_ = 0;
  long last_blocks_ = 0;
  const char* kernel_ = "";
  int n_threads_ = 0;
  void (*body_)(void*) = nullptr;
  void* data_ = nullptr;
  char* stacks_ = nullptr;
  std::unique_ptr<Fiber[]> fibers_;
  std::vector<char> shared_;
  std::size_t shared_used_ = 0, shared_end_ = 0;
  std::string failure_;
  const char* barrier_file_ = "";
  int barrier_line_ = 0, waiting_ = 0, votes_ = 0, result_ = 0;
};

inline Machine machine;
inline Machine& Machine::instance() { return machine; }

template <int least_card = 75, class... Parameters, class... Arguments>
inline void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 threads,
                   std::size_t dynamic_bytes, Arguments... arguments) {
  auto body = [&] { kernel(arguments...); };
  machine.run(
      name, grid, threads, dynamic_bytes, least_card < 80 ? kTuringShared : kMostShared,
      [](void* data) { (*static_cast<decltype(body)*>(data))(); }, &body);
}

template <class T>
inline T* require_aligned(T* address, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0) {
    machine.fail("a vector of " + std::to_string(bytes) + " bytes at a misaligned address");
  }
  return address;
}

template <class T>
inline T shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = machine.exchange(Collective::shuffle, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int lane() { return machine.current->number % kWarp; }

}  // namespace cuda_on_cpu

#define threadIdx (::cuda_on_cpu::machine.current->index)
#define blockIdx (::cuda_on_cpu::machine.block)
#define blockDim (::cuda_on_cpu::machine.block_size)
#define gridDim (::cuda_on_cpu::machine.grid)

#include "cuda_collectives.h"
#include "cuda_tensor.h"
