// Storage types, the type sums are kept in, and loads and stores of 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/launch.h"

namespace pyllm::cuda {

// The type sums are kept in: float, but double for double.
template <class Storage>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class Storage>
using Wide = typename Accumulator<Storage>::type;

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ double widen(double value) { return value; }
__device__ __forceinline__ float widen(signed char value) { return static_cast<float>(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ __forceinline__ void narrow_to(float& to, float value) { to = value; }
__device__ __forceinline__ void narrow_to(double& to, double value) { to = value; }
__device__ __forceinline__ void narrow_to(signed char& to, float value) {
  to = static_cast<signed char>(value);
}
__device__ __forceinline__ void narrow_to(__half& to, float value) { to = __float2half_rn(value); }
__device__ __forceinline__ void narrow_to(__nv_bfloat16& to, float value) {
  to = __float2bfloat16_rn(value);
}

// The lowest finite number: where a search for the largest begins.
template <class W>
__device__ __forceinline__ W lowest();
template <>
__device__ __forceinline__ float lowest<float>() {
  return -3.402823466e+38f;
}
template <>
__device__ __forceinline__ double lowest<double>() {
  return -1.7976931348623157e+308;
}

// A number in the type it is stored as, rounded to nearest even.
template <class Storage>
__device__ __forceinline__ Storage narrow(Wide<Storage> value) {
  Storage result;
  narrow_to(result, value);
  return result;
}

// `count` neighbours, loaded and stored at once: 16 bytes at an address that 16 divides, or one.
template <class T, int count>
struct alignas(count == 1 ? alignof(T) : sizeof(T) * count) Pack {
  T values[count];
};

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));

template <int count, class T>
__device__ __forceinline__ Pack<T, count> load_pack(const T* from) {
  using Block = Pack<T, count>;
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::require_aligned(from, alignof(Block));
#endif
  return *reinterpret_cast<const Block*>(from);
}

template <int count, class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T, count>& pack) {
  using Block = Pack<T, count>;
#ifdef PYLLM_CUDA_ON_CPU
  cuda_on_cpu::require_aligned(to, alignof(Block));
#endif
  *reinterpret_cast<Block*>(to) = pack;
}

// May rows of `width` that begin at these addresses be read and written in packs?
template <class T, class... Pointers>
bool fits_packs(std::int64_t width, const Pointers*... addresses) {
  return width % kPack<T> == 0 && ((reinterpret_cast<std::uintptr_t>(addresses) % 16 == 0) && ...);
}

// Calls fn(Storage{}) with the storage type that the code stands for.
template <class Fn>
void with_storage(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::float32:
      return fn(float{});
    case DType::float64:
      return fn(double{});
    case DType::bfloat16:
      return fn(__nv_bfloat16{});
    case DType::float16:
      return fn(__half{});
  }
  throw std::invalid_argument("no such dtype code");
}

// Calls fn with true or false as a type, so that a kernel can be compiled for either.
template <bool value>
struct Flag {
  static constexpr bool kValue = value;
};
template <class Fn>
void with_flag(bool value, const Fn& fn) {
  if (value) return fn(Flag<true>{});
  fn(Flag<false>{});
}

}  // namespace pyllm::cuda
