// Rows that are sorted by expert, cut into tiles that no two experts share, and experts into groups
// whose intermediate results stay in the cache.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/tile.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// How many tiles so many rows of one expert are: as few as can be, of about as many rows each, for
// one of two rows costs as much as one of four.
inline std::int64_t tiles_of(std::int64_t rows) { return parts_of(rows, kTileRows); }

struct RowTile {
  std::int64_t first;
  int rows;
};

inline RowTile tile_of(std::int64_t first, std::int64_t rows, std::int64_t tile) {
  const std::int64_t n = tiles_of(rows), from = rows * tile / n;
  return {first + from, static_cast<int>(rows * (tile + 1) / n - from)};
}

// Experts [begin, end) that are worked on together, with at most `most` rows, or a single expert.
struct ExpertGroup {
  const std::int32_t* offsets;  // expert e has rows [offsets[e], offsets[e + 1])
  std::int64_t begin, end;

  static ExpertGroup from(const std::int32_t* offsets, std::int64_t begin, std::int64_t n_experts,
                          std::int64_t most) {
    std::int64_t end = begin + 1;
    while (end < n_experts && offsets[end + 1] - offsets[begin] <= most) ++end;
    return {offsets, begin, end};
  }

  std::int64_t n_experts() const { return end - begin; }
  std::int64_t first_row(std::int64_t e) const { return offsets[e]; }
  std::int64_t rows(std::int64_t e) const { return offsets[e + 1] - offsets[e]; }
  // Of expert e, counted from the group's first: where its rows, tiles and packed reductions over
  // its rows begin, if every expert gets room for a tile or step that is not full.
  std::int64_t row(std::int64_t e) const { return offsets[e] - offsets[begin]; }
  std::int64_t tile(std::int64_t e) const { return row(e) / kTileRows + (e - begin); }
  template <class Storage>
  std::int64_t step(std::int64_t e) const {
    constexpr std::int64_t numbers = kStepBlock<Unit<Storage>> * kDepth<Unit<Storage>>;
    return (row(e) / numbers + (e - begin)) * kStepBlock<Unit<Storage>>;
  }

  // Calls fn(expert, tile, its number in the group) for task `number` of tile(end), if there is
  // one.
  template <class Fn>
  void with_tile(std::int64_t number, const Fn& fn) const {
    std::int64_t e = begin;
    while (tile(e + 1) <= number) ++e;
    const std::int64_t in_expert = number - tile(e);
    if (in_expert < tiles_of(rows(e))) fn(e, tile_of(offsets[e], rows(e), in_expert), number);
  }
};

// Rows of the largest group, and how many groups there are.
struct GroupSizes {
  std::int64_t rows = 0, experts = 0, count = 0;

  GroupSizes(const std::int32_t* offsets, std::int64_t n_experts, std::int64_t most) {
    for (std::int64_t e = 0; e < n_experts; ++count) {
      const ExpertGroup group = ExpertGroup::from(offsets, e, n_experts, most);
      rows = std::max(rows, group.row(group.end));
      experts = std::max(experts, group.n_experts());
      e = group.end;
    }
  }
  std::int64_t tiles() const { return rows / kTileRows + experts; }
  template <class Storage>
  std::int64_t steps() const {
    constexpr std::int64_t numbers = kStepBlock<Unit<Storage>> * kDepth<Unit<Storage>>;
    return (rows / numbers + experts) * kStepBlock<Unit<Storage>>;
  }
};

}  // namespace
}  // namespace pyllm::PYLLM_ISA
