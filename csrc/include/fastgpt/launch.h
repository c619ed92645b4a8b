// The boundary between the torch glue (ops_cpu.cpp, ops_cuda.cpp) and the kernels (cpu/*.cpp, cuda/*.cu): raw pointers,
// sizes and a stream, no torch header. CPU and CUDA take the same structs. Shapes and dtypes are checked by the caller.
#pragma once
#include <cstdint>

namespace fastgpt {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i16 = 3 };

// Rows are N = n_rows, columns C = n_cols. `*_row` is the distance between two rows in elements (0 for an expanded
// tensor); columns are contiguous. Pointers need only element alignment: kernels choose their vector width from it.
struct LayerNormFwdArgs {
  const void* x;         // (N, C) dtype
  const void* residual;  // (N, C) dtype, or null
  const void* weight;    // (C) weight_dtype, or null
  const void* bias;      // (C) weight_dtype, or null
  void* y;               // (N, C) dtype, contiguous
  void* sum;             // (N, C) dtype, contiguous: x + residual; null without residual
  float* stats;          // (2, N): mean, then 1 / sqrt(var + eps)
  int64_t x_row, residual_row;
  int64_t n_rows, n_cols;
  float eps;
  DType dtype, weight_dtype;
};

struct LayerNormBwdArgs {
  const void* dy;      // (N, C) dtype
  const void* dsum;    // (N, C) dtype, or null: gradient that reaches x + residual directly
  const void* h;       // (N, C) dtype: what was normalised
  const void* weight;  // (C) weight_dtype, or null
  const float* stats;  // (2, N)
  void* dx;            // (N, C) dtype, contiguous
  void* dweight;       // (C) weight_dtype, or null
  void* dbias;         // (C) weight_dtype, or null
  float* partials;     // (layer_norm_bwd_blocks(N, C), 2, C): dweight, dbias of each block; null if neither is asked
  int64_t dy_row, dsum_row, h_row;
  int64_t n_rows, n_cols;
  DType dtype, weight_dtype;
};

// loss_i and its gradient by logits_i; formulas in fastgpt/ops/cross_entropy.py.
struct CrossEntropyArgs {
  const void* logits;       // (N, n_cols) dtype, rows logits_row apart
  void* dlogits;            // (N, n_cols) dtype, rows dlogits_row apart; may be the logits themselves
  const int64_t* target;    // (N)
  const float* weight;      // (n_classes), or null
  const float* weight_sum;  // (1): sum of weight; null without weight
  const float* scale;       // (N) or (1): factor of each row's gradient
  float* loss;              // (N)
  float* max;               // (N): of z; written by fwd, read by bwd, not used by fwd_bwd
  float* sum_exp;           // (N): sum exp(z - max); as max
  int64_t logits_row, dlogits_row;
  int64_t scale_step;       // 1 for (N), 0 for (1)
  int64_t n_rows, n_cols, n_classes;
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  DType dtype;
};

struct ScaleRowsArgs {
  void* x;  // (N, n_cols) dtype, rows x_row apart
  const float* scale;
  int64_t x_row, scale_step;
  int64_t n_rows, n_cols;
  DType dtype;
};

// gelu(x + bias); formulas in fastgpt/ops/bias_gelu.py.
struct BiasGeluArgs {
  const void* dy;    // (N, C) dtype; bwd only
  const void* x;     // (N, C) dtype
  const void* bias;  // (C) bias_dtype, or null
  void* out;         // (N, C) dtype, contiguous: y, or dx
  void* dbias;       // (C) bias_dtype; bwd only, null without bias
  float* partials;   // (bias_gelu_bwd_blocks(N, C), C): dbias of each block; null without bias
  int64_t dy_row, x_row;
  int64_t n_rows, n_cols;
  bool tanh;
  DType dtype, bias_dtype;
};

enum class Activation : int { silu = 0, gelu = 1, relu2 = 2, gelu_tanh = 3 };

// act(gate) * up; packed tensors are two halves of one, their rows twice as far apart.
struct SwigluArgs {
  const void* dy;    // (N, C) dtype; bwd only
  const void* gate;  // (N, C) dtype
  const void* up;    // (N, C) dtype
  void* y;           // (N, C) dtype, contiguous; fwd only
  void* dgate;       // (N, C) dtype; bwd only
  void* dup;         // (N, C) dtype; bwd only
  int64_t dy_row, gate_row, up_row, grad_row;
  int64_t n_rows, n_cols;
  Activation activation;
  DType dtype;
};

struct AdamWTensor {
  void* param;       // (numel) param_dtype
  const void* grad;  // (numel) grad_dtype
  void* exp_avg;     // (numel) moment_dtype
  void* exp_avg_sq;  // (numel) moment_dtype
  void* master;      // (numel) fp32 master or int16 remainder, or null
  int64_t numel;
  int32_t group;     // into AdamWArgs::groups and lr
  int32_t step;      // into AdamWArgs::steps
};

