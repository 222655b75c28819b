// Intrinsics, where the processor has any.
#pragma once

#if defined(__x86_64__) || defined(__i386__)
// GCC 12 reports its own header, which leaves a register undefined on purpose (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
