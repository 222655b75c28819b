// Types and arithmetic of CUDA C++ for a plain C++ compiler; see cuda_on_cpu.h.
//
// 16-bit arithmetic rounds once, to nearest even, as the hardware does. What the hardware only
// approximates (rsqrtf, __expf) is computed to the last bit here.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define CUDA_VECTOR2(T, name, bytes)         \
  struct alignas(bytes) name##2 { T x, y; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }
#define CUDA_VECTOR3(T, name)    \
  struct name##3 { T x, y, z; }; \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }
#define CUDA_VECTOR4(T, name, bytes)               \
  struct alignas(bytes) name##4 { T x, y, z, w; }; \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_VECTOR2(signed char, char, 2)
CUDA_VECTOR4(signed char, char, 4)
CUDA_VECTOR2(unsigned char, uchar, 2)
CUDA_VECTOR4(unsigned char, uchar, 4)
CUDA_VECTOR2(short, short, 4)
CUDA_VECTOR4(short, short, 8)
CUDA_VECTOR2(unsigned short, ushort, 4)
CUDA_VECTOR4(unsigned short, ushort, 8)
CUDA_VECTOR2(int, int, 8)
CUDA_VECTOR3(int, int)
CUDA_VECTOR4(int, int, 16)
CUDA_VECTOR2(unsigned, uint, 8)
CUDA_VECTOR3(unsigned, uint)
CUDA_VECTOR4(unsigned, uint, 16)
CUDA_VECTOR2(float, float, 8)
CUDA_VECTOR3(float, float)
CUDA_VECTOR4(float, float, 16)
CUDA_VECTOR2(double, double, 16)
CUDA_VECTOR2(long long, longlong, 16)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

template <class To, class From>
inline To cuda_bits(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof result);
  return result;
}
inline int __float_as_int(float value) { return cuda_bits<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_bits<unsigned>(value); }
inline float __int_as_float(int bits) { return cuda_bits<float>(bits); }
inline float __uint_as_float(unsigned bits) { return cuda_bits<float>(bits); }
inline long long __double_as_longlong(double value) { return cuda_bits<long long>(value); }
inline double __longlong_as_double(long long bits) { return cuda_bits<double>(bits); }

