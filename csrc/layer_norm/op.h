// Arguments and launchers of LayerNorm; formulas in fastgpt/ops/layer_norm.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

struct LayerNormFwdArgs {
  const void* x;         // (N, C) dtype
  const void* residual;  // (N, C) dtype, or null
  const void* x_bias;    // (C) x_bias_dtype, or null; only with a residual
  const void* weight;    // (C) weight_dtype, or null
  const void* bias;      // (C) weight_dtype, or null
  void* y;               // (N, C) dtype, contiguous
  void* sum;             // (N, C) dtype, contiguous: x + x_bias + residual; null without residual
  float* stats;          // (2, N): mean, then 1 / sqrt(var + eps)
  int64_t x_row, residual_row;
  int64_t n_rows, n_cols;
  float eps;
  DType dtype, weight_dtype, x_bias_dtype;
};

struct LayerNormBwdArgs {
  const void* dy;      // (N, C) dtype
  const void* dsum;    // (N, C) dtype, or null: gradient of `sum` from its other uses
  const void* h;       // (N, C) dtype: the input of the normalisation
  const void* weight;  // (C) weight_dtype, or null
  const float* stats;  // (2, N)
  void* dx;            // (N, C) dtype, contiguous
  void* dweight;       // (C) weight_dtype, or null
  void* dbias;         // (C) weight_dtype, or null
  void* dx_bias;       // (C) x_bias_dtype, or null: column sums of dx
  float* partials;     // (layer_norm_bwd_blocks(N, C), 2 or 3, C): dweight, dbias and, unless it is null, dx_bias of
                       // each block; null if none is needed
  int64_t dy_row, dsum_row, h_row;
  int64_t n_rows, n_cols;
  DType dtype, weight_dtype, x_bias_dtype;
};

FASTGPT_ON_EACH_DEVICE(
  void layer_norm_fwd(const LayerNormFwdArgs& a, Stream stream);
  void layer_norm_bwd(const LayerNormBwdArgs& a, Stream stream);
  int64_t layer_norm_bwd_blocks(int64_t n_rows, int64_t n_cols, Stream stream);)

}  // namespace fastgpt
