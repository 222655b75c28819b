// New tokens through a whole model in one call: for decoding, where separate operations cost more
// in calls than in work. The layers are those of pyllm/models/transformer.py; the arithmetic is in
// float, with weights as they lie in memory: float, bfloat16 or int8 (int8_dot.h).
//
// One team of threads goes through all loops (team.h). Every number is computed by one block, and
// no sum is cut where the number of threads says: bitwise the same on any number of them.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/activation.h"
#include "cpu/allocator.h"
#include "cpu/cached_attention.h"
#include "cpu/decode_parts.h"
#include "cpu/decode_plan.h"
#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/team.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Loops in a layer, and outside of them.
constexpr std::int64_t kLoopsPerLayer = 12, kOtherLoops = 4;

template <class Weight>
class Pass : CachedAttention {
  using P = Products<Weight>;
  using Row = typename P::Row;

 public:
  Pass(const Plan& plan, const Step& step, std::int64_t n_tokens, Allocator memory)
      : CachedAttention(plan, step, n_tokens, memory), d_(plan.width) {
    const std::int64_t heads_width = plan.heads * plan.head_width;
    std::int64_t slots = n_, hidden = 0;
    std::int64_t widest = std::max(d_, heads_width), n_rows = n_;
    for (const PlanLayer& layer : plan.layers) {
      const std::int64_t of_experts = layer.experts.count > 0 ? n_ * plan.top_k : 0;
      const std::int64_t of_mlp = layer.mlp.count > 0 ? n_ : 0;
      slots = std::max(slots, of_experts + of_mlp);
      hidden = std::max(hidden, of_experts * layer.experts.hidden + of_mlp * layer.mlp.hidden);
      widest = std::max({widest, layer.experts.hidden, layer.mlp.hidden});
      n_rows = std::max(n_rows, of_experts + of_mlp);
      most_experts_ = std::max(most_experts_, layer.experts.count);
    }
    row_stride_ = P::row_size(widest);
    ends_ = memory.take<std::int64_t>(step.batch);
    x_ = memory.take<float>(n_ * d_);
    normed_ = memory.take<float>(n_ * std::max(d_, heads_width));
    chosen_ = memory.take<std::int64_t>(n_ * std::max<std::int64_t>(1, plan.top_k));
    odds_ = memory.take<float>(n_ * std::max<std::int64_t>(1, plan.top_k));
    slots_ = memory.take<Slot>(slots);
    tasks_ = memory.take<Task>(most_experts_ + 1);
    scores_ = memory.take<float>(n_ * 2 * most_experts_);
    hidden_ = memory.take<float>(2 * hidden);
    rows_ = memory.take<Row>(n_rows * row_stride_);
    used = memory.used;
  }

  std::int64_t used;

  void run(Team::Member& team) {
    team.once([&] { place_tokens(); });
    team.for_each(n_, [&](std::int64_t n) { embed(n); });
    for (std::size_t layer = 0; layer < plan_.layers.size(); ++layer) {
      const PlanLayer& weights = plan_.layers[layer];
      attend(team, weights, layer);
      feed_forward(team, weights);
    }
    if (step_.logits == nullptr) return;
    const std::int64_t n_ends = n_ends_.load(std::memory_order_relaxed), v = plan_.output.rows;
    team.for_each(n_ends, [&](std::int64_t i) {
      normalise(plan_, x_ + ends_[i] * d_, plan_.final_norm, plan_.final_norm_bias,
                normed_ + i * d_);
      prepare(normed_ + i * d_, d_, i);
    });
    multiply(team, plan_.output, d_, n_ends,
             [&](std::int64_t i, std::int64_t f, float value) { step_.logits[i * v + f] = value; });
  }

 private:
  const Row* row(std::int64_t i) const { return rows_ + i * row_stride_; }

  // A row of activations as the products want it: row number i.
  void prepare(const float* x, std::int64_t width, std::int64_t i) {
    P::prepare(x, width, rows_ + i * row_stride_);
  }

