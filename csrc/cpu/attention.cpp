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

struct Strides {
  std::int64_t batch, token, head;
};

template <class Storage>
Attention<Storage> make_problem(const void* q, Strides of_q, const void* k, Strides of_k,
                                const void* v, Strides of_v, double scale, bool causal,
                                std::int64_t window, std::int64_t sinks, std::int64_t batch,
                                std::int64_t tokens, std::int64_t keys, std::int64_t groups,
                                std::int64_t shared, std::int64_t width) {
  using S = const Storage*;
  // A window of all keys hides none, and its positions cannot overflow.
  const std::int64_t limited = window < keys ? window : keys;
  return {{static_cast<S>(q), of_q.batch, of_q.token, of_q.head},
          {static_cast<S>(k), of_k.batch, of_k.token, of_k.head},
          {static_cast<S>(v), of_v.batch, of_v.token, of_v.head},
          static_cast<Wide<Storage>>(scale),
          causal,
          limited,
          window > 0 ? sinks : 0,
          batch,
          tokens,
          keys,
          groups,
          shared,
          width};
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
    const auto problem =
        make_problem<S>(q, {q_batch_stride, q_token_stride, q_head_stride}, k,
                        {k_batch_stride, k_token_stride, k_head_stride}, v,
                        {v_batch_stride, v_token_stride, v_head_stride}, scale, causal, window,
                        sinks, batch, tokens, keys, groups, shared, width);
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
    const auto problem =
        make_problem<S>(q, {q_batch_stride, q_token_stride, q_head_stride}, k,
                        {k_batch_stride, k_token_stride, k_head_stride}, v,
                        {v_batch_stride, v_token_stride, v_head_stride}, scale, causal, window,
                        sinks, batch, tokens, keys, groups, shared, width);
    const Gradients<S> gradients{
        static_cast<const S*>(dy), static_cast<const S*>(y), static_cast<const Wide<S>*>(lse),
        static_cast<S*>(dq),       static_cast<S*>(dk),      static_cast<S*>(dv)};
    backward(problem, gradients, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
