// pyllm._cpu: addresses, sizes and a thread count in; no torch header, so no ABI to break.
//
// Nothing here checks anything: shapes are checked by the doors and by PyTorch's dispatcher,
// indices by the launchers in pyllm/cpu_kernels, which own every tensor.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/decode_plan.h"
#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/weak_symbols.h"
#include "cpu/workspace.h"
#include "tensor_view.h"

namespace py = pybind11;

char* pyllm::Plan::reserve(std::int64_t bytes) {
  if (static_cast<std::int64_t>(workspace.size()) < bytes) {
    workspace.clear();  // nothing in it is needed, so that nothing is copied
    workspace.resize(bytes);
  }
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

// Under ThreadSanitizer two threads more than asked for: nearly all tests ask for one.
#ifdef PYLLM_THREAD_SANITIZER
constexpr int kMoreThreads = 2;
#else
constexpr int kMoreThreads = 0;
#endif
template <>
struct FromPython<int> {  // n_threads, always
  using type = int;
  static int convert(int n_threads) { return n_threads + kMoreThreads; }
};

// The instruction set for a kernel whose first argument this is.
template <class First>
pyllm::Isa isa_of([[maybe_unused]] First first) {
  if constexpr (std::is_same_v<First, pyllm::DType>) return pyllm::isa_for(first);
  return pyllm::active_isa();
}

// `pick` gives an instruction set's kernel, at each call.
template <class Pick, class First, class... Rest>
void define(py::module_& module, const char* name, Pick pick, void (*)(First, Rest...)) {
  module.def(
      name,
      [pick](typename FromPython<First>::type first, typename FromPython<Rest>::type... rest) {
        const First converted = FromPython<First>::convert(first);
        pick(isa_of(converted))(converted, FromPython<Rest>::convert(rest)...);
        if (pyllm::was_out_of_memory()) throw std::bad_alloc();
      },
      py::call_guard<py::gil_scoped_release>());
}

#define PYLLM_DEFINE(name)                                                 \
  define(                                                                  \
      module, #name, [](pyllm::Isa isa) { return PYLLM_PICK(isa, name); }, \
      &::pyllm::baseline::name)

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
             std::int64_t tokens, Address cache, int cache_type, Address scales, std::int64_t slots,
             std::int64_t ring, Address logits, int n_threads) {
            const pyllm::Step step{static_cast<const std::int64_t*>(in(ids)),
                                   static_cast<const std::int32_t*>(in(starts)),
                                   static_cast<const std::int32_t*>(in(counts)),
                                   batch,
                                   tokens,
                                   out(cache),
                                   static_cast<pyllm::WeightType>(cache_type),
                                   static_cast<float*>(out(scales)),
                                   slots,
                                   ring,
                                   static_cast<float*>(out(logits)),
                                   n_threads + kMoreThreads};
            const std::lock_guard<std::mutex> lock(plan.mutex);
            PYLLM_PICK(pyllm::active_isa(), decode_step)(plan, step);
          },
          py::call_guard<py::gil_scoped_release>());
  py::dict types;
  types["float32"] = static_cast<int>(pyllm::WeightType::float32);
  types["bfloat16"] = static_cast<int>(pyllm::WeightType::bfloat16);
  types["int8"] = static_cast<int>(pyllm::WeightType::int8);
  module.attr("WEIGHT_TYPES") = types;
}

// The dtype code of floating point in a view; -1 of anything else.
int float_code(const pyllm::TensorView& view) {
  using pyllm::DType;
  if (view.is(pyllm::kFloatKind, 32)) return static_cast<int>(DType::float32);
  if (view.is(pyllm::kFloatKind, 64)) return static_cast<int>(DType::float64);
  if (view.is(pyllm::kFloatKind, 16)) return static_cast<int>(DType::float16);
  if (view.is(pyllm::kBFloatKind, 16)) return static_cast<int>(DType::bfloat16);
  return -1;
}

