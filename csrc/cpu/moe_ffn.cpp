// The expert network and its gradients. The equations are in pyllm/reference/moe_ffn.py.
//
// Rows are sorted by expert, and an expert's rows are cut into tiles (tile.h). A panel of an
// expert's weights is packed once and multiplied with all of its tiles: first product with the
// activation behind it, then the second; between them all threads wait. Experts are taken in groups
// whose scratch stays in the cache. Every number is computed by one thread in one order, so the
// number of threads changes no bit.

#include <algorithm>
#include <cstdint>

#include "cpu/activation.h"
#include "cpu/allocator.h"
#include "cpu/kernels.h"
#include "cpu/numeric.h"
#include "cpu/row_tiles.h"
#include "cpu/team.h"
#include "cpu/tile.h"
#include "cpu/tile_results.h"

namespace pyllm::PYLLM_ISA {
namespace {

template <class Storage>
struct Network {
  using W = Wide<Storage>;
  DType dtype;
  std::int64_t n_tokens, top_k, n_experts, width, hidden;
  const Storage *x, *w_in, *w_out;
  const W* weights;
  const std::int32_t *order, *position, *offsets;

  std::int64_t n_rows() const { return n_tokens * top_k; }
  // The row of a (n_tokens, width) tensor that sorted row r is a copy of.
  const Storage* row_of(const Storage* tensor, std::int64_t r) const {
    return tensor + order[r] / top_k * width;
  }
};

template <class Storage>
Network<Storage> network(DType dtype, const void* x, const void* w_in, const void* w_out,
                         const void* weights, const void* order, const void* position,
                         const void* offsets, std::int64_t n_tokens, std::int64_t top_k,
                         std::int64_t n_experts, std::int64_t width, std::int64_t hidden) {
  using S = const Storage*;
  using I = const std::int32_t*;
  return {dtype,
          n_tokens,
          top_k,
          n_experts,
          width,
          hidden,
          static_cast<S>(x),
          static_cast<S>(w_in),
          static_cast<S>(w_out),
          static_cast<const Wide<Storage>*>(weights),
          static_cast<I>(order),
          static_cast<I>(position),
          static_cast<I>(offsets)};
}

// Packs the lines of a panel whose columns are rows of weights: `n` from `first` on, and for a
// gated network in the second half of the panel those `to_last` rows further.
template <class Storage>
void pack_weight_rows(const Storage* first, int n, int half, std::int64_t to_last,
                      std::int64_t width, Unit<Storage>* panel) {
  constexpr int columns = kTileColumns<Wide<Storage>>;
  const auto line = [=](std::int64_t i) {
    const std::int64_t in_half = i % half < n ? i % half : 0;  // sums beyond n are not looked at
    return first + (in_half + (i < half ? 0 : to_last)) * width;
  };
  pack_lines<columns, Storage>(line, columns, width, panel);
}

template <class Activation, class Storage>
void activate(const Wide<Storage>* sums, int rows, std::int64_t n, Storage* pre, Storage* h,
              std::int64_t hidden) {
  constexpr int columns = kTileColumns<Wide<Storage>>, half = columns / Activation::columns;
  for (int r = 0; r < rows; ++r) {
    const Wide<Storage>* __restrict first = sums + r * columns;
    const Wide<Storage>* __restrict last = first + (Activation::columns - 1) * half;
    Storage* pre_first = pre + r * Activation::columns * hidden;
    Storage* pre_last = pre_first + (Activation::columns - 1) * hidden;
    Storage* __restrict out = h + r * hidden;
    for (std::int64_t i = 0; i < n; ++i) pre_first[i] = narrow<Storage>(first[i]);
    if (Activation::columns == 2) {
      for (std::int64_t i = 0; i < n; ++i) pre_last[i] = narrow<Storage>(last[i]);
    }
    // From what the backward will read.
#pragma omp simd
    for (std::int64_t i = 0; i < n; ++i) {
      out[i] = narrow<Storage>(Activation::hidden(widen(pre_first[i]), widen(pre_last[i])));
    }
  }
}

// A panel times all tiles of an expert: put(tile, sums) gets the products.
template <class Storage, class Put>
void multiply_tiles(const ExpertGroup& group, std::int64_t e, const Unit<Storage>* packed,
                    const Unit<Storage>* panel, std::int64_t steps, const Put& put) {
  alignas(64) Wide<Storage> sums[kTileRows * kTileColumns<Wide<Storage>>];
  const std::int64_t rows = group.rows(e), n_tiles = tiles_of(rows);
  for (std::int64_t t = 0; t < n_tiles; ++t) {
    const RowTile tile = tile_of(group.first_row(e), rows, t);
    tile_products(tile.rows, packed + (group.tile(e) + t) * steps * kTileRows, panel, steps, sums);
    put(tile, sums);
  }
}

// Packs the group's rows, tile by tile, for reductions over `count` numbers; row(r) is where sorted
// row r's begin.
template <class Storage, class Rows>
void pack_tile(const ExpertGroup& group, std::int64_t number, const Rows& row, std::int64_t count,
               Unit<Storage>* packed) {
  group.with_tile(number, [&](std::int64_t, RowTile tile, std::int64_t at) {
    pack_lines<kTileRows, Storage>([&](std::int64_t i) { return row(tile.first + i); }, tile.rows,
                                   count, packed + at * steps_of<Storage>(count) * kTileRows);
  });
}

template <class Storage>
struct ForwardScratch {
  Unit<Storage>*x_packed, *h_packed, *panels;
  Storage *h, *y_rows;
};

// The first product and the activation for the columns that task stands for.
template <class Activation, class Storage>
void first_product(const Network<Storage>& net, const ExpertGroup& group, std::int64_t e,
                   std::int64_t f, const Unit<Storage>* x_packed, Unit<Storage>* panel,
                   Storage* pre, Storage* h) {
  constexpr int half = kTileColumns<Wide<Storage>> / Activation::columns;
  const std::int64_t width = net.width, hidden = net.hidden;
  const int n = static_cast<int>(std::min<std::int64_t>(half, hidden - f));
  const Storage* w = net.w_in + (e * Activation::columns * hidden + f) * width;
  pack_weight_rows(w, n, half, hidden, width, panel);
  multiply_tiles<Storage>(
      group, e, x_packed, panel, steps_of<Storage>(width), [&](RowTile tile, const auto* sums) {
        activate<Activation>(sums, tile.rows, n,
                             pre + tile.first * Activation::columns * hidden + f,
                             h + (tile.first - group.first_row(group.begin)) * hidden + f, hidden);
      });
}

template <class Activation, class Storage>
void forward(const Network<Storage>& net, Storage* pre, Storage* y, std::int64_t group_bytes,
             int n_threads) {
  using U = Unit<Storage>;
  constexpr int columns = kTileColumns<Wide<Storage>>, half = columns / Activation::columns;
  const std::int64_t width = net.width, hidden = net.hidden, n_rows = net.n_rows();
  const std::int64_t in_steps = steps_of<Storage>(width), out_steps = steps_of<Storage>(hidden);
  const std::int64_t in_panels = parts_of(hidden, half);
  const std::int64_t out_panels = parts_of(width, columns);
  const std::int64_t row_bytes = (width + 2 * hidden) * static_cast<std::int64_t>(sizeof(U));
  const std::int64_t most = group_bytes / row_bytes;
  const std::int64_t panel = std::max(in_steps, out_steps) * columns;
  const GroupSizes sizes(net.offsets, net.n_experts, most);
  prefer_large_pages(pre, n_rows * Activation::columns * hidden * sizeof(Storage));
  Team team(4 * sizes.count);
  const Workspace<ForwardScratch<Storage>> scratch([&](Allocator& allocator) {
    ForwardScratch<Storage> arrays;
    arrays.x_packed = allocator.take<U>(sizes.tiles() * in_steps * kTileRows);
    arrays.h_packed = allocator.take<U>(sizes.tiles() * out_steps * kTileRows);
    arrays.panels = allocator.take<U>(panel * n_threads);
    arrays.h = allocator.take<Storage>(sizes.rows * hidden);
    arrays.y_rows = allocator.take<Storage>(n_rows * width);
    return arrays;
  });
  if (scratch.failed()) return;
  team.run(n_threads, [&](Team::Member& member) {
    U* own = scratch->panels + member.number * panel;
    for (std::int64_t next = 0; next < net.n_experts;) {
      const auto group = ExpertGroup::from(net.offsets, next, net.n_experts, most);
      const std::int64_t n_experts = group.n_experts(), first_row = group.first_row(next);
      next = group.end;
      member.for_each(group.tile(group.end), [&](std::int64_t task) {
        pack_tile<Storage>(
            group, task, [&](std::int64_t r) { return net.row_of(net.x, r); }, width,
            scratch->x_packed);
      });
      member.for_each(n_experts * in_panels, [&](std::int64_t task) {
        const std::int64_t e = group.begin + task / in_panels;
        if (group.rows(e) == 0) return;
        first_product<Activation>(net, group, e, task % in_panels * half, scratch->x_packed, own,
                                  pre, scratch->h);
      });
      member.for_each(group.tile(group.end), [&](std::int64_t task) {
        pack_tile<Storage>(
            group, task, [&](std::int64_t r) { return scratch->h + (r - first_row) * hidden; },
            hidden, scratch->h_packed);
      });
      member.for_each(n_experts * out_panels, [&](std::int64_t task) {
        const std::int64_t e = group.begin + task / out_panels, d = task % out_panels * columns;
        if (group.rows(e) == 0) return;
        const int n = static_cast<int>(std::min<std::int64_t>(columns, width - d));
        pack_weight_rows(net.w_out + (e * width + d) * hidden, n, columns, 0, hidden, own);
        multiply_tiles<Storage>(
            group, e, scratch->h_packed, own, out_steps, [&](RowTile tile, const auto* sums) {
              put_rows(sums, tile.rows, n, scratch->y_rows + tile.first * width + d, width);
            });
      });
    }
  });
  moe_combine_forward(net.dtype, scratch->y_rows, net.weights, net.position, y, net.n_tokens,
                      net.top_k, width, n_threads);
}

// The gradient behind the activation for one tile and panel. sums: dh, not yet weighted. `dot` gets
// each row's part of <dh, h>, the gradient of its routing weight. weighted_h, dpre and dot begin
// with the group's first row.
template <class Activation, class Storage>
void activate_backward(const Network<Storage>& net, const Wide<Storage>* sums, const RowTile& tile,
                       std::int64_t first_row, std::int64_t f, std::int64_t n, const Storage* pre,
                       Storage* weighted_h, Storage* dpre, Wide<Storage>* dot,
                       std::int64_t dot_stride) {
  using W = Wide<Storage>;
  constexpr int columns = kTileColumns<Wide<Storage>>;
  const std::int64_t hidden = net.hidden, to_last = (Activation::columns - 1) * hidden;
  const std::int64_t wide = Activation::columns * hidden;
  for (int r = 0; r < tile.rows; ++r) {
    const std::int64_t row = tile.first + r, in_group = row - first_row;
    const std::int64_t at = row * wide + f, group_at = in_group * wide + f;
    const W weight = net.weights[net.order[row]];
    const W* __restrict dh = sums + r * columns;
    const Storage* __restrict pre_first = pre + at;
    const Storage* __restrict pre_last = pre + at + to_last;
    Storage* __restrict out = weighted_h + in_group * hidden + f;
    Storage* __restrict dpre_first = dpre + group_at;
    Storage* __restrict dpre_last = dpre + group_at + to_last;
    W sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < n; ++i) {
      W value, dfirst, dlast = 0;
      Activation::gradient(widen(pre_first[i]), widen(pre_last[i]), value, dfirst, dlast);
      sum += dh[i] * value;
      out[i] = narrow<Storage>(weight * value);
      dpre_first[i] = narrow<Storage>(weight * dh[i] * dfirst);
      if constexpr (Activation::columns == 2) {
        dpre_last[i] = narrow<Storage>(weight * dh[i] * dlast);
      }
    }
    dot[in_group * dot_stride] = sum;
  }
}

template <class Storage>
struct BackwardScratch {
  Unit<Storage>*dy_packed, *dy_columns, *dpre_packed, *dpre_columns, *panels;
  Storage *dpre, *weighted_h, *dx_rows;
  Wide<Storage>* dots;
};

template <class Activation, class Storage>
void backward(const Network<Storage>& net, const Storage* dy, const Storage* pre, Storage* dx,
              Storage* dw_in, Storage* dw_out, Wide<Storage>* dweights, std::int64_t group_bytes,
              int n_threads) {
  using W = Wide<Storage>;
  using U = Unit<Storage>;
  constexpr int columns = kTileColumns<Wide<Storage>>;
  const std::int64_t width = net.width, hidden = net.hidden, n_rows = net.n_rows();
  const std::int64_t wide = Activation::columns * hidden;
  const std::int64_t y_steps = steps_of<Storage>(width), pre_steps = steps_of<Storage>(wide);
  const std::int64_t width_panels = parts_of(width, columns);
  const std::int64_t hidden_panels = parts_of(hidden, columns);
  const std::int64_t width_groups = tiles_of(width);
  const std::int64_t wide_groups = tiles_of(wide);
  const std::int64_t row_bytes =
      (2 * width + 3 * wide + hidden) * static_cast<std::int64_t>(sizeof(U));
  const std::int64_t most = group_bytes / row_bytes;
  const GroupSizes sizes(net.offsets, net.n_experts, most);
  const std::int64_t panel =
      std::max({y_steps, pre_steps, sizes.template steps<Storage>()}) * columns;
  prefer_large_pages(dw_in, net.n_experts * wide * width * sizeof(Storage));
  prefer_large_pages(dw_out, net.n_experts * width * hidden * sizeof(Storage));
  Team team(4 * sizes.count);
  const Workspace<BackwardScratch<Storage>> scratch([&](Allocator& allocator) {
    BackwardScratch<Storage> arrays;
    const std::int64_t rows = sizes.tiles() * kTileRows;
    const std::int64_t steps = sizes.template steps<Storage>() * kTileRows;
    arrays.dy_packed = allocator.take<U>(rows * y_steps);
    arrays.dy_columns = allocator.take<U>(steps * width_groups);
    arrays.dpre_packed = allocator.take<U>(rows * pre_steps);
    arrays.dpre_columns = allocator.take<U>(steps * wide_groups);
    arrays.panels = allocator.take<U>(panel * n_threads);
    arrays.dpre = allocator.take<Storage>(sizes.rows * wide);
    arrays.weighted_h = allocator.take<Storage>(sizes.rows * hidden);
    arrays.dx_rows = allocator.take<Storage>(n_rows * width);
    arrays.dots = allocator.take<W>(sizes.rows * hidden_panels);
    return arrays;
  });
  if (scratch.failed()) return;
  team.run(n_threads, [&](Team::Member& member) {
    U* own = scratch->panels + member.number * panel;
    for (std::int64_t next = 0; next < net.n_experts;) {
      const auto group = ExpertGroup::from(net.offsets, next, net.n_experts, most);
      const std::int64_t n_experts = group.n_experts(), first_row = group.first_row(next);
      const std::int64_t n_tiles = group.tile(group.end);
      next = group.end;
      const auto columns_of = [&](U* packed, std::int64_t e, std::int64_t n_groups) {
        return packed + group.template step<Storage>(e) * n_groups * kTileRows;
      };
      member.for_each(n_tiles + n_experts * width_groups, [&](std::int64_t task) {
        if (task < n_tiles) {
          return pack_tile<Storage>(
              group, task, [&](std::int64_t r) { return net.row_of(dy, r); }, width,
              scratch->dy_packed);
        }
        const std::int64_t e = group.begin + (task - n_tiles) / width_groups;
        const std::int64_t first = group.first_row(e);
        pack_columns<Storage>([&](std::int64_t k) { return net.row_of(dy, first + k); },
                              group.rows(e), (task - n_tiles) % width_groups, width,
                              columns_of(scratch->dy_columns, e, width_groups));
      });
      member.for_each(n_experts * hidden_panels, [&](std::int64_t task) {
        const std::int64_t e = group.begin + task / hidden_panels, p = task % hidden_panels;
        const std::int64_t f = p * columns;
        if (group.rows(e) == 0) return;
        const int n = static_cast<int>(std::min<std::int64_t>(columns, hidden - f));
        const Storage* w = net.w_out + e * width * hidden + f;
        pack_steps<columns, Storage>([&](std::int64_t k) { return w + k * hidden; }, width, n, own);
        multiply_tiles<Storage>(
            group, e, scratch->dy_packed, own, y_steps, [&](RowTile tile, const auto* sums) {
              activate_backward<Activation>(net, sums, tile, first_row, f, n, pre,
                                            scratch->weighted_h, scratch->dpre, scratch->dots + p,
                                            hidden_panels);
            });
      });
      member.for_each(n_tiles + n_experts * wide_groups, [&](std::int64_t task) {
        if (task < n_tiles) {
          group.with_tile(task, [&](std::int64_t, RowTile tile, std::int64_t) {
            for (int i = 0; i < tile.rows; ++i) {
              const W* parts = scratch->dots + (tile.first + i - first_row) * hidden_panels;
              W sum = 0;
              for (std::int64_t p = 0; p < hidden_panels; ++p) sum += parts[p];
              dweights[net.order[tile.first + i]] = sum;
            }
          });
          return pack_tile<Storage>(
              group, task, [&](std::int64_t r) { return scratch->dpre + (r - first_row) * wide; },
              wide, scratch->dpre_packed);
        }
        const std::int64_t e = group.begin + (task - n_tiles) / wide_groups;
        const Storage* rows = scratch->dpre + (group.first_row(e) - first_row) * wide;
        pack_columns<Storage>([&](std::int64_t k) { return rows + k * wide; }, group.rows(e),
                              (task - n_tiles) % wide_groups, wide,
                              columns_of(scratch->dpre_columns, e, wide_groups));
      });
      const std::int64_t per_expert = 2 * width_panels + hidden_panels;
      member.for_each(n_experts * per_expert, [&](std::int64_t task) {
        const std::int64_t e = group.begin + task / per_expert, p = task % per_expert;
        const std::int64_t rows = group.rows(e), first = group.first_row(e);
        if (p < width_panels) {
          if (rows == 0) return;
          const std::int64_t d = p * columns;
          const int n = static_cast<int>(std::min<std::int64_t>(columns, width - d));
          const Storage* w = net.w_in + e * wide * width + d;
          pack_steps<columns, Storage>([&](std::int64_t k) { return w + k * width; }, wide, n, own);
          multiply_tiles<Storage>(
              group, e, scratch->dpre_packed, own, pre_steps, [&](RowTile tile, const auto* sums) {
                put_rows(sums, tile.rows, n, scratch->dx_rows + tile.first * width + d, width);
              });
        } else if (p < 2 * width_panels) {
          const std::int64_t d = (p - width_panels) * columns;
          const int n = static_cast<int>(std::min<std::int64_t>(columns, width - d));
          weight_gradient<Storage>(
              columns_of(scratch->dpre_columns, e, wide_groups), wide,
              [&](std::int64_t k) { return net.row_of(net.x, first + k) + d; }, rows, n, own,
              dw_in + e * wide * width + d, width);
        } else {
          const std::int64_t f = (p - 2 * width_panels) * columns;
          const int n = static_cast<int>(std::min<std::int64_t>(columns, hidden - f));
          const Storage* h = scratch->weighted_h + (first - first_row) * hidden + f;
          weight_gradient<Storage>(
              columns_of(scratch->dy_columns, e, width_groups), width,
              [&](std::int64_t k) { return h + k * hidden; }, rows, n, own,
              dw_out + e * width * hidden + f, hidden);
        }
      });
    }
  });
  moe_combine_forward(net.dtype, scratch->dx_rows, nullptr, net.position, dx, net.n_tokens,
                      net.top_k, width, n_threads);
}

}  // namespace

