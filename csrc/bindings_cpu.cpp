// pyllm._cpu: addresses, sizes and a thread count in; no torch header, so no ABI to break.
//
// Nothing here checks anything: shapes are checked by the doors and by PyTorch's dispatcher,
// indices by the launchers in pyllm/cpu_kernels, which own every tensor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/decode_plan.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace py = pybind11;

char* pyllm::Plan::reserve(std::int64_t bytes) {
  if (static_cast<std::int64_t>(workspace.size()) < bytes) workspace.resize(bytes);
  return workspace.data();
}

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

// A whole model for the decode step. Addresses as everywhere; 0 for what there is not.
void define_plan(py::module_& module) {
  using pyllm::Matrix, pyllm::Networks, pyllm::Plan, pyllm::PlanLayer;
  const auto floats = [](Address address) { return static_cast<const float*>(in(address)); };
  py::class_<Matrix>(module, "Matrix")
      .def(py::init([=](Address weight, Address scale, std::int64_t rows) {
             return Matrix{in(weight), floats(scale), rows};
           }),
           py::arg("weight"), py::arg("scale"), py::arg("rows"));
  py::class_<Networks>(module, "Networks")
      .def(py::init([](const Matrix& w_in, const Matrix& w_out, std::int64_t count,
                       std::int64_t hidden) { return Networks{w_in, w_out, count, hidden}; }),
           py::arg("w_in"), py::arg("w_out"), py::arg("count"), py::arg("hidden"));
  py::class_<PlanLayer>(module, "PlanLayer")
      .def(py::init([=](Address attention_norm, Address attention_norm_bias, const Matrix& qkv,
                        const Matrix& out, Address ffn_norm, Address ffn_norm_bias, Address router,
                        Address router_bias, const Networks* experts, const Networks* mlp) {
             return PlanLayer{floats(attention_norm),
                              floats(attention_norm_bias),
                              qkv,
                              out,
                              floats(ffn_norm),
                              floats(ffn_norm_bias),
                              floats(router),
                              floats(router_bias),
                              experts == nullptr ? Networks{} : *experts,
                              mlp == nullptr ? Networks{} : *mlp};
           }),
           py::arg("attention_norm"), py::arg("attention_norm_bias"), py::arg("qkv"),
           py::arg("out"), py::arg("ffn_norm"), py::arg("ffn_norm_bias"), py::arg("router"),
           py::arg("router_bias"), py::arg("experts").none(true), py::arg("mlp").none(true));
  py::class_<Plan>(module, "Plan")
      .def(py::init([=](int weights, bool layer_norm, bool gated, double eps, std::int64_t width,
                        std::int64_t heads, std::int64_t groups, std::int64_t head_width,
                        std::int64_t top_k, std::int64_t window, std::int64_t sinks, Address cos,
                        Address sin, Address positions, const Matrix& embedding,
                        const Matrix& output, Address final_norm, Address final_norm_bias,
                        std::vector<PlanLayer> layers) {
             auto plan = std::make_unique<Plan>();
             plan->weights = static_cast<pyllm::WeightType>(weights);
             plan->layer_norm = layer_norm;
             plan->gated = gated;
             plan->eps = eps;
             plan->width = width;
             plan->heads = heads;
             plan->groups = groups;
             plan->head_width = head_width;
             plan->top_k = top_k;
             plan->window = window;
             plan->sinks = sinks;
             plan->cos = floats(cos);
             plan->sin = floats(sin);
             plan->positions = floats(positions);
             plan->embedding = embedding;
             plan->output = output;
             plan->final_norm = floats(final_norm);
             plan->final_norm_bias = floats(final_norm_bias);
             plan->layers = std::move(layers);
             return plan;
           }),
           py::kw_only(), py::arg("weights"), py::arg("layer_norm"), py::arg("gated"),
           py::arg("eps"), py::arg("width"), py::arg("heads"), py::arg("groups"),
           py::arg("head_width"), py::arg("top_k"), py::arg("window"), py::arg("sinks"),
           py::arg("cos"), py::arg("sin"), py::arg("positions"), py::arg("embedding"),
           py::arg("output"), py::arg("final_norm"), py::arg("final_norm_bias"), py::arg("layers"))
      .def(
          "step",
          [](Plan& plan, Address ids, Address starts, Address counts, std::int64_t batch,
             std::int64_t tokens, Address cache, bool cache_is_float, std::int64_t slots,
             std::int64_t ring, Address logits, int n_threads) {
            const pyllm::Step step{static_cast<const std::int64_t*>(in(ids)),
                                   static_cast<const std::int32_t*>(in(starts)),
                                   static_cast<const std::int32_t*>(in(counts)),
                                   batch,
                                   tokens,
                                   out(cache),
                                   cache_is_float,
                                   slots,
                                   ring,
                                   static_cast<float*>(out(logits)),
                                   n_threads};
            const std::lock_guard<std::mutex> lock(plan.mutex);
            PYLLM_PICK(decode_step)(plan, step);
          },
          py::call_guard<py::gil_scoped_release>());
  py::dict types;
  types["float32"] = static_cast<int>(pyllm::WeightType::float32);
  types["bfloat16"] = static_cast<int>(pyllm::WeightType::bfloat16);
  types["int8"] = static_cast<int>(pyllm::WeightType::int8);
  module.attr("WEIGHT_TYPES") = types;
}

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
  PYLLM_DEFINE(moe_ffn_forward);
  PYLLM_DEFINE(moe_ffn_backward);
  PYLLM_DEFINE(route_topk_forward);
  PYLLM_DEFINE(route_topk_backward);
  PYLLM_DEFINE(rope);
  PYLLM_DEFINE(linear_cross_entropy_forward);
  PYLLM_DEFINE(linear_cross_entropy_backward);
  PYLLM_DEFINE(attention_forward);
  PYLLM_DEFINE(attention_backward);
  PYLLM_DEFINE(kv_append);
  PYLLM_DEFINE(decode_attention);
  PYLLM_DEFINE(int8_linear);
  define_plan(module);
}
