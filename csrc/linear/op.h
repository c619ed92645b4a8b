// Arguments and launchers of linear; formulas in fastgpt/ops/linear.py. Only the CPU has a kernel.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

enum class WeightType : int { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };

struct LinearArgs {
  const void* x;        // (N, C) dtype
  const void* weight;   // (F, C) weight_type
  const float* scale;   // (F,), or null
  const void* bias;     // (F,) dtype, or null
  void* y;              // (N, F) dtype, contiguous
  int64_t x_row, weight_row;
  int64_t n_rows, n_in, n_out;  // N, C, F
  DType dtype;
  WeightType weight_type;
};

// out = a b + bias, or added to what out holds; strides in floats
struct ProductArgs {
  const float* a;     // (n_rows, n_inner)
  const float* b;     // (n_inner, n_cols)
  const float* bias;  // (n_cols,), or null
  float* out;         // (n_rows, n_cols), contiguous rows
  int64_t a_row, a_col, b_row, b_col, out_row;
  int64_t n_rows, n_cols, n_inner;  // all > 0
  bool add;
};

namespace cpu {
void linear_fwd(const LinearArgs& a, Stream stream);
void linear_product(const ProductArgs& p, Stream stream);
}  // namespace cpu

}  // namespace fastgpt
