// AMX: eight tile registers of 16 rows of 64 bytes, and instructions that multiply two of them
// (Intel 64 and IA-32 Architectures Software Developer's Manual, vol. 1, ch. 18). Written as
// assembly: GCC's intrinsics do not say that they read and write memory.
#pragma once

#include <cstdint>

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

#if defined(__AMX_TILE__)

struct TileShapes {  // of LDTILECFG
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {};
  std::uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

// A thread's tile registers: all of them whole. To be called before anything below, and given back
// at the end: other code on the thread has its own shapes, and saving them costs time.
inline void claim_tiles() {
  TileShapes shapes;
  for (int i = 0; i < 8; ++i) shapes.row_bytes[i] = 64, shapes.rows[i] = 16;
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
inline void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// Rows that lie `stride` bytes apart.
template <int tile>
inline void load_tile(const void* from, std::int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(void* to, std::int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}

// sum += a b. Row r of `a` has 32 bfloat16; row s of `b` has, for each of 16 columns, numbers 2 s
// and 2 s + 1 of the reduction side by side; the sums are float.
template <int sum, int a, int b>
inline void multiply_bfloat16() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

// sum += a b in int8 and int32: as above with 64 numbers in a row of `a`, and four side by side in
// `b`.
template <int sum, int a, int b>
inline void multiply_int8() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(a), "i"(b));
}

template <int sum, int a, int b>
inline void multiply_tiles(float*) {
  multiply_bfloat16<sum, a, b>();
}
template <int sum, int a, int b>
inline void multiply_tiles(std::int32_t*) {
  multiply_int8<sum, a, b>();
}

// sums (16, 32) = A B, or += A B for `add`. A is n squares of 16 rows, a_square bytes from one to
// the next and a_row from row to row; B as many blocks of 16 steps of 32 columns, four bytes each.
// The squares go to two sets of sums in turn, so that each product need not wait for the one before
// it.
template <class Sum>
[[gnu::noinline]] void multiply_squares(const void* a, std::int64_t a_row, std::int64_t a_square,
                                        const void* b, std::int64_t n, bool add, Sum* sums) {
  constexpr std::int64_t kStep = 32 * 4, kBlock = 16 * kStep;
  constexpr int kSums = 16 * 32;
  const char* left = static_cast<const char*>(a);
  const char* right = static_cast<const char*>(b);
  zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
  for (; n >= 2; n -= 2, left += 2 * a_square, right += 2 * kBlock) {
    load_tile<4>(left, a_row);
    load_tile<5>(right, kStep);
    load_tile<6>(right + 64, kStep);
    multiply_tiles<0, 4, 5>(sums);
    multiply_tiles<1, 4, 6>(sums);
    load_tile<7>(left + a_square, a_row);
    load_tile<5>(right + kBlock, kStep);
    load_tile<6>(right + kBlock + 64, kStep);
    multiply_tiles<2, 7, 5>(sums);
    multiply_tiles<3, 7, 6>(sums);
  }
  if (n > 0) {
    load_tile<4>(left, a_row);
    load_tile<5>(right, kStep);
    load_tile<6>(right + 64, kStep);
    multiply_tiles<0, 4, 5>(sums);
    multiply_tiles<1, 4, 6>(sums);
  }
  alignas(64) Sum parts[2][kSums];
  store_tile<0>(parts[0], kStep), store_tile<1>(parts[0] + 16, kStep);
  store_tile<2>(parts[1], kStep), store_tile<3>(parts[1] + 16, kStep);
  if (add) {
#pragma omp simd
    for (int i = 0; i < kSums; ++i) sums[i] += parts[0][i] + parts[1][i];
  } else {
#pragma omp simd
    for (int i = 0; i < kSums; ++i) sums[i] = parts[0][i] + parts[1][i];
  }
}

#else

inline void claim_tiles() {}
inline void release_tiles() {}

#endif

}  // namespace
}  // namespace pyllm::PYLLM_ISA
