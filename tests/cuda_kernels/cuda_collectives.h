// CUDA's barriers, votes and shuffles: included by cuda_on_cpu.h.
#pragma once

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  cuda_on_cpu::machine.barrier(file, line, false);
}
inline int __syncthreads_count(int vote, const char* file = __builtin_FILE(),
                               int line = __builtin_LINE()) {
  cuda_on_cpu::machine.barrier(file, line, vote != 0);
  return cuda_on_cpu::machine.votes();
}
inline int __syncthreads_or(int vote, const char* file = __builtin_FILE(),
                            int line = __builtin_LINE()) {
  return __syncthreads_count(vote, file, line) > 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_cpu::machine.exchange(cuda_on_cpu::Collective::sync, mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  using cuda_on_cpu::Collective;
  const std::uint64_t voted = vote != 0;
  return static_cast<unsigned>(cuda_on_cpu::machine.exchange(Collective::ballot, mask, voted, 0));
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }
inline unsigned __match_any_sync(unsigned mask, int value) {
  using cuda_on_cpu::Collective;
  const std::uint64_t bits = static_cast<unsigned>(value);
  return static_cast<unsigned>(cuda_on_cpu::machine.exchange(Collective::match, mask, bits, 0));
}

// Lanes work in groups of `width`; a source outside of the group gives a lane its own value.
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = cuda_on_cpu::kWarp) {
  const int lane = cuda_on_cpu::lane(), first = lane - lane % width;
  return cuda_on_cpu::shuffle(mask, value, first + (source & (width - 1)));
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = cuda_on_cpu::kWarp) {
  const int lane = cuda_on_cpu::lane(), source = lane - static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source < lane - lane % width ? lane : source);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = cuda_on_cpu::kWarp) {
  const int lane = cuda_on_cpu::lane(), source = lane + static_cast<int>(delta);
  return cuda_on_cpu::shuffle(mask, value, source >= lane - lane % width + width ? lane : source);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = cuda_on_cpu::kWarp) {
  const int lane = cuda_on_cpu::lane(), source = lane ^ flip;
  return cuda_on_cpu::shuffle(mask, value, source >= lane - lane % width + width ? lane : source);
}
