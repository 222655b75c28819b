// The attention of a decode step: what is computed for a token, a range of tokens or a chunk of
// keys, in a cache of float, bfloat16 or int8. It is apart from the weights, whose type is another
// matter: compiled for each pair of types, the decode step took four times as long to build.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/allocator.h"
#include "cpu/block_attention.h"
#include "cpu/decode_attention.h"
#include "cpu/decode_parts.h"
#include "cpu/decode_plan.h"
#include "cpu/int8_cache.h"
#include "cpu/int8_row.h"
#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {  // the linker must not merge the instruction sets' copies

// Keys are cut into at most so many chunks, of so many keys or a multiple. From so many new tokens
// of a sequence on, they are taken in blocks by ranges of as many tokens.
constexpr std::int64_t kMostChunks = 16, kKeyStep = 16, kRange = 16;

// Calls fn(Cached{}) with what a number of the cache is stored as.
template <class Fn>
inline void with_cached(WeightType type, const Fn& fn) {
  switch (type) {
    case WeightType::float32:
      return fn(float{});
    case WeightType::bfloat16:
      return fn(BFloat16{});
    case WeightType::int8:
      return fn(Int8<float>{});
  }
}

class CachedAttention {
 protected:
  CachedAttention(const Plan& plan, const Step& step, std::int64_t n_tokens, Allocator& memory)
      : plan_(plan), step_(step), n_(n_tokens) {
    std::int64_t seen = 1;
    for (std::int64_t b = 0; b < step.batch; ++b) {
      longest_ = std::max<std::int64_t>(longest_, step.counts[b]);
      seen = std::max<std::int64_t>(seen, step.starts[b] + step.counts[b]);
    }
    if (plan.window > 0) seen = std::min(seen, plan.window + longest_ - 1 + plan.sinks);
    chunk_ = (seen + kMostChunks * kKeyStep - 1) / (kMostChunks * kKeyStep) * kKeyStep;
    n_chunks_ = longest_ >= kRange ? 0 : (seen + chunk_ - 1) / chunk_;
    tokens_ = memory.take<Token>(n_);
    first_ = memory.take<std::int64_t>(step.batch);
    qkv_ = memory.take<float>(n_ * (plan.heads + 2 * plan.groups) * plan.head_width);
    q_ = memory.take<float>(n_ * plan.heads * plan.head_width);
    partials_ =
        memory.take<float>(step.batch * n_chunks_ * longest_ * plan.heads * (plan.head_width + 2));
  }

  // Queries and keys of token n turned by their position; keys and values into a layer's cache.
  void turn_and_append(std::int64_t n, std::size_t layer) {
    const std::int64_t k = plan_.head_width, half = k / 2;
    float* qkv = qkv_ + n * (plan_.heads + 2 * plan_.groups) * k;
    if (plan_.cos != nullptr) {
      const std::int64_t at = tokens_[n].position * half;
      turn_heads(qkv, plan_.cos + at, plan_.sin + at, plan_.heads + plan_.groups, half);
    }
    std::memcpy(q_ + n * plan_.heads * k, qkv, plan_.heads * k * sizeof(float));
    with_cached(step_.cache_type, [&](auto cached) {
      append(tokens_[n], qkv + plan_.heads * k, Layer<decltype(cached)>(*this, layer));
    });
  }

  // Ranges of tokens, each with a kv head: none where there are few tokens, and chunks instead.
  std::int64_t n_ranges() const {
    if (longest_ < kRange) return 0;
    return step_.batch * ranges_of_row() * plan_.groups;
  }
  std::int64_t n_chunks() const { return step_.batch * n_chunks_; }

  // y: (n_, heads, head_width), of which the range's rows are written.
  void take_range(std::int64_t item, std::size_t layer, float* y) const {
    with_cached(step_.cache_type,
                [&](auto cached) { attend(item, Layer<decltype(cached)>(*this, layer), y); });
  }

  void take_chunk(std::int64_t item, std::size_t layer) const {
    with_cached(step_.cache_type, [&](auto cached) {
      using Cached = decltype(cached);
      const std::int64_t k = plan_.head_width;
      const Problem<Cached> problem = this->problem(Layer<Cached>(*this, layer));
      const Scratch<Cached> scratch(plan_.heads, k);
      const Partial<float> partial(partials_, item, n_chunks(), problem.rows(), k);
      if (k == 64) {
        take_in_chunk<64>(problem, item, partial, scratch);
      } else if (k == 128) {
        take_in_chunk<128>(problem, item, partial, scratch);
      } else {
        take_in_chunk<0>(problem, item, partial, scratch);
      }
      scratch.free();
    });
  }

