// The launchers of all CUDA kernels, for the bindings: addresses on the card, sizes, and the stream
// as the last argument. None of them waits for the card. One that cannot launch throws.
#pragma once

#include <cstdint>
#include <string>

namespace pyllm::cuda {

// What a tensor is stored as. The bindings give the codes to Python (pyllm._cuda.DTYPES).
enum class DType : int { float32, float64, bfloat16, float16 };

// A cudaStream_t, without CUDA's headers.
struct Stream {
  void* handle;
};

// device.cu. Why no kernel can run on the device that is current: its driver is older than the
// runtime, or they were compiled for other cards. Empty where they can.
std::string obstacle();

// rms_norm.cu. rstd and weight are in the type that sums are kept in; so is the scratch: means
// (rows,) and partials (blocks, width), a block of the backward taking rows_per_block rows.
void rms_norm_forward(DType dtype, const void* x, const void* weight, double eps, void* y,
                      void* rstd, std::int64_t rows, std::int64_t width, Stream stream);
void rms_norm_backward(DType dtype, const void* dy, const void* x, const void* weight,
                       const void* rstd, void* dx, void* dweight, void* means, void* partials,
                       std::int64_t rows, std::int64_t width, std::int64_t rows_per_block,
                       Stream stream);

// moe_dispatch.cu. counts: scratch, ((n_experts + 1) * tiles,) int32, zeros, for tiles of
// `tile_size` choices, at least one. n_valid: the last of the offsets.
void sort_by_expert(const void* experts, void* counts, void* order, void* position, void* offsets,
                    std::int64_t n_choices, std::int64_t n_experts, std::int64_t tile_size,
                    Stream stream);
void moe_dispatch_gather(DType dtype, const void* x, const void* order, const void* n_valid,
                         void* rows, std::int64_t n_rows, std::int64_t top_k, std::int64_t width,
                         Stream stream);

// moe_combine.cu. Without weights (null) rows are added up as they are.
void moe_combine_forward(DType dtype, const void* rows, const void* weights, const void* position,
                         void* y, std::int64_t n_tokens, std::int64_t top_k, std::int64_t width,
                         Stream stream);
void moe_combine_backward(DType dtype, const void* dy, const void* rows, const void* weights,
                          const void* position, void* drows, void* dweights, std::int64_t n_tokens,
                          std::int64_t top_k, std::int64_t width, Stream stream);

// rope.cu. Strides in elements; table_stride: of a batch row, 0 for one table.
void rope(DType dtype, bool inverse, const void* x, std::int64_t batch_stride,
          std::int64_t token_stride, std::int64_t head_stride, const void* cosines,
          const void* sines, std::int64_t table_stride, void* y, std::int64_t n_batch,
          std::int64_t n_tokens, std::int64_t n_heads, std::int64_t half, Stream stream);

// kv_append.cu. Strides in elements; ring: 0 for a contiguous cache.
void kv_append(DType dtype, void* k_cache, void* v_cache, const void* k, std::int64_t k_batch,
               std::int64_t k_token, std::int64_t k_head, const void* v, std::int64_t v_batch,
               std::int64_t v_token, std::int64_t v_head, const void* starts, const void* counts,
               std::int64_t sinks, std::int64_t ring, std::int64_t batch, std::int64_t n_tokens,
               std::int64_t n_slots, std::int64_t groups, std::int64_t width, Stream stream);
void kv_append_int8(DType dtype, void* k_cache, void* v_cache, void* k_scales, void* v_scales,
                    const void* k, std::int64_t k_batch, std::int64_t k_token, std::int64_t k_head,
                    const void* v, std::int64_t v_batch, std::int64_t v_token, std::int64_t v_head,
                    const void* starts, const void* counts, std::int64_t sinks, std::int64_t ring,
                    std::int64_t batch, std::int64_t n_tokens, std::int64_t n_slots,
                    std::int64_t groups, std::int64_t width, Stream stream);

// route_topk.cu. Scratch, for blocks of rows_per_warp rows a warp: partials (warps, n_experts + 1)
// in the type that sums are kept in, partial_counts (warps, n_experts) int32. bias may be null.
void route_topk_forward(DType dtype, const void* logits, const void* bias, void* weights,
                        void* experts, void* balance_loss, void* z_loss, void* tokens_per_expert,
                        void* partials, void* partial_counts, std::int64_t rows,
                        std::int64_t n_experts, std::int64_t top_k, std::int64_t rows_per_warp,
                        Stream stream);
void route_topk_backward(DType dtype, const void* dweights, const void* dbalance_loss,
                         const void* dz_loss, const void* logits, const void* weights,
                         const void* experts, const void* tokens_per_expert, void* dlogits,
                         std::int64_t rows, std::int64_t n_experts, std::int64_t top_k,
                         Stream stream);

// decode_attention.cu. Strides in elements; scales null, but for an int8 cache. Scratch in the type
// that sums are kept in: partial_y (batch * groups, n_chunks, n_tokens * per_group, width), the two
// others without the width. n_chunks of `chunk` keys cover all that a query may see.
void decode_attention(DType dtype, const void* q, const void* k_cache, std::int64_t k_batch,
                      std::int64_t k_slot, std::int64_t k_head, const void* v_cache,
                      std::int64_t v_batch, std::int64_t v_slot, std::int64_t v_head,
                      const void* k_scales, const void* v_scales, const void* starts,
                      const void* counts, double scale, std::int64_t window, std::int64_t sinks,
                      std::int64_t ring, void* y, void* partial_y, void* partial_largest,
                      void* partial_sum, std::int64_t batch, std::int64_t n_tokens,
                      std::int64_t n_slots, std::int64_t groups, std::int64_t per_group,
                      std::int64_t width, std::int64_t chunk, std::int64_t n_chunks, Stream stream);

// int8_linear.cu. q: scratch, (rows, pitch) int8, pitch being the width rounded up to 16; scales:
// (rows,) float32. int8_matmul takes what quantize_rows made; int8_one_row takes x, of one
// row of at most 32,768 numbers, a multiple of 16; int8_weights, in int8_linear_weights.cu, leaves
// x as it is. tensor_cores: may they be used where the card has them?
void quantize_rows(DType dtype, const void* x, void* q, void* scales, std::int64_t rows,
                   std::int64_t width, std::int64_t pitch, Stream stream);
void int8_one_row(DType dtype, const void* x, const void* weight, const void* weight_scale, void* y,
                  std::int64_t features, std::int64_t width, Stream stream);
void int8_matmul(DType dtype, const void* q, const void* scales, const void* weight,
                 const void* weight_scale, void* y, std::int64_t rows, std::int64_t features,
                 std::int64_t width, std::int64_t pitch, bool tensor_cores, Stream stream);
void int8_weights(DType dtype, const void* x, const void* weight, const void* weight_scale, void* y,
                  std::int64_t rows, std::int64_t features, std::int64_t width, bool tensor_cores,
                  Stream stream);

// moe_ffn.cu. tiles: (most_tiles, 2) int32 by moe_tiles, of tile_rows sorted rows at most: 64, of
// float64 32. h (rows, hidden) and y_rows (rows, width) are scratch; moe_combine.cu ends the job.
void moe_tiles(const void* offsets, void* tiles, std::int64_t n_experts, std::int64_t n_rows,
               std::int64_t tile_rows, std::int64_t most_tiles, Stream stream);
void moe_ffn_forward(DType dtype, const void* x, const void* w_in, const void* w_out,
                     const void* order, const void* offsets, const void* tiles, void* pre, void* h,
                     void* y_rows, std::int64_t n_rows, std::int64_t top_k, std::int64_t n_experts,
                     std::int64_t width, std::int64_t hidden, bool gated, std::int64_t most_tiles,
                     Stream stream);
// moe_ffn_few.cu: all of the forward, for few tokens.
void moe_ffn_few(DType dtype, const void* x, const void* w_in, const void* w_out,
                 const void* weights, const void* experts, void* y, void* pre, void* h, void* order,
                 void* position, void* offsets, std::int64_t n_tokens, std::int64_t top_k,
                 std::int64_t n_experts, std::int64_t width, std::int64_t hidden, bool gated,
                 Stream stream);
// moe_ffn_backward.cu. Scratch: dpre as pre, weighted_h (rows, hidden), partials (hidden / 128, of
// float32 and float64 64, rounded up; rows) in the type of sums, dx_rows (rows, width), which
// moe_combine.cu adds up.
void moe_ffn_backward(DType dtype, const void* dy, const void* x, const void* w_in,
                      const void* w_out, const void* weights, const void* pre, const void* order,
                      const void* position, const void* offsets, const void* tiles, void* dpre,
                      void* weighted_h, void* partials, void* dx_rows, void* dw_in, void* dw_out,
                      void* dweights, std::int64_t n_rows, std::int64_t top_k,
                      std::int64_t n_experts, std::int64_t width, std::int64_t hidden, bool gated,
                      std::int64_t most_tiles, Stream stream);

// attention.cu, attention_backward.cu. Contiguous tensors; heads of up to 128 numbers; window 0 for
// none. delta is scratch of lse's size and type.
void attention_forward(DType dtype, const void* q, const void* k, const void* v, double scale,
                       void* y, void* lse, std::int64_t batch, std::int64_t n_queries,
                       std::int64_t n_keys, std::int64_t n_heads, std::int64_t n_kv_heads,
                       std::int64_t head, bool causal, std::int64_t window, std::int64_t sinks,
                       Stream stream);
void attention_backward(DType dtype, const void* dy, const void* q, const void* k, const void* v,
                        const void* y, const void* lse, double scale, void* delta, void* dq,
                        void* dk, void* dv, std::int64_t batch, std::int64_t n_queries,
                        std::int64_t n_keys, std::int64_t n_heads, std::int64_t n_kv_heads,
                        std::int64_t head, bool causal, std::int64_t window, std::int64_t sinks,
                        Stream stream);

// linear_cross_entropy.cu. Scratch of the forward, in the type of sums: partials (words / 128, of
// float32 and float64 64, rounded up; 2; rows) and picked (rows,). The backward gives the gradients
// of some words' logits, (rows, last_word - first_word); products with them are the caller's.
void linear_cross_entropy_forward(DType dtype, const void* x, const void* weight,
                                  const void* targets, void* loss, void* lse, void* partials,
                                  void* picked, std::int64_t ignore_index, std::int64_t n_rows,
                                  std::int64_t n_words, std::int64_t width, Stream stream);
void linear_cross_entropy_backward(DType dtype, const void* dloss, const void* x,
                                   const void* weight, const void* targets, const void* lse,
                                   void* dlogits, std::int64_t ignore_index, std::int64_t n_rows,
                                   std::int64_t width, std::int64_t first_word,
                                   std::int64_t last_word, Stream stream);

}  // namespace pyllm::cuda