namespace cuda_on_cpu {

inline float widen_half(std::uint16_t bits) {
  const std::uint32_t magnitude = (bits & 0x7fffu) << 13, sign = (bits & 0x8000u) << 16;
  const std::uint32_t special = magnitude >= (31u << 23) ? 112u << 23 : 0u;
  const std::uint32_t normal = magnitude + (112u << 23) + special;
  const float subnormal = cuda_bits<float>(magnitude + (113u << 23)) - cuda_bits<float>(113u << 23);
  const bool is_subnormal = magnitude < (1u << 23);
  return cuda_bits<float>((is_subnormal ? cuda_bits<std::uint32_t>(subnormal) : normal) | sign);
}

inline std::uint16_t narrow_half(float value) {
  const std::uint32_t bits = cuda_bits<std::uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const std::uint32_t sign = (bits >> 16) & 0x8000u;
  std::uint32_t result = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  if (magnitude < (113u << 23)) {
    result = cuda_bits<std::uint32_t>(cuda_bits<float>(magnitude) + 0.5f) -
             cuda_bits<std::uint32_t>(0.5f);
  }
  if (magnitude >= (143u << 23)) result = 0x7c00u;
  if (magnitude > 0x7f800000u) return 0x7fffu;  // the NaN that CUDA makes
  return static_cast<std::uint16_t>(result | sign);
}

inline float widen_bfloat(std::uint16_t bits) {
  return cuda_bits<float>(std::uint32_t{bits} << 16);
}

inline std::uint16_t narrow_bfloat(float value) {
  const std::uint32_t bits = cuda_bits<std::uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffu;
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// a * b + c, rounded to odd to float: rounding that once more to 16 bits rounds correctly. The
// product of two 16-bit numbers is exact in double; what the sum loses shows in `lost`.
inline float fma_to_odd(float a, float b, float c) {
  const double product = double{a} * double{b}, addend = double{c};
  const double sum = product + addend;
  const double back = sum - product;
  const double lost = (product - (sum - back)) + (addend - back);
  if (!std::isfinite(sum)) return static_cast<float>(sum);
  float result = static_cast<float>(sum);
  // Towards zero, then the last bit set where anything is left.
  const double over = double{result} - sum;
  if (over == 0 && lost == 0) return result;
  const bool too_large = over != 0 ? std::fabs(double{result}) > std::fabs(sum)
                                   : (lost < 0) == (result > 0) && result != 0;
  std::uint32_t bits = cuda_bits<std::uint32_t>(result);
  if (too_large) --bits;
  return cuda_bits<float>(bits | 1u);
}

}  // namespace cuda_on_cpu

// Both 16-bit types: sum, difference, product and quotient of two are rounded correctly when they
// are computed in float, which has more than twice their digits.
#define CUDA_FLOAT16(H, from, to)                                                      \
  struct H {                                                                           \
    std::uint16_t bits;                                                                \
    H() = default;                                                                     \
    H(float value) : bits(cuda_on_cpu::to(value)) {}                                   \
    operator float() const { return cuda_on_cpu::from(bits); }                         \
  };                                                                                   \
  struct alignas(4) H##2 { H x, y; };                                                  \
  inline H operator+(H a, H b) { return H(float(a) + float(b)); }                      \
  inline H operator-(H a, H b) { return H(float(a) - float(b)); }                      \
  inline H operator*(H a, H b) { return H(float(a) * float(b)); }                      \
  inline H operator/(H a, H b) { return H(float(a) / float(b)); }                      \
  inline H __hadd(H a, H b) { return a + b; }                                          \
  inline H __hsub(H a, H b) { return a - b; }                                          \
  inline H __hmul(H a, H b) { return a * b; }                                          \
  inline H __hdiv(H a, H b) { return a / b; }                                          \
  inline H __hneg(H a) { return H(-float(a)); }                                        \
  inline H __habs(H a) { return H(std::fabs(float(a))); }                              \
  inline H __hmax(H a, H b) { return H(std::fmax(float(a), float(b))); }               \
  inline H __hmin(H a, H b) { return H(std::fmin(float(a), float(b))); }               \
  inline H __hfma(H a, H b, H c) { return H(cuda_on_cpu::fma_to_odd(a, b, c)); }       \
  inline H##2 __hadd2(H##2 a, H##2 b) { return {a.x + b.x, a.y + b.y}; }               \
  inline H##2 __hsub2(H##2 a, H##2 b) { return {a.x - b.x, a.y - b.y}; }               \
  inline H##2 __hmul2(H##2 a, H##2 b) { return {a.x * b.x, a.y * b.y}; }               \
  inline H##2 __hmax2(H##2 a, H##2 b) { return {__hmax(a.x, b.x), __hmax(a.y, b.y)}; } \
  inline H##2 __hfma2(H##2 a, H##2 b, H##2 c) {                                        \
    return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)};                             \
  }                                                                                    \
  inline float __low2float(H##2 a) { return a.x; }                                     \
  inline float __high2float(H##2 a) { return a.y; }

CUDA_FLOAT16(__half, widen_half, narrow_half)
CUDA_FLOAT16(__nv_bfloat16, widen_bfloat, narrow_bfloat)
using half = __half;
using half2 = __half2;

inline float __half2float(__half a) { return a; }
inline __half __float2half(float a) { return __half(a); }
inline __half __float2half_rn(float a) { return __half(a); }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 a) { return {__half(a.x), __half(a.y)}; }
inline __half2 __half2half2(__half a) { return {a, a}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half __low2half(__half2 a) { return a.x; }
inline __half __high2half(__half2 a) { return a.y; }
inline float2 __half22float2(__half2 a) { return {float(a.x), float(a.y)}; }
inline unsigned short __half_as_ushort(__half a) { return a.bits; }
inline __half __ushort_as_half(unsigned short bits) { return cuda_bits<__half>(bits); }
inline float __bfloat162float(__nv_bfloat16 a) { return a; }
inline __nv_bfloat16 __float2bfloat16(float a) { return __nv_bfloat16(a); }
inline __nv_bfloat16 __float2bfloat16_rn(float a) { return __nv_bfloat16(a); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__nv_bfloat16(a), __nv_bfloat16(b)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 a) { return {float(a.x), float(a.y)}; }

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }

inline float rsqrtf(float a) { return static_cast<float>(1.0 / std::sqrt(double{a})); }
inline float rsqrt(float a) { return rsqrtf(a); }
inline double rsqrt(double a) { return 1.0 / std::sqrt(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }

inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __popc(unsigned a) { return __builtin_popcount(a); }

// Four of the eight bytes of two words; each digit of the selector names one.
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const std::uint64_t bytes = std::uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned digit = selector >> (4 * i) & 7u;
    result |= static_cast<unsigned>(bytes >> (8 * digit) & 255u) << (8 * i);
  }
  return result;
}

// Four products of 8-bit numbers, added to the third argument.
inline int __dp4a(int a, int b, int c) {
  for (int shift = 0; shift < 32; shift += 8) {
    c += static_cast<std::int8_t>(a >> shift) * static_cast<std::int8_t>(b >> shift);
  }
  return c;
}
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int shift = 0; shift < 32; shift += 8) c += ((a >> shift) & 255u) * ((b >> shift) & 255u);
  return c;
}

template <class T>
inline T __ldg(const T* address) {
  return *address;
}

// Blocks run one after the other on one thread of the CPU, so that nothing can come between.
template <class T>
inline T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
inline T atomicMax(T* address, T value) {
  const T old = *address;
  *address = max(old, value);
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
