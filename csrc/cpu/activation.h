// The activations of a feed-forward network, and their gradients.
#pragma once

#include <cstdint>

#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Each activation reads `columns` pre-activations and gives one hidden value.

struct SwiGlu {
  static constexpr std::int64_t columns = 2;

  template <class W>
  static W hidden(W gate, W up) {
    return gate * sigmoid_of(gate) * up;
  }
  template <class W>
  static void gradient(W gate, W up, W& hidden, W& dgate, W& dup) {
    const W s = sigmoid_of(gate);
    const W silu = gate * s;
    hidden = silu * up;
    dgate = up * s * (W(1) + gate * (W(1) - s));
    dup = silu;
  }
};

// GELU's tanh form: (1 + tanh(u)) / 2 = sigmoid(2u), which does not cancel where u is negative.
struct Gelu {
  static constexpr std::int64_t columns = 1;
  static constexpr double scale = 1.5957691216057307117597842397375;  // 2 sqrt(2 / pi)
  static constexpr double cubic = 0.044715;

  template <class W>
  static W hidden(W x, W) {
    return x * sigmoid_of(W(scale) * (x + W(cubic) * x * x * x));
  }
  template <class W>
  static void gradient(W x, W, W& hidden, W& dx, W&) {
    const W s = sigmoid_of(W(scale) * (x + W(cubic) * x * x * x));
    hidden = x * s;
    dx = s + hidden * (W(1) - s) * W(scale) * (W(1) + W(3 * cubic) * x * x);
  }
};

}  // namespace
}  // namespace pyllm::PYLLM_ISA
