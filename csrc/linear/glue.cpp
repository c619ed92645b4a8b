// Raw ops of linear: check, allocate, fill the struct of the launcher, launch. The schemas are in fastgpt/ops/linear.py.
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

// Checks that t is an fp32 matrix of this size.
void check_matrix(const char* name, const Tensor& t, int64_t n_rows, int64_t n_cols) {
  const char* op = "linear_product";
  FASTGPT_CHECK(t.dim() == 2 && t.size(0) == n_rows && t.size(1) == n_cols, op, name, " must be (", n_rows, ", ", n_cols,
                ")");
  FASTGPT_CHECK(t.scalar_type() == ScalarType::Float, op, name, " must be float32");
  FASTGPT_CHECK(t.stride(0) >= 0 && t.stride(1) >= 0, op, name, " has negative strides");
}

template <class Device>
void linear_product(Tensor a, Tensor b, OptTensor bias, Tensor out, bool add) {
  const char* op = "linear_product";
  FASTGPT_CHECK(a.dim() == 2 && b.dim() == 2, op, "a and b must be matrices");
  const int64_t n_rows = a.size(0), n_inner = a.size(1), n_cols = b.size(1);
  check_matrix("a", a, n_rows, n_inner);
  check_matrix("b", b, n_inner, n_cols);
  check_matrix("out", out, n_rows, n_cols);
  check_device(op, "b", b, a);
  check_device(op, "out", out, a);
  FASTGPT_CHECK(n_inner > 0, op, "a has no columns");
  if (bias) {
    make_contiguous(bias);
    check_flat(op, "bias", *bias, ScalarType::Float, n_cols, a);
  }
  ProductArgs p{};
  p.out_row = writable_row_stride(op, "out", out);
  if (n_rows == 0 || n_cols == 0) return;
  p.a = static_cast<const float*>(a.data_ptr()), p.a_row = a.stride(0), p.a_col = n_inner == 1 ? 1 : a.stride(1);
  p.b = static_cast<const float*>(b.data_ptr()), p.b_row = b.stride(0), p.b_col = b.stride(1);
  p.bias = static_cast<const float*>(data_or_null(bias)), p.out = static_cast<float*>(out.data_ptr());
  p.n_rows = n_rows, p.n_cols = n_cols, p.n_inner = n_inner, p.add = add;
  const Device device(a);
  linear_product(p, device.stream);
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER_CPU(linear_fwd)
FASTGPT_REGISTER_CPU(linear_product)
