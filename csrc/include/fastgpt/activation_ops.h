// Bodies of ActivationOps<Device>, as ops_impl.h has those of Ops<Device>: check, allocate, fill the struct, launch.
#pragma once
#include "fastgpt/ops_impl.h"

namespace fastgpt {

// ---- bias_gelu ----

// Everything but dy and the outputs; `x_rows` and `bias` keep the memory alive.
inline BiasGeluArgs bias_gelu_args(const char* op, const Tensor& x, OptTensor& bias, bool tanh) {
  FASTGPT_CHECK(x.dim() >= 1, op, "x must have at least one dimension");
  BiasGeluArgs a{};
  a.dtype = float_dtype_of(op, "x", x);
  a.n_cols = x.size(x.dim() - 1);
  a.n_rows = a.n_cols == 0 ? 0 : x.numel() / a.n_cols;
  a.tanh = tanh;
  if (bias) {
    if (!bias->is_contiguous()) bias = torch::stable::contiguous(*bias);
    a.bias_dtype = float_dtype_of(op, "bias", *bias);
    FASTGPT_CHECK(a.bias_dtype == a.dtype || a.bias_dtype == DType::f32, op, "bias has the wrong dtype");
    check_flat(op, "bias", *bias, bias->scalar_type(), a.n_cols, x);
    a.bias = bias->data_ptr();
  }
  return a;
}

template <class Device>
Tensor ActivationOps<Device>::bias_gelu_fwd(Tensor x, OptTensor bias, bool tanh) {
  BiasGeluArgs a = bias_gelu_args("bias_gelu_fwd", x, bias, tanh);
  Device device(x);
  Tensor y = allocate_like(x);
  if (a.n_rows == 0) return y;
  const Rows x_rows = rows_of(x);
  a.x = x_rows.data(), a.x_row = x_rows.step;
  a.out = y.data_ptr();
  device.bias_gelu_fwd(a);
  return y;
}

template <class Device>
std::tuple<Tensor, OptTensor> ActivationOps<Device>::bias_gelu_bwd(Tensor dy, Tensor x, OptTensor bias, bool tanh) {
  const char* op = "bias_gelu_bwd";
  BiasGeluArgs a = bias_gelu_args(op, x, bias, tanh);
  check_same_shape(op, "dy", dy, x);
  Device device(x);
  Tensor dx = allocate_like(x);
  OptTensor dbias = bias ? OptTensor(allocate_like(*bias)) : std::nullopt, partials;
  if (a.n_rows == 0) {
    if (dbias) torch::stable::zero_(*dbias);
    return {dx, dbias};
  }
  const Rows x_rows = rows_of(x), dy_rows = rows_of(dy);
  a.x = x_rows.data(), a.x_row = x_rows.step;
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.out = dx.data_ptr();
  if (dbias) {
    partials = allocate(x, {device.bias_gelu_bwd_blocks(a.n_rows, a.n_cols), a.n_cols}, ScalarType::Float);
    a.dbias = dbias->data_ptr(), a.partials = static_cast<float*>(partials->data_ptr());
  }
  device.bias_gelu_bwd(a);
  return {dx, dbias};
}

// ---- swiglu ----

inline void* elements_after(void* data, int64_t n, DType dtype) {
  return static_cast<char*>(data) + n * (dtype == DType::f32 ? 4 : 2);
}

struct GatedRows {
  Rows gate, up;
};

// Shapes, and where gate and up begin; `rows` keeps the memory alive.
inline SwigluArgs swiglu_args(const char* op, const Tensor& gate, const OptTensor& up, int64_t activation,
                              std::optional<GatedRows>& rows) {
  FASTGPT_CHECK(gate.dim() >= 1, op, "gate must have at least one dimension");
  FASTGPT_CHECK(activation >= 0 && activation <= 3, op, "activation is ", activation, ", expected 0 to 3");
  const int64_t width = gate.size(gate.dim() - 1);
  FASTGPT_CHECK(up || width % 2 == 0, op, "packed gate must have an even number of columns");
  if (up) check_same_shape(op, "up", *up, gate);
  SwigluArgs a{};
  a.dtype = float_dtype_of(op, "gate", gate);
  a.activation = static_cast<Activation>(activation);
  a.n_cols = up ? width : width / 2;
  a.n_rows = width == 0 ? 0 : gate.numel() / width;
  a.grad_row = width;
  if (a.n_rows == 0) return a;
  const Rows gate_rows = rows_of(gate);
  rows = GatedRows{gate_rows, up ? rows_of(*up) : gate_rows};
  a.gate = rows->gate.keep.data_ptr(), a.gate_row = rows->gate.step;
  a.up = up ? rows->up.keep.data_ptr() : elements_after(rows->gate.keep.data_ptr(), a.n_cols, a.dtype);
  a.up_row = rows->up.step;
  return a;
}

inline std::vector<int64_t> gated_sizes(const Tensor& gate, int64_t n_cols) {
  const auto sizes = gate.sizes();
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out.back() = n_cols;
  return out;
}

template <class Device>
Tensor ActivationOps<Device>::swiglu_fwd(Tensor gate, OptTensor up, int64_t activation) {
  std::optional<GatedRows> rows;
  SwigluArgs a = swiglu_args("swiglu_fwd", gate, up, activation, rows);
  Device device(gate);
  Tensor y = allocate(gate, gated_sizes(gate, a.n_cols), gate.scalar_type());
  a.y = y.data_ptr();
  if (a.n_rows > 0) device.swiglu_fwd(a);
  return y;
}

template <class Device>
std::tuple<Tensor, OptTensor> ActivationOps<Device>::swiglu_bwd(Tensor dy, Tensor gate, OptTensor up,
                                                                int64_t activation) {
  const char* op = "swiglu_bwd";
  std::optional<GatedRows> rows;
  SwigluArgs a = swiglu_args(op, gate, up, activation, rows);
  FASTGPT_CHECK(dy.dim() == gate.dim() && dy.size(dy.dim() - 1) == a.n_cols &&
                    dy.numel() == a.n_rows * a.n_cols && dy.scalar_type() == gate.scalar_type(),
                op, "dy has the wrong shape or dtype");
  check_device(op, "dy", dy, gate);
  Device device(gate);
  Tensor dgate = allocate_like(gate);
  OptTensor dup = up ? OptTensor(allocate_like(gate)) : std::nullopt;
  if (a.n_rows == 0) return {dgate, dup};
  const Rows dy_rows = rows_of(dy);
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.dgate = dgate.data_ptr();
  a.dup = dup ? dup->data_ptr() : elements_after(dgate.data_ptr(), a.n_cols, a.dtype);
  device.swiglu_bwd(a);
  return {dgate, dup};
}

}  // namespace fastgpt
