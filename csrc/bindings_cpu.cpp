// pyllm._cpu: addresses, sizes and a thread count in; no torch header, so no ABI to break.
//
// Nothing here checks anything: shapes are checked by the doors and by PyTorch's dispatcher,
// indices by the launchers in pyllm/cpu_kernels, which own every tensor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

const void* in(Address address) { return reinterpret_cast<const void*>(address); }
void* out(Address address) { return reinterpret_cast<void*>(address); }
pyllm::DType dtype_of(int code) { return static_cast<pyllm::DType>(code); }

// How an argument of a kernel comes from Python: addresses and dtype codes are integers there.
template <class T>
struct FromPython {
  using type = T;
  static T convert(T value) { return value; }
};
template <>
struct FromPython<const void*> {
  using type = Address;
  static const void* convert(Address address) { return in(address); }
};
template <>
struct FromPython<void*> {
  using type = Address;
  static void* convert(Address address) { return out(address); }
};
template <>
struct FromPython<pyllm::DType> {
  using type = int;
  static pyllm::DType convert(int code) { return dtype_of(code); }
};

// `pick` gives the kernel of the active instruction set, at each call.
template <class Pick, class... Arguments>
void define(py::module_& module, const char* name, Pick pick, void (*)(Arguments...)) {
  module.def(
      name,
      [pick](typename FromPython<Arguments>::type... arguments) {
        pick()(FromPython<Arguments>::convert(arguments)...);
      },
      py::call_guard<py::gil_scoped_release>());
}

#define PYLLM_DEFINE(name) \
  define(module, #name, [] { return PYLLM_PICK(name); }, &::pyllm::baseline::name)

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  module.doc() = "CPU kernels of pyllm on raw pointers; called by pyllm.cpu_kernels only.";

  py::dict dtypes;
  dtypes["float32"] = static_cast<int>(pyllm::DType::float32);
  dtypes["float64"] = static_cast<int>(pyllm::DType::float64);
  dtypes["bfloat16"] = static_cast<int>(pyllm::DType::bfloat16);
  dtypes["float16"] = static_cast<int>(pyllm::DType::float16);
  module.attr("DTYPES") = dtypes;

  module.def("built_isas", &pyllm::built_isas);
  module.def("supported_isas", &pyllm::supported_isas);
  module.def("set_isa", &pyllm::set_isa);
  module.def("active_isa", &pyllm::active_isa_name);
  module.def("parallel_backend", &pyllm::parallel_backend);

  PYLLM_DEFINE(rms_norm_forward);
  PYLLM_DEFINE(rms_norm_backward);
  PYLLM_DEFINE(sort_by_expert);
  PYLLM_DEFINE(gather_rows);
  PYLLM_DEFINE(moe_combine_forward);
  PYLLM_DEFINE(moe_combine_backward);
  PYLLM_DEFINE(moe_activation_forward);
  PYLLM_DEFINE(moe_activation_backward);
  PYLLM_DEFINE(route_topk_forward);
  PYLLM_DEFINE(route_topk_backward);
  PYLLM_DEFINE(rope);
  PYLLM_DEFINE(cross_entropy_forward);
  PYLLM_DEFINE(cross_entropy_backward);
  PYLLM_DEFINE(accumulate);
  PYLLM_DEFINE(pack_heads);
  PYLLM_DEFINE(unpack_heads);
  PYLLM_DEFINE(attention_softmax);
  PYLLM_DEFINE(attention_softmax_gradient);
  PYLLM_DEFINE(attention_delta);
  PYLLM_DEFINE(kv_append);
  PYLLM_DEFINE(decode_attention);
}
