// What weak_symbols.cmake wrote while the extension was built (PYLLM_WEAK_SYMBOLS).
#pragma once

namespace pyllm {

// Symbols of the kernels' objects that the linker may merge between instruction sets, a line each;
// there must be none.
const char* weak_symbols();

}  // namespace pyllm
