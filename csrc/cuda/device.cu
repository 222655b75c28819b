// What stands in the way of every kernel, asked once before the first of them runs.

#include "cuda/launch.h"

namespace pyllm::cuda {
namespace {

__global__ void nothing() {}

}  // namespace

std::string obstacle() {
#ifdef __CUDACC__
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, nothing);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch would find it
    return cudaGetErrorString(error);
  }
#else
  (void)nothing;
#endif
  return {};
}

}  // namespace pyllm::cuda
