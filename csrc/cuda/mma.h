// Tensor cores, and copies from global to shared memory that go on by themselves: the instructions
// of sm_80 and later, as functions.
//
// mma multiplies two matrices that lie in the registers of a warp,
//
//     sums (16, 8) += a (16, depth) times b (depth, 8),
//
// and every lane holds a piece of each, a *fragment*. The depth is 32 bytes: 32 numbers of int8,
// or 16 of 16 bits. With group = lane / 4 and member = lane % 4, a register has 4 bytes (4 or 2
// neighbours along the depth), and lies at
//
//     a[0]  row group      bytes  4 member ...           b[0]  column group  bytes  4 member ...
//     a[1]  row group + 8  bytes  4 member ...           b[1]  column group  bytes  4 member + 16
//     ... a[2]  row group      bytes  4 member + 16 ... a[3]  row group + 8  bytes  4 member + 16
//     ...      sums[0], sums[1]  row group
//                                                        sums[2], sums[3]  row group + 8
//                                                                columns 2 member, 2 member + 1
//
// (PTX manual, 9.7.14.5: "Matrix Fragments for mma.m16n8k16", "... for mma.m16n8k32"). A sum does
// not care in which order the depth is counted: where a and b are loaded in the same other order,
// the result is the same, so that a lane can take 16 neighbouring bytes of a row at once, for four
// registers, instead of four pieces of 4 bytes.
#pragma once

#include "cuda/launch.h"

namespace pyllm::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
#define PYLLM_PTX(...) asm volatile(__VA_ARGS__)
#else
#define PYLLM_PTX(...)  // older cards, whose kernels have no body, and nvcc's pass over host code
#endif

// Sums of products of int8, exact in int32.
__device__ __forceinline__ void mma(int (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                                    signed char) {
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::mma<signed char>(sums, a, b);
#else
  PYLLM_PTX(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+r"(sums[0]),
      "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
      "r"(b[0]), "r"(b[1]));
#endif
}

// Sums in float of exact products of halfs, or of bfloats.
__device__ __forceinline__ void mma(float (&sums)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2], __half) {
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::mma<__half>(sums, a, b);
#else
  PYLLM_PTX(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(sums[0]),
      "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
      "r"(b[0]), "r"(b[1]));
#endif
}
__device__ __forceinline__ void mma(float (&sums)[4], const unsigned (&a)[4],
                                    const unsigned (&b)[2], __nv_bfloat16) {
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::mma<__nv_bfloat16>(sums, a, b);
#else
  PYLLM_PTX(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(sums[0]),
      "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
      "r"(b[0]), "r"(b[1]));
#endif
}

// Starts a copy of 16 bytes to shared memory, past the first level cache and the registers: the
// first `given` are read, the others become zeros. Both addresses are multiples of 16, and `from`
// is one that may be read even where nothing is.
__device__ __forceinline__ void copy_async(void* to, const void* from, int given) {
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::copy_async(to, from, given);
#else
  PYLLM_PTX("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(
                static_cast<unsigned>(__cvta_generic_to_shared(to))),
            "l"(from), "r"(given) : "memory");
#endif
}

// The copies that this thread has started since the last call are a group.
__device__ __forceinline__ void commit_copies() {
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::commit_copies();
#else
  PYLLM_PTX("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits until at most the last `pending` groups of this thread are on their way. What the other
// threads have copied is there after a __syncthreads as well.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::wait_for_copies(pending);
#else
  PYLLM_PTX("cp.async.wait_group %0;" : : "n"(pending) : "memory");
#endif
}

}  // namespace pyllm::cuda
