// Raw ops of rms_norm: check, allocate, fill the struct of the launcher, launch. Schemas are in
// fastgpt/ops/rms_norm.py.
#include "glue/register.h"
#include "norm/glue.h"
#include "rms_norm/op.h"

namespace fastgpt {
namespace {

template <class Device>
std::tuple<Tensor, OptTensor, Tensor> rms_norm_fwd(Tensor x, OptTensor residual, OptTensor weight, double eps,
                                                   double weight_offset, OptTensor x_bias) {
  const char* op = "rms_norm_fwd";
  RmsNormFwdArgs a{};
  OptTensor no_bias;
  check_norm(op, "x", x, weight, no_bias, a);
  check_x_bias(op, x, x_bias, a);
  if (residual) check_same_shape(op, "residual", *residual, x);
  FASTGPT_CHECK(residual || !x_bias, op, "x_bias needs a residual");
  const Device device(x);
  const NormFwd t = norm_fwd(x, residual, a);
  Tensor rstd = allocate(x, {a.n_rows}, ScalarType::Float);
  a.weight = data_or_null(weight), a.x_bias = data_or_null(x_bias);
  a.rstd = static_cast<float*>(rstd.data_ptr());
  a.eps = static_cast<float>(eps), a.weight_offset = static_cast<float>(weight_offset);
  if (a.n_rows > 0) rms_norm_fwd(a, device.stream);
  return {t.y, t.sum, rstd};
}

template <class Device>
std::tuple<Tensor, OptTensor, OptTensor> rms_norm_bwd(Tensor dy, OptTensor dsum, Tensor h, OptTensor weight,
                                                      Tensor rstd, double eps, double weight_offset,
                                                      OptTensor x_bias) {
  const char* op = "rms_norm_bwd";
  RmsNormBwdArgs a{};
  OptTensor no_bias;
  check_norm(op, "h", h, weight, no_bias, a);
  check_x_bias(op, h, x_bias, a);
  check_same_shape(op, "dy", dy, h);
  if (dsum) check_same_shape(op, "dsum", *dsum, h);
  check_flat(op, "rstd", rstd, ScalarType::Float, a.n_rows, h);
  const Device device(h);
  const OptTensor dweight = allocate_grad(weight, a.n_rows), dx_bias = allocate_grad(x_bias, a.n_rows);
  const int64_t n_blocks = rms_norm_bwd_blocks(a.n_rows, a.n_cols, device.stream);
  const NormBwd t = norm_bwd(dy, dsum, h, n_blocks, x_bias ? 2 : weight ? 1 : 0, a);
  a.weight = data_or_null(weight), a.dweight = data_or_null(dweight), a.dx_bias = data_or_null(dx_bias);
  a.rstd = static_cast<const float*>(rstd.data_ptr());
  a.eps = static_cast<float>(eps), a.weight_offset = static_cast<float>(weight_offset);
  if (a.n_rows > 0) rms_norm_bwd(a, device.stream);
  return {t.dx, dweight, dx_bias};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(rms_norm_fwd)
FASTGPT_REGISTER(rms_norm_bwd)
