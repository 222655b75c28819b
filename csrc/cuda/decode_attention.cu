// Attention of few new queries to a kv cache on the card. The equations are in
// pyllm/reference/decode_attention.py.
//
// The keys that a row of the batch sees are numbered in the order of their positions, the sinks
// first, and cut into chunks. A block takes a chunk of one kv head and up to kRows queries of all
// the heads that share it: one pass over the cache, tile by tile, with an online softmax (Milakov &
// Gimelshein 2018, arXiv:1805.02867). It leaves a maximum, a sum and a weighted sum of values for
// each query; a second kernel adds the chunks in order. Where they are cut depends on sizes only:
// the same bits every time, and nothing of the positions has to be known on the host.
//
// A start or a count out of range cannot raise an error from here: such a row of the batch is NaN.

#include <cstdint>

#include "cuda/reduce.h"
#include "cuda/rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kBlock = 128;      // threads
constexpr int kRows = 8;         // queries of a block, which share its pass
constexpr int kTile = 64;        // keys whose scores are kept at a time
constexpr int kKeyLanes = 8;     // threads that multiply one key
constexpr int kMostGroups = 16;  // of threads that add values of other keys
constexpr int kMostWidth = 512;  // of a head

struct Strides {
  std::int64_t batch, slot, head;
};

struct Shape {
  Strides k, v;
  std::int64_t n_slots, window, sinks, ring, n_tokens, groups, per_group, width, chunk, n_chunks;
};

// Which keys the queries of one row of the batch see: positions [0, n_sinks), then
// [first, start + count); numbered without the gap.
struct Seen {
  std::int64_t start, n_sinks, first, n;

  __device__ Seen(const Shape& shape, int start_of_row, int count)
      : start(start_of_row), n_sinks(0), first(0), n(0) {
    if (count <= 0) return;
    const std::int64_t end = start + count;
    if (shape.window > 0) {
      n_sinks = shape.sinks < end ? shape.sinks : end;
      first = start - shape.window + 1 > n_sinks ? start - shape.window + 1 : n_sinks;
    }
    n = n_sinks + end - first;
  }

  __device__ std::int64_t position(std::int64_t i) const {
    return i < n_sinks ? i : first + i - n_sinks;
  }
};

__device__ __forceinline__ bool is_valid(const Shape& shape, int start, int count) {
  const std::int64_t end = std::int64_t{start} + count;
  return start >= 0 && count >= 0 && count <= shape.n_tokens &&
         end <= (shape.ring > 0 ? std::int64_t{kLargestPosition} : shape.n_slots);
}

// A query does not see a key.
template <class W>
__device__ __forceinline__ W hidden() {
  return W(-1);
}

// The scale of an int8 cache; not finite gives NaN.
__device__ __forceinline__ float sound(float scale) { return isfinite(scale) ? scale : NAN; }

// Scores, then weights, of kRows queries and kTile keys, and what stands beside them.
template <class W>
struct Tile {
  W weights[kRows][kTile];
  W factors[kRows];
  W largest[kRows], sums[kRows];
  int positions[kTile];
  int slots[kTile];
};

