// Scratch memory that outlives a call.
//
// Memory that is written for the first time costs a fault for each page, for 4 KiB as much time as
// copying it three times, and what a call frees goes back to the system. So the last block stays,
// in large pages where there are any, and the next call takes it.
#pragma once

#include <cstdint>

namespace pyllm {

// At least so many bytes from a page's beginning on; null where there is no memory.
void* take_workspace(std::int64_t bytes) noexcept;

// Was this thread refused memory since it asked this last? A kernel that was returns at once, and
// whoever called it throws: among the kernels nothing may unwind (isa.h).
bool was_out_of_memory() noexcept;

// Keeps it for the next call, or frees it where another one came back meanwhile. Null: nothing.
void give_workspace(void* memory) noexcept;

// Asks for pages of 2 MiB for a tensor that is larger than a few of these and about to be written.
void prefer_large_pages(void* memory, std::int64_t bytes) noexcept;

}  // namespace pyllm
