// Arguments and launchers of RMSNorm; formulas in fastgpt/ops/rms_norm.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

// Like LayerNorm, but without mean and bias; y uses weight + weight_offset.
struct RmsNormFwdArgs {
  const void* x;         // (N, C) dtype
  const void* residual;  // (N, C) dtype, or null
  const void* x_bias;    // (C) x_bias_dtype, or null; only with a residual
  const void* weight;    // (C) weight_dtype, or null
  void* y;               // (N, C) dtype, contiguous
  void* sum;             // (N, C) dtype, contiguous: x + x_bias + residual; null without residual
  float* rstd;           // (N): 1 / sqrt(mean of squares + eps)
  int64_t x_row, residual_row;
  int64_t n_rows, n_cols;
  float eps, weight_offset;
  DType dtype, weight_dtype, x_bias_dtype;
};

struct RmsNormBwdArgs {
  const void* dy;      // (N, C) dtype
  const void* dsum;    // (N, C) dtype, or null: gradient of `sum` from its other uses
  const void* h;       // (N, C) dtype: the input of the normalisation
  const void* weight;  // (C) weight_dtype, or null
  const float* rstd;   // (N)
  void* dx;            // (N, C) dtype, contiguous
  void* dweight;       // (C) weight_dtype, or null
  void* dx_bias;       // (C) x_bias_dtype, or null: column sums of dx
  float* partials;     // (rms_norm_bwd_blocks(N, C), 1 or 2, C): dweight and, unless it is null, dx_bias of each block;
                       // null if none is needed
  int64_t dy_row, dsum_row, h_row;
  int64_t n_rows, n_cols;
  float eps, weight_offset;
  DType dtype, weight_dtype, x_bias_dtype;
};

FASTGPT_ON_EACH_DEVICE(
  void rms_norm_fwd(const RmsNormFwdArgs& a, Stream stream);
  void rms_norm_bwd(const RmsNormBwdArgs& a, Stream stream);
  int64_t rms_norm_bwd_blocks(int64_t n_rows, int64_t n_cols, Stream stream);)

}  // namespace fastgpt
