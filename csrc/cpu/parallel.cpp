#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace pyllm {

#ifdef PYLLM_THREAD_SANITIZER

// ThreadSanitizer sees what std::thread orders, but not the barriers of an OpenMP library that was
// compiled without it. The blocks are dealt out in turn, because a counter would leave a small loop
// to the first thread.
void parallel_blocks(std::int64_t n_blocks, int n_threads, void (*body)(void*, std::int64_t),
                     void* context) noexcept {
  const std::int64_t step = std::min<std::int64_t>(n_threads, n_blocks);
  const auto share = [=](std::int64_t first) {
    for (std::int64_t block = first; block < n_blocks; block += step) body(context, block);
  };
  std::vector<std::thread> threads;
  for (std::int64_t first = 1; first < step; ++first) threads.emplace_back(share, first);
  share(0);
  for (std::thread& thread : threads) thread.join();
}

const char* parallel_backend() { return "std::thread"; }

#else

namespace {

// GOMP_parallel(fn, data, num_threads, flags): GNU's entry point, which LLVM's and Intel's runtimes
// offer as well on Linux. __kmpc_fork_call: LLVM's own, the only one on macOS.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
using KmpcForkCall = void (*)(void*, std::int32_t, void (*)(std::int32_t*, std::int32_t*, void*),
                              void*);
using KmpcPushNumThreads = void (*)(void*, std::int32_t, std::int32_t);
using KmpcGlobalThreadNum = std::int32_t (*)(void*);

struct Runtime {
  GompParallel gomp = nullptr;
  KmpcForkCall fork = nullptr;
  KmpcPushNumThreads push = nullptr;
  KmpcGlobalThreadNum thread_num = nullptr;
};

#ifndef _WIN32
template <class Function>
void look_up(void* library, const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(library, name));
}
#endif

Runtime find_runtime() {
  Runtime runtime;
#ifndef _WIN32
#ifdef __APPLE__
  const char* torch = "@rpath/libtorch_cpu.dylib";
#else
  const char* torch = "libtorch_cpu.so";
#endif
  // dlsym on the handle searches torch's own dependencies, wherever they are and whatever they are
  // called; RTLD_NOLOAD makes sure that nothing new comes into the process.
  void* library = dlopen(torch, RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) return runtime;
  look_up(library, "GOMP_parallel", runtime.gomp);
  look_up(library, "__kmpc_fork_call", runtime.fork);
  look_up(library, "__kmpc_push_num_threads", runtime.push);
  look_up(library, "__kmpc_global_thread_num", runtime.thread_num);
  if (runtime.push == nullptr || runtime.thread_num == nullptr) runtime.fork = nullptr;
#endif
  return runtime;
}

const Runtime& runtime() {
  static const Runtime found = find_runtime();
  return found;
}

// Blocks are handed out one by one from a counter, so a runtime that grants fewer threads than
// asked for (a nested region, a thread limit) still does all of the work.
struct Work {
  std::atomic<std::int64_t> next{0};
  std::int64_t n_blocks;
  void (*body)(void*, std::int64_t);
  void* context;

  void run() {
    for (std::int64_t block = next++; block < n_blocks; block = next++) body(context, block);
  }
};

void run_work(void* work) { static_cast<Work*>(work)->run(); }

void run_work_kmpc(std::int32_t*, std::int32_t*, void* work) { run_work(work); }

void run_on_std_threads(Work& work, int n_threads) {
  std::vector<std::thread> threads;
  threads.reserve(n_threads - 1);
  try {
    for (int i = 1; i < n_threads; ++i) threads.emplace_back(run_work, &work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  work.run();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

void parallel_blocks(std::int64_t n_blocks, int n_threads, void (*body)(void*, std::int64_t),
                     void* context) noexcept {
  n_threads = static_cast<int>(std::min<std::int64_t>(n_threads, n_blocks));
  if (n_threads <= 1) {
    for (std::int64_t block = 0; block < n_blocks; ++block) body(context, block);
    return;
  }
  Work work{{0}, n_blocks, body, context};
  const Runtime& omp = runtime();
  if (omp.gomp != nullptr) {
    omp.gomp(run_work, &work, static_cast<unsigned>(n_threads), 0);
  } else if (omp.fork != nullptr) {
    omp.push(nullptr, omp.thread_num(nullptr), n_threads);
    omp.fork(nullptr, 1, run_work_kmpc, &work);
  } else {
    run_on_std_threads(work, n_threads);
  }
}

const char* parallel_backend() {
  return runtime().gomp != nullptr || runtime().fork != nullptr ? "openmp" : "std::thread";
}

#endif

}  // namespace pyllm
