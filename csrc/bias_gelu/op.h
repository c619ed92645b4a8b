// Arguments and launchers of bias_gelu; formulas in fastgpt/ops/bias_gelu.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

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

FASTGPT_ON_EACH_DEVICE(
  void bias_gelu_fwd(const BiasGeluArgs& a, Stream stream);
  void bias_gelu_bwd(const BiasGeluArgs& a, Stream stream);
  int64_t bias_gelu_bwd_blocks(int64_t n_rows, int64_t n_cols, Stream stream);)

}  // namespace fastgpt
