// Raw ops of layer_norm: check, allocate, fill the struct of the launcher, launch. Schemas are in
// fastgpt/ops/layer_norm.py.
#include "glue/register.h"
#include "layer_norm/op.h"
#include "norm/glue.h"

namespace fastgpt {
namespace {

template <class Device>
std::tuple<Tensor, OptTensor, Tensor> layer_norm_fwd(Tensor x, OptTensor residual, OptTensor weight, OptTensor bias,
                                                     double eps, OptTensor x_bias) {
  const char* op = "layer_norm_fwd";
  LayerNormFwdArgs a{};
  check_norm(op, "x", x, weight, bias, a);
  check_x_bias(op, x, x_bias, a);
  if (residual) check_same_shape(op, "residual", *residual, x);
  FASTGPT_CHECK(residual || !x_bias, op, "x_bias needs a residual");
  const Device device(x);
  const NormFwd t = norm_fwd(x, residual, a);
  Tensor stats = allocate(x, {2, a.n_rows}, ScalarType::Float);
  a.weight = data_or_null(weight), a.bias = data_or_null(bias), a.x_bias = data_or_null(x_bias);
  a.stats = static_cast<float*>(stats.data_ptr());
  a.eps = static_cast<float>(eps);
  if (a.n_rows > 0) layer_norm_fwd(a, device.stream);
  return {t.y, t.sum, stats};
}

template <class Device>
std::tuple<Tensor, OptTensor, OptTensor, OptTensor> layer_norm_bwd(Tensor dy, OptTensor dsum, Tensor h,
                                                                   OptTensor weight, OptTensor bias, Tensor stats,
                                                                   OptTensor x_bias) {
  const char* op = "layer_norm_bwd";
  LayerNormBwdArgs a{};
  check_norm(op, "h", h, weight, bias, a);
  check_x_bias(op, h, x_bias, a);
  check_same_shape(op, "dy", dy, h);
  if (dsum) check_same_shape(op, "dsum", *dsum, h);
  check_flat(op, "stats", stats, ScalarType::Float, 2 * a.n_rows, h);
  const Device device(h);
  const OptTensor dweight = allocate_grad(weight, a.n_rows), dbias = allocate_grad(bias, a.n_rows);
  const OptTensor dx_bias = allocate_grad(x_bias, a.n_rows);
  const int64_t n_blocks = layer_norm_bwd_blocks(a.n_rows, a.n_cols, device.stream);
  const NormBwd t = norm_bwd(dy, dsum, h, n_blocks, x_bias ? 3 : weight || bias ? 2 : 0, a);
  a.weight = data_or_null(weight), a.dweight = data_or_null(dweight), a.dbias = data_or_null(dbias);
  a.dx_bias = data_or_null(dx_bias);
  a.stats = static_cast<const float*>(stats.data_ptr());
  if (a.n_rows > 0) layer_norm_bwd(a, device.stream);
  return {t.dx, dweight, dbias, dx_bias};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(layer_norm_fwd)
FASTGPT_REGISTER(layer_norm_bwd)
