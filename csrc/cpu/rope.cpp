// Rotary position embedding. The equations are in pyllm/reference/rope.py.

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/parallel.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Elements in a range handed to a thread: enough to hide the hand-over (about 1 us).
constexpr std::int64_t kElementsPerRange = per_range(16384);

// One head: the halves a and b of x, turned by the angles of its token.
template <class Storage>
void turn(const Storage* __restrict x, const Wide<Storage>* __restrict cos,
          const Wide<Storage>* __restrict sin, Wide<Storage> direction, Storage* __restrict y,
          std::int64_t half) {
  using W = Wide<Storage>;
#pragma omp simd
  for (std::int64_t i = 0; i < half; ++i) {
    const W a = widen(x[i]), b = widen(x[half + i]);
    const W c = cos[i], s = direction * sin[i];
    y[i] = narrow<Storage>(a * c - b * s);
    y[half + i] = narrow<Storage>(a * s + b * c);
  }
}

}  // namespace

void rope(DType dtype, bool inverse, const void* x, std::int64_t batch_stride,
          std::int64_t token_stride, std::int64_t head_stride, const void* cos, const void* sin,
          std::int64_t table_stride, void* y, std::int64_t batch, std::int64_t tokens,
          std::int64_t heads, std::int64_t half, int n_threads) {
  const std::int64_t per_token = heads * half * 2;
  const std::int64_t grain = rows_per_range(kElementsPerRange, per_token);
  with_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    const W direction = inverse ? W(-1) : W(1);
    parallel_for(batch * tokens, grain, n_threads, [=](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const std::int64_t b = row / tokens, t = row % tokens;
        const S* from = static_cast<const S*>(x) + b * batch_stride + t * token_stride;
        const std::int64_t angles = b * table_stride + t * half;
        for (std::int64_t head = 0; head < heads; ++head) {
          turn(from + head * head_stride, static_cast<const W*>(cos) + angles,
               static_cast<const W*>(sin) + angles, direction,
               static_cast<S*>(y) + (row * heads + head) * 2 * half, half);
        }
      }
    });
  });
}

}  // namespace pyllm::PYLLM_ISA
