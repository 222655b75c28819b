// What a tensor is and where it lies, read from its Python object through the table of C functions
// that DLPack 1 lays down ("C exchange API", github.com/dmlc/dlpack), which torch.Tensor carries as
// __dlpack_c_exchange_api__: 30 ns, where Python takes 90 for an address alone. The layout of the
// table and of a view is DLPack's promise; no torch header is needed.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace pyllm {

struct TensorView {  // DLTensor
  void* data;
  std::int32_t device, device_number, n_dims;
  std::uint8_t kind, bits;
  std::uint16_t lanes;
  std::int64_t* sizes;
  std::int64_t* strides;
  std::uint64_t byte_offset;

  bool is(int wanted_kind, int wanted_bits) const {
    return kind == wanted_kind && bits == wanted_bits && lanes == 1;
  }

  // On the CPU, in one piece, with so many dimensions, and with memory if there are elements.
  bool is_plain(int wanted_dims) const {
    constexpr std::int32_t kCpu = 1;
    if (device != kCpu || n_dims != wanted_dims || byte_offset != 0) return false;
    std::int64_t stride = 1;
    for (int dim = n_dims - 1; dim >= 0; --dim) {
      if (sizes[dim] != 1 && strides[dim] != stride) return false;
      stride *= sizes[dim];
    }
    return data != nullptr || stride == 0;
  }
};

constexpr int kIntKind = 0, kFloatKind = 2, kBFloatKind = 4;  // DLDataTypeCode

struct TensorFunctions {  // DLPackExchangeAPI
  std::uint32_t major, minor;
  TensorFunctions* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*view)(void* tensor, TensorView* view);
  void* stream;
};

// torch.Tensor's, or null before PyTorch 2.10.
inline const TensorFunctions* tensor_functions(PyObject* type) {
  const char* const attribute = "__dlpack_c_exchange_api__";
  PyObject* const capsule = PyObject_GetAttrString(type, attribute);
  void* const found =
      capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, "dlpack_exchange_api");
  Py_XDECREF(capsule);
  PyErr_Clear();
  const auto* functions = static_cast<const TensorFunctions*>(found);
  const bool usable = functions != nullptr && functions->major == 1 && functions->view != nullptr;
  return usable ? functions : nullptr;
}

}  // namespace pyllm
