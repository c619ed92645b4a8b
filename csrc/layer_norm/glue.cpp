// layer_norm's raw ops: check, allocate, fill the launcher's struct, launch. Schemas are in fastgpt/ops/layer_norm.py.
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"
#include "layer_norm/op.h"
#include "norm/glue.h"

namespace fastgpt {
namespace {

template <class Device>
std::tuple<Tensor, OptTensor, Tensor> layer_norm_fwd(Tensor x, OptTensor residual, OptTensor weight, OptTensor bias,
                                                     double eps) {
  const char* op = "layer_norm_fwd";
  FASTGPT_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  if (weight && !weight->is_contiguous()) weight = torch::stable::contiguous(*weight);
  if (bias && !bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
  LayerNormFwdArgs a{};
  a.dtype = float_dtype_of(op, "x", x);
  a.weight_dtype = check_affine(op, x, weight, bias);
  if (residual) check_same_shape(op, "residual", *residual, x);
  a.n_cols = x.size(x.dim() - 1);
  a.n_rows = a.n_cols == 0 ? 0 : x.numel() / a.n_cols;
  a.eps = static_cast<float>(eps);
  const Device device(x);
  Tensor y = allocate_like(x), stats = allocate(x, {2, a.n_rows}, ScalarType::Float);
  OptTensor sum = residual ? OptTensor(allocate_like(x)) : std::nullopt;
  if (a.n_rows > 0) {
    const Rows x_rows = rows_of(x), residual_rows = residual ? rows_of(*residual) : Rows{x, 0};
    a.x = x_rows.data(), a.x_row = x_rows.step;
    a.residual = residual ? residual_rows.data() : nullptr, a.residual_row = residual_rows.step;
    a.weight = data_or_null(weight), a.bias = data_or_null(bias);
    a.y = y.data_ptr(), a.sum = sum ? sum->data_ptr() : nullptr;
    a.stats = static_cast<float*>(stats.data_ptr());
    layer_norm_fwd(a, device.stream);
  }
  return {y, sum, stats};
}

template <class Device>
std::tuple<Tensor, OptTensor, OptTensor> layer_norm_bwd(Tensor dy, OptTensor dsum, Tensor h, OptTensor weight,
                                                        OptTensor bias, Tensor stats) {
  const char* op = "layer_norm_bwd";
  FASTGPT_CHECK(h.dim() >= 1, op, "h must have at least one dimension");
  if (weight && !weight->is_contiguous()) weight = torch::stable::contiguous(*weight);
  if (bias && !bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
  LayerNormBwdArgs a{};
  a.dtype = float_dtype_of(op, "h", h);
  a.weight_dtype = check_affine(op, h, weight, bias);
  check_same_shape(op, "dy", dy, h);
  if (dsum) check_same_shape(op, "dsum", *dsum, h);
  a.n_cols = h.size(h.dim() - 1);
  a.n_rows = a.n_cols == 0 ? 0 : h.numel() / a.n_cols;
  check_flat(op, "stats", stats, ScalarType::Float, 2 * a.n_rows, h);
  const Device device(h);
  Tensor dx = allocate_like(h);
  OptTensor dweight = weight ? OptTensor(allocate_like(*weight)) : std::nullopt;
  OptTensor dbias = bias ? OptTensor(allocate_like(*bias)) : std::nullopt;
  if (a.n_rows == 0) {
    if (dweight) torch::stable::zero_(*dweight);
    if (dbias) torch::stable::zero_(*dbias);
    return {dx, dweight, dbias};
  }
  const Rows dy_rows = rows_of(dy), h_rows = rows_of(h), dsum_rows = dsum ? rows_of(*dsum) : Rows{dy, 0};
  OptTensor partials;
  if (weight || bias) {
    partials = allocate(h, {layer_norm_bwd_blocks(a.n_rows, a.n_cols, device.stream), 2, a.n_cols}, ScalarType::Float);
  }
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.h = h_rows.data(), a.h_row = h_rows.step;
  a.dsum = dsum ? dsum_rows.data() : nullptr, a.dsum_row = dsum_rows.step;
  a.weight = data_or_null(weight);
  a.stats = static_cast<const float*>(stats.data_ptr());
  a.dx = dx.data_ptr();
  a.dweight = dweight ? dweight->data_ptr() : nullptr, a.dbias = dbias ? dbias->data_ptr() : nullptr;
  a.partials = partials ? static_cast<float*>(partials->data_ptr()) : nullptr;
  layer_norm_bwd(a, device.stream);
  return {dx, dweight, dbias};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(layer_norm_fwd)
FASTGPT_REGISTER(layer_norm_bwd)
