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

#else

inline void claim_tiles() {}
inline void release_tiles() {}

#endif

}  // namespace
}  // namespace pyllm::PYLLM_ISA
