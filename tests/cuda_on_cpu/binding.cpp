// The launchers of csrc/cuda/*.cu, compiled for the host, as Python functions. Arguments go by the structs' field
// names; pointers are integers (Tensor.data_ptr()), dtypes the numbers of DType. What is not given is zero or null.
#include <cuda_runtime.h>
#include <fastgpt/launch.h>
#include <fastgpt/math.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace py = pybind11;
using namespace fastgpt;

namespace {

template <typename T>
void set(T& field, py::handle value) {
  if constexpr (std::is_pointer_v<T>) field = reinterpret_cast<T>(value.cast<uintptr_t>());
  else if constexpr (std::is_enum_v<T>) field = static_cast<T>(value.cast<int>());
  else field = value.cast<T>();
}

#define FIELD(name) \
  if (values.contains(#name)) set(a.name, values[#name])

LayerNormFwdArgs layer_norm_fwd_args(const py::dict& values) {
  LayerNormFwdArgs a{};
  FIELD(x); FIELD(residual); FIELD(weight); FIELD(bias); FIELD(y); FIELD(sum); FIELD(stats); FIELD(x_row);
  FIELD(residual_row); FIELD(n_rows); FIELD(n_cols); FIELD(eps); FIELD(dtype); FIELD(weight_dtype);
  return a;
}

LayerNormBwdArgs layer_norm_bwd_args(const py::dict& values) {
  LayerNormBwdArgs a{};
  FIELD(dy); FIELD(dsum); FIELD(h); FIELD(weight); FIELD(stats); FIELD(dx); FIELD(dweight);
  FIELD(dbias); FIELD(partials); FIELD(dy_row); FIELD(dsum_row); FIELD(h_row); FIELD(n_rows); FIELD(n_cols);
  FIELD(dtype); FIELD(weight_dtype);
  return a;
}

CrossEntropyArgs cross_entropy_args(const py::dict& values) {
  CrossEntropyArgs a{};
  FIELD(logits); FIELD(dlogits); FIELD(target); FIELD(weight); FIELD(weight_sum); FIELD(scale); FIELD(loss); FIELD(lse);
  FIELD(logits_row); FIELD(dlogits_row); FIELD(scale_step); FIELD(n_rows); FIELD(n_cols); FIELD(n_classes);
  FIELD(ignore_index); FIELD(label_smoothing); FIELD(z_loss); FIELD(softcap); FIELD(dtype);
  return a;
}

ScaleRowsArgs scale_rows_args(const py::dict& values) {
  ScaleRowsArgs a{};
  FIELD(x); FIELD(scale); FIELD(x_row); FIELD(scale_step); FIELD(n_rows); FIELD(n_cols); FIELD(dtype);
  return a;
}

AdamWTensor adamw_tensor(const py::dict& values) {
  AdamWTensor a{};
  FIELD(param); FIELD(grad); FIELD(exp_avg); FIELD(exp_avg_sq); FIELD(master); FIELD(numel); FIELD(group); FIELD(step);
  return a;
}

// With "tensors" (list of dicts) and "groups" (list of beta1, beta2, eps, weight_decay).
void adamw(void (*launcher)(const AdamWArgs&, cuda::Stream), const py::dict& values) {
  std::vector<AdamWTensor> tensors;
  for (py::handle t : values["tensors"]) tensors.push_back(adamw_tensor(t.cast<py::dict>()));
  std::vector<AdamWGroup> groups;
  for (py::handle g : values["groups"]) {
    const auto v = g.cast<std::array<double, 4>>();
    groups.push_back(AdamWGroup{v[0], v[1], v[2], v[3]});
  }
  AdamWArgs a{};
  a.tensors = tensors.data(), a.n_tensors = tensors.size(), a.groups = groups.data(), a.n_groups = groups.size();
  FIELD(lr); FIELD(steps); FIELD(partials); FIELD(offset); FIELD(n_partials); FIELD(max_norm); FIELD(grad_scale);
  FIELD(found_inf); FIELD(grad_norm); FIELD(stochastic); FIELD(seed); FIELD(param_dtype); FIELD(grad_dtype);
  FIELD(moment_dtype); FIELD(master_dtype);
  launcher(a, nullptr);
}

}  // namespace

// The order in which threads run: 0 forward, 1 backward, 2 random from this seed.
extern "C" __attribute__((visibility("default"))) void fastgpt_set_schedule(int schedule, unsigned seed) {
  emulator::machine().schedule = static_cast<emulator::Schedule>(schedule);
  emulator::machine().random.seed(seed);
}

PYBIND11_MODULE(kernels, m) {
  m.def("layer_norm_fwd", [](const py::kwargs& v) { cuda::layer_norm_fwd(layer_norm_fwd_args(v), nullptr); });
  m.def("layer_norm_bwd", [](const py::kwargs& v) { cuda::layer_norm_bwd(layer_norm_bwd_args(v), nullptr); });
  m.def("layer_norm_bwd_blocks", &cuda::layer_norm_bwd_blocks);
  m.def("cross_entropy_fwd", [](const py::kwargs& v) { cuda::cross_entropy_fwd(cross_entropy_args(v), nullptr); });
  m.def("cross_entropy_bwd", [](const py::kwargs& v) { cuda::cross_entropy_bwd(cross_entropy_args(v), nullptr); });
  m.def("cross_entropy_fwd_bwd",
        [](const py::kwargs& v) { cuda::cross_entropy_fwd_bwd(cross_entropy_args(v), nullptr); });
  m.def("scale_rows", [](const py::kwargs& v) { cuda::scale_rows(scale_rows_args(v), nullptr); });
  m.def("adamw_prepare", [](const py::kwargs& v) { adamw(cuda::adamw_prepare, v); });
  m.def("adamw_update", [](const py::kwargs& v) { adamw(cuda::adamw_update, v); });
  m.def("adamw_partials", [](const std::vector<int64_t>& n) { return cuda::adamw_partials(n.data(), n.size()); });
}