  // The row y (heads, head_width) of token n; its query is lost.
  void combine_chunks(std::int64_t n, std::size_t layer, float* y) {
    with_cached(step_.cache_type, [&](auto cached) {
      const auto problem = this->problem(Layer<decltype(cached)>(*this, layer));
      const std::int64_t b = tokens_[n].b, first = (n - first_[b]) * plan_.heads;
      const std::int64_t k = plan_.head_width;
      for (std::int64_t head = 0; head < plan_.heads; ++head) {
        add_chunks(problem, partials_, b, first + head, q_ + n * plan_.heads * k, y + head * k);
      }
    });
  }

  const Plan& plan_;
  const Step& step_;
  const std::int64_t n_;
  Token* tokens_;
  std::int64_t* first_;
  float* qkv_;

 private:
  // A layer's keys and values, and in an int8 cache their scales.
  template <class Cached>
  struct Layer {
    Cached *keys, *values;
    float *key_scales = nullptr, *value_scales = nullptr;

    Layer(const CachedAttention& all, std::size_t number) {
      const std::int64_t scales = all.step_.batch * all.step_.slots * all.plan_.groups;
      const std::int64_t numbers = scales * all.plan_.head_width;
      keys = static_cast<Cached*>(all.step_.cache) + 2 * number * numbers;
      values = keys + numbers;
      if constexpr (kIsInt8<Cached>) {
        key_scales = all.step_.scales + 2 * number * scales;
        value_scales = key_scales + scales;
      }
    }
  };

  std::int64_t ranges_of_row() const { return (longest_ + kRange - 1) / kRange; }

  // key: of all groups, then the values.
  template <class Cached>
  void append(const Token& token, const float* __restrict key, const Layer<Cached>& layer) const {
    const std::int64_t k = plan_.head_width, groups = plan_.groups;
    std::int64_t slot = token.position;
    if (step_.ring > 0 && slot >= plan_.sinks) {
      slot = plan_.sinks + (slot - plan_.sinks) % step_.ring;
    }
    const std::int64_t row = (token.b * step_.slots + slot) * groups;
    const float* __restrict value = key + groups * k;
    Cached* const keys = layer.keys + row * k;
    Cached* const values = layer.values + row * k;
    if constexpr (kIsInt8<Cached>) {
      for (std::int64_t g = 0; g < groups; ++g) {
        layer.key_scales[row + g] = quantize_row(key + g * k, k, &keys[g * k].value).scale;
        layer.value_scales[row + g] = quantize_row(value + g * k, k, &values[g * k].value).scale;
      }
    } else {
      for (std::int64_t i = 0; i < groups * k; ++i) {
        keys[i] = narrow<Cached>(key[i]);
        values[i] = narrow<Cached>(value[i]);
      }
    }
  }

  template <class Cached>
  void attend(std::int64_t item, const Layer<Cached>& layer, float* y) const {
    const std::int64_t k = plan_.head_width, heads_width = plan_.heads * k;
    const std::int64_t groups = plan_.groups, shared = plan_.heads / groups;
    const std::int64_t b = item / groups % step_.batch, g = item % groups;
    // The last ranges see most keys, and come first.
    const std::int64_t first = (ranges_of_row() - 1 - item / groups / step_.batch) * kRange;
    const std::int64_t n = std::min<std::int64_t>(kRange, step_.counts[b] - first);
    if (n <= 0) return;
    const std::int64_t at = (first_[b] + first) * heads_width + g * shared * k;
    const std::int64_t row = b * step_.slots * groups + g;
    const QueryRange<Cached> range{q_ + at,
                                   y + at,
                                   heads_width,
                                   step_.starts[b] + first,
                                   n,
                                   shared,
                                   k,
                                   layer.keys + row * k,
                                   layer.values + row * k,
                                   groups * k,
                                   plan_.window,
                                   plan_.sinks,
                                   step_.ring,
                                   1.0f / std::sqrt(static_cast<float>(k)),
                                   kIsInt8<Cached> ? layer.key_scales + row : nullptr,
                                   kIsInt8<Cached> ? layer.value_scales + row : nullptr,
                                   groups};
    attend_range(range);
  }

  template <class Cached>
  Problem<Cached> problem(const Layer<Cached>& layer) const {
    const std::int64_t k = plan_.head_width;
    const Strides strides{step_.slots * plan_.groups * k, plan_.groups * k, k};
    return {q_,
            layer.keys,
            layer.values,
            strides,
            strides,
            step_.starts,
            step_.counts,
            1.0f / std::sqrt(static_cast<float>(k)),
            plan_.window,
            plan_.sinks,
            step_.ring,
            step_.batch,
            longest_,
            plan_.groups,
            plan_.heads / plan_.groups,
            k,
            chunk_,
            n_chunks_,
            first_,
            layer.key_scales,
            layer.value_scales,
            step_.slots};
  }

  std::int64_t longest_ = 0, chunk_ = 0, n_chunks_ = 0;
  float *q_, *partials_;
};

}  // namespace
}  // namespace pyllm::PYLLM_ISA