struct AdamWGroup {
  double beta1, beta2, eps, weight_decay;
};

struct AdamWArgs {
  const AdamWTensor* tensors;  // host memory
  int64_t n_tensors;
  const AdamWGroup* groups;    // host memory
  int64_t n_groups;
  const float* lr;             // (n_groups), on the device
  float* steps;                // on the device, indexed by AdamWTensor::step
  float* partials;             // on the device: prepare writes [offset, offset + adamw_partials()), update reads all n_partials
  int64_t offset, n_partials;  // n_partials == 0: no norm, no clipping
  float max_norm;              // <= 0: the norm is computed, nothing is clipped
  const float* grad_scale;     // (1) on the device, or null
  const float* found_inf;      // (1) on the device, or null
  float* grad_norm;            // (1) on the device
  bool stochastic;             // bf16 parameters without master: stochastic rounding
  uint64_t seed;
  DType param_dtype, grad_dtype, moment_dtype, master_dtype;  // master_dtype: f32 or i16, meaningful where master is set
};

// RMSNorm: as LayerNorm, without mean and bias; the weight counts as weight + weight_offset.
struct RmsNormFwdArgs {
  const void* x;         // (N, C) dtype
  const void* residual;  // (N, C) dtype, or null
  const void* weight;    // (C) weight_dtype, or null
  void* y;               // (N, C) dtype, contiguous
  void* sum;             // (N, C) dtype, contiguous: x + residual; null without residual
  float* rstd;           // (N): 1 / sqrt(mean of squares + eps)
  int64_t x_row, residual_row;
  int64_t n_rows, n_cols;
  float eps, weight_offset;
  DType dtype, weight_dtype;
};

struct RmsNormBwdArgs {
  const void* dy;      // (N, C) dtype
  const void* dsum;    // (N, C) dtype, or null: gradient that reaches x + residual directly
  const void* h;       // (N, C) dtype: what was normalised
  const void* weight;  // (C) weight_dtype, or null
  const float* rstd;   // (N)
  void* dx;            // (N, C) dtype, contiguous
  void* dweight;       // (C) weight_dtype, or null
  float* partials;     // (rms_norm_bwd_blocks(N, C), C): dweight of each block; null without weight
  int64_t dy_row, dsum_row, h_row;
  int64_t n_rows, n_cols;
  float eps, weight_offset;
  DType dtype, weight_dtype;
};

// Rotary embedding of one or two tensors in one pass; formulas in fastgpt/ops/rope.py. Strides are in elements, columns
// contiguous; a position outside [0, n_positions) gives NaN in the columns that are turned.
struct RopePart {
  const void* x;  // (B, T, H, D) dtype
  void* y;        // (B, T, H, D) dtype; may be x
  int64_t x_batch, x_time, x_head;
  int64_t y_batch, y_time, y_head;
  int64_t n_heads, n_turned;  // heads from n_turned on are copied
};

struct RopeArgs {
  RopePart parts[2];
  const float* cos;          // (n_positions, half)
  const float* sin;          // (n_positions, half)
  const int64_t* positions;  // (T) or (B, T); null: 0, 1, 2, ...
  int64_t positions_batch;   // distance between two batches' positions: T, or 0 for (T)
  int64_t n_batch, n_time, n_cols, half, n_positions;
  float sign;  // -1 turns back
  bool interleaved;
  DType dtype;
};

struct Indices {
  const void* data;  // int64 where wide, else int32; null where absent
  bool wide;
};

// weight[ids] + position_weight[positions]; formulas in fastgpt/ops/embedding.py. An index outside its table gives a
// row of NaN.
struct EmbeddingFwdArgs {
  Indices ids;                  // (N)
  Indices positions;            // (period); absent: token n has position n % period
  const void* weight;           // (n_rows, C) dtype, rows weight_row apart
  const void* position_weight;  // (n_positions, C) dtype, rows position_row apart, or null
  void* y;                      // (N, C) dtype, contiguous
  int64_t weight_row, position_row;
  int64_t n_tokens, n_cols, n_rows, n_positions, period;
  DType dtype;
};

// dweight[ids[n]] += dy[n]; an index outside the table adds nothing. What is CUDA's alone is null on the CPU.
struct EmbeddingBwdArgs {
  Indices ids;     // (N)
  const void* dy;  // (N, C) dtype, rows dy_row apart
  void* dweight;   // (n_rows, C) dweight_dtype, rows dweight_row apart
  const int32_t* sorted;   // (N): table row of each token, ascending; n_rows for one outside; CUDA
  const int64_t* order;    // (N): the token it belongs to; CUDA
  float* partials;         // (embedding_partials(N), C); CUDA
  int32_t* partial_keys;   // (embedding_partials(N)); CUDA
  int64_t dy_row, dweight_row;
  int64_t n_tokens, n_cols, n_rows;
  DType dtype, dweight_dtype;  // dweight_dtype: dtype or f32
};