// C: what the cache holds, T or signed char. `count` of it are loaded at once.
template <class T, class C, int count>
__global__ void __launch_bounds__(kBlock, 1)
    chunk_kernel(const T* __restrict__ q, const C* __restrict__ k_cache,
                 const C* __restrict__ v_cache, const float* __restrict__ k_scales,
                 const float* __restrict__ v_scales, const int* __restrict__ starts,
                 const int* __restrict__ counts, Wide<T> scale, Wide<T>* __restrict__ partial_y,
                 Wide<T>* __restrict__ partial_largest, Wide<T>* __restrict__ partial_sum,
                 Shape shape) {
  using W = Wide<T>;
  constexpr int kPacks = (kMostWidth / count + kBlock - 1) / kBlock;  // of values, a thread
  PYLLM_DYNAMIC_SHARED(W, rows);  // (kRows, width): queries, at the end the sums of values
  PYLLM_SHARED(Tile<W>, tile, [1]);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t chunk = blockIdx.y, b = blockIdx.x / shape.groups;
  const std::int64_t group = blockIdx.x % shape.groups;
  const std::int64_t all_rows = shape.n_tokens * shape.per_group;
  const std::int64_t first_row = std::int64_t{blockIdx.z} * kRows;
  const int n_rows = static_cast<int>(all_rows - first_row < kRows ? all_rows - first_row : kRows);
  const int width = static_cast<int>(shape.width);

  const bool valid = is_valid(shape, starts[b], counts[b]);
  const Seen seen(shape, starts[b], valid ? counts[b] : 0);
  const std::int64_t begin = chunk * shape.chunk;
  const std::int64_t end = begin + shape.chunk < seen.n ? begin + shape.chunk : seen.n;
  if (begin >= end) return;  // the whole block; the second kernel knows as well

  // Row r of the group is query r / per_group of head r % per_group.
  const std::int64_t n_heads = shape.groups * shape.per_group;
  for (int i = thread; i < n_rows * width; i += kBlock) {
    const std::int64_t row = first_row + i / width, t = row / shape.per_group;
    const std::int64_t head = group * shape.per_group + row % shape.per_group;
    rows[i] = widen(q[((b * shape.n_tokens + t) * n_heads + head) * width + i % width]);
  }
  if (thread < kRows) {
    tile->largest[thread] = lowest<W>();
    tile->sums[thread] = 0;
  }

  const int n_packs = width / count;
  int n_groups = kBlock / (n_packs < kBlock ? n_packs : kBlock);
  n_groups = n_groups < kMostGroups ? n_groups : kMostGroups;
  const int own_group = n_packs < kBlock ? thread / n_packs : 0;
  const int own_pack = n_packs < kBlock ? thread % n_packs : thread;
  W sums[kPacks][kRows][count] = {};

  for (std::int64_t first = begin; first < end; first += kTile) {
    const int n_keys = static_cast<int>(end - first < kTile ? end - first : kTile);
    if (thread < n_keys) {
      const std::int64_t position = seen.position(first + thread);
      const bool turns = shape.ring > 0 && position >= shape.sinks;
      tile->positions[thread] = static_cast<int>(position);
      tile->slots[thread] =
          static_cast<int>(turns ? shape.sinks + (position - shape.sinks) % shape.ring : position);
    }
    __syncthreads();

    // Scores: kKeyLanes threads for each key.
    const int key_lane = thread % kKeyLanes;
    for (int key = thread / kKeyLanes; key < kTile; key += kBlock / kKeyLanes) {
      const std::int64_t slot = key < n_keys ? tile->slots[key] : 0;
      const C* const k_row =
          k_cache + b * shape.k.batch + slot * shape.k.slot + group * shape.k.head;
      W dots[kRows] = {};
      if (key < n_keys) {
        for (int pack = key_lane; pack < n_packs; pack += kKeyLanes) {
          const auto loaded = load_pack<count>(k_row + pack * count);
#pragma unroll
          for (int i = 0; i < count; ++i) {
            const W value = static_cast<W>(widen(loaded.values[i]));
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              if (r < n_rows) dots[r] += rows[r * width + pack * count + i] * value;
            }
          }
        }
      }
      W factor = scale;
      if (k_scales != nullptr && key < n_keys) {
        factor *=
            static_cast<W>(sound(k_scales[(b * shape.n_slots + slot) * shape.groups + group]));
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= n_rows) break;
        for (int flip = kKeyLanes / 2; flip > 0; flip /= 2) {
          dots[r] += __shfl_xor_sync(kAllLanes, dots[r], flip);
        }
        if (key_lane == 0) tile->weights[r][key] = dots[r] * factor;
      }
    }
    __syncthreads();

    // The online softmax: a warp for each query.
    for (int r = thread / kWarp; r < n_rows; r += kBlock / kWarp) {
      const std::int64_t t = (first_row + r) / shape.per_group;
      const std::int64_t at = seen.start + t;
      W scores[kTile / kWarp];
      bool sees[kTile / kWarp];
      W largest = tile->largest[r];
      const W before = largest;
#pragma unroll
      for (int part = 0; part < kTile / kWarp; ++part) {
        const int key = part * kWarp + thread % kWarp;
        sees[part] = key < n_keys && t < counts[b];
        scores[part] = 0;
        if (!sees[part]) continue;
        const std::int64_t position = tile->positions[key];
        sees[part] = position <= at &&
                     (shape.window == 0 || position > at - shape.window || position < shape.sinks);
        scores[part] = tile->weights[r][key];
        if (sees[part] && scores[part] > largest) largest = scores[part];
      }
      largest = warp_max(largest);
      W sum = 0;
#pragma unroll
      for (int part = 0; part < kTile / kWarp; ++part) {
        const int key = part * kWarp + thread % kWarp;
        const W weight = exp(scores[part] - largest);
        if (sees[part]) sum += weight;
        tile->weights[r][key] = sees[part] ? weight : hidden<W>();
      }
      sum = warp_sum(sum);
      __syncwarp();  // all have read the largest so far: shuffles order no memory
      if (thread % kWarp == 0) {
        tile->factors[r] = exp(before - largest);
        tile->largest[r] = largest;
        tile->sums[r] = tile->sums[r] * tile->factors[r] + sum;
      }
    }
    __syncthreads();

    // Values: groups of threads take other keys, a thread its channels.
    if (own_group < n_groups) {
#pragma unroll
      for (int part = 0; part < kPacks; ++part) {
        const int pack = own_pack + part * kBlock;
        if (pack >= n_packs) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= n_rows) break;
#pragma unroll
          for (int i = 0; i < count; ++i) sums[part][r][i] *= tile->factors[r];
        }
        for (int key = own_group; key < n_keys; key += n_groups) {
          const std::int64_t slot = tile->slots[key];
          const auto loaded = load_pack<count>(v_cache + b * shape.v.batch + slot * shape.v.slot +
                                               group * shape.v.head + std::int64_t{pack} * count);
          W factor = 1;
          if (v_scales != nullptr) {
            factor =
                static_cast<W>(sound(v_scales[(b * shape.n_slots + slot) * shape.groups + group]));
          }
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (r >= n_rows) break;
            const W weight = tile->weights[r][key];
            // What is hidden may be a NaN of stale memory, and times 0 it would still be NaN.
            if (weight == hidden<W>()) continue;
#pragma unroll
            for (int i = 0; i < count; ++i) {
              sums[part][r][i] += weight * factor * static_cast<W>(widen(loaded.values[i]));
            }
          }
        }
      }
    }
    __syncthreads();  // the tile is read
  }

  for (int turn = 0; turn < n_groups; ++turn) {
    if (own_group == turn) {
#pragma unroll
      for (int part = 0; part < kPacks; ++part) {
        const int pack = own_pack + part * kBlock;
        if (pack >= n_packs) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= n_rows) break;
#pragma unroll
          for (int i = 0; i < count; ++i) {
            W& total = rows[r * width + pack * count + i];
            total = turn == 0 ? sums[part][r][i] : total + sums[part][r][i];
          }
        }
      }
    }
    __syncthreads();
  }
  const std::int64_t out = (blockIdx.x * shape.n_chunks + chunk) * all_rows + first_row;
  for (int i = thread; i < n_rows * width; i += kBlock) partial_y[out * width + i] = rows[i];
  if (thread < n_rows) {
    partial_largest[out + thread] = tile->largest[thread];
    partial_sum[out + thread] = tile->sums[thread];
  }
}

