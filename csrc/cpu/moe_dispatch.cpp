// The stable counting sort by expert, and the gather of rows that follows it. The equations are in
// pyllm/reference/moe_dispatch.py; the backward is the unweighted sum of moe_combine.cpp.

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Bytes in a range of rows handed to a thread: enough to hide the hand-over (about 1 us).
constexpr std::int64_t kBytesPerRange = per_range(65536);

}  // namespace

// One thread: 16,384 slots take about 30 us, less than what follows by far.
void sort_by_expert(const void* experts, std::int64_t n_slots, std::int64_t n_experts, void* order,
                    void* position, void* offsets) {
  const auto* expert_of = static_cast<const std::int32_t*>(experts);
  auto* order_out = static_cast<std::int32_t*>(order);
  auto* position_out = static_cast<std::int32_t*>(position);
  auto* offset = static_cast<std::int32_t*>(offsets);
  for (std::int64_t e = 0; e <= n_experts; ++e) offset[e] = 0;
  for (std::int64_t slot = 0; slot < n_slots; ++slot) {
    const std::int32_t e = expert_of[slot];
    if (e >= 0 && e < n_experts) ++offset[e + 1];
  }
  for (std::int64_t e = 0; e < n_experts; ++e) offset[e + 1] += offset[e];
  // An expert out of range: write nothing, the launcher sees it in the last offset.
  if (offset[n_experts] != n_slots) return;
  // offset[e] serves as the next free row of e, and ends up as the start of e + 1.
  for (std::int64_t slot = 0; slot < n_slots; ++slot) {
    const std::int32_t row = offset[expert_of[slot]]++;
    order_out[row] = static_cast<std::int32_t>(slot);
    position_out[slot] = row;
  }
  for (std::int64_t e = n_experts; e > 0; --e) offset[e] = offset[e - 1];
  offset[0] = 0;
}

void gather_rows(const void* source, const void* order, std::int64_t top_k, void* rows,
                 std::int64_t n_rows, std::int64_t row_bytes, int n_threads) {
  if (row_bytes == 0) return;  // empty tensors are null pointers, which memcpy does not take
  const auto* from = static_cast<const char*>(source);
  const auto* slot = static_cast<const std::int32_t*>(order);
  auto* to = static_cast<char*>(rows);
  const std::int64_t grain = rows_per_range(kBytesPerRange, row_bytes);
  parallel_for(n_rows, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = begin; row < end; ++row) {
      std::memcpy(to + row * row_bytes, from + slot[row] / top_k * row_bytes, row_bytes);
    }
  });
}

}  // namespace pyllm::PYLLM_ISA
