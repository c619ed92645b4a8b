// Raw ops of bias_gelu: check, allocate, fill the struct of the launcher, launch. Schemas are in
// fastgpt/ops/bias_gelu.py.
#include "bias_gelu/op.h"
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"

namespace fastgpt {
namespace {

// Sets everything except x, dy and the outputs; `bias` owns its memory.
BiasGeluArgs bias_gelu_args(const char* op, const Tensor& x, OptTensor& bias, bool tanh) {
  FASTGPT_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  BiasGeluArgs a{};
  a.dtype = float_dtype_of(op, "x", x);
  a.n_cols = x.size(x.dim() - 1);
  a.n_rows = row_count(x);
  a.tanh = tanh;
  make_contiguous(bias);
  if (bias) {
    a.bias_dtype = float_dtype_of(op, "bias", *bias);
    FASTGPT_CHECK(a.bias_dtype == a.dtype || a.bias_dtype == DType::f32, op, "bias has the wrong dtype");
    check_flat(op, "bias", *bias, bias->scalar_type(), a.n_cols, x);
    a.bias = bias->data_ptr();
  }
  return a;
}

template <class Device>
Tensor bias_gelu_fwd(Tensor x, OptTensor bias, bool tanh) {
  BiasGeluArgs a = bias_gelu_args("bias_gelu_fwd", x, bias, tanh);
  const Device device(x);
  Tensor y = allocate_like(x);
  if (a.n_rows == 0) return y;
  const Rows x_rows = rows_of(x);
  a.x = x_rows.data(), a.x_row = x_rows.step;
  a.out = y.data_ptr();
  bias_gelu_fwd(a, device.stream);
  return y;
}

template <class Device>
std::tuple<Tensor, OptTensor> bias_gelu_bwd(Tensor dy, Tensor x, OptTensor bias, bool tanh) {
  const char* op = "bias_gelu_bwd";
  BiasGeluArgs a = bias_gelu_args(op, x, bias, tanh);
  check_same_shape(op, "dy", dy, x);
  const Device device(x);
  Tensor dx = allocate_like(x);
  const OptTensor dbias = allocate_grad(bias, a.n_rows);
  OptTensor partials;
  if (a.n_rows == 0) return {dx, dbias};
  const Rows x_rows = rows_of(x), dy_rows = rows_of(dy);
  a.x = x_rows.data(), a.x_row = x_rows.step;
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.out = dx.data_ptr();
  if (dbias) {
    partials = allocate(x, {bias_gelu_bwd_blocks(a.n_rows, a.n_cols, device.stream), a.n_cols}, ScalarType::Float);
    a.dbias = dbias->data_ptr(), a.partials = static_cast<float*>(partials->data_ptr());
  }
  bias_gelu_bwd(a, device.stream);
  return {dx, dbias};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(bias_gelu_fwd)
FASTGPT_REGISTER(bias_gelu_bwd)