// softmax(scale q k^T + mask) v; formulas in fastgpt/ops/attention.py. `*_at`: distances in elements between batches,
// rows and heads; the head dimension is contiguous. Index values are not checked: kernels clamp them to what is there.
struct AttentionStrides {
  int64_t batch, row, head;
};

struct AttentionArgs {
  const void *q, *k, *v;  // (B, T, H, D), (B, S, Hkv, D), (B, S, Hkv, D) dtype
  const void* dout;       // (B, T, H, D) dtype; bwd only
  void* out;              // (B, T, H, D) dtype; written by fwd, read by bwd
  float* lse;             // (B, H, T) contiguous; written by fwd, read by bwd
  const float* dlse;      // (B, H, T) contiguous, or null; bwd only
  void *dq, *dk, *dv;     // as q, k, v; bwd only
  float* workspace;       // attention_bwd_workspace(B, T, H) floats; bwd only
  AttentionStrides q_at, k_at, v_at, dout_at, out_at, dq_at, dk_at, dv_at;
  const int32_t *cu_q, *cu_k;         // (n_sequences + 1) starts of packed sequences, or null
  const int32_t* doc_ids;             // (B, T), or null
  const int32_t *kv_lens, *kv_start;  // (B), or null
  const int64_t* rng;                 // (2) seed, offset; null: no dropout
  int64_t n_batch, n_queries, n_keys, n_heads, n_kv_heads, head_dim, n_sequences;
  int64_t window;  // 0: none
  float scale, softcap;
  float keep_scale;     // 1 / (1 - dropout_p)
  uint32_t drop_below;  // an entry is dropped where its random word is less
  bool causal;
  DType dtype;
};

#define FASTGPT_LAUNCHERS(...)                                             \
  void layer_norm_fwd(const LayerNormFwdArgs& a __VA_ARGS__);              \
  void layer_norm_bwd(const LayerNormBwdArgs& a __VA_ARGS__);              \
  void cross_entropy_fwd(const CrossEntropyArgs& a __VA_ARGS__);           \
  void cross_entropy_bwd(const CrossEntropyArgs& a __VA_ARGS__);           \
  void cross_entropy_fwd_bwd(const CrossEntropyArgs& a __VA_ARGS__);       \
  void scale_rows(const ScaleRowsArgs& a __VA_ARGS__);                     \
  void rms_norm_fwd(const RmsNormFwdArgs& a __VA_ARGS__);                  \
  void rms_norm_bwd(const RmsNormBwdArgs& a __VA_ARGS__);                  \
  void bias_gelu_fwd(const BiasGeluArgs& a __VA_ARGS__);                   \
  void bias_gelu_bwd(const BiasGeluArgs& a __VA_ARGS__);                   \
  void swiglu_fwd(const SwigluArgs& a __VA_ARGS__);                        \
  void swiglu_bwd(const SwigluArgs& a __VA_ARGS__);                        \
  void adamw_prepare(const AdamWArgs& a __VA_ARGS__); /* grad, numel, step of each tensor; steps, partials */ \
  void adamw_update(const AdamWArgs& a __VA_ARGS__);                       \
  void rope(const RopeArgs& a __VA_ARGS__);                                \
  void embedding_fwd(const EmbeddingFwdArgs& a __VA_ARGS__);               \
  void embedding_bwd_add(const EmbeddingBwdArgs& a __VA_ARGS__);           \
  void attention_fwd(const AttentionArgs& a __VA_ARGS__);                  \
  void attention_bwd(const AttentionArgs& a __VA_ARGS__);                  \
  /* sizes of the workspaces above, from shapes alone */                   \
  int64_t layer_norm_bwd_blocks(int64_t n_rows, int64_t n_cols);           \
  int64_t rms_norm_bwd_blocks(int64_t n_rows, int64_t n_cols);             \
  int64_t bias_gelu_bwd_blocks(int64_t n_rows, int64_t n_cols);            \
  int64_t adamw_partials(const int64_t* numels, int64_t n_tensors);        \
  int64_t attention_bwd_workspace(int64_t n_batch, int64_t n_queries, int64_t n_heads);

namespace cpu {
FASTGPT_LAUNCHERS()
}  // namespace cpu

namespace cuda {
using Stream = void*;  // a cudaStream_t
#define FASTGPT_STREAM , Stream stream
FASTGPT_LAUNCHERS(FASTGPT_STREAM)
#undef FASTGPT_STREAM
void embedding_keys(const EmbeddingBwdArgs& a, int32_t* keys, Stream stream);  // (N): what is to be sorted
int64_t embedding_partials(int64_t n_tokens);
}  // namespace cuda

#undef FASTGPT_LAUNCHERS
}  // namespace fastgpt
