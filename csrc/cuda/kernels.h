// The launchers of all CUDA kernels, for the bindings: addresses on the card, sizes, and the stream
// as the last argument. None of them waits for the card. One that cannot launch throws.
#pragma once

#include <cstdint>

namespace pyllm::cuda {

// What a tensor is stored as. The bindings give the codes to Python (pyllm._cuda.DTYPES).
enum class DType : int { float32, float64, bfloat16, float16 };

// A cudaStream_t, without CUDA's headers.
struct Stream {
  void* handle;
};

// rms_norm.cu. rstd and weight are in the type that sums are kept in; so is the scratch: means
// (rows,) and partials (blocks, width), a block of the backward taking rows_per_block rows.
void rms_norm_forward(DType dtype, const void* x, const void* weight, double eps, void* y,
                      void* rstd, std::int64_t rows, std::int64_t width, Stream stream);
void rms_norm_backward(DType dtype, const void* dy, const void* x, const void* weight,
                       const void* rstd, void* dx, void* dweight, void* means, void* partials,
                       std::int64_t rows, std::int64_t width, std::int64_t rows_per_block,
                       Stream stream);

}  // namespace pyllm::cuda
