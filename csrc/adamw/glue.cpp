// Raw ops of adamw: check, allocate, fill the struct of the launcher, launch. Schemas are in fastgpt/ops/adamw.py.
#include "adamw/op.h"
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"

namespace fastgpt {
namespace {

void check_count(const char* op, const char* name, size_t got, size_t expected) {
  FASTGPT_CHECK(got == expected, op, name, " has ", got, " entries, expected ", expected);
}

void check_slots(const char* op, const char* name, const Ints& slots, int64_t n) {
  for (int64_t slot : slots) FASTGPT_CHECK(slot >= 0 && slot < n, op, name, " holds ", slot, ", expected 0 to ", n - 1);
}

template <class Device>
void adamw_prepare(Tensors grads, Tensor steps, Ints index, Tensor partials, int64_t offset, bool norm) {
  const char* op = "adamw_prepare";
  if (grads.empty()) return;
  check_count(op, "index", index.size(), grads.size());
  check_flat(op, "steps", steps, ScalarType::Float, steps.numel(), grads[0]);
  check_slots(op, "index", index, steps.numel());
  AdamWArgs a{};
  a.grad_dtype = float_dtype_of(op, "grads", grads[0]);
  std::vector<AdamWTensor> tensors(grads.size());
  Ints numels(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    FASTGPT_CHECK(grads[i].scalar_type() == grads[0].scalar_type(), op, "grads must have one dtype");
    FASTGPT_CHECK(is_dense(grads[i]), op, "grads must be dense");
    check_device(op, "grads", grads[i], grads[0]);
    tensors[i].grad = grads[i].data_ptr();
    tensors[i].numel = numels[i] = grads[i].numel();
    tensors[i].step = static_cast<int32_t>(index[i]);
  }
  const Device device(grads[0]);
  a.tensors = tensors.data(), a.n_tensors = static_cast<int64_t>(tensors.size());
  a.steps = static_cast<float*>(steps.data_ptr());
  if (norm) {
    check_flat(op, "partials", partials, ScalarType::Float, partials.numel(), grads[0]);
    a.offset = offset, a.n_partials = partials.numel();
    const int64_t needed = adamw_partials(numels.data(), a.n_tensors, device.stream);
    FASTGPT_CHECK(offset >= 0 && needed <= a.n_partials - offset, op, "partials has ", a.n_partials,
                  " elements, expected ", offset + needed);
    a.partials = static_cast<float*>(partials.data_ptr());
  }
  adamw_prepare(a, device.stream);
}

AdamWTensor update_entry(const char* op, const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
                         const Tensor& exp_avg_sq, const Tensor* master) {
  FASTGPT_CHECK(is_dense(param), op, "params must be dense");
  check_same_layout(op, "grads", grad, param);
  check_same_layout(op, "exp_avgs", exp_avg, param);
  check_same_layout(op, "exp_avg_sqs", exp_avg_sq, param);
  if (master) check_same_layout(op, "masters", *master, param);
  AdamWTensor t{};
  t.param = param.data_ptr(), t.grad = grad.data_ptr();
  t.exp_avg = exp_avg.data_ptr(), t.exp_avg_sq = exp_avg_sq.data_ptr();
  t.master = master ? master->data_ptr() : nullptr;
  t.numel = param.numel();
  return t;
}

// Sets the dtypes of the call: one each for params, grads, moments and masters.
void set_dtypes(const char* op, AdamWArgs& a, const Tensors& params, const Tensors& grads, const Tensors& ms,
                const Tensors& vs, const Tensors& masters) {
  a.param_dtype = float_dtype_of(op, "params", params[0]);
  a.grad_dtype = float_dtype_of(op, "grads", grads[0]);
  a.moment_dtype = float_dtype_of(op, "exp_avgs", ms[0]);
  a.master_dtype = masters.empty() ? DType::f32 : dtype_of(op, "masters", masters[0]);
  FASTGPT_CHECK(a.grad_dtype == a.param_dtype || a.grad_dtype == DType::f32, op, "grads must be params' dtype or fp32");
  FASTGPT_CHECK(a.moment_dtype != DType::f16, op, "moments must be fp32 or bf16");
  FASTGPT_CHECK(a.master_dtype == DType::f32 || (a.master_dtype == DType::i16 && a.param_dtype == DType::bf16), op,
                "masters must be fp32, or int16 beside bf16 params");
  for (size_t i = 0; i < params.size(); ++i) {
    const bool same = params[i].scalar_type() == params[0].scalar_type() &&
                      grads[i].scalar_type() == grads[0].scalar_type() && ms[i].scalar_type() == ms[0].scalar_type() &&
                      vs[i].scalar_type() == ms[0].scalar_type() &&
                      (masters.empty() || masters[i].scalar_type() == masters[0].scalar_type());
    FASTGPT_CHECK(same, op, "params, grads, moments and masters must have one dtype each");
    check_device(op, "params", params[i], params[0]);
  }
}

float* check_scalar(const char* op, const char* name, const OptTensor& t, const Tensor& like) {
  if (!t) return nullptr;
  check_flat(op, name, *t, ScalarType::Float, 1, like);
  return static_cast<float*>(t->data_ptr());
}

template <class Device>
void adamw_update(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters, Tensor steps,
                  Ints index, Ints group, Tensor lr, Doubles beta1, Doubles beta2, Doubles eps, Doubles weight_decay,
                  Tensor partials, double max_norm, OptTensor grad_scale, OptTensor found_inf, Tensor grad_norm,
                  bool stochastic, int64_t seed) {
  const char* op = "adamw_update";
  if (params.empty()) return;
  const size_t n = params.size(), n_groups = beta1.size();
  for (const Tensors* list : {&grads, &exp_avgs, &exp_avg_sqs}) check_count(op, "grads or moments", list->size(), n);
  if (!masters.empty()) check_count(op, "masters", masters.size(), n);
  for (const Ints* list : {&index, &group}) check_count(op, "index or group", list->size(), n);
  for (const Doubles* list : {&beta2, &eps, &weight_decay}) check_count(op, "settings", list->size(), n_groups);
  AdamWArgs a{};
  set_dtypes(op, a, params, grads, exp_avgs, exp_avg_sqs, masters);
  check_flat(op, "steps", steps, ScalarType::Float, steps.numel(), params[0]);
  check_flat(op, "lr", lr, ScalarType::Float, static_cast<int64_t>(n_groups), params[0]);
  check_flat(op, "partials", partials, ScalarType::Float, partials.numel(), params[0]);
  check_slots(op, "index", index, steps.numel());
  check_slots(op, "group", group, static_cast<int64_t>(n_groups));
  std::vector<AdamWTensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    tensors[i] = update_entry(op, params[i], grads[i], exp_avgs[i], exp_avg_sqs[i],
                              masters.empty() ? nullptr : &masters[i]);
    tensors[i].group = static_cast<int32_t>(group[i]), tensors[i].step = static_cast<int32_t>(index[i]);
  }
  std::vector<AdamWGroup> groups(n_groups);
  for (size_t g = 0; g < n_groups; ++g) groups[g] = {beta1[g], beta2[g], eps[g], weight_decay[g]};
  a.tensors = tensors.data(), a.n_tensors = static_cast<int64_t>(n);
  a.groups = groups.data(), a.n_groups = static_cast<int64_t>(n_groups);
  a.lr = static_cast<const float*>(lr.data_ptr()), a.steps = static_cast<float*>(steps.data_ptr());
  a.n_partials = partials.numel();
  a.partials = a.n_partials ? static_cast<float*>(partials.data_ptr()) : nullptr;
  a.max_norm = static_cast<float>(max_norm);
  a.grad_scale = check_scalar(op, "grad_scale", grad_scale, params[0]);
  a.found_inf = check_scalar(op, "found_inf", found_inf, params[0]);
  a.grad_norm = check_scalar(op, "grad_norm", grad_norm, params[0]);
  a.stochastic = stochastic && masters.empty() && a.param_dtype == DType::bf16;
  a.seed = static_cast<uint64_t>(seed);
  const Device device(params[0]);
  adamw_update(a, device.stream);
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(adamw_prepare)
FASTGPT_REGISTER(adamw_update)
