// Dispatch on the card: a stable counting sort by expert, then rows are gathered. The equations are
// in pyllm/reference/moe_dispatch.py.
//
// The choices are cut into tiles, a warp for each. It counts the choices of each expert; a scan
// turns the counts of all tiles, expert by expert, into the rows where each tile's choices begin;
// then the warp walks its tile again and numbers them. Equal experts within 32 choices find each
// other by __match_any_sync, so that there are no atomics and the order is always the same.
//
// An expert out of range cannot raise an error from here. Such choices are counted under the
// number `n_experts`, come last, behind offsets[n_experts], and their rows are NaN.

#include <cstdint>

#include "cuda/rows.h"

namespace pyllm::cuda {
namespace {

constexpr int kSortWarps = 8;     // tiles of a block
constexpr int kScanBlock = 1024;  // threads that add up all counts

__device__ __forceinline__ int bucket_of(int expert, int n_experts) {
  return expert < 0 || expert >= n_experts ? n_experts : expert;
}

// counts: (n_experts + 1, tiles), zero before the first pass, where each becomes the number of
// choices; in the second one `counts` are the rows to be filled next.
template <bool place>
__global__ void __launch_bounds__(kSortWarps* kWarp, 1)
    walk_kernel(const int* __restrict__ experts, int* __restrict__ counts, int* __restrict__ order,
                int* __restrict__ position, std::int64_t n_choices, int n_experts,
                std::int64_t tile_size, std::int64_t n_tiles) {
  const std::int64_t tile = std::int64_t{blockIdx.x} * kSortWarps + threadIdx.y;
  if (tile >= n_tiles) return;  // with the whole warp
  const int lane = static_cast<int>(threadIdx.x);
  const std::int64_t begin = tile * tile_size;
  const std::int64_t end = begin + tile_size < n_choices ? begin + tile_size : n_choices;
  for (std::int64_t first = begin; first < end; first += kWarp) {
    const std::int64_t slot = first + lane;
    // Lanes behind the end stand together under a number that is nobody's.
    const int bucket = slot < end ? bucket_of(experts[slot], n_experts) : -1;
    const unsigned equal = __match_any_sync(kAllLanes, bucket);
    const int before = __popc(equal & ((1u << lane) - 1u));
    int* const count = counts + (bucket < 0 ? 0 : bucket) * n_tiles + tile;
    int row = 0;
    if (bucket >= 0) row = *count;
    __syncwarp();  // all have read before the first of them writes
    if (bucket >= 0) {
      if (before == 0) *count = row + __popc(equal);
      if (place) {
        order[row + before] = static_cast<int>(slot);
        position[slot] = row + before;
      }
    }
    __syncwarp();
  }
}

// Exclusive prefix sums of counts, in place, by one block; where an expert begins goes to offsets.
__global__ void __launch_bounds__(kScanBlock, 1)
    scan_kernel(int* __restrict__ counts, int* __restrict__ offsets, int n_experts,
                std::int64_t n_tiles) {
  PYLLM_SHARED(int, sums, [kWarp]);
  const std::int64_t n_counts = (std::int64_t{n_experts} + 1) * n_tiles;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  int total = 0;
  for (std::int64_t first = 0; first < n_counts; first += kScanBlock) {
    const std::int64_t i = first + thread;
    const int mine = i < n_counts ? counts[i] : 0;
    int sum = mine;
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += other;
    }
    if (lane == kWarp - 1) sums[warp] = sum;
    __syncthreads();
    int before = total;
    for (int w = 0; w < kScanBlock / kWarp; ++w) {
      if (w < warp) before += sums[w];
      total += sums[w];
    }
    __syncthreads();  // sums are read
    if (i < n_counts) {
      counts[i] = before + sum - mine;
      if (i % n_tiles == 0) offsets[i / n_tiles] = before + sum - mine;
    }
  }
}

template <class T, int count>
__global__ void __launch_bounds__(kRowBlock, 1)
    gather_kernel(const T* __restrict__ x, const int* __restrict__ order,
                  const int* __restrict__ n_valid, T* __restrict__ rows, std::int64_t n_rows,
                  std::int64_t top_k, std::int64_t width) {
  const std::int64_t row = row_of_thread();
  if (row >= n_rows) return;
  const T* const from = x + order[row] / top_k * width;
  const bool valid = row < *n_valid;
  for (std::int64_t i = threadIdx.x * count; i < width; i += blockDim.x * count) {
    auto pack = load_pack<count>(from + i);
    if (!valid) {
      for (int k = 0; k < count; ++k) pack.values[k] = not_a_number<T>();
    }
    store_pack(rows + row * width + i, pack);
  }
}

}  // namespace

void sort_by_expert(const void* experts, void* counts, void* order, void* position, void* offsets,
                    std::int64_t n_choices, std::int64_t n_experts, std::int64_t tile_size,
                    Stream stream) {
  const std::int64_t n_tiles = n_choices > 0 ? blocks_for(n_choices, tile_size) : 1;
  const Grid grid{n_choices > 0 ? blocks_for(n_tiles, kSortWarps) : 0};
  const dim3 threads(kWarp, kSortWarps);
  const auto walk = [=](auto kernel) {
    launch("sort_by_expert", kernel, grid, threads, 0, stream, static_cast<const int*>(experts),
           static_cast<int*>(counts), static_cast<int*>(order), static_cast<int*>(position),
           n_choices, static_cast<int>(n_experts), tile_size, n_tiles);
  };
  walk(walk_kernel<false>);
  launch("sort_by_expert", scan_kernel, {1}, kScanBlock, 0, stream, static_cast<int*>(counts),
         static_cast<int*>(offsets), static_cast<int>(n_experts), n_tiles);
  walk(walk_kernel<true>);
}

void moe_dispatch_gather(DType dtype, const void* x, const void* order, const void* n_valid,
                         void* rows, std::int64_t n_rows, std::int64_t top_k, std::int64_t width,
                         Stream stream) {
  with_storage(dtype, [=](auto storage) {
    using T = decltype(storage);
    with_flag(fits_packs<T>(width, x, rows), [=](auto packed) {
      constexpr int count = packed.kValue ? kPack<T> : 1;
      const dim3 threads = row_threads(width / count);
      launch("moe_dispatch_gather", gather_kernel<T, count>, {blocks_for(n_rows, threads.y)},
             threads, 0, stream, static_cast<const T*>(x), static_cast<const int*>(order),
             static_cast<const int*>(n_valid), static_cast<T*>(rows), n_rows, top_k, width);
    });
  });
}

}  // namespace pyllm::cuda