// int8_linear for the tensors that it nearly always gets: of exactly the class torch.Tensor, on the
// CPU, contiguous, the scale in the type sums are kept in, with shapes that fit. The result in a
// new tensor made by `empty`, which is torch's; None for anything else, which goes the longer way.
class Int8Linear {
 public:
  // largest_width: of what is quantised, so that sums of products stay in int32.
  Int8Linear(py::object tensor_class, py::object empty, std::int64_t largest_width)
      : class_(std::move(tensor_class)),
        empty_(std::move(empty)),
        largest_width_(largest_width),
        functions_(pyllm::tensor_functions(class_.ptr())) {}

  py::object operator()(py::handle x, py::handle weight, py::handle scale, bool quantize,
                        int n_threads) const {
    pyllm::TensorView x_view, weight_view, scale_view;
    if (!view(x, x_view) || !view(weight, weight_view) || !view(scale, scale_view)) {
      return py::none();
    }
    const int code = float_code(x_view);
    const int scale_bits = code == static_cast<int>(pyllm::DType::float64) ? 64 : 32;
    if (code < 0 || !x_view.is_plain(2) || !weight_view.is(pyllm::kIntKind, 8) ||
        !weight_view.is_plain(2) || !scale_view.is(pyllm::kFloatKind, scale_bits) ||
        !scale_view.is_plain(1)) {
      return py::none();
    }
    const std::int64_t rows = x_view.sizes[0], width = x_view.sizes[1];
    const std::int64_t features = weight_view.sizes[0];
    if (width != weight_view.sizes[1] || features != scale_view.sizes[0] || width < 1 ||
        features < 1 || (quantize && width > largest_width_)) {
      return py::none();
    }
    const py::object y = new_matrix(rows, features, x);
    pyllm::TensorView y_view;
    if (!view(y, y_view) || !y_view.is_plain(2)) return py::none();
    {
      const py::gil_scoped_release release;
      PYLLM_PICK(pyllm::active_isa(), int8_linear)(dtype_of(code), quantize, x_view.data,
                                                   weight_view.data, scale_view.data, y_view.data,
                                                   rows, features, width, n_threads + kMoreThreads);
    }
    return y;
  }

 private:
  bool view(py::handle tensor, pyllm::TensorView& view) const {
    if (functions_ == nullptr || Py_TYPE(tensor.ptr()) != class_type()) return false;
    if (functions_->view(tensor.ptr(), &view) == 0) return true;
    PyErr_Clear();  // a tensor without memory, for example a sparse one
    return false;
  }

  // empty(rows, features, dtype=like.dtype), without what pybind11 takes for a call.
  py::object new_matrix(std::int64_t rows, std::int64_t features, py::handle like) const {
    const py::int_ first(rows), second(features);
    const auto dtype = py::reinterpret_steal<py::object>(
        PyObject_GetAttr(like.ptr(), PyTuple_GET_ITEM(names_.ptr(), 0)));
    if (!dtype) throw py::error_already_set();
    PyObject* const arguments[] = {first.ptr(), second.ptr(), dtype.ptr()};
    PyObject* const made = PyObject_Vectorcall(empty_.ptr(), arguments, 2, names_.ptr());
    if (made == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
  }

  PyTypeObject* class_type() const { return reinterpret_cast<PyTypeObject*>(class_.ptr()); }

  const py::object class_, empty_;
  const std::int64_t largest_width_;
  const py::tuple names_ = py::make_tuple("dtype");
  const pyllm::TensorFunctions* const functions_;
};

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
#ifdef PYLLM_WEAK_SYMBOLS
  module.def("weak_symbols", &pyllm::weak_symbols);
#endif
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
  PYLLM_DEFINE(kv_append_int8);
  PYLLM_DEFINE(decode_attention);
  PYLLM_DEFINE(int8_linear);
  py::class_<Int8Linear>(module, "Int8Linear")
      .def(py::init<py::object, py::object, std::int64_t>(), py::arg("tensor_class"),
           py::arg("empty"), py::arg("largest_width"))
      .def("__call__", &Int8Linear::operator());
  define_plan(module);
}
