// The kernels of every instruction set, and the choice between them.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pyllm {

// What a tensor is stored as. The bindings give the codes to Python (pyllm._cpu.DTYPES).
enum class DType : int { float32, float64, bfloat16, float16 };

struct Plan;
struct Step;

namespace baseline {
#include "cpu/signatures.inc"
}
#ifdef PYLLM_X86_ISAS
namespace avx2 {
#include "cpu/signatures.inc"
}
namespace avx512 {
#include "cpu/signatures.inc"
}
// The function of that name in the active instruction set's namespace.
#define PYLLM_PICK(name)                                                 \
  (::pyllm::active_isa() == ::pyllm::Isa::avx512 ? ::pyllm::avx512::name \
   : ::pyllm::active_isa() == ::pyllm::Isa::avx2 ? ::pyllm::avx2::name   \
                                                 : ::pyllm::baseline::name)
#else
#define PYLLM_PICK(name) (::pyllm::baseline::name)
#endif

}  // namespace pyllm
