// What layer_norm and rms_norm check in their glue.
#pragma once
#include "glue/check.h"

namespace fastgpt {

inline DType check_affine(const char* op, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  const int64_t n_cols = x.size(x.dim() - 1);
  const ScalarType dtype = weight ? weight->scalar_type() : bias ? bias->scalar_type() : x.scalar_type();
  FASTGPT_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float, op, "weight and bias have the wrong dtype");
  if (weight) check_flat(op, "weight", *weight, dtype, n_cols, x);
  if (bias) check_flat(op, "bias", *bias, dtype, n_cols, x);
  return weight ? float_dtype_of(op, "weight", *weight) : bias ? float_dtype_of(op, "bias", *bias) : DType::f32;
}

}  // namespace fastgpt