  // Calls put(row, feature, sum) for rows [0, n) of prepared ones times all rows of a matrix.
  template <class Put>
  void multiply(Team::Member& team, const Matrix& matrix, std::int64_t width, std::int64_t n,
                const Put& put) {
    const std::int64_t per_block = rows_per_block(matrix.rows, width);
    const std::int64_t n_blocks = (matrix.rows + per_block - 1) / per_block;
    team.for_each(n == 0 ? 0 : n_blocks, [&](std::int64_t block) {
      const std::int64_t begin = block * per_block;
      const Weight* first = weights_of<Weight>(matrix) + begin * width;
      multiply_rows<Weight>(
          std::min(per_block, matrix.rows - begin),
          [=](std::int64_t f) { return first + f * width; }, n,
          [&](std::int64_t t) { return row(t); }, width,
          [&](std::int64_t t, std::int64_t f, const float* sums, std::int64_t n_sums) {
            for (std::int64_t k = 0; k < n_sums; ++k) {
              put(t, begin + f + k, sums[k] * scale_of<Weight>(matrix, begin + f + k));
            }
          });
    });
  }

  std::int64_t rows_per_block(std::int64_t rows, std::int64_t width) const {
    const std::int64_t row_bytes = width * static_cast<std::int64_t>(sizeof(Weight));
    return PYLLM_ISA::rows_per_block(rows, row_bytes, step_.n_threads);
  }

  // The real tokens side by side; the last one of each sequence that has any.
  void place_tokens() {
    std::int64_t n = 0, n_ends = 0;
    for (std::int64_t b = 0; b < step_.batch; ++b) {
      first_[b] = n;
      for (std::int64_t t = 0; t < step_.counts[b]; ++t) {
        tokens_[n++] = {b, step_.starts[b] + t, step_.ids[b * step_.tokens + t]};
      }
      if (step_.counts[b] > 0) ends_[n_ends++] = n - 1;
    }
    n_ends_.store(n_ends, std::memory_order_relaxed);
  }

  void embed(std::int64_t n) {
    const Token& token = tokens_[n];
    const float* position =
        plan_.positions == nullptr ? nullptr : plan_.positions + token.position * d_;
    embed_token(weights_of<Weight>(plan_.embedding) + token.id * d_,
                scale_of<Weight>(plan_.embedding, token.id), position, d_, x_ + n * d_);
  }

  void attend(Team::Member& team, const PlanLayer& layer, std::size_t number) {
    const std::int64_t k = plan_.head_width, heads_width = plan_.heads * k;
    const std::int64_t qkv_width = (plan_.heads + 2 * plan_.groups) * k;
    team.for_each(n_, [&](std::int64_t n) {
      normalise(plan_, x_ + n * d_, layer.attention_norm, layer.attention_norm_bias,
                normed_ + n * d_);
      prepare(normed_ + n * d_, d_, n);
    });
    multiply(team, layer.qkv, d_, n_,
             [&](std::int64_t n, std::int64_t f, float value) { qkv_[n * qkv_width + f] = value; });
    team.for_each(n_, [&](std::int64_t n) { turn_and_append(n, number); });
    if (n_ranges() > 0) {
      team.for_each(n_ranges(), [&](std::int64_t i) { take_range(i, number, normed_); });
      team.for_each(n_,
                    [&](std::int64_t n) { prepare(normed_ + n * heads_width, heads_width, n); });
    } else {
      team.for_each(n_chunks(), [&](std::int64_t i) { take_chunk(i, number); });
      team.for_each(n_, [&](std::int64_t n) {
        combine_chunks(n, number, normed_ + n * heads_width);
        prepare(normed_ + n * heads_width, heads_width, n);
      });
    }
    multiply(team, layer.out, heads_width, n_,
             [&](std::int64_t n, std::int64_t f, float value) { x_[n * d_ + f] += value; });
  }

