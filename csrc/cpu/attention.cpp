// Attention with all its products, forward and backward. The equations are in
// pyllm/reference/attention.py.

#include <cstdint>

#include "cpu/attention_backward.h"
#include "cpu/attention_forward.h"
#include "cpu/attention_problem.h"
#include "cpu/kernels.h"
#include "cpu/numeric.h"

namespace pyllm::PYLLM_ISA {
namespace {

// A window of all keys hides none, and its positions cannot overflow.
std::int64_t limited(std::int64_t window, std::int64_t keys) {
  return window < keys ? window : keys;
}

}  // namespace

void attention_forward(DType dtype, const void* q, std::int64_t q_batch_stride,
                       std::int64_t q_token_stride, std::int64_t q_head_stride, const void* k,
                       std::int64_t k_batch_stride, std::int64_t k_token_stride,
                       std::int64_t k_head_stride, const void* v, std::int64_t v_batch_stride,
                       std::int64_t v_token_stride, std::int64_t v_head_stride, double scale,
                       bool causal, std::int64_t window, std::int64_t sinks, std::int64_t batch,
                       std::int64_t tokens, std::int64_t keys, std::int64_t groups,
                       std::int64_t shared, std::int64_t width, void* y, void* lse, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    const Attention<S> problem{
        {static_cast<const S*>(q), q_batch_stride, q_token_stride, q_head_stride},
        {static_cast<const S*>(k), k_batch_stride, k_token_stride, k_head_stride},
        {static_cast<const S*>(v), v_batch_stride, v_token_stride, v_head_stride},
        static_cast<Wide<S>>(scale),
        causal,
        limited(window, keys),
        window > 0 ? sinks : 0,
        batch,
        tokens,
        keys,
        groups,
        shared,
        width};
    forward(problem, static_cast<S*>(y), static_cast<Wide<S>*>(lse), n_threads);
  });
}

void attention_backward(DType dtype, const void* q, std::int64_t q_batch_stride,
                        std::int64_t q_token_stride, std::int64_t q_head_stride, const void* k,
                        std::int64_t k_batch_stride, std::int64_t k_token_stride,
                        std::int64_t k_head_stride, const void* v, std::int64_t v_batch_stride,
                        std::int64_t v_token_stride, std::int64_t v_head_stride, double scale,
                        bool causal, std::int64_t window, std::int64_t sinks, std::int64_t batch,
                        std::int64_t tokens, std::int64_t keys, std::int64_t groups,
                        std::int64_t shared, std::int64_t width, const void* dy, const void* y,
                        const void* lse, void* dq, void* dk, void* dv, int n_threads) {
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    const Attention<S> problem{
        {static_cast<const S*>(q), q_batch_stride, q_token_stride, q_head_stride},
        {static_cast<const S*>(k), k_batch_stride, k_token_stride, k_head_stride},
        {static_cast<const S*>(v), v_batch_stride, v_token_stride, v_head_stride},
        static_cast<Wide<S>>(scale),
        causal,
        limited(window, keys),
        window > 0 ? sinks : 0,
        batch,
        tokens,
        keys,
        groups,
        shared,
        width};
    const Gradients<S> gradients{
        static_cast<const S*>(dy), static_cast<const S*>(y), static_cast<const Wide<S>*>(lse),
        static_cast<S*>(dq),       static_cast<S*>(dk),      static_cast<S*>(dv)};
    backward(problem, gradients, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
