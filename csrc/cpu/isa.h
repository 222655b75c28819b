// Which instruction sets are built in, and which one runs.
//
// Every kernel source is compiled once per instruction set into a namespace of its own
// (pyllm::baseline, pyllm::avx2, pyllm::avx512; the build defines PYLLM_ISA as that name), and
// those that gain by it once more for AMX (pyllm::amx), which has AVX-512's kernels for all else.
// Kernel sources therefore call nothing that the linker could merge between instruction sets: no
// std containers or algorithms with out-of-line bodies, only their own namespace and parallel.h.
// Otherwise an AVX-512 copy of an inline function could end up in the baseline path.
#pragma once

#include <string>
#include <vector>

namespace pyllm {

enum class Isa : int { baseline, avx2, avx512, amx };

// Instruction sets compiled into this module, the slowest first.
std::vector<std::string> built_isas();

// Those of built_isas() that this processor and operating system can run. Asks for AMX (isa.cpp).
std::vector<std::string> supported_isas();

// Select by name; "" selects the fastest supported one.
// Throws std::invalid_argument for a name that is unknown, not built or not supported here.
void set_isa(const std::string& name);

Isa active_isa();
std::string active_isa_name();

}  // namespace pyllm
