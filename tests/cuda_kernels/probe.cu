// Small kernels with a fault each, and arithmetic, for test_cuda_on_cpu.py.
#include <cstdio>

#include "cuda/mma.h"
#include "cuda/numeric.h"
#include "cuda/reduce.h"

namespace pyllm::cuda {
namespace {

__global__ void reversed(const int* from, int* to, bool with_barrier) {
  PYLLM_SHARED(int, values, [64]);
  values[threadIdx.x] = from[threadIdx.x];
  if (with_barrier) __syncthreads();
  to[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void stale(float* to) {
  PYLLM_SHARED(float, values, [32]);
  to[blockIdx.x * 32 + threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 1.0f;
}

__global__ void half_way() {
  if (threadIdx.x < 40) __syncthreads();
}
__global__ void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void not_all_lanes() {
  if (threadIdx.x != 5) __syncwarp();
}
__global__ void not_in_the_mask() { __ballot_sync(0xffu, 1); }
__global__ void from_outside() {
  if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 9);
}
__global__ void two_collectives() {
  if (threadIdx.x % 2 == 0) {
    __ballot_sync(kAllLanes, 1);
  } else {
    __shfl_sync(kAllLanes, 1, 0);
  }
}
__global__ void misaligned(const float* from) { load_pack<4>(from + 1); }
__global__ void copy_misaligned(const int* from) {
  PYLLM_SHARED(int, values, [8]);
  copy_async(values, from + 1, 16);
}
__global__ void two_products() {
  const unsigned a[4] = {}, b[2] = {};
  float sums[4] = {};
  if (threadIdx.x % 2 == 0) {
    mma(sums, a, b, __half{});
  } else {
    mma(sums, a, b, __nv_bfloat16{});
  }
}
__global__ void too_much_shared() {
  PYLLM_SHARED(float, values, [12289]);
  values[0] = 0;
}

__global__ void static_and_dynamic() {
  PYLLM_SHARED(float, values, [3072]);
  values[0] = 0;
}
__global__ void too_wide_for_a_card(int* to) { *to = 1; }

// A row of numbers for each collective, lane by lane.
__global__ void collectives(int* to) {
  const int lane = static_cast<int>(threadIdx.x);
  to[lane] = __shfl_xor_sync(kAllLanes, lane, 5);
  to[32 + lane] = __shfl_up_sync(kAllLanes, lane, 3);
  to[64 + lane] = __shfl_down_sync(kAllLanes, lane, 3, 8);
  to[96 + lane] = __shfl_sync(kAllLanes, lane, 9, 8);
  to[128 + lane] = static_cast<int>(__ballot_sync(kAllLanes, lane % 3 == 0));
  to[160 + lane] = static_cast<int>(__match_any_sync(kAllLanes, lane / 10));
  to[192 + lane] = __dp4a(static_cast<int>(0x80ff7f01u), 0x02030405, lane);
  if (lane < 16) {
    to[224 + lane] = __shfl_xor_sync(0xffffu, lane, 1);
  } else {
    to[224 + lane] = __shfl_xor_sync(0xffff0000u, lane, 1);
  }
}

// A product of (16, depth) and (8, depth)^T, its fragments made number by number as the PTX manual
// has them (9.7.14.5): `a` has 16 or 8 numbers in a lane, `b` half of that.
template <class Entry, class Sum>
__global__ void fragments(const Entry* left, const Entry* right, Sum* to) {
  constexpr int kOf = 4 / static_cast<int>(sizeof(Entry)), kDepth = 8 * kOf;
  const int group = static_cast<int>(threadIdx.x) >> 2, member = static_cast<int>(threadIdx.x) % 4;
  Entry a[4 * kOf], b[2 * kOf];
  for (int i = 0; i < 4 * kOf; ++i) {
    const bool upper = i < kOf || (2 * kOf <= i && i < 3 * kOf);
    const int row = upper ? group : group + 8;
    const int column = member * kOf + (i & (kOf - 1)) + (i < 2 * kOf ? 0 : kDepth / 2);
    a[i] = left[row * kDepth + column];
  }
  for (int i = 0; i < 2 * kOf; ++i) {
    const int row = member * kOf + (i & (kOf - 1)) + (i < kOf ? 0 : kDepth / 2);
    b[i] = right[group * kDepth + row];
  }
  unsigned a_words[4], b_words[2];
  memcpy(a_words, a, sizeof a);
  memcpy(b_words, b, sizeof b);
  Sum sums[4] = {1, 2, 3, 4};
  mma(sums, a_words, b_words, Entry{});
  for (int i = 0; i < 4; ++i) {
    to[(i < 2 ? group : group + 8) * 8 + member * 2 + (i & 1)] = sums[i] - static_cast<Sum>(i + 1);
  }
}

// The neighbours of 32 threads by a copy of 16 bytes, the last of which has four only.
__global__ void copied(const int* from, int* to, bool with_wait, bool with_barrier) {
  PYLLM_SHARED(int, values, [132]);
  const int lane = static_cast<int>(threadIdx.x);
  copy_async(values + 4 * lane, from + 4 * lane, lane < 31 ? 16 : 4);
  commit_copies();
  if (lane == 0) copy_async(values + 128, from, 0);
  commit_copies();
  if (with_wait) wait_for_copies<1>();
  if (with_barrier) __syncthreads();
  for (int i = 0; i < 4; ++i) to[4 * lane + i] = values[127 - 4 * lane - i];
  __syncthreads();
  if (lane == 0) to[128] = values[128];
  wait_for_copies<0>();
  if (lane == 0) to[129] = values[128];
}

template <class... Parameters, class... Arguments>
void attempt(const char* name, void (*kernel)(Parameters...), int threads, Arguments... arguments) {
  try {
    launch(name, kernel, {1}, threads, 0, Stream{nullptr}, arguments...);
    std::printf("%s: nothing\n", name);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}

// Past launch.h, which refuses or leaves out what a card would refuse.
void attempt_raw(const char* name, dim3 grid, dim3 threads, std::size_t dynamic_bytes) {
  try {
    int to = 0;
    cuda_on_cpu::launch(name, too_wide_for_a_card, grid, threads, dynamic_bytes, &to);
    std::printf("%s: nothing\n", name);
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}

void print(const char* name, const int* values, int count) {
  std::printf("%s", name);
  for (int i = 0; i < count; ++i) std::printf(" %d", values[i]);
  std::printf("\n");
}

template <class H>
void print_arithmetic(const char* name) {
  unsigned state = 1;
  const auto next = [&state] {
    for (;;) {
      state = state * 1664525u + 1013904223u;
      const H number = cuda_bits<H>(static_cast<std::uint16_t>(state >> 16));
      if (std::isfinite(float(number))) return number;
    }
  };
  for (int i = 0; i < 20000; ++i) {
    const H a = next(), b = next(), c = next();
    const H values[] = {a, b, c, a + b, a * b, a / b, __hfma(a, b, c)};
    std::printf("%s", name);
    for (const H value : values) std::printf(" %d", value.bits);
    std::printf("\n");
  }
}

// Prints both matrices, of small whole numbers, and their product.
template <class Entry, class Sum>
void print_product(const char* name, int depth) {
  Entry left[16 * 32], right[8 * 32];
  Sum product[16 * 8];
  int numbers[24 * 32 + 16 * 8];
  unsigned state = 7;
  for (int i = 0; i < 24 * depth; ++i) {
    state = state * 1664525u + 1013904223u;
    numbers[i] = static_cast<int>(state >> 24) - 128;
    (i < 16 * depth ? left[i] : right[i - 16 * depth]) = static_cast<Entry>(numbers[i]);
  }
  launch(name, fragments<Entry, Sum>, {1}, 32, 0, Stream{nullptr}, left, right, product);
  for (int i = 0; i < 128; ++i) numbers[24 * depth + i] = static_cast<int>(product[i]);
  print(name, numbers, 24 * depth + 128);
}

}  // namespace
}  // namespace pyllm::cuda

int main() {
  using namespace pyllm::cuda;
  int from[64], to[256] = {};
  for (int i = 0; i < 64; ++i) from[i] = i;
  for (const unsigned order : {0u, 1u, 7u}) {
    cuda_on_cpu::machine.set_order(order);
    for (const bool with_barrier : {true, false}) {
      launch("reversed", reversed, {1}, 64, 0, Stream{nullptr}, from, to, with_barrier);
      print(with_barrier ? "with" : "without", to, 64);
    }
  }
  cuda_on_cpu::machine.set_order(0);
  float fresh[64];
  launch("stale", stale, {2}, 32, 0, Stream{nullptr}, fresh);
  int n_nan = 0;
  for (const float value : fresh) n_nan += value != value;
  print("stale", &n_nan, 1);
  attempt("half_way", half_way, 64);
  attempt("two_barriers", two_barriers, 64);
  attempt("not_all_lanes", not_all_lanes, 32);
  attempt("not_in_the_mask", not_in_the_mask, 32);
  attempt("from_outside", from_outside, 32);
  attempt("two_collectives", two_collectives, 32);
  attempt("misaligned", misaligned, 32, fresh);
  attempt("too_much_shared", too_much_shared, 32);
  attempt("no_warp", half_way, 40);
  attempt("static_and_dynamic", static_and_dynamic, 32);
  try {
    launch("both_shared", static_and_dynamic, {1}, 32, 40 * 1024, Stream{nullptr});
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
  attempt_raw("no_blocks", dim3(0), dim3(32), 0);
  attempt_raw("many_blocks", dim3(1, 65536), dim3(32), 0);
  attempt_raw("many_threads", dim3(1), dim3(1056), 0);
  attempt_raw("much_shared", dim3(1), dim3(32), 64 * 1024 + 1);
  launch("collectives", collectives, {1}, 32, 0, Stream{nullptr}, to);
  print("collectives", to, 256);
  print_product<signed char, int>("product8", 32);
  print_product<__half, float>("product16", 16);
  print_product<__nv_bfloat16, float>("product16", 16);
  alignas(16) int source[128];
  int result[130];
  for (int i = 0; i < 128; ++i) source[i] = i + 1;
  for (const unsigned order : {0u, 1u, 7u}) {
    cuda_on_cpu::machine.set_order(order);
    for (const int without : {0, 1, 2}) {
      launch("copied", copied, {1}, 32, 0, Stream{nullptr}, source, result, without != 1,
             without != 2);
      const char* const names[] = {"copied", "copied_unwaited", "copied_unsynchronised"};
      print(names[without], result, 130);
    }
  }
  cuda_on_cpu::machine.set_order(0);
  attempt("copy_misaligned", copy_misaligned, 32, source);
  attempt("two_products", two_products, 32);
  print_arithmetic<__half>("float16");
  print_arithmetic<__nv_bfloat16>("bfloat16");
}
