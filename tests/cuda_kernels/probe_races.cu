// Small kernels with a race or without, for test_races.py.
#include <cstdio>
#include <utility>
#include <vector>

#include "cuda/numeric.h"

void watch_tensors(std::vector<std::pair<std::uintptr_t, std::size_t>> tensors);

namespace pyllm::cuda {
namespace {

// Every thread writes what its neighbour reads.
__global__ void around_the_block(int* to, bool with_barrier) {
  PYLLM_SHARED(int, values, [64]);
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) __syncthreads();
  to[threadIdx.x] = values[(threadIdx.x + 1) % 64];
}
// The same within a warp, where a shuffle waits for all lanes but orders no memory.
__global__ void around_the_warp(int* to, bool with_barrier) {
  to[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (with_barrier) __syncwarp();
  const int seen = __shfl_sync(kAllLanes, to[(threadIdx.x + 1) % 32], 0);
  if (seen < 0) to[0] = seen;
}
// What is read is written again before all have read it.
__global__ void again(int* to, bool with_barrier) {
  PYLLM_SHARED(int, value, [1]);
  for (int i = 0; i < 2; ++i) {
    if (threadIdx.x == 0) value[0] = i;
    __syncthreads();
    to[i * 64 + threadIdx.x] = value[0];
    if (with_barrier) __syncthreads();
  }
}
// Two blocks write to one place, or each to its own. Shared memory is not one place.
__global__ void blocks(int* to, bool apart) {
  PYLLM_SHARED(int, value, [1]);
  if (threadIdx.x != 0) return;
  value[0] = 1;
  to[apart ? blockIdx.x : 0] = value[0];
}
// Bytes of one word by four threads.
__global__ void bytes(signed char* to, bool apart) {
  to[apart ? threadIdx.x : threadIdx.x / 2] = 1;
}

// The last of four numbers, or the one behind it.
__global__ void outside(int* to, bool inside) {
  if (threadIdx.x == 0) to[inside ? 3 : 4] = 1;
}

template <class T>
void attempt(const char* name, void (*kernel)(T*, bool), Grid grid, int threads, T* to = nullptr) {
  T own[256] = {};
  if (to == nullptr) to = own;
  for (const bool right : {true, false}) {
    try {
      launch(name, kernel, grid, threads, 0, Stream{nullptr}, to, right);
      std::printf("%s %s: nothing\n", name, right ? "right" : "wrong");
    } catch (const std::exception& error) {
      std::printf("%s %s: %s\n", name, right ? "right" : "wrong", error.what());
    }
  }
}

}  // namespace
}  // namespace pyllm::cuda

int main() {
  using namespace pyllm::cuda;
  attempt("around_the_block", around_the_block, {1}, 64);
  attempt("around_the_warp", around_the_warp, {1}, 32);
  attempt("again", again, {1}, 64);
  attempt("blocks", blocks, {2}, 32);
  attempt("bytes", bytes, {1}, 32);
  std::vector<int> heap(8);
  watch_tensors({{reinterpret_cast<std::uintptr_t>(heap.data()), 4 * sizeof(int)}});
  attempt("outside", outside, {1}, 32, heap.data());
}
