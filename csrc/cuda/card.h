// What a launcher has to know of the current card. Each card is asked once: the answers do not
// change, and a launch shall cost no more than that. Nothing here is forbidden while a CUDA graph
// is captured.
#pragma once

#include <atomic>

#include "cuda/launch.h"

namespace pyllm::cuda {

#ifdef __CUDACC__
inline void require_success(cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the next launch would find it
  throw std::runtime_error(cudaGetErrorString(error));
}

// Keeps the answer, a positive number, for each card.
class OncePerCard {
 public:
  template <class Ask>
  int answer(const Ask& ask) {
    int card = 0;
    require_success(cudaGetDevice(&card));
    if (card >= kMostCards) return ask(card);
    int known = known_[card].load(std::memory_order_relaxed);
    if (known == 0) known_[card].store(known = ask(card), std::memory_order_relaxed);
    return known;
  }

 private:
  static constexpr int kMostCards = 64;  // beyond, they are asked every time
  std::atomic<int> known_[kMostCards] = {};
};

inline int multiprocessors() {
  static OncePerCard known;
  return known.answer([](int card) {
    int count = 0;
    require_success(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, card));
    return count;
  });
}

// For which cards the kernel was compiled that runs on this one: 75, 80, ... This, and not what the
// card could do, says which body it has: a build for sm_75 alone runs on later cards as well.
template <class Kernel>
int compiled_for(OncePerCard& known, Kernel* kernel) {
  return known.answer([kernel](int) {
    cudaFuncAttributes found{};
    require_success(cudaFuncGetAttributes(&found, kernel));
    return found.ptxVersion;
  });
}
#else
class OncePerCard {};
inline int multiprocessors() { return 2; }
template <class Kernel>
int compiled_for(OncePerCard& /*known*/, Kernel* /*kernel*/) {
  return 80;
}
#endif

}  // namespace pyllm::cuda
