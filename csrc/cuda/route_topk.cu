// Routing on the card. The equations are in pyllm/reference/route_topk.py.
//
// A warp takes a row; its lanes share the experts. The chosen ones are found one after the other:
// the largest score behind the one before, equal scores by their index, so that nothing has to be
// marked. The statistics are summed by each warp over its rows, in memory of its own, and then by
// one block: no atomics, the same bits every time.

#include <cstdint>

#include "cuda/numeric.h"
#include "cuda/reduce.h"

namespace pyllm::cuda {
namespace {

constexpr int kWarps = 4;        // of a block that walks rows
constexpr int kSumBlock = 1024;  // threads that add up the statistics

// Integers that are ordered as the numbers are, a NaN above all, as PyTorch sorts.
__device__ __forceinline__ int rank_of(float value) {
  if (value != value) return 0x7fffffff;
  const int bits = __float_as_int(value + 0.0f);  // -0 becomes 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
__device__ __forceinline__ long long rank_of(double value) {
  if (value != value) return 0x7fffffffffffffffll;
  const long long bits = __double_as_longlong(value + 0.0);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffffll);
}

// Is the score of an expert before that of another? -1 stands for none.
template <class Rank>
__device__ __forceinline__ bool rank_before(Rank rank, int expert, Rank other_rank, int other) {
  if (expert < 0 || other < 0) return expert >= 0;
  return rank > other_rank || (rank == other_rank && expert < other);
}

// The softmax of a row: its largest logit and the sum of the exponentials.
template <class T, class W = Wide<T>>
__device__ __forceinline__ void softmax_of(const T* logits, std::int64_t n_experts, W& largest,
                                           W& sum) {
  largest = W(-INFINITY);
  for (std::int64_t e = threadIdx.x; e < n_experts; e += kWarp) {
    const W z = widen(logits[e]);
    largest = largest > z || largest != largest ? largest : z;
  }
  largest = warp_max(largest);
  sum = 0;
  for (std::int64_t e = threadIdx.x; e < n_experts; e += kWarp) {
    sum += exp(widen(logits[e]) - largest);
  }
  sum = warp_sum(sum);
}

// What PyTorch's logsumexp gives where the largest is infinite: that, and not NaN.
template <class W>
__device__ __forceinline__ W log_sum_exp(W largest, W sum) {
  return isinf(largest) ? largest : largest + log(sum);
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    forward_kernel(const T* __restrict__ logits, const Wide<T>* __restrict__ bias,
                   Wide<T>* __restrict__ weights, int* experts, Wide<T>* __restrict__ partials,
                   int* __restrict__ partial_counts, std::int64_t rows, std::int64_t n_experts,
                   std::int64_t top_k, std::int64_t rows_per_warp) {
  using W = Wide<T>;
  using Rank = decltype(rank_of(W()));
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t warp = std::int64_t{blockIdx.x} * kWarps + threadIdx.y;
  const std::int64_t begin = warp * rows_per_warp;
  if (begin >= rows) return;  // with the whole warp
  const std::int64_t end = begin + rows_per_warp < rows ? begin + rows_per_warp : rows;
  partials += warp * (n_experts + 1);
  partial_counts += warp * n_experts;
  // Each lane keeps the sums of its own experts.
  for (std::int64_t e = lane; e < n_experts; e += kWarp) {
    partials[e] = 0;
    partial_counts[e] = 0;
  }
  W z_sum = 0;
  for (std::int64_t row = begin; row < end; ++row) {
    const T* const z = logits + row * n_experts;
    int* const chosen = experts + row * top_k;
    W largest, sum;
    softmax_of(z, n_experts, largest, sum);
    const W lse = log_sum_exp(largest, sum);
    z_sum += lse * lse;
    for (std::int64_t e = lane; e < n_experts; e += kWarp) {
      partials[e] += exp(widen(z[e]) - largest) / sum;
    }
    Rank last_rank = 0;
    std::int64_t last = -1;
    for (std::int64_t a = 0; a < top_k; ++a) {
      Rank best_rank = 0;
      int best = -1;
      for (std::int64_t e = lane; e < n_experts; e += kWarp) {
        W score = widen(z[e]);
        if (bias != nullptr) score = exp(score - largest) / sum + bias[e];
        const Rank rank = rank_of(score);
        const bool taken = last >= 0 && (rank > last_rank || (rank == last_rank && e <= last));
        if (!taken && (best < 0 || rank > best_rank)) {
          best_rank = rank;
          best = static_cast<int>(e);
        }
      }
      for (int flip = kWarp / 2; flip > 0; flip /= 2) {
        const Rank other_rank = __shfl_xor_sync(kAllLanes, best_rank, flip);
        const int other = __shfl_xor_sync(kAllLanes, best, flip);
        const bool first = rank_before(other_rank, other, best_rank, best);
        best_rank = first ? other_rank : best_rank;
        best = first ? other : best;
      }
      last_rank = best_rank;
      last = best;
      if (best % kWarp == lane) ++partial_counts[best];
      if (lane == 0) chosen[a] = best;
    }
    __syncwarp();  // the chosen are written
    W largest_chosen = W(-INFINITY);
    for (std::int64_t a = lane; a < top_k; a += kWarp) {
      const W value = widen(z[chosen[a]]);
      largest_chosen =
          largest_chosen > value || largest_chosen != largest_chosen ? largest_chosen : value;
    }
    largest_chosen = warp_max(largest_chosen);
    W chosen_sum = 0;
    for (std::int64_t a = lane; a < top_k; a += kWarp) {
      chosen_sum += exp(widen(z[chosen[a]]) - largest_chosen);
    }
    chosen_sum = warp_sum(chosen_sum);
    for (std::int64_t a = lane; a < top_k; a += kWarp) {
      weights[row * top_k + a] = exp(widen(z[chosen[a]]) - largest_chosen) / chosen_sum;
    }
  }
  if (lane == 0) partials[n_experts] = z_sum;
}

// The statistics of all warps by one block; each of its warps takes some experts.
template <class W>
__global__ void __launch_bounds__(kSumBlock, 1)
    statistics_kernel(const W* __restrict__ partials, const int* __restrict__ partial_counts,
                      W* __restrict__ balance_loss, W* __restrict__ z_loss,
                      int* __restrict__ tokens_per_expert, std::int64_t n_partials,
                      std::int64_t rows, std::int64_t n_experts, std::int64_t top_k) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const W n_rows = static_cast<W>(rows > 0 ? rows : 1);
  W balance = 0;
  for (std::int64_t e = threadIdx.x / kWarp; e <= n_experts; e += kSumBlock / kWarp) {
    W sum = 0;
    int count = 0;
    for (std::int64_t i = lane; i < n_partials; i += kWarp) {
      sum += partials[i * (n_experts + 1) + e];
      if (e < n_experts) count += partial_counts[i * n_experts + e];
    }
    sum = warp_sum(sum);
    count = warp_sum(count);
    if (e == n_experts) {
      if (lane == 0) *z_loss = sum / n_rows;
      continue;
    }
    if (lane == 0) tokens_per_expert[e] = count;
    balance += static_cast<W>(count) / (n_rows * static_cast<W>(top_k)) * (sum / n_rows);
  }
  // Every lane has the sum of its warp, so that one of them counts.
  balance = team_sum(lane == 0 ? balance : W(0));
  if (threadIdx.x == 0) *balance_loss = static_cast<W>(n_experts) * balance;
}

template <class T>
__global__ void __launch_bounds__(kWarps* kWarp, 1)
    backward_kernel(const Wide<T>* __restrict__ dweights, const Wide<T>* __restrict__ dbalance,
                    const Wide<T>* __restrict__ dz, const T* __restrict__ logits,
                    const Wide<T>* __restrict__ weights, const int* __restrict__ experts,
                    const int* __restrict__ tokens_per_expert, T* __restrict__ dlogits,
                    std::int64_t rows, std::int64_t n_experts, std::int64_t top_k) {
  using W = Wide<T>;
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.y;
  if (row >= rows) return;  // with the whole warp
  const T* const z = logits + row * n_experts;
  W largest, sum;
  softmax_of(z, n_experts, largest, sum);
  const W n_rows = static_cast<W>(rows);
  const W of_z = *dz * (W(2) / n_rows) * log_sum_exp(largest, sum);
  // c_e = of_balance * tokens_per_expert[e]
  const W of_balance =
      *dbalance * static_cast<W>(n_experts) / (n_rows * static_cast<W>(top_k)) / n_rows;
  W mean = 0;
  for (std::int64_t e = lane; e < n_experts; e += kWarp) {
    const W p = exp(widen(z[e]) - largest) / sum;
    mean += p * (of_balance * static_cast<W>(tokens_per_expert[e]));
  }
  mean = warp_sum(mean);
  W inner = 0;
  for (std::int64_t a = lane; a < top_k; a += kWarp) {
    inner += dweights[row * top_k + a] * weights[row * top_k + a];
  }
  inner = warp_sum(inner);
  for (std::int64_t e = lane; e < n_experts; e += kWarp) {
    const W p = exp(widen(z[e]) - largest) / sum;
    W dz_here = p * (of_balance * static_cast<W>(tokens_per_expert[e]) - mean) + of_z * p;
    for (std::int64_t a = 0; a < top_k; ++a) {
      const std::int64_t at = row * top_k + a;
      if (experts[at] == e) dz_here += weights[at] * (dweights[at] - inner);
    }
    dlogits[row * n_experts + e] = narrow<T>(dz_here);
  }
}

}  // namespace

void route_topk_forward(DType dtype, const void* logits, const void* bias, void* weights,
                        void* experts, void* balance_loss, void* z_loss, void* tokens_per_expert,
                        void* partials, void* partial_counts, std::int64_t rows,
                        std::int64_t n_experts, std::int64_t top_k, std::int64_t rows_per_warp,
                        Stream stream) {
  const std::int64_t n_warps = blocks_for(rows, rows_per_warp);
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    launch("route_topk_forward", forward_kernel<T>, {blocks_for(n_warps, kWarps)},
           dim3(kWarp, kWarps), 0, stream, static_cast<const T*>(logits),
           static_cast<const W*>(bias), static_cast<W*>(weights), static_cast<int*>(experts),
           static_cast<W*>(partials), static_cast<int*>(partial_counts), rows, n_experts, top_k,
           rows_per_warp);
    launch("route_topk_forward", statistics_kernel<W>, {1}, kSumBlock, 0, stream,
           static_cast<const W*>(partials), static_cast<const int*>(partial_counts),
           static_cast<W*>(balance_loss), static_cast<W*>(z_loss),
           static_cast<int*>(tokens_per_expert), n_warps, rows, n_experts, top_k);
  });
}

void route_topk_backward(DType dtype, const void* dweights, const void* dbalance_loss,
                         const void* dz_loss, const void* logits, const void* weights,
                         const void* experts, const void* tokens_per_expert, void* dlogits,
                         std::int64_t rows, std::int64_t n_experts, std::int64_t top_k,
                         Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    using W = Wide<T>;
    launch("route_topk_backward", backward_kernel<T>, {blocks_for(rows, kWarps)},
           dim3(kWarp, kWarps), 0, stream, static_cast<const W*>(dweights),
           static_cast<const W*>(dbalance_loss), static_cast<const W*>(dz_loss),
           static_cast<const T*>(logits), static_cast<const W*>(weights),
           static_cast<const int*>(experts), static_cast<const int*>(tokens_per_expert),
           static_cast<T*>(dlogits), rows, n_experts, top_k);
  });
}

}  // namespace pyllm::cuda