  void feed_forward(Team::Member& team, const PlanLayer& layer) {
    team.for_each(n_, [&](std::int64_t n) {
      normalise(plan_, x_ + n * d_, layer.ffn_norm, layer.ffn_norm_bias, normed_ + n * d_);
      if (layer.experts.count > 0) {
        choose_experts(plan_, layer, normed_ + n * d_, scores_ + n * 2 * most_experts_,
                       chosen_ + n * plan_.top_k, odds_ + n * plan_.top_k);
      }
      prepare(normed_ + n * d_, d_, n);
    });
    team.once([&] { make_tasks(layer); });
    const auto now = [](const std::atomic<std::int64_t>& value) {
      return value.load(std::memory_order_relaxed);
    };
    team.for_each(now(n_hidden_blocks_), [&](std::int64_t block) { hidden_block(block); });
    // Their rows take the place of the tokens', which are no longer needed.
    team.for_each(now(n_slots_), [&](std::int64_t i) {
      const Slot& slot = slots_[i];
      prepare(hidden_ + slot.hidden, slot.width, i);
    });
    // Each block has its own channels of the model, and adds the networks in order: no atomics.
    const std::int64_t per_block = now(channels_per_block_);
    team.for_each((d_ + per_block - 1) / per_block, [&](std::int64_t block) {
      const std::int64_t begin = block * per_block;
      for (std::int64_t i = 0; i < n_tasks_; ++i) {
        add_task(tasks_[i], begin, std::min(begin + per_block, d_));
      }
    });
  }

  // The slots of each expert in turn, then those of the network that all tokens go through.
  void make_tasks(const PlanLayer& layer) {
    std::int64_t hidden = 0, n_slots = 0, n_blocks = 0, bytes = 0;
    n_tasks_ = 0;
    const std::int64_t parts = plan_.gated ? 2 : 1;
    std::int64_t n_rows = 0;
    for (std::int64_t e = 0; e < layer.experts.count; ++e) {
      const std::int64_t n_chosen = n_ * plan_.top_k;
      if (std::find(chosen_, chosen_ + n_chosen, e) != chosen_ + n_chosen) {
        n_rows += parts * layer.experts.hidden;
      }
    }
    if (layer.mlp.count > 0) n_rows += parts * layer.mlp.hidden;
    hidden_per_block_ = rows_per_block(n_rows, d_) / parts;
    const auto end_task = [&](const Networks& networks, std::int64_t which, std::int64_t first) {
      tasks_[n_tasks_++] = {&networks, which, first, n_slots - first, n_blocks};
      n_blocks += (networks.hidden + hidden_per_block_ - 1) / hidden_per_block_;
      bytes += networks.hidden * static_cast<std::int64_t>(sizeof(Weight));
    };
    const auto add_slot = [&](const Networks& networks, std::int64_t token, float weight) {
      slots_[n_slots++] = {token, hidden, networks.hidden, weight};
      hidden += networks.hidden;
    };
    for (std::int64_t e = 0; e < layer.experts.count; ++e) {
      const std::int64_t first = n_slots;
      for (std::int64_t i = 0; i < n_ * plan_.top_k; ++i) {
        if (chosen_[i] == e) add_slot(layer.experts, i / plan_.top_k, odds_[i]);
      }
      if (n_slots > first) end_task(layer.experts, e, first);
    }
    if (layer.mlp.count > 0) {
      const std::int64_t first = n_slots;
      for (std::int64_t n = 0; n < n_; ++n) add_slot(layer.mlp, n, 1.0f);
      end_task(layer.mlp, 0, first);
    }
    up_ = hidden;
    n_slots_.store(n_slots, std::memory_order_relaxed);
    n_hidden_blocks_.store(n_blocks, std::memory_order_relaxed);
    const std::int64_t all_widths = bytes / static_cast<std::int64_t>(sizeof(Weight));
    channels_per_block_.store(rows_per_block(d_, all_widths), std::memory_order_relaxed);
  }

