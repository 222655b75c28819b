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
#ifdef PYLLM_AMX
namespace amx {
using namespace avx512;  // what follows comes first
#include "cpu/signatures_tiles.inc"
}  // namespace amx
#else
namespace amx = avx512;  // not built, and never active
#endif
#endif

// The active instruction set for numbers of that type: AMX multiplies bfloat16 only.
inline Isa isa_for(DType dtype) {
  const Isa isa = active_isa();
  return isa == Isa::amx && dtype != DType::bfloat16 ? Isa::avx512 : isa;
}

// The function of that name in an instruction set's namespace.
#ifdef PYLLM_X86_ISAS
#define PYLLM_PICK(isa, name)                              \
  ((isa) == ::pyllm::Isa::amx      ? ::pyllm::amx::name    \
   : (isa) == ::pyllm::Isa::avx512 ? ::pyllm::avx512::name \
   : (isa) == ::pyllm::Isa::avx2   ? ::pyllm::avx2::name   \
                                   : ::pyllm::baseline::name)
#else
#define PYLLM_PICK(isa, name) ((void)(isa), ::pyllm::baseline::name)
#endif

}  // namespace pyllm
