// The output projection and its cross-entropy. The equations are in
// pyllm/reference/linear_cross_entropy.py.
//
// Forward: a panel of words (tile.h) meets all rows, and each row keeps a running maximum and sum
// of exponentials for a range of words; the logits are nowhere. Backward: a block of words at a
// time, whose logits are computed once more and become their gradient; that is multiplied with the
// rows for the words' own gradient, and with the words for the rows' gradient, which is added up
// block by block in float.

#include <cmath>
#include <cstdint>

#include "cpu/allocator.h"
#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/row_tiles.h"
#include "cpu/team.h"
#include "cpu/tile.h"
#include "cpu/tile_results.h"
#include "cpu/vector_math.h"

namespace pyllm::PYLLM_ISA {
namespace {

// Ranges of words whose sums are kept apart: more than there are threads.
constexpr std::int64_t kRanges = 64;
// Rows combined, and words' gradients computed, in one piece.
constexpr std::int64_t kRowsPerTask = 256, kGroupsPerTask = 4;

template <class Storage>
struct Projection {
  using W = Wide<Storage>;
  const Storage *x, *weight;
  const std::int64_t* targets;
  std::int64_t ignore_index, n_rows, width, n_words;

  std::int64_t steps() const { return steps_of<Storage>(width); }
  std::int64_t n_panels() const { return parts_of(n_words, kTileColumns<W>); }
  const Storage* row(std::int64_t r) const { return x + r * width; }

  void pack_rows(std::int64_t tile, Unit<Storage>* packed) const {
    const RowTile rows = tile_of(0, n_rows, tile);
    pack_lines<kTileRows, Storage>([&](std::int64_t i) { return row(rows.first + i); }, rows.rows,
                                   width, packed + tile * steps() * kTileRows);
  }