  // Some hidden features of one network, for all of its rows.
  void hidden_block(std::int64_t block) {
    std::int64_t i = n_tasks_ - 1;
    while (tasks_[i].block > block) --i;
    const Task& task = tasks_[i];
    const Networks& networks = *task.networks;
    const Matrix& matrix = networks.w_in;
    const std::int64_t parts = plan_.gated ? 2 : 1;
    const std::int64_t begin = (block - task.block) * hidden_per_block_;
    const std::int64_t end = std::min(begin + hidden_per_block_, networks.hidden), n = end - begin;
    // The gates of the block, then their ups.
    const auto place = [=](std::int64_t f) {
      return begin + (f < n ? f : networks.hidden + f - n);
    };
    const std::int64_t first_row = task.which * parts * networks.hidden;
    multiply_rows<Weight>(
        parts * n,
        [&](std::int64_t f) { return weights_of<Weight>(matrix) + (first_row + place(f)) * d_; },
        task.n, [&](std::int64_t t) { return row(slots_[task.first + t].token); }, d_,
        [&](std::int64_t t, std::int64_t f, const float* sums, std::int64_t n_sums) {
          float* to = hidden_ + slots_[task.first + t].hidden + begin;
          // Gates, then ups, each in a loop that can be vectorised.
          const std::int64_t end_sums = f + n_sums, gates = std::min(end_sums, n);
          for (std::int64_t k = f; k < gates; ++k) {
            to[k] = sums[k - f] * scale_of<Weight>(matrix, first_row + begin + k);
          }
          const std::int64_t up_row = first_row + networks.hidden + begin - n;
          for (std::int64_t k = std::max(f, n); k < end_sums; ++k) {
            to[up_ + k - n] = sums[k - f] * scale_of<Weight>(matrix, up_row + k);
          }
        });
    for (std::int64_t j = 0; j < task.n; ++j) {
      float* __restrict first = hidden_ + slots_[task.first + j].hidden;
      const float* __restrict up = first + up_;
      if (plan_.gated) {
#pragma omp simd
        for (std::int64_t f = begin; f < end; ++f) first[f] = SwiGlu::hidden(first[f], up[f]);
      } else {
#pragma omp simd
        for (std::int64_t f = begin; f < end; ++f) first[f] = Gelu::hidden(first[f], first[f]);
      }
    }
  }

  // x[token] += weight * w_out hidden, channels [begin, end), for all rows of a task.
  void add_task(const Task& task, std::int64_t begin, std::int64_t end) {
    const Networks& networks = *task.networks;
    const Matrix& matrix = networks.w_out;
    const std::int64_t first_row = task.which * d_ + begin;
    multiply_rows<Weight>(
        end - begin,
        [&](std::int64_t f) {
          return weights_of<Weight>(matrix) + (first_row + f) * networks.hidden;
        },
        task.n, [&](std::int64_t t) { return row(task.first + t); }, networks.hidden,
        [&](std::int64_t t, std::int64_t f, const float* sums, std::int64_t n_sums) {
          const Slot& slot = slots_[task.first + t];
          float* to = x_ + slot.token * d_ + begin + f;
          for (std::int64_t k = 0; k < n_sums; ++k) {
            to[k] += slot.weight * (sums[k] * scale_of<Weight>(matrix, first_row + f + k));
          }
        });
  }

  const std::int64_t d_;
  std::int64_t row_stride_ = 0, most_experts_ = 0;
  std::int64_t* ends_;
  float *x_, *normed_;
  std::int64_t* chosen_;
  float *odds_, *scores_;
  Slot* slots_;
  Task* tasks_;
  float* hidden_;  // gates or hidden numbers of all slots, then their ups
  Row* rows_;
  std::int64_t n_tasks_ = 0, up_ = 0, hidden_per_block_ = 0;
  // Read between two loops, where a thread that comes late may meet a later layer's.
  std::atomic<std::int64_t> n_ends_{0}, n_slots_{0}, n_hidden_blocks_{0}, channels_per_block_{0};
};

template <class Weight>
void run_step(Plan& plan, const Step& step) {
  std::int64_t n_tokens = 0;
  for (std::int64_t b = 0; b < step.batch; ++b) n_tokens += step.counts[b];
  if (n_tokens == 0) return;
  const Pass<Weight> measured(plan, step, n_tokens, {nullptr});
  char* const memory = plan.reserve(measured.used + kLineBytes);
  Pass<Weight> pass(plan, step, n_tokens, {at_line(memory)});
  Team team(kLoopsPerLayer * static_cast<std::int64_t>(plan.layers.size()) + kOtherLoops);
  team.run(step.n_threads, [&](Team::Member& member) { pass.run(member); });
}

}  // namespace

void decode_step(Plan& plan, const Step& step) {
  if (plan.weights == WeightType::int8) return run_step<std::int8_t>(plan, step);
#if defined(__AMX_INT8__)
  avx512::decode_step(plan, step);  // rows of floats meet no tile (panel.h)
#else
  if (plan.weights == WeightType::bfloat16) return run_step<BFloat16>(plan, step);
  run_step<float>(plan, step);
#endif
}

}  // namespace pyllm::PYLLM_ISA
