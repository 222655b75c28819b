// Top-k routing. The equations are in pyllm/reference/route_topk.py.
//
// The statistics are sums over all rows: each range of rows keeps its own, and they are added up in
// order, so that the result does not depend on the number of threads.

#include <cmath>
#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Elements in a range of rows handed to a thread: an exponential each, so about 5 us.
constexpr std::int64_t kElementsPerRange = per_range(8192);

// Softmax of one row into `p`; returns the log-sum-exp.
template <class Storage>
Wide<Storage> softmax(const Storage* __restrict z, Wide<Storage>* __restrict p,
                      std::int64_t width) {
  using W = Wide<Storage>;
  W largest = -INFINITY;
#pragma omp simd reduction(max : largest)
  for (std::int64_t i = 0; i < width; ++i) {
    const W value = widen(z[i]);
    largest = value > largest ? value : largest;
  }
  W sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < width; ++i) {
    p[i] = exp_of(widen(z[i]) - largest);
    sum += p[i];
  }
  const W scale = W(1) / sum;
#pragma omp simd
  for (std::int64_t i = 0; i < width; ++i) p[i] *= scale;
  return largest + W(::log(static_cast<double>(sum)));
}

// Does `a` come before `b` where both have the lower index first? NaN counts as the largest value.
template <class W>
bool is_larger(W a, W b) {
  return a > b || (a != a && b == b);
}

// The k largest of one row, the largest first, the lower index first among equals.
template <class Storage>
void choose(const Storage* z, std::int64_t width, std::int32_t* chosen, std::int64_t top_k,
            bool* taken) {
  for (std::int64_t i = 0; i < width; ++i) taken[i] = false;
  for (std::int64_t a = 0; a < top_k; ++a) {
    std::int64_t best = -1;
    for (std::int64_t i = 0; i < width; ++i) {
      if (!taken[i] && (best < 0 || is_larger(widen(z[i]), widen(z[best])))) best = i;
    }
    taken[best] = true;
    chosen[a] = static_cast<std::int32_t>(best);
  }
}

template <class Storage>
void forward(const Storage* logits, const Wide<Storage>* bias, Wide<Storage>* weights,
             std::int32_t* experts, Wide<Storage>* balance_loss, Wide<Storage>* z_loss,
             std::int32_t* tokens_per_expert, std::int64_t n_tokens, std::int64_t n_experts,
             std::int64_t top_k, int n_threads) {
  using W = Wide<Storage>;
  const std::int64_t grain = rows_per_range(kElementsPerRange, n_experts);
  const std::int64_t n_ranges = (n_tokens + grain - 1) / grain;
  // Per range: the sum of p for each expert, and the sum of squared log-sum-exps behind them. In
  // double, so that the losses of a million rows are as exact as those of ten.
  double* partials = new double[(n_ranges + 1) * (n_experts + 1)]();
  std::int32_t* counts = new std::int32_t[(n_ranges + 1) * n_experts]();
  parallel_for(n_tokens, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
    double* p_sum = partials + begin / grain * (n_experts + 1);
    std::int32_t* count = counts + begin / grain * n_experts;
    W* p = new W[n_experts];
    W* scores = new W[n_experts];
    bool* taken = new bool[n_experts];
    for (std::int64_t token = begin; token < end; ++token) {
      const Storage* z = logits + token * n_experts;
      std::int32_t* chosen = experts + token * top_k;
      W* weight = weights + token * top_k;
      const W lse = softmax(z, p, n_experts);
      if (bias == nullptr) {
        choose(z, n_experts, chosen, top_k, taken);
      } else {
        for (std::int64_t e = 0; e < n_experts; ++e) scores[e] = p[e] + bias[e];
        choose(scores, n_experts, chosen, top_k, taken);
      }
      for (std::int64_t a = 0; a < top_k; ++a) {
        scores[a] = widen(z[chosen[a]]);
        ++count[chosen[a]];
      }
      softmax(scores, weight, top_k);
      for (std::int64_t e = 0; e < n_experts; ++e) p_sum[e] += p[e];
      p_sum[n_experts] += static_cast<double>(lse) * lse;
    }
    delete[] taken;
    delete[] scores;
    delete[] p;
  });
  // The last partial row, still zero, takes the totals.
  double* total = partials + n_ranges * (n_experts + 1);
  for (std::int64_t e = 0; e < n_experts; ++e) tokens_per_expert[e] = 0;
  for (std::int64_t range = 0; range < n_ranges; ++range) {
    for (std::int64_t e = 0; e <= n_experts; ++e) total[e] += partials[range * (n_experts + 1) + e];
    for (std::int64_t e = 0; e < n_experts; ++e) {
      tokens_per_expert[e] += counts[range * n_experts + e];
    }
  }
  const double rows = n_tokens > 0 ? static_cast<double>(n_tokens) : 1.0;
  double balance = 0;
  for (std::int64_t e = 0; e < n_experts; ++e) {
    balance += tokens_per_expert[e] / (rows * static_cast<double>(top_k)) * (total[e] / rows);
  }
  *balance_loss = static_cast<W>(static_cast<double>(n_experts) * balance);
  *z_loss = static_cast<W>(total[n_experts] / rows);
  delete[] counts;
  delete[] partials;
}