void moe_ffn_forward(DType dtype, bool gated, const void* x, const void* w_in, const void* w_out,
                     const void* weights, const void* order, const void* position,
                     const void* offsets, void* pre, void* y, std::int64_t n_tokens,
                     std::int64_t top_k, std::int64_t n_experts, std::int64_t width,
                     std::int64_t hidden, std::int64_t group_bytes, int n_threads) {
  with_tile_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    const auto net = network<S>(dtype, x, w_in, w_out, weights, order, position, offsets, n_tokens,
                                top_k, n_experts, width, hidden);
    const auto run = gated ? forward<SwiGlu, S> : forward<Gelu, S>;
    run(net, static_cast<S*>(pre), static_cast<S*>(y), group_bytes, n_threads);
  });
}

void moe_ffn_backward(DType dtype, bool gated, const void* dy, const void* x, const void* w_in,
                      const void* w_out, const void* weights, const void* pre, const void* order,
                      const void* position, const void* offsets, void* dx, void* dw_in,
                      void* dw_out, void* dweights, std::int64_t n_tokens, std::int64_t top_k,
                      std::int64_t n_experts, std::int64_t width, std::int64_t hidden,
                      std::int64_t group_bytes, int n_threads) {
  with_tile_storage(dtype, [=](auto storage) {
    using S = decltype(storage);
    const auto net = network<S>(dtype, x, w_in, w_out, weights, order, position, offsets, n_tokens,
                                top_k, n_experts, width, hidden);
    const auto run = gated ? backward<SwiGlu, S> : backward<Gelu, S>;
    run(net, static_cast<const S*>(dy), static_cast<const S*>(pre), static_cast<S*>(dx),
        static_cast<S*>(dw_in), static_cast<S*>(dw_out), static_cast<Wide<S>*>(dweights),
        group_bytes, n_threads);
  });
}

}  // namespace pyllm::PYLLM_ISA
