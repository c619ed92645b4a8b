// Shared by the glue of layer_norm and rms_norm: checks, allocations, and the fields that both have.
#pragma once
#include "glue/allocate.h"
#include "glue/rows.h"

namespace fastgpt {

// Checks x, called `name` in errors, and the parameters, makes the parameters contiguous, and sets dtypes and sizes.
template <class Args>
void check_norm(const char* op, const char* name, const Tensor& x, OptTensor& weight, OptTensor& bias, Args& a) {
  FASTGPT_CHECK(x.dim() >= 1, op, name, " must have at least one dimension");
  a.n_cols = x.size(x.dim() - 1), a.n_rows = row_count(x);
  a.dtype = float_dtype_of(op, name, x);
  make_contiguous(weight), make_contiguous(bias);
  const ScalarType dtype = weight ? weight->scalar_type() : bias ? bias->scalar_type() : x.scalar_type();
  FASTGPT_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float, op, "weight and bias have the wrong dtype");
  if (weight) check_flat(op, "weight", *weight, dtype, a.n_cols, x);
  if (bias) check_flat(op, "bias", *bias, dtype, a.n_cols, x);
  a.weight_dtype = weight ? float_dtype_of(op, "weight", *weight) : bias ? float_dtype_of(op, "bias", *bias) : DType::f32;
}

// Checks x_bias, makes it contiguous and sets its dtype; `like`: x, or h.
template <class Args>
void check_x_bias(const char* op, const Tensor& like, OptTensor& x_bias, Args& a) {
  a.x_bias_dtype = a.dtype;
  if (!x_bias) return;
  make_contiguous(x_bias);
  a.x_bias_dtype = float_dtype_of(op, "x_bias", *x_bias);
  FASTGPT_CHECK(a.x_bias_dtype == a.dtype || a.x_bias_dtype == DType::f32, op, "x_bias has the wrong dtype");
  check_flat(op, "x_bias", *x_bias, x_bias->scalar_type(), a.n_cols, like);
}

// Inputs and outputs of forward. They own the memory that `a` points to.
struct NormFwd {
  Rows x, residual;
  Tensor y;
  OptTensor sum;
};

// Sets all pointers and strides except those of the parameters and the statistics.
template <class Args>
NormFwd norm_fwd(const Tensor& x, const OptTensor& residual, Args& a) {
  const Rows x_rows = rows_of(x);
  NormFwd t{x_rows, residual ? rows_of(*residual) : x_rows, allocate_like(x), std::nullopt};
  if (residual) t.sum = allocate_like(x);
  a.x = t.x.data(), a.x_row = t.x.step;
  a.residual = residual ? t.residual.data() : nullptr, a.residual_row = t.residual.step;
  a.y = t.y.data_ptr(), a.sum = t.sum ? t.sum->data_ptr() : nullptr;
  return t;
}

// Inputs and outputs of backward. They own the memory that `a` points to.
struct NormBwd {
  Rows dy, dsum, h;
  Tensor dx;
  OptTensor partials;
};

// Sets all pointers and strides except those of the parameters, their gradients and the statistics. n_blocks is the
// number of blocks of rows, each with a partial for n_sums gradients of parameters; n_sums is 0 if none is needed.
template <class Args>
NormBwd norm_bwd(const Tensor& dy, const OptTensor& dsum, const Tensor& h, int64_t n_blocks, int64_t n_sums, Args& a) {
  const Rows dy_rows = rows_of(dy);
  NormBwd t{dy_rows, dsum ? rows_of(*dsum) : dy_rows, rows_of(h), allocate_like(h), std::nullopt};
  a.dy = t.dy.data(), a.dy_row = t.dy.step;
  a.h = t.h.data(), a.h_row = t.h.step;
  a.dsum = dsum ? t.dsum.data() : nullptr, a.dsum_row = t.dsum.step;
  a.dx = t.dx.data_ptr();
  if (n_sums > 0) {
    t.partials = allocate(h, {n_blocks, n_sums, a.n_cols}, ScalarType::Float);
    a.partials = static_cast<float*>(t.partials->data_ptr());
  }
  return t;
}

}  // namespace fastgpt