// Adds the chunks of each query and head, in order.
template <class T>
__global__ void __launch_bounds__(kBlock, 1)
    combine_kernel(const int* __restrict__ starts, const int* __restrict__ counts,
                   const Wide<T>* __restrict__ partial_y,
                   const Wide<T>* __restrict__ partial_largest,
                   const Wide<T>* __restrict__ partial_sum, T* __restrict__ y, Shape shape) {
  using W = Wide<T>;
  const std::int64_t n_heads = shape.groups * shape.per_group;
  const std::int64_t head = blockIdx.x % n_heads, t = blockIdx.x / n_heads % shape.n_tokens;
  const std::int64_t b = blockIdx.x / n_heads / shape.n_tokens;
  const std::int64_t group = head / shape.per_group;
  const std::int64_t row = t * shape.per_group + head % shape.per_group;
  const std::int64_t all_rows = shape.n_tokens * shape.per_group;
  const bool valid = is_valid(shape, starts[b], counts[b]);
  const bool real = valid && t < counts[b];
  const Seen seen(shape, starts[b], real ? counts[b] : 0);
  const std::int64_t n_chunks = (seen.n + shape.chunk - 1) / shape.chunk;
  const std::int64_t first = (b * shape.groups + group) * shape.n_chunks * all_rows + row;
  W largest = lowest<W>(), total = 0;
  for (std::int64_t c = 0; c < n_chunks; ++c) {
    const W here = partial_largest[first + c * all_rows];
    largest = here > largest ? here : largest;
  }
  for (std::int64_t c = 0; c < n_chunks; ++c) {
    const std::int64_t at = first + c * all_rows;
    total += partial_sum[at] * exp(partial_largest[at] - largest);
  }
  for (std::int64_t i = threadIdx.x; i < shape.width; i += kBlock) {
    W sum = 0;
    for (std::int64_t c = 0; c < n_chunks; ++c) {
      const std::int64_t at = first + c * all_rows;
      sum += partial_y[at * shape.width + i] * exp(partial_largest[at] - largest);
    }
    // A query that sees nothing gives 0.
    const W result = !valid ? W(NAN) : total == W(0) ? W(0) : sum / total;
    y[blockIdx.x * shape.width + i] = narrow<T>(result);
  }
}