// `slope` is c of the reference: the derivative of the balance loss by each expert's probability.
template <class Storage>
void backward_row(const Wide<Storage>* dweight, Wide<Storage> dz_scale, const Storage* z,
                  const Wide<Storage>* weight, const std::int32_t* chosen,
                  const Wide<Storage>* slope, Wide<Storage>* p, Wide<Storage>* dz, Storage* dlogits,
                  std::int64_t n_experts, std::int64_t top_k) {
  using W = Wide<Storage>;
  const W lse = softmax(z, p, n_experts);
  W mean_slope = 0;
  for (std::int64_t e = 0; e < n_experts; ++e) mean_slope += slope[e] * p[e];
  for (std::int64_t e = 0; e < n_experts; ++e) {
    dz[e] = p[e] * (slope[e] - mean_slope + dz_scale * lse);
  }
  W inner = 0;
  for (std::int64_t a = 0; a < top_k; ++a) inner += dweight[a] * weight[a];
  for (std::int64_t a = 0; a < top_k; ++a) dz[chosen[a]] += weight[a] * (dweight[a] - inner);
  for (std::int64_t e = 0; e < n_experts; ++e) dlogits[e] = narrow<Storage>(dz[e]);
}

template <class Storage>
void backward(const Wide<Storage>* dweights, Wide<Storage> dbalance_loss, Wide<Storage> dz_loss,
              const Storage* logits, const Wide<Storage>* weights, const std::int32_t* experts,
              const std::int32_t* tokens_per_expert, Storage* dlogits, std::int64_t n_tokens,
              std::int64_t n_experts, std::int64_t top_k, int n_threads) {
  using W = Wide<Storage>;
  const W rows = n_tokens > 0 ? W(n_tokens) : W(1);
  W* slope = new W[n_experts];
  for (std::int64_t e = 0; e < n_experts; ++e) {
    slope[e] = dbalance_loss * W(n_experts) * (W(tokens_per_expert[e]) / (rows * W(top_k))) / rows;
  }
  const W dz_scale = dz_loss * (W(2) / rows);
  parallel_for(n_tokens, rows_per_range(kElementsPerRange, n_experts), n_threads,
               [=](std::int64_t begin, std::int64_t end) {
                 W* scratch = new W[2 * n_experts];
                 for (std::int64_t token = begin; token < end; ++token) {
                   const std::int64_t at = token * n_experts, slot = token * top_k;
                   backward_row(dweights + slot, dz_scale, logits + at, weights + slot,
                                experts + slot, slope, scratch, scratch + n_experts, dlogits + at,
                                n_experts, top_k);
                 }
                 delete[] scratch;
               });
  delete[] slope;
}

}  // namespace

void route_topk_forward(DType dtype, const void* logits, const void* bias, void* weights,
                        void* experts, void* balance_loss, void* z_loss, void* tokens_per_expert,
                        std::int64_t n_tokens, std::int64_t n_experts, std::int64_t top_k,
                        int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    forward(static_cast<const S*>(logits), static_cast<const W*>(bias), static_cast<W*>(weights),
            static_cast<std::int32_t*>(experts), static_cast<W*>(balance_loss),
            static_cast<W*>(z_loss), static_cast<std::int32_t*>(tokens_per_expert), n_tokens,
            n_experts, top_k, n_threads);
  });
}

void route_topk_backward(DType dtype, const void* dweights, const void* dbalance_loss,
                         const void* dz_loss, const void* logits, const void* weights,
                         const void* experts, const void* tokens_per_expert, void* dlogits,
                         std::int64_t n_tokens, std::int64_t n_experts, std::int64_t top_k,
                         int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    backward(static_cast<const W*>(dweights), *static_cast<const W*>(dbalance_loss),
             *static_cast<const W*>(dz_loss), static_cast<const S*>(logits),
             static_cast<const W*>(weights), static_cast<const std::int32_t*>(experts),
             static_cast<const std::int32_t*>(tokens_per_expert), static_cast<S*>(dlogits),
             n_tokens, n_experts, top_k, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
