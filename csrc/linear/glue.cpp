// Raw op of linear: check, allocate, fill the struct of the launcher, launch. The schema is in fastgpt/ops/linear.py.
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"
#include "linear/op.h"

namespace fastgpt {
namespace {

WeightType weight_type_of(const char* op, const Tensor& weight) {
  if (weight.scalar_type() == ScalarType::Char) return WeightType::i8;
  const DType dtype = float_dtype_of(op, "weight", weight);
  return dtype == DType::f32 ? WeightType::f32 : dtype == DType::bf16 ? WeightType::bf16 : WeightType::f16;
}

template <class Device>
Tensor linear_fwd(Tensor x, Tensor weight, OptTensor scale, OptTensor bias) {
  const char* op = "linear_fwd";
  FASTGPT_CHECK(x.dim() >= 1 && weight.dim() == 2, op, "x must be (..., C) and weight (F, C)");
  LinearArgs a{};
  a.dtype = float_dtype_of(op, "x", x);
  a.weight_type = weight_type_of(op, weight);
  a.n_in = x.size(x.dim() - 1), a.n_out = weight.size(0);
  FASTGPT_CHECK(weight.size(1) == a.n_in, op, "weight has ", weight.size(1), " columns, expected ", a.n_in);
  FASTGPT_CHECK(a.n_in > 0, op, "x has no columns");
  check_device(op, "weight", weight, x);
  const auto sizes = x.sizes();
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out.back() = a.n_out;
  Tensor y = allocate(x, out, x.scalar_type());
  a.n_rows = row_count(x);
  if (a.n_rows == 0 || a.n_out == 0) return y;
  if (scale) {
    make_contiguous(scale);
    check_flat(op, "scale", *scale, ScalarType::Float, a.n_out, x);
  }
  if (bias) {
    make_contiguous(bias);
    check_flat(op, "bias", *bias, x.scalar_type(), a.n_out, x);
  }
  const Rows x_rows = rows_of(x), weight_rows = rows_of(weight);
  a.x = x_rows.data(), a.x_row = x_rows.step;
  a.weight = weight_rows.data(), a.weight_row = weight_rows.step;
  a.scale = static_cast<const float*>(data_or_null(scale)), a.bias = data_or_null(bias);
  a.y = y.data_ptr();
  const Device device(x);
  linear_fwd(a, device.stream);
  return y;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER_CPU(linear_fwd)
