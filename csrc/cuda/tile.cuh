// A block's tile of a matrix product, for cards without tensor cores. Every operation of more than
// one row is made of these.
//
// The block walks along the reduction in slices. The next slice is on its way from global memory
// to registers while the present one, in shared memory, is multiplied. Sums are float (double for
// double), or pairs of halfs that are added to floats after every slice.
//
// An operand is given by its rows: a function from an index to an address, or to null for a row of
// zeros. So a gather costs nothing, and neither do rows that a tile has too many.
#pragma once

#include <cstdint>

#include "cuda/numeric.h"

namespace pyllm::cuda {

constexpr int kThreadColumns = 16;  // threads side by side in a tile
constexpr int kSlice = 16;          // entries of the reduction that are in shared memory at once

// What shared memory holds is a number, or two neighbours of the reduction.
template <class Entry>
constexpr int kSteps = 1;
template <>
inline constexpr int kSteps<__half2> = 2;

// Each thread has micro-tiles: groups of neighbours that are loaded at once, spread over the tile.
// The columns are in at least two groups, the first half of them in the first half of the tile.
// `in_parts`: a long sum is that of partial sums, whose roundings add up to less.
template <class W, int rows, int columns, int thread_rows, bool in_parts = false>
struct Tile {
  static constexpr bool kInParts = in_parts;
  static constexpr int kRows = rows, kColumns = columns;
  static constexpr int kThreads = kThreadColumns * thread_rows;
  static constexpr int kMicroRows = rows / thread_rows;
  static constexpr int kMicroColumns = columns / kThreadColumns;
  static constexpr int kMost = 16 / static_cast<int>(sizeof(W));
  static constexpr int kRowGroup = kMicroRows < kMost ? kMicroRows : kMost;
  static constexpr int kColumnGroup = kMicroColumns / 2 < kMost ? kMicroColumns / 2 : kMost;
  static constexpr int kEntries = kSlice * (rows + columns);  // of shared memory

  static __device__ __forceinline__ int row_group(int group) {
    const int thread = static_cast<int>(threadIdx.x) / kThreadColumns;
    return group * thread_rows * kRowGroup + thread * kRowGroup;
  }
  static __device__ __forceinline__ int column_group(int group) {
    const int thread = static_cast<int>(threadIdx.x) % kThreadColumns;
    return group * kThreadColumns * kColumnGroup + thread * kColumnGroup;
  }
  static __device__ __forceinline__ int row_of(int i) {
    return row_group(i / kRowGroup) + i % kRowGroup;
  }
  static __device__ __forceinline__ int column_of(int j) {
    return column_group(j / kColumnGroup) + j % kColumnGroup;
  }

  struct Sums {
    W at[kMicroRows][kMicroColumns] = {};

    // Adds what `parts` has, and empties it.
    __device__ __forceinline__ void take(Sums& parts) {
#pragma unroll
      for (int i = 0; i < kMicroRows; ++i) {
#pragma unroll
        for (int j = 0; j < kMicroColumns; ++j) {
          at[i][j] += parts.at[i][j];
          parts.at[i][j] = W(0);
        }
      }
    }
  };
};

// 64 x 128 by 128 threads of 8 x 8 for 16 bits. Floats have two sums for each, doubles take twice
// the registers.
template <class T>
using ProductTile =
    Tile<Wide<T>, sizeof(T) == 8 ? 32 : 64, sizeof(T) == 2 ? 128 : 64, 8, sizeof(T) == 4>;

// Up to 16 bytes from `from`, zeros where there is nothing: a null row, or what `left` excludes.
// `packed` says that whole packs can be loaded, of which `left` never leaves a part.
template <class T>
__device__ __forceinline__ Pack<T, kPack<T>> load_part(const T* from, int left, bool packed) {
  Pack<T, kPack<T>> pack;
#pragma unroll
  for (int k = 0; k < kPack<T>; ++k) pack.values[k] = narrow<T>(0);
  if (from == nullptr || left <= 0) return pack;
  if (packed) return load_pack<kPack<T>>(from);
#pragma unroll
  for (int k = 0; k < kPack<T>; ++k) {
    if (k < left) pack.values[k] = from[k];
  }
  return pack;
}

// `count` neighbours, those of the first `left` that there are.
template <class T, int count>
__device__ __forceinline__ void store_part(T* to, int left, bool packed,
                                           const Pack<T, count>& pack) {
  if (packed && left >= count) return store_pack(to, pack);
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (k < left) to[k] = pack.values[k];
  }
}

