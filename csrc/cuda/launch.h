// How kernels are launched: on the stream they are given, with every error an exception.
//
// Compiled by nvcc for a card. Compiled by a plain C++ compiler after tests/cuda_kernels/
// cuda_on_cpu.h, the same kernels run on the CPU, so that machines without a card can test them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#elif !defined(PYLLM_CUDA_ON_CPU)
#error "for nvcc, or for g++ -x c++ -include tests/cuda_kernels/cuda_on_cpu.h"
#endif

#include "cuda/kernels.h"

// Shared memory of a block: PYLLM_SHARED(float, tile, [32][33]); and as much of T as the launch
// asks for: PYLLM_DYNAMIC_SHARED(float, rows);
#ifdef __CUDACC__
#define PYLLM_SHARED(T, name, extents) __shared__ __align__(16) T name extents
#define PYLLM_DYNAMIC_SHARED(T, name)                     \
  extern __shared__ __align__(16) char dynamic_shared_[]; \
  T* const name = reinterpret_cast<T*>(dynamic_shared_)
#else
#define PYLLM_SHARED(T, name, extents)                \
  using name##_array_ = T extents;                    \
  static ::cuda_on_cpu::SharedSite name##_site_;      \
  name##_array_& name = *static_cast<name##_array_*>( \
      ::cuda_on_cpu::machine.static_shared(name##_site_, sizeof(name##_array_), 16))
#define PYLLM_DYNAMIC_SHARED(T, name) \
  T* const name = static_cast<T*>(::cuda_on_cpu::machine.dynamic_shared())
#endif

namespace pyllm::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr std::size_t kSharedByDefault = 48 * 1024;  // more has to be asked for, kernel by kernel

// Blocks of `per_block` that cover n.
inline std::int64_t blocks_for(std::int64_t n, std::int64_t per_block) {
  return (n + per_block - 1) / per_block;
}

struct Grid {
  std::int64_t x, y = 1, z = 1;
};

// Refused before the launch, which would fail and leave its error for the next call to find.
inline void require_launchable(const char* name, Grid grid, dim3 threads) {
  constexpr std::int64_t kMostX = 2147483647, kMostYZ = 65535;
  const std::int64_t block = std::int64_t{threads.x} * threads.y * threads.z;
  const bool fits = grid.x <= kMostX && grid.y <= kMostYZ && grid.z <= kMostYZ && grid.x >= 0 &&
                    grid.y >= 0 && grid.z >= 0 && threads.z <= 64;
  if (!fits || block < 1 || block > 1024 || block % kWarp != 0) {
    throw std::invalid_argument(std::string(name) + ": a grid of " + std::to_string(grid.x) +
                                " x " + std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                                " blocks of " + std::to_string(block) +
                                " threads cannot be launched; split the call");
  }
}

// kernel(arguments...) in every thread; nothing where the grid is empty. `name` is for messages;
// `least_card` is the oldest that the kernel is for (75, 80, ...), whose shared memory has to do.
template <int least_card = 75, class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, dim3 threads,
            std::size_t dynamic_bytes, Stream stream, Arguments... arguments) {
  require_launchable(name, grid, threads);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const dim3 blocks(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y),
                    static_cast<unsigned>(grid.z));
#ifdef __CUDACC__
  if (dynamic_bytes > kSharedByDefault) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(dynamic_bytes));
  }
  kernel<<<blocks, threads, dynamic_bytes, static_cast<cudaStream_t>(stream.handle)>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(name) + ": " + cudaGetErrorString(error));
  }
#else
  (void)stream;
  cuda_on_cpu::launch<least_card>(name, kernel, blocks, threads, dynamic_bytes,
                                  static_cast<Parameters>(arguments)...);
#endif
}

}  // namespace pyllm::cuda
