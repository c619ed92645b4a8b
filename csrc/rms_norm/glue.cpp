// rms_norm's raw ops: check, allocate, fill the launcher's struct, launch. Schemas are in fastgpt/ops/rms_norm.py.
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"
#include "norm/glue.h"
#include "rms_norm/op.h"

namespace fastgpt {
namespace {

template <class Device>
std::tuple<Tensor, OptTensor, Tensor> rms_norm_fwd(Tensor x, OptTensor residual, OptTensor weight, double eps,
                                                   double weight_offset) {
  const char* op = "rms_norm_fwd";
  FASTGPT_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  if (weight && !weight->is_contiguous()) weight = torch::stable::contiguous(*weight);
  RmsNormFwdArgs a{};
  a.dtype = float_dtype_of(op, "x", x);
  a.weight_dtype = check_affine(op, x, weight, std::nullopt);
  if (residual) check_same_shape(op, "residual", *residual, x);
  a.n_cols = x.size(x.dim() - 1);
  a.n_rows = a.n_cols == 0 ? 0 : x.numel() / a.n_cols;
  a.eps = static_cast<float>(eps), a.weight_offset = static_cast<float>(weight_offset);
  const Device device(x);
  Tensor y = allocate_like(x), rstd = allocate(x, {a.n_rows}, ScalarType::Float);
  OptTensor sum = residual ? OptTensor(allocate_like(x)) : std::nullopt;
  if (a.n_rows > 0) {
    const Rows x_rows = rows_of(x), residual_rows = residual ? rows_of(*residual) : Rows{x, 0};
    a.x = x_rows.data(), a.x_row = x_rows.step;
    a.residual = residual ? residual_rows.data() : nullptr, a.residual_row = residual_rows.step;
    a.weight = data_or_null(weight);
    a.y = y.data_ptr(), a.sum = sum ? sum->data_ptr() : nullptr;
    a.rstd = static_cast<float*>(rstd.data_ptr());
    rms_norm_fwd(a, device.stream);
  }
  return {y, sum, rstd};
}

template <class Device>
std::tuple<Tensor, OptTensor> rms_norm_bwd(Tensor dy, OptTensor dsum, Tensor h, OptTensor weight, Tensor rstd,
                                           double eps, double weight_offset) {
  const char* op = "rms_norm_bwd";
  FASTGPT_CHECK(h.dim() >= 1, op, "h must have at least one dimension");
  if (weight && !weight->is_contiguous()) weight = torch::stable::contiguous(*weight);
  RmsNormBwdArgs a{};
  a.dtype = float_dtype_of(op, "h", h);
  a.weight_dtype = check_affine(op, h, weight, std::nullopt);
  check_same_shape(op, "dy", dy, h);
  if (dsum) check_same_shape(op, "dsum", *dsum, h);
  a.n_cols = h.size(h.dim() - 1);
  a.n_rows = a.n_cols == 0 ? 0 : h.numel() / a.n_cols;
  a.eps = static_cast<float>(eps), a.weight_offset = static_cast<float>(weight_offset);
  check_flat(op, "rstd", rstd, ScalarType::Float, a.n_rows, h);
  const Device device(h);
  Tensor dx = allocate_like(h);
  OptTensor dweight = weight ? OptTensor(allocate_like(*weight)) : std::nullopt;
  if (a.n_rows == 0) {
    if (dweight) torch::stable::zero_(*dweight);
    return {dx, dweight};
  }
  const Rows dy_rows = rows_of(dy), h_rows = rows_of(h), dsum_rows = dsum ? rows_of(*dsum) : Rows{dy, 0};
  OptTensor partials;
  if (weight) {
    partials = allocate(h, {rms_norm_bwd_blocks(a.n_rows, a.n_cols, device.stream), a.n_cols}, ScalarType::Float);
  }
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.h = h_rows.data(), a.h_row = h_rows.step;
  a.dsum = dsum ? dsum_rows.data() : nullptr, a.dsum_row = dsum_rows.step;
  a.weight = data_or_null(weight);
  a.rstd = static_cast<const float*>(rstd.data_ptr());
  a.dx = dx.data_ptr(), a.dweight = dweight ? dweight->data_ptr() : nullptr;
  a.partials = partials ? static_cast<float*>(partials->data_ptr()) : nullptr;
  rms_norm_bwd(a, device.stream);
  return {dx, dweight};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(rms_norm_fwd)
FASTGPT_REGISTER(rms_norm_bwd)