__device__ __forceinline__ void join(float& entry, const float* values) { entry = values[0]; }
__device__ __forceinline__ void join(double& entry, const double* values) { entry = values[0]; }
__device__ __forceinline__ void join(float& entry, const __half* values) {
  entry = widen(values[0]);
}
__device__ __forceinline__ void join(float& entry, const __nv_bfloat16* values) {
  entry = widen(values[0]);
}
__device__ __forceinline__ void join(float& entry, const signed char* values) {
  entry = static_cast<float>(values[0]);
}
__device__ __forceinline__ void join(double& entry, const signed char* values) {
  entry = static_cast<double>(values[0]);
}
__device__ __forceinline__ void join(__half2& entry, const __half* values) {
  entry = __halves2half2(values[0], values[1]);
}

// An operand whose rows run along the reduction: entry (i, k) is row_at(i)[k].
template <class T, class Entry, int side, int threads>
class Along {
 public:
  template <class RowAt>
  __device__ __forceinline__ Along(const RowAt& row_at, bool packed) : packed_(packed) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) rows_[n] = has(n) ? row_at(piece(n) % side) : nullptr;
  }

  __device__ __forceinline__ void fetch(int start, int depth) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const int k = start + piece(n) / side * kPack<T>;
      pieces_[n] = load_part(rows_[n] == nullptr ? nullptr : rows_[n] + k, depth - k, packed_);
    }
  }

  __device__ __forceinline__ void put(Entry* slice) const {
    constexpr int kEntriesOfPiece = kPack<T> / kSteps<Entry>;
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      if (!has(n)) continue;
      Entry* const to = slice + piece(n) / side * kEntriesOfPiece * side + piece(n) % side;
#pragma unroll
      for (int e = 0; e < kEntriesOfPiece; ++e) {
        join(to[e * side], pieces_[n].values + e * kSteps<Entry>);
      }
    }
  }

 private:
  static constexpr int kAll = side * kSlice * kSteps<Entry> / kPack<T>;
  static constexpr int kPieces = (kAll + threads - 1) / threads;
  static __device__ __forceinline__ int piece(int n) {
    return static_cast<int>(threadIdx.x) + n * threads;
  }
  static __device__ __forceinline__ bool has(int n) {
    return kAll % threads == 0 || piece(n) < kAll;
  }

  const T* rows_[kPieces];
  Pack<T, kPack<T>> pieces_[kPieces];
  bool packed_;
};

// An operand whose rows lie across the reduction: entry (i, k) is row_at(k)[i], i below `extent`.
template <class T, int side, int threads, class RowAt>
class Across {
 public:
  __device__ __forceinline__ Across(const RowAt& row_at, int extent, bool packed)
      : row_at_(row_at), extent_(extent), packed_(packed) {}

  __device__ __forceinline__ void fetch(int start, int depth) {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const int k = start + piece(n) / kPiecesOfRow;
      const int i = piece(n) % kPiecesOfRow * kPack<T>;
      const T* const row = has(n) && k < depth ? row_at_(k) : nullptr;
      pieces_[n] = load_part(row == nullptr ? nullptr : row + i, extent_ - i, packed_);
    }
  }

  __device__ __forceinline__ void put(Wide<T>* slice) const {
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      if (!has(n)) continue;
      Wide<T>* const to = slice + piece(n) * kPack<T>;
#pragma unroll
      for (int e = 0; e < kPack<T>; ++e) to[e] = widen(pieces_[n].values[e]);
    }
  }

 private:
  static constexpr int kPiecesOfRow = side / kPack<T>;
  static constexpr int kAll = kSlice * kPiecesOfRow;
  static constexpr int kPieces = (kAll + threads - 1) / threads;
  static __device__ __forceinline__ int piece(int n) {
    return static_cast<int>(threadIdx.x) + n * threads;
  }
  static __device__ __forceinline__ bool has(int n) {
    return kAll % threads == 0 || piece(n) < kAll;
  }

  RowAt row_at_;
  int extent_;
  Pack<T, kPack<T>> pieces_[kPieces];
  bool packed_;
};

template <class T, int side, int threads, class RowAt>
__device__ __forceinline__ Across<T, side, threads, RowAt> across(const RowAt& row_at, int extent,
                                                                  bool packed) {
  return {row_at, extent, packed};
}

template <class Tile, class Entry>
struct Operands {
  Entry left[Tile::kMicroRows], right[Tile::kMicroColumns];

  __device__ __forceinline__ void load(const Entry* left_row, const Entry* right_row) {
    constexpr int kRowGroup = Tile::kRowGroup, kColumnGroup = Tile::kColumnGroup;
#pragma unroll
    for (int i = 0; i < Tile::kMicroRows; i += kRowGroup) {
      const auto pack = load_pack<kRowGroup>(left_row + Tile::row_group(i / kRowGroup));
#pragma unroll
      for (int k = 0; k < kRowGroup; ++k) left[i + k] = pack.values[k];
    }
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; j += kColumnGroup) {
      const auto pack = load_pack<kColumnGroup>(right_row + Tile::column_group(j / kColumnGroup));
#pragma unroll
      for (int k = 0; k < kColumnGroup; ++k) right[j + k] = pack.values[k];
    }
  }
};