template <class T, class C, int count>
void run(const void* q, const void* k_cache, const void* v_cache, const void* k_scales,
         const void* v_scales, const void* starts, const void* counts, double scale, void* y,
         void* partial_y, void* partial_largest, void* partial_sum, std::int64_t batch,
         const Shape& shape, Stream stream) {
  using W = Wide<T>;
  const std::int64_t all_rows = shape.n_tokens * shape.per_group;
  const Grid grid{batch * shape.groups, shape.n_chunks, blocks_for(all_rows, kRows)};
  const std::size_t bytes = sizeof(W) * kRows * shape.width;
  launch("decode_attention", chunk_kernel<T, C, count>, grid, kBlock, bytes, stream,
         static_cast<const T*>(q), static_cast<const C*>(k_cache), static_cast<const C*>(v_cache),
         static_cast<const float*>(k_scales), static_cast<const float*>(v_scales),
         static_cast<const int*>(starts), static_cast<const int*>(counts), static_cast<W>(scale),
         static_cast<W*>(partial_y), static_cast<W*>(partial_largest), static_cast<W*>(partial_sum),
         shape);
  launch("decode_attention", combine_kernel<T>, {batch * shape.groups * all_rows}, kBlock, 0,
         stream, static_cast<const int*>(starts), static_cast<const int*>(counts),
         static_cast<const W*>(partial_y), static_cast<const W*>(partial_largest),
         static_cast<const W*>(partial_sum), static_cast<T*>(y), shape);
}

}  // namespace

void decode_attention(DType dtype, const void* q, const void* k_cache, std::int64_t k_batch,
                      std::int64_t k_slot, std::int64_t k_head, const void* v_cache,
                      std::int64_t v_batch, std::int64_t v_slot, std::int64_t v_head,
                      const void* k_scales, const void* v_scales, const void* starts,
                      const void* counts, double scale, std::int64_t window, std::int64_t sinks,
                      std::int64_t ring, void* y, void* partial_y, void* partial_largest,
                      void* partial_sum, std::int64_t batch, std::int64_t n_tokens,
                      std::int64_t n_slots, std::int64_t groups, std::int64_t per_group,
                      std::int64_t width, std::int64_t chunk, std::int64_t n_chunks,
                      Stream stream) {
  const Shape shape{{k_batch, k_slot, k_head},
                    {v_batch, v_slot, v_head},
                    n_slots,
                    window,
                    sinks,
                    ring,
                    n_tokens,
                    groups,
                    per_group,
                    width,
                    chunk,
                    n_chunks};
  if (width > kMostWidth) throw std::invalid_argument("decode_attention: heads are too wide");
  const auto fits = [=](std::int64_t bytes, std::int64_t size) {
    bool all = width * size % bytes == 0;
    for (const std::int64_t stride : {k_batch, k_slot, k_head, v_batch, v_slot, v_head}) {
      all = all && stride * size % bytes == 0;
    }
    for (const void* const address : {k_cache, v_cache}) {
      all = all && reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
    }
    return all;
  };
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    const bool is_int8 = k_scales != nullptr;
    // As many numbers of int8 as of T: the sums of a thread are as many.
    const std::int64_t bytes = is_int8 ? kPack<T> : 16;
    with_flag(fits(bytes, is_int8 ? 1 : sizeof(T)), [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      const auto call = [=](auto cache) {
        run<T, decltype(cache), count>(q, k_cache, v_cache, k_scales, v_scales, starts, counts,
                                       scale, y, partial_y, partial_largest, partial_sum, batch,
                                       shape, stream);
      };
      if (is_int8) return call(static_cast<signed char>(0));
      call(T{});
    });
  });
}

}  // namespace pyllm::cuda