  // Calls put(rows, sums, first word, how many) with the logits of a panel's words for each tile.
  template <class Put>
  void logits(std::int64_t panel_index, const Unit<Storage>* x_packed, Unit<Storage>* panel,
              const Put& put) const {
    constexpr int columns = kTileColumns<Wide<Storage>>;
    const std::int64_t first = panel_index * columns;
    const int n = static_cast<int>(std::min<std::int64_t>(columns, n_words - first));
    pack_lines<columns, Storage>([&](std::int64_t i) { return weight + (first + i) * width; }, n,
                                 width, panel);
    alignas(64) W sums[kTileRows * columns];
    for (std::int64_t t = 0; t < tiles_of(n_rows); ++t) {
      const RowTile tile = tile_of(0, n_rows, t);
      tile_products(tile.rows, x_packed + t * steps() * kTileRows, panel, steps(), sums);
      put(tile, sums, first, n);
    }
  }
};

// With an infinite largest value, z - largest would be NaN where it should be 0 or inf.
template <class W>
W shift_of(W largest) {
  return largest - largest == 0 ? largest : W(0);
}

// The sum of exponentials with another shift. Nothing stays nothing, whatever the factor.
template <class W>
W shifted(W sum, W from, W to) {
  return sum > 0 ? sum * exp_of(from - to) : sum;
}

// Adds `columns` logits to a row's largest value so far and its sum of exponentials of what lies
// below that.
template <int columns, class W>
void add_logits(const W* __restrict z, W& largest, W& sum) {
  W most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int i = 0; i < columns; ++i) most = z[i] > most ? z[i] : most;
  if (most > largest) {
    sum = shifted(sum, shift_of(largest), shift_of(most));
    largest = most;
  }
  const W shift = shift_of(largest);
  W part = 0;
#pragma omp simd reduction(+ : part)
  for (int i = 0; i < columns; ++i) part += exp_of(z[i] - shift);
  sum += part;
}

template <class Storage>
struct ForwardScratch {
  Unit<Storage>*x_packed, *panels;
  Wide<Storage>*largest, *sums, *at_target;
};

template <class Storage>
void forward(const Projection<Storage>& p, Wide<Storage>* loss, Wide<Storage>* lse, int n_threads) {
  using W = Wide<Storage>;
  constexpr int columns = kTileColumns<Wide<Storage>>;
  const std::int64_t n_tiles = tiles_of(p.n_rows), steps = p.steps();
  const std::int64_t per_range = parts_of(p.n_panels(), kRanges);
  const std::int64_t n_ranges = per_range > 0 ? parts_of(p.n_panels(), per_range) : 0;
  Team team(3);
  const Workspace<ForwardScratch<Storage>> scratch([&](Allocator& allocator) {
    ForwardScratch<Storage> arrays;
    arrays.x_packed = allocator.take<Unit<Storage>>(n_tiles * steps * kTileRows);
    arrays.panels = allocator.take<Unit<Storage>>(steps * columns * n_threads);
    arrays.largest = allocator.take<W>(n_ranges * p.n_rows);
    arrays.sums = allocator.take<W>(n_ranges * p.n_rows);
    arrays.at_target = allocator.take<W>(p.n_rows);
    return arrays;
  });
  if (scratch.failed()) return;
  team.run(n_threads, [&](Team::Member& member) {
    Unit<Storage>* panel = scratch->panels + member.number * steps * columns;
    member.for_each(n_tiles, [&](std::int64_t t) { p.pack_rows(t, scratch->x_packed); });
    member.for_each(n_ranges, [&](std::int64_t range) {
      W* largest = scratch->largest + range * p.n_rows;
      W* sums = scratch->sums + range * p.n_rows;
      for (std::int64_t r = 0; r < p.n_rows; ++r) largest[r] = -INFINITY, sums[r] = 0;
      const std::int64_t end = std::min(p.n_panels(), (range + 1) * per_range);
      for (std::int64_t at = range * per_range; at < end; ++at) {
        p.logits(at, scratch->x_packed, panel, [&](RowTile tile, W* z, std::int64_t first, int n) {
          for (int i = 0; i < tile.rows; ++i, z += columns) {
            const std::int64_t row = tile.first + i, target = p.targets[row] - first;
            if (target >= 0 && target < n) scratch->at_target[row] = z[target];
            for (int k = n; k < columns; ++k) z[k] = -INFINITY;
            add_logits<columns>(z, largest[row], sums[row]);
          }
        });
      }
    });
    member.for_each(parts_of(p.n_rows, kRowsPerTask), [&](std::int64_t task) {
      const std::int64_t end = std::min(p.n_rows, (task + 1) * kRowsPerTask);
      for (std::int64_t row = task * kRowsPerTask; row < end; ++row) {
        W largest = -INFINITY, sum = 0;
        for (std::int64_t range = 0; range < n_ranges; ++range) {
          const W other = scratch->largest[range * p.n_rows + row];
          largest = other > largest ? other : largest;
        }
        const W shift = shift_of(largest);
        for (std::int64_t range = 0; range < n_ranges; ++range) {
          const std::int64_t at = range * p.n_rows + row;
          sum += shifted(scratch->sums[at], shift_of(scratch->largest[at]), shift);
        }
        lse[row] = shift + W(::log(static_cast<double>(sum)));
        loss[row] = p.targets[row] == p.ignore_index ? 0 : lse[row] - scratch->at_target[row];
      }
    });
  });
}

// One row of logits to their gradient; target: its column here, or none.
template <int columns, class Storage>
void gradient_row(const Wide<Storage>* __restrict z, std::int64_t target, int n, Wide<Storage> lse,
                  Wide<Storage> upstream, Storage* __restrict dz) {
  using W = Wide<Storage>;
  if (n == columns) {
#pragma omp simd
    for (int i = 0; i < columns; ++i) dz[i] = narrow<Storage>(exp_of(z[i] - lse) * upstream);
  } else {
    for (int i = 0; i < n; ++i) dz[i] = narrow<Storage>(exp_of(z[i] - lse) * upstream);
  }
  if (target >= 0 && target < n) {
    dz[target] = narrow<Storage>((exp_of(z[target] - lse) - W(1)) * upstream);
  }
}

template <class Storage>
struct BackwardScratch {
  Unit<Storage>*x_packed, *x_panels, *dz_packed, *dz_columns, *panels;
  Storage* dz;
  Wide<Storage>* dx;
};

template <class Storage>
void backward(const Projection<Storage>& p, const Wide<Storage>* lse, const Wide<Storage>* dloss,
              Storage* dx, Storage* dweight, std::int64_t block_bytes, int n_threads) {
  using W = Wide<Storage>;
  using U = Unit<Storage>;
  constexpr int columns = kTileColumns<Wide<Storage>>;
  constexpr std::int64_t kUnit = columns * kTileRows;  // words that are whole panels and tiles
  const std::int64_t n_tiles = tiles_of(p.n_rows), steps = p.steps();
  const std::int64_t row_steps = steps_of<Storage>(p.n_rows);
  const std::int64_t width_panels = parts_of(p.width, columns);
  const std::int64_t fit =
      block_bytes / (std::max<std::int64_t>(p.n_rows, 1) * static_cast<std::int64_t>(sizeof(U)));
  const std::int64_t block = std::max<std::int64_t>(1, fit / kUnit) * kUnit;
  const std::int64_t block_steps = steps_of<Storage>(block);
  const std::int64_t n_blocks = parts_of(p.n_words, block);
  const std::int64_t panel = std::max(steps, block_steps) * columns;
  prefer_large_pages(dweight, p.n_words * p.width * sizeof(Storage));
  Team team(1 + 3 * n_blocks);
  const Workspace<BackwardScratch<Storage>> scratch([&](Allocator& allocator) {
    BackwardScratch<Storage> arrays;
    arrays.x_packed = allocator.take<U>(n_tiles * steps * kTileRows);
    arrays.x_panels = allocator.take<U>(width_panels * row_steps * columns);
    arrays.dz_packed = allocator.take<U>(n_tiles * block_steps * kTileRows);
    arrays.dz_columns = allocator.take<U>(block * row_steps);
    arrays.panels = allocator.take<U>(panel * n_threads);
    arrays.dz = allocator.take<Storage>(p.n_rows * block);
    arrays.dx = allocator.take<W>(p.n_rows * p.width);
    return arrays;
  });
  if (scratch.failed()) return;
  team.run(n_threads, [&](Team::Member& member) {
    U* own = scratch->panels + member.number * panel;
    const auto columns_at = [&](std::int64_t width_panel) {
      return static_cast<int>(std::min<std::int64_t>(columns, p.width - width_panel * columns));
    };
    member.for_each(n_tiles + width_panels, [&](std::int64_t task) {
      if (task < n_tiles) return p.pack_rows(task, scratch->x_packed);
      const std::int64_t d = task - n_tiles;
      pack_steps<columns, Storage>([&](std::int64_t k) { return p.row(k) + d * columns; }, p.n_rows,
                                   columns_at(d), scratch->x_panels + d * row_steps * columns);
    });
    for (std::int64_t b = 0; b < n_blocks; ++b) {
      const std::int64_t first_word = b * block, words = std::min(block, p.n_words - first_word);
      const std::int64_t groups = tiles_of(words);
      member.for_each(parts_of(words, columns), [&](std::int64_t task) {
        p.logits(first_word / columns + task, scratch->x_packed, own,
                 [&](RowTile tile, const W* z, std::int64_t first, int n) {
                   for (int i = 0; i < tile.rows; ++i) {
                     const std::int64_t row = tile.first + i, target = p.targets[row];
                     Storage* dz = scratch->dz + row * block + (first - first_word);
                     if (target == p.ignore_index) {
                       for (int k = 0; k < n; ++k) dz[k] = narrow<Storage>(0);
                     } else {
                       gradient_row<columns>(z + i * columns, target - first, n, lse[row],
                                             dloss[row], dz);
                     }
                   }
                 });
      });
      member.for_each(n_tiles + groups, [&](std::int64_t task) {
        if (task < n_tiles) {
          const RowTile tile = tile_of(0, p.n_rows, task);
          pack_lines<kTileRows, Storage>(
              [&](std::int64_t i) { return scratch->dz + (tile.first + i) * block; }, tile.rows,
              words, scratch->dz_packed + task * steps_of<Storage>(words) * kTileRows);
          return;
        }
        pack_columns<Storage>([&](std::int64_t k) { return scratch->dz + k * block; }, p.n_rows,
                              task - n_tiles, words, scratch->dz_columns);
      });
      const std::int64_t tasks = parts_of(groups, kGroupsPerTask);
      member.for_each(width_panels + tasks, [&](std::int64_t task) {
        alignas(64) W sums[kTileRows * columns];
        if (task < width_panels) {
          const std::int64_t word_steps = steps_of<Storage>(words);
          const Storage* w = p.weight + first_word * p.width + task * columns;
          const int n = columns_at(task);
          pack_steps<columns, Storage>([&](std::int64_t k) { return w + k * p.width; }, words, n,
                                       own);
          for (std::int64_t t = 0; t < n_tiles; ++t) {
            const RowTile tile = tile_of(0, p.n_rows, t);
            tile_products(tile.rows, scratch->dz_packed + t * word_steps * kTileRows, own,
                          word_steps, sums);
            for (int i = 0; i < tile.rows; ++i) {
              W* sum = scratch->dx + (tile.first + i) * p.width + task * columns;
              Storage* out = dx + (tile.first + i) * p.width + task * columns;
              for (int k = 0; k < n; ++k) {
                sum[k] = b == 0 ? sums[i * columns + k] : sum[k] + sums[i * columns + k];
                if (b == n_blocks - 1) out[k] = narrow<Storage>(sum[k]);
              }
            }
          }
          return;
        }
        const std::int64_t first = (task - width_panels) * kGroupsPerTask;
        for (std::int64_t d = 0; d < width_panels; ++d) {
          for (std::int64_t g = first; g < std::min(groups, first + kGroupsPerTask); ++g) {
            const std::int64_t word = g * kTileRows;
            const int rows = static_cast<int>(std::min<std::int64_t>(kTileRows, words - word));
            tile_products(rows, scratch->dz_columns + word * row_steps,
                          scratch->x_panels + d * row_steps * columns, row_steps, sums);
            stream_rows(sums, rows, columns_at(d),
                        dweight + (first_word + word) * p.width + d * columns, p.width);
          }
        }
        end_stream();
      });
    }
  });
}

template <class Storage>
Projection<Storage> projection(const void* x, const void* weight, const void* targets,
                               std::int64_t ignore_index, std::int64_t n_rows, std::int64_t width,
                               std::int64_t n_words) {
  return {static_cast<const Storage*>(x),
          static_cast<const Storage*>(weight),
          static_cast<const std::int64_t*>(targets),
          ignore_index,
          n_rows,
          width,
          n_words};
}

}  // namespace

void linear_cross_entropy_forward(DType dtype, const void* x, const void* weight,
                                  const void* targets, std::int64_t ignore_index, void* loss,
                                  void* lse, std::int64_t n_rows, std::int64_t width,
                                  std::int64_t n_words, int n_threads) {
  with_tile_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    forward(projection<S>(x, weight, targets, ignore_index, n_rows, width, n_words),
            static_cast<W*>(loss), static_cast<W*>(lse), n_threads);
  });
}

void linear_cross_entropy_backward(DType dtype, const void* x, const void* weight,
                                   const void* targets, std::int64_t ignore_index, const void* lse,
                                   const void* dloss, void* dx, void* dweight, std::int64_t n_rows,
                                   std::int64_t width, std::int64_t n_words,
                                   std::int64_t block_bytes, int n_threads) {
  with_tile_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    using W = Wide<S>;
    backward(projection<S>(x, weight, targets, ignore_index, n_rows, width, n_words),
             static_cast<const W*>(lse), static_cast<const W*>(dloss), static_cast<S*>(dx),
             static_cast<S*>(dweight), block_bytes, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
