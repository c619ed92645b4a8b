// Raw ops of swiglu: check, allocate, fill the struct of the launcher, launch. Schemas are in fastgpt/ops/swiglu.py.
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"
#include "swiglu/op.h"

namespace fastgpt {
namespace {

void* elements_after(void* data, int64_t n, DType dtype) {
  return static_cast<char*>(data) + n * (dtype == DType::f32 ? 4 : 2);
}

struct GatedRows {
  Rows gate, up;
};

// Sets shapes and the pointers of gate and up; `rows` owns the memory.
SwigluArgs swiglu_args(const char* op, const Tensor& gate, const OptTensor& up, int64_t activation,
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
  a.n_rows = row_count(gate);
  a.grad_row = width;
  if (a.n_rows == 0) return a;
  const Rows gate_rows = rows_of(gate);
  rows = GatedRows{gate_rows, up ? rows_of(*up) : gate_rows};
  a.gate = rows->gate.keep.data_ptr(), a.gate_row = rows->gate.step;
  a.up = up ? rows->up.keep.data_ptr() : elements_after(rows->gate.keep.data_ptr(), a.n_cols, a.dtype);
  a.up_row = rows->up.step;
  return a;
}

std::vector<int64_t> gated_sizes(const Tensor& gate, int64_t n_cols) {
  const auto sizes = gate.sizes();
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out.back() = n_cols;
  return out;
}

template <class Device>
Tensor swiglu_fwd(Tensor gate, OptTensor up, int64_t activation) {
  std::optional<GatedRows> rows;
  SwigluArgs a = swiglu_args("swiglu_fwd", gate, up, activation, rows);
  const Device device(gate);
  Tensor y = allocate(gate, gated_sizes(gate, a.n_cols), gate.scalar_type());
  a.y = y.data_ptr();
  if (a.n_rows > 0) swiglu_fwd(a, device.stream);
  return y;
}

template <class Device>
std::tuple<Tensor, OptTensor> swiglu_bwd(Tensor dy, Tensor gate, OptTensor up, int64_t activation) {
  const char* op = "swiglu_bwd";
  std::optional<GatedRows> rows;
  SwigluArgs a = swiglu_args(op, gate, up, activation, rows);
  FASTGPT_CHECK(dy.dim() == gate.dim() && dy.size(dy.dim() - 1) == a.n_cols &&
                    dy.numel() == a.n_rows * a.n_cols && dy.scalar_type() == gate.scalar_type(),
                op, "dy has the wrong shape or dtype");
  check_device(op, "dy", dy, gate);
  const Device device(gate);
  Tensor dgate = allocate_like(gate);
  OptTensor dup = up ? OptTensor(allocate_like(gate)) : std::nullopt;
  if (a.n_rows == 0) return {dgate, dup};
  const Rows dy_rows = rows_of(dy);
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.dgate = dgate.data_ptr();
  a.dup = dup ? dup->data_ptr() : elements_after(dgate.data_ptr(), a.n_cols, a.dtype);
  swiglu_bwd(a, device.stream);
  return {dgate, dup};
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(swiglu_fwd)
FASTGPT_REGISTER(swiglu_bwd)
