// Tensor cores and copies to shared memory that go on by themselves, both of sm_80, for the CPU;
// cuda_on_cpu.h includes it. csrc/cuda/mma.h calls it where nvcc would get PTX.
//
// A product is a collective of the warp: each lane brings its fragments, the last one to come puts
// the matrices together by the layout of the PTX manual (9.7.14.5, "Matrix Fragments for
// mma.m16n8k16" and "mma.m16n8k32"), multiplies, and hands out the results. What a lane holds in
// the wrong register or for the wrong lane is so multiplied with the wrong numbers, as on a card.
//
// The 16 bytes that a copy goes to are NaN (integers: -1) until the thread has waited for its
// group.
#pragma once

#include <type_traits>

namespace cuda_on_cpu {

template <class Sum>
struct MmaFragments {
  Sum* sums;
  const unsigned *a, *b;
};

// The sum of 16 exact products and a float; cards cut off what float does not hold, they do not
// round. The manual promises no more than single precision.
inline float add_products(float sum, double products) {
  const double exact = double{sum} + products;
  const float rounded = static_cast<float>(exact);
  if (!std::isfinite(rounded) || std::fabs(double{rounded}) <= std::fabs(exact)) return rounded;
  return cuda_bits<float>(cuda_bits<std::uint32_t>(rounded) - 1);
}
inline int add_products(int sum, int products) {
  return static_cast<int>(static_cast<unsigned>(sum) + static_cast<unsigned>(products));
}

// (16, depth) times (depth, 8), added to (16, 8); the depth is 32 bytes of entries.
template <class Entry, class Sum>
void mma_of_warp(void* const* lanes) {
  using Exact = std::conditional_t<std::is_same_v<Sum, int>, int, double>;
  constexpr int kEntries = 4 / sizeof(Entry), kDepth = 32 / sizeof(Entry);
  Exact a[16][kDepth], b[8][kDepth];
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const MmaFragments<Sum>*>(lanes[lane]);
    const int group = lane / 4, first = lane % 4 * kEntries;
    for (int i = 0; i < 4 * kEntries; ++i) {
      const int word = i / kEntries, entry = i % kEntries;
      Entry values[kEntries];
      std::memcpy(values, &mine.a[word], 4);
      const int row = group + word % 2 * 8, k = first + entry + word / 2 * (kDepth / 2);
      a[row][k] = static_cast<Exact>(values[entry]);
    }
    for (int i = 0; i < 2 * kEntries; ++i) {
      const int word = i / kEntries, entry = i % kEntries;
      Entry values[kEntries];
      std::memcpy(values, &mine.b[word], 4);
      b[group][first + entry + word * (kDepth / 2)] = static_cast<Exact>(values[entry]);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const MmaFragments<Sum>*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      Exact products = 0;
      for (int k = 0; k < kDepth; ++k) products += a[row][k] * b[column][k];
      mine.sums[i] = add_products(mine.sums[i], products);
    }
  }
}

template <class Entry, class Sum>
inline void mma(Sum (&sums)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  MmaFragments<Sum> mine{sums, a, b};
  machine.exchange(Collective::together, 0xffffffffu, reinterpret_cast<std::uint64_t>(&mine), 0,
                   &mma_of_warp<Entry, Sum>);
}

inline void copy_async(void* to, const void* from, int given) {
  require_aligned(to, 16);
  require_aligned(from, 16);
  Fiber& me = *machine.current;
  std::memset(to, 0xff, 16);
  me.copies.push_back({to, from, given, me.group});
}

inline void commit_copies() { ++machine.current->group; }

// Until at most the last `pending` groups of this thread are on their way.
inline void wait_for_copies(int pending) {
  Fiber& me = *machine.current;
  auto copy = me.copies.begin();
  for (; copy != me.copies.end() && copy->group < me.group - pending; ++copy) {
    std::memcpy(copy->to, copy->from, copy->given);
    std::memset(static_cast<char*>(copy->to) + copy->given, 0, 16 - copy->given);
  }
  me.copies.erase(me.copies.begin(), copy);
}

}  // namespace cuda_on_cpu