// sums += left^T right for a slice of both.
template <class Tile, int left_stride = Tile::kRows, class W>
__device__ __forceinline__ void add_slice(const W* left, const W* right,
                                          typename Tile::Sums& sums) {
#pragma unroll 4
  for (int k = 0; k < kSlice; ++k) {
    Operands<Tile, W> now;
    now.load(left + k * left_stride, right + k * Tile::kColumns);
#pragma unroll
    for (int i = 0; i < Tile::kMicroRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kMicroColumns; ++j) sums.at[i][j] += now.left[i] * now.right[j];
    }
  }
}

// The same by halfs, twice as many products at once: each of a pair adds up kSlice products.
template <class Tile>
__device__ __forceinline__ void add_pairs(const __half2* left, const __half2* right,
                                          typename Tile::Sums& sums) {
  __half2 pairs[Tile::kMicroRows][Tile::kMicroColumns];
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; ++j) pairs[i][j] = __float2half2_rn(0.0f);
  }
#pragma unroll 4
  for (int k = 0; k < kSlice; ++k) {
    Operands<Tile, __half2> now;
    now.load(left + k * Tile::kRows, right + k * Tile::kColumns);
#pragma unroll
    for (int i = 0; i < Tile::kMicroRows; ++i) {
#pragma unroll
      for (int j = 0; j < Tile::kMicroColumns; ++j) {
        pairs[i][j] = __hfma2(now.left[i], now.right[j], pairs[i][j]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kMicroRows; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kMicroColumns; ++j) {
      sums.at[i][j] += __low2float(pairs[i][j]) + __high2float(pairs[i][j]);
    }
  }
}

// sums += left right over `depth` steps. `shared` has Tile::kEntries; the block's threads may have
// read it until now.
template <class Tile, class Entry, class Left, class Right>
__device__ __forceinline__ void multiply(Left left, Right right, int depth, Entry* shared,
                                         typename Tile::Sums& sums) {
  constexpr int kStride = kSlice * kSteps<Entry>;
  constexpr int kPart = 8 * kStride;
  Entry* const left_slice = shared;
  Entry* const right_slice = shared + kSlice * Tile::kRows;
  typename Tile::Sums parts;  // if there are any
  left.fetch(0, depth);
  right.fetch(0, depth);
  for (int start = 0; start < depth; start += kStride) {
    __syncthreads();  // the slice before has been read
    left.put(left_slice);
    right.put(right_slice);
    __syncthreads();
    if (depth - start > kStride) {
      left.fetch(start + kStride, depth);
      right.fetch(start + kStride, depth);
    }
    if constexpr (kSteps<Entry> == 2) {
      add_pairs<Tile>(left_slice, right_slice, sums);
    } else {
      add_slice<Tile>(left_slice, right_slice, Tile::kInParts ? parts : sums);
      if (Tile::kInParts && start % kPart == kPart - kStride) sums.take(parts);
    }
  }
  if (Tile::kInParts) sums.take(parts);
}

// The same with all of the left operand in shared memory, entry (i, k) at k * left_stride + i, to a
// multiple of kSlice steps; `shared` has kSlice * Tile::kColumns.
template <class Tile, int left_stride, class W, class Right>
__device__ __forceinline__ void multiply_kept(const W* left, Right right, int depth, W* shared,
                                              typename Tile::Sums& sums) {
  right.fetch(0, depth);
  for (int start = 0; start < depth; start += kSlice) {
    __syncthreads();  // the left operand is written, the slice before has been read
    right.put(shared);
    __syncthreads();
    if (depth - start > kSlice) right.fetch(start + kSlice, depth);
    add_slice<Tile, left_stride>(left + start * left_stride, shared, sums);
  }
}

// The sum over the threads of a tile's row; each of them gets it.
template <class T>
__device__ __forceinline__ T row_sum(T value) {
#pragma unroll
  for (int flip = kThreadColumns / 2; flip > 0; flip /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, flip);
  }
  return value;
}
template <class T>
__device__ __forceinline__ T row_max(T value) {
#pragma unroll
  for (int flip = kThreadColumns / 2; flip > 0; flip /= 2) {
    const T other = __shfl_xor_sync(kAllLanes, value, flip);
    value = value > other || value != value ? value : other;  // a NaN stays
  }
  return value;
}

}  // namespace pyllm::cuda
