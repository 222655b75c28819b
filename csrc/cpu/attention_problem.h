// The sizes of one call of attention, its mask, and where rows lie.
#pragma once

#include <cstdint>

#include "cpu/attention_tile.h"
#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

inline std::int64_t clamp(std::int64_t value, std::int64_t low, std::int64_t high) {
  return value < low ? low : value > high ? high : value;
}

inline std::int64_t rounded_up(std::int64_t value, std::int64_t step) {
  return parts_of(value, step) * step;
}

// Which keys are seen: [0, sinks) and [first, end), with sinks < first or 0.
struct SeenKeys {
  std::int64_t sinks, first, end;

  bool meets(std::int64_t from, std::int64_t to) const {
    return (from < end && to > first) || from < sinks;
  }
  std::int64_t count() const { return sinks + end - first; }
};

// Work is cut into pairs (batch row, kv head); the rows of a pair are its queries, (token, head of
// the group), token by token, so that query heads share the keys and values they read.
template <class Storage>
struct Attention {
  struct Heads {
    const Storage* data;
    std::int64_t batch_stride, token_stride, head_stride;
  };

  Heads q, k, v;
  Wide<Storage> scale;
  bool causal;
  std::int64_t window, sinks, batch, tokens, keys, groups, shared, width;

  std::int64_t pairs() const { return batch * groups; }
  std::int64_t rows() const { return tokens * shared; }
  std::int64_t heads() const { return groups * shared; }
  // Of a row of values, and of one of queries.
  std::int64_t columns() const { return rounded_up(width, kLanes<Wide<Storage>>); }
  std::int64_t steps() const { return steps_of<Storage>(width); }

  const Storage* query(std::int64_t pair, std::int64_t row) const {
    return at(q, pair, row / shared, pair % groups * shared + row % shared);
  }
  const Storage* key(std::int64_t pair, std::int64_t s) const {
    return at(k, pair, s, pair % groups);
  }
  const Storage* value(std::int64_t pair, std::int64_t s) const {
    return at(v, pair, s, pair % groups);
  }
  // Rows of contiguous (batch, tokens, heads, ...), and of statistics (batch, heads, tokens).
  std::int64_t place(std::int64_t pair, std::int64_t row) const {
    const std::int64_t token = pair / groups * tokens + row / shared;
    return token * heads() + pair % groups * shared + row % shared;
  }
  std::int64_t statistic(std::int64_t pair, std::int64_t row) const {
    return (pair * shared + row % shared) * tokens + row / shared;
  }

  SeenKeys seen(std::int64_t row) const {
    const std::int64_t position = keys - tokens + row / shared;
    const std::int64_t end = !causal ? keys : position < 0 ? 0 : position + 1;
    const std::int64_t first = window > 0 && window <= position ? position - window + 1 : 0;
    const std::int64_t front = sinks < end ? sinks : end;
    if (first <= front) return {0, 0, end};  // no key lies between
    return {front, first, end};
  }
  // What some of rows [from, to) see; a key between may be seen by none.
  SeenKeys seen(std::int64_t from, std::int64_t to) const {
    const SeenKeys lowest = seen(from), highest = seen(to - 1);
    return {highest.sinks, lowest.first, highest.end};
  }

 private:
  const Storage* at(const Heads& heads, std::int64_t pair, std::int64_t token,
                    std::int64_t head) const {
    return heads.data + pair / groups * heads.batch_stride + token * heads.token_stride +
           head * heads.head_stride;
  }
};

// Sets what a row does not see of n keys from first_key on.
template <class Number>
inline void hide(const SeenKeys& seen, std::int64_t first_key, std::int64_t n, Number number,
                 Number* row) {
  const std::int64_t sinks = clamp(seen.sinks - first_key, 0, n);
  const std::int64_t first = clamp(seen.first - first_key, 0, n);
  for (std::int64_t i = sinks; i < first; ++i) row[i] = number;
  for (std::int64_t i = clamp(seen.end - first_key, first, n); i < n; ++i) row[i] = number;
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
