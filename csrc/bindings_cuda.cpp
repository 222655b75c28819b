// pyllm._cuda: addresses on the card, sizes and a stream in; no torch header, so no ABI to break.
//
// Nothing here checks anything: shapes are checked by the doors and by PyTorch's dispatcher; the
// launchers in pyllm/cuda_kernels own every tensor and keep them on one device.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "cuda/kernels.h"

#ifdef PYLLM_CUDA_RACES  // tests/cuda_kernels/cuda_races.cpp
#include <pybind11/stl.h>

#include <utility>
#include <vector>

void watch_tensors(std::vector<std::pair<std::uintptr_t, std::size_t>> tensors);
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using pyllm::cuda::DType;
using pyllm::cuda::Stream;

// How an argument of a launcher comes from Python: addresses, streams and codes are integers there.
template <class T>
struct FromPython {
  using type = T;
  static T convert(T value) { return value; }
};
template <>
struct FromPython<const void*> {
  using type = Address;
  static const void* convert(Address address) { return reinterpret_cast<const void*>(address); }
};
template <>
struct FromPython<void*> {
  using type = Address;
  static void* convert(Address address) { return reinterpret_cast<void*>(address); }
};
template <>
struct FromPython<DType> {
  using type = int;
  static DType convert(int code) { return static_cast<DType>(code); }
};
template <>
struct FromPython<Stream> {
  using type = Address;
  static Stream convert(Address handle) { return {reinterpret_cast<void*>(handle)}; }
};

template <class... Arguments>
void define(py::module_& module, const char* name, void (*launcher)(Arguments...)) {
  module.def(
      name,
      [launcher](typename FromPython<Arguments>::type... arguments) {
        launcher(FromPython<Arguments>::convert(arguments)...);
      },
      py::call_guard<py::gil_scoped_release>());
}

#define PYLLM_DEFINE(name) define(module, #name, &::pyllm::cuda::name)

}  // namespace

PYBIND11_MODULE(_cuda, module) {
  module.doc() = "CUDA kernels of pyllm on raw pointers; called by pyllm.cuda_kernels only.";

  py::dict dtypes;
  dtypes["float32"] = static_cast<int>(DType::float32);
  dtypes["float64"] = static_cast<int>(DType::float64);
  dtypes["bfloat16"] = static_cast<int>(DType::bfloat16);
  dtypes["float16"] = static_cast<int>(DType::float16);
  module.attr("DTYPES") = dtypes;

  // Compiled for tests without a card (tests/cuda_kernels/cuda_on_cpu.h), or by nvcc?
#ifdef PYLLM_CUDA_ON_CPU
  module.attr("ON_CPU") = true;
  module.def("set_order", [](unsigned order) { cuda_on_cpu::machine.set_order(order); });
  module.def("set_last_blocks", [](long count) { cuda_on_cpu::machine.set_last_blocks(count); });
#ifdef PYLLM_CUDA_RACES
  module.def("watch_tensors", &watch_tensors);
#endif
#else
  module.attr("ON_CPU") = false;
#endif

  module.def("obstacle", &pyllm::cuda::obstacle, py::call_guard<py::gil_scoped_release>());

  PYLLM_DEFINE(rms_norm_forward);
  PYLLM_DEFINE(rms_norm_backward);
  PYLLM_DEFINE(sort_by_expert);
  PYLLM_DEFINE(moe_dispatch_gather);
  PYLLM_DEFINE(moe_combine_forward);
  PYLLM_DEFINE(moe_combine_backward);
  PYLLM_DEFINE(rope);
  PYLLM_DEFINE(kv_append);
  PYLLM_DEFINE(kv_append_int8);
  PYLLM_DEFINE(route_topk_forward);
  PYLLM_DEFINE(route_topk_backward);
  PYLLM_DEFINE(decode_attention);
  PYLLM_DEFINE(quantize_rows);
  PYLLM_DEFINE(int8_one_row);
  PYLLM_DEFINE(int8_matmul);
  PYLLM_DEFINE(int8_weights);
  PYLLM_DEFINE(moe_tiles);
  PYLLM_DEFINE(moe_ffn_forward);
  PYLLM_DEFINE(moe_ffn_few);
  PYLLM_DEFINE(moe_ffn_backward);
  PYLLM_DEFINE(attention_forward);
  PYLLM_DEFINE(attention_backward);
  PYLLM_DEFINE(linear_cross_entropy_forward);
  PYLLM_DEFINE(linear_cross_entropy_backward);
}
