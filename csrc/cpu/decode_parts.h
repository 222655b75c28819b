// The parts of a decode step that know nothing of its threads and its workspace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "cpu/decode_plan.h"
#include "cpu/float_dot.h"
#include "cpu/numeric.h"
#include "cpu/products.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

template <class Weight>
inline const Weight* weights_of(const Matrix& matrix) {
  return static_cast<const Weight*>(matrix.weight);
}

template <class Weight>
inline float scale_of(const Matrix& matrix, std::int64_t row) {
  return std::is_same_v<Weight, std::int8_t> ? matrix.scale[row] : 1.0f;
}

// A token: its sequence, its place in that and in the model's context.
struct Token {
  std::int64_t b, position, id;
};

// Rows that go through one network: the choices of one expert, or all tokens.
struct Task {
  const Networks* networks;
  std::int64_t which, first, n;  // of networks; rows of slots
  std::int64_t block;            // its first one of the loop over hidden features
};

// A row of a task: a token, and where its hidden numbers are and how many.
struct Slot {
  std::int64_t token, hidden, width;
  float weight;
};

inline float number(float value) { return value; }
inline float number(BFloat16 value) { return widen(value); }
inline float number(std::int8_t value) { return static_cast<float>(value); }

// A row of the embeddings, and the position where it is added (or null).
template <class Weight>
inline void embed_token(const Weight* __restrict row, float scale, const float* __restrict position,
                        std::int64_t width, float* __restrict x) {
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) x[i] = scale * number(row[i]);
  if (position == nullptr) return;
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) x[i] += position[i];
}

// RMSNorm or LayerNorm of one row.
inline void normalise(const Plan& plan, const float* __restrict x, const float* __restrict weight,
                      const float* __restrict bias, float* __restrict y) {
  const std::int64_t width = plan.width;
  float mean = 0;
  if (plan.layer_norm) {
    mean = sum_of<float>(width, [=](std::int64_t i) { return x[i]; }) / static_cast<float>(width);
  }
  const float square = sum_of<float>(width, [=](std::int64_t i) {
    const float value = x[i] - mean;
    return value * value;
  });
  const float scale =
      1.0f / std::sqrt(square / static_cast<float>(width) + static_cast<float>(plan.eps));
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) y[i] = (x[i] - mean) * scale * weight[i];
  if (bias == nullptr) return;
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) y[i] += bias[i];
}

// The experts of a token and their weights: pyllm/reference/route_topk.py. scores: scratch, two for
// each expert.
inline void choose_experts(const Plan& plan, const PlanLayer& layer, const float* x, float* scores,
                           std::int64_t* chosen, float* weights) {
  const std::int64_t n_experts = layer.experts.count, top_k = plan.top_k;
  const std::int64_t width = plan.width;
  float* const logits = scores + n_experts;
  for (std::int64_t e = 0; e < n_experts; e += kFeatures) {
    const std::int64_t n_here = std::min<std::int64_t>(kFeatures, n_experts - e);
    const float* w[kFeatures];
    for (int k = 0; k < kFeatures; ++k) {
      w[k] = layer.router + (e + std::min<std::int64_t>(k, n_here - 1)) * width;
    }
    float sums[kFeatures];
    float_dots<1>(&x, w, width, sums, kFeatures);
    for (std::int64_t k = 0; k < n_here; ++k) scores[e + k] = logits[e + k] = sums[k];
  }
  if (layer.router_bias != nullptr) {  // it is added to the probabilities
    const float largest = *std::max_element(logits, logits + n_experts);
    float total = 0;
    for (std::int64_t e = 0; e < n_experts; ++e) {
      scores[e] = std::exp(logits[e] - largest);
      total += scores[e];
    }
    for (std::int64_t e = 0; e < n_experts; ++e) {
      scores[e] = scores[e] / total + layer.router_bias[e];
    }
  }
  float largest = -INFINITY, total = 0;
  for (std::int64_t a = 0; a < top_k; ++a) {
    std::int64_t best = -1;
    for (std::int64_t e = 0; e < n_experts; ++e) {
      if (std::find(chosen, chosen + a, e) != chosen + a) continue;
      if (best < 0 || scores[e] > scores[best]) best = e;
    }
    chosen[a] = best;
    largest = logits[best] > largest ? logits[best] : largest;
  }
  // Of the chosen logits, also where a bias chose experts whose probability underflows to 0.
  for (std::int64_t a = 0; a < top_k; ++a) {
    weights[a] = std::exp(logits[chosen[a]] - largest);
    total += weights[a];
  }
  for (std::int64_t a = 0; a < top_k; ++a) weights[a] /= total;
}

// Turns the first `heads` heads of a row by its position: pyllm/reference/rope.py.
inline void turn_heads(float* heads_of_row, const float* __restrict cos,
                       const float* __restrict sin, std::int64_t heads, std::int64_t half) {
  for (std::int64_t head = 0; head < heads; ++head) {
    float* __restrict first = heads_of_row + head * 2 * half;
    float* __restrict second = first + half;
#pragma omp simd
    for (std::int64_t i = 0; i < half; ++i) {
      const float a = first[i], b = second[i];
      first[i] = a * cos[i] - b * sin[i];
      second[i] = a * sin[i] + b * cos[i];
    }
  }
}

}  // namespace
}  // namespace pyllm::PYLLM_ISA
