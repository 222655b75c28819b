// A whole language model as addresses: what the decode step runs on. Filled in by
// pyllm/cpu_kernels/decode_step.py, which owns the tensors.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace pyllm {

enum class WeightType : int { float32, bfloat16, int8 };

// Rows of weights, one for each output; in int8 with a scale for each.
struct Matrix {
  const void* weight = nullptr;
  const float* scale = nullptr;
  std::int64_t rows = 0;
};

// A feed-forward network, or `count` of them one after the other: w_in has, for each, its hidden
// rows (gated: the gate's, then as many for up), w_out a row for each channel of the model.
struct Networks {
  Matrix w_in, w_out;
  std::int64_t count = 0, hidden = 0;
};

struct PlanLayer {
  const float *attention_norm = nullptr, *attention_norm_bias = nullptr;
  Matrix qkv, out;
  const float *ffn_norm = nullptr, *ffn_norm_bias = nullptr;
  const float *router = nullptr, *router_bias = nullptr;  // (experts, width), (experts,)
  Networks experts;                                       // of which top_k run for each token
  Networks mlp;  // that runs for every token: the only one of a dense layer, or the shared one
};

// Norms, router and positions: float. A pointer to what the model does not have is null.
struct Plan {
  WeightType weights = WeightType::float32;
  bool layer_norm = false, gated = true;
  double eps = 0;
  std::int64_t width = 0, heads = 0, groups = 0, head_width = 0, top_k = 0, window = 0, sinks = 0;
  const float *cos = nullptr, *sin = nullptr;  // (context, head_width / 2)
  const float* positions = nullptr;            // (context, width), added to the embeddings
  Matrix embedding, output;
  const float *final_norm = nullptr, *final_norm_bias = nullptr;
  std::vector<PlanLayer> layers;

  // Kept from step to step; one step at a time may use it.
  std::vector<char> workspace;
  std::mutex mutex;

  // At least so many bytes of it. Not inline: what a kernel's object holds of the standard library,
  // the linker would merge across instruction sets.
  char* reserve(std::int64_t bytes);
};

// New tokens: sequence b has counts[b] of `tokens` ids (batch, tokens), at positions from starts[b]
// on. cache (layers, 2, batch, slots, groups, head_width): see kv_append. scales (layers, 2, batch,
// slots, groups): of an int8 cache, else null.
struct Step {
  const std::int64_t* ids;
  const std::int32_t *starts, *counts;
  std::int64_t batch, tokens;
  void* cache;
  WeightType cache_type;
  float* scales;
  std::int64_t slots, ring;
  float* logits;  // of what follows the last new token of each sequence that has one; or null
  int n_threads;
};

}  // namespace pyllm
