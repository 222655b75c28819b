// The softmax of scores that come in pieces (Milakov & Gimelshein 2018, arXiv:1805.02867).
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/lanes.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Takes the scores s of n more keys in: they become weights. Returns what the sums before have to
// be multiplied with, because the largest score grew. s has room for whole vectors.
template <class W>
inline W to_weights(W* __restrict s, std::int64_t n, W* largest, W* sum) {
  constexpr std::int64_t lanes = kLanes<W>;
  const std::int64_t whole = (n + lanes - 1) / lanes * lanes;
  for (std::int64_t i = n; i < whole; ++i) s[i] = -INFINITY;
  Vector<W> most = load(s);
  for (std::int64_t i = lanes; i < whole; i += lanes) {
    const Vector<W> more = load(s + i);
    most = more > most ? more : most;
  }
  W new_largest = *largest;
  for (std::int64_t k = 0; k < lanes; ++k)
    new_largest = most[k] > new_largest ? most[k] : new_largest;
  // Only -inf so far: -inf - -inf would be NaN where it should be 0.
  const W shift = new_largest == -INFINITY ? W(0) : new_largest;
  const W shrink = exp_of(*largest - shift);
  for (std::int64_t i = 0; i < whole; i += lanes) {
#pragma omp simd
    for (std::int64_t k = 0; k < lanes; ++k) s[i + k] = exp_of(s[i + k] - shift);
  }
  Vector<W> added = load(s);
  for (std::int64_t i = lanes; i < whole; i += lanes) added += load(s + i);
  W total = 0;
  for (std::int64_t k = 0; k < lanes; ++k) total += added[k];
  *largest = new_largest;
  *sum = *sum * shrink + total;
  return shrink;
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
