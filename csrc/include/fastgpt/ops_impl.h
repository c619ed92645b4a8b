// Bodies of Ops<Device>: check, allocate, fill the launcher's struct, launch. A Device is constructed from a tensor (it
// holds the guard and the stream where there are any) and has one method per launcher, and the two workspace sizes.
#pragma once
#include <array>

#include "fastgpt/check.h"
#include "fastgpt/ops.h"

namespace fastgpt {

// Uninitialised, contiguous, on like's device.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = step;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t device = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, device, like.get_device_index(),
                                                         &handle));
  return Tensor(handle);
}

inline Tensor allocate_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return allocate(like, std::vector<int64_t>(sizes.begin(), sizes.end()), like.scalar_type());
}

// ---- layer_norm ----

inline DType check_affine(const char* op, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  const int64_t n_cols = x.size(x.dim() - 1);
  const ScalarType dtype = weight ? weight->scalar_type() : bias ? bias->scalar_type() : x.scalar_type();
  FASTGPT_CHECK(dtype == x.scalar_type() || dtype == ScalarType::Float, op, "weight and bias have the wrong dtype");
  if (weight) check_flat(op, "weight", *weight, dtype, n_cols, x);
  if (bias) check_flat(op, "bias", *bias, dtype, n_cols, x);
  return weight ? float_dtype_of(op, "weight", *weight) : bias ? float_dtype_of(op, "bias", *bias) : DType::f32;
}

template <class Device>
std::tuple<Tensor, OptTensor, Tensor> Ops<Device>::layer_norm_fwd(Tensor x, OptTensor residual, OptTensor weight,
                                                                  OptTensor bias, double eps) {
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
  Device device(x);
  Tensor y = allocate_like(x), stats = allocate(x, {2, a.n_rows}, ScalarType::Float);
  OptTensor sum = residual ? OptTensor(allocate_like(x)) : std::nullopt;
  if (a.n_rows > 0) {
    const Rows x_rows = rows_of(x), residual_rows = residual ? rows_of(*residual) : Rows{x, 0};
    a.x = x_rows.data(), a.x_row = x_rows.step;
    a.residual = residual ? residual_rows.data() : nullptr, a.residual_row = residual_rows.step;
    a.weight = data_or_null(weight), a.bias = data_or_null(bias);
    a.y = y.data_ptr(), a.sum = sum ? sum->data_ptr() : nullptr;
    a.stats = static_cast<float*>(stats.data_ptr());
    device.layer_norm_fwd(a);
  }
  return {y, sum, stats};
}

template <class Device>
std::tuple<Tensor, OptTensor, OptTensor> Ops<Device>::layer_norm_bwd(Tensor dy, OptTensor dsum, Tensor h,
                                                                     OptTensor weight, OptTensor bias, Tensor stats) {
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
  Device device(h);
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
    partials = allocate(h, {device.layer_norm_bwd_blocks(a.n_rows, a.n_cols), 2, a.n_cols}, ScalarType::Float);
  }
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.h = h_rows.data(), a.h_row = h_rows.step;
  a.dsum = dsum ? dsum_rows.data() : nullptr, a.dsum_row = dsum_rows.step;
  a.weight = data_or_null(weight);
  a.stats = static_cast<const float*>(stats.data_ptr());
  a.dx = dx.data_ptr();
  a.dweight = dweight ? dweight->data_ptr() : nullptr, a.dbias = dbias ? dbias->data_ptr() : nullptr;
  a.partials = partials ? static_cast<float*>(partials->data_ptr()) : nullptr;
  device.layer_norm_bwd(a);
  return {dx, dweight, dbias};
}

// ---- cross_entropy ----

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
  int64_t vocab_size;
};

// Everything but logits' pointers and outputs; `weight_sum` keeps its memory alive.
inline CrossEntropyArgs loss_args(const char* op, const Tensor& logits, Tensor& target, OptTensor& weight,
                                  const LossOptions& o, OptTensor& weight_sum) {
  FASTGPT_CHECK(logits.dim() == 2, op, "logits must be (N, V)");
  CrossEntropyArgs a{};
  a.dtype = float_dtype_of(op, "logits", logits);
  a.n_rows = logits.size(0), a.n_cols = logits.size(1), a.n_classes = o.vocab_size;
  FASTGPT_CHECK(o.vocab_size >= 1 && o.vocab_size <= a.n_cols, op, "vocab_size is ", o.vocab_size, ", expected 1 to ",
                a.n_cols);
  if (!target.is_contiguous()) target = torch::stable::contiguous(target);
  check_flat(op, "target", target, ScalarType::Long, a.n_rows, logits);
  a.target = static_cast<const int64_t*>(target.data_ptr());
  if (weight) {
    if (!weight->is_contiguous()) weight = torch::stable::contiguous(*weight);
    check_flat(op, "weight", *weight, ScalarType::Float, o.vocab_size, logits);
    weight_sum = torch::stable::sum(*weight);
    a.weight = static_cast<const float*>(weight->data_ptr());
    a.weight_sum = static_cast<const float*>(weight_sum->data_ptr());
  }
  a.ignore_index = o.ignore_index;
  a.label_smoothing = static_cast<float>(o.label_smoothing);
  a.z_loss = static_cast<float>(o.z_loss), a.softcap = static_cast<float>(o.softcap);
  return a;
}

// Per-row factor: (1,) for all rows, or (N,).
inline int64_t check_scale(const char* op, const char* name, const Tensor& scale, int64_t n_rows, const Tensor& like) {
  check_flat(op, name, scale, ScalarType::Float, scale.numel() == 1 ? 1 : n_rows, like);
  return scale.numel() == 1 ? 0 : 1;
}

// Row stride of a tensor that is written in place.
inline int64_t writable_row_stride(const char* op, const char* name, const Tensor& t) {
  FASTGPT_CHECK(t.dim() == 2, op, name, " must be (N, V)");
  const int64_t step = row_stride(t);
  FASTGPT_CHECK(step >= t.size(1) || t.numel() == 0, op, name, " needs contiguous rows that do not overlap");
  return step;
}

template <class Device>
std::tuple<Tensor, Tensor> Ops<Device>::cross_entropy_fwd(Tensor logits, Tensor target, OptTensor weight,
                                                          int64_t ignore_index, double label_smoothing, double z_loss,
                                                          double softcap, int64_t vocab_size) {
  Device device(logits);
  OptTensor weight_sum;
  CrossEntropyArgs a = loss_args("cross_entropy_fwd", logits, target, weight,
                                 {ignore_index, label_smoothing, z_loss, softcap, vocab_size}, weight_sum);
  Tensor loss = allocate(logits, {a.n_rows}, ScalarType::Float);
  Tensor stats = allocate(logits, {2, a.n_rows}, ScalarType::Float);
  if (a.n_rows > 0) {
    const Rows rows = rows_of(logits);
    a.logits = rows.data(), a.logits_row = rows.step;
    a.loss = static_cast<float*>(loss.data_ptr());
    a.max = static_cast<float*>(stats.data_ptr()), a.sum_exp = a.max + a.n_rows;
    device.cross_entropy_fwd(a);
  }
  return {loss, stats};
}

template <class Device>
Tensor Ops<Device>::cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor stats, OptTensor weight,
                                      int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                      int64_t vocab_size) {
  const char* op = "cross_entropy_bwd";
  Device device(logits);
  OptTensor weight_sum;
  CrossEntropyArgs a = loss_args(op, logits, target, weight,
                                 {ignore_index, label_smoothing, z_loss, softcap, vocab_size}, weight_sum);
  check_flat(op, "stats", stats, ScalarType::Float, 2 * a.n_rows, logits);
  if (!dloss.is_contiguous()) dloss = torch::stable::contiguous(dloss);
  a.scale_step = check_scale(op, "dloss", dloss, a.n_rows, logits);
  Tensor dlogits = allocate_like(logits);
  if (a.n_rows > 0) {
    const Rows rows = rows_of(logits);
    a.logits = rows.data(), a.logits_row = rows.step;
    a.dlogits = dlogits.data_ptr(), a.dlogits_row = a.n_cols;
    a.max = static_cast<float*>(stats.data_ptr()), a.sum_exp = a.max + a.n_rows;
    a.scale = static_cast<const float*>(dloss.data_ptr());
    device.cross_entropy_bwd(a);
  }
  return dlogits;
}

template <class Device>
void Ops<Device>::cross_entropy_fwd_bwd(Tensor logits, Tensor loss, Tensor target, OptTensor weight, Tensor scale,
                                        int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                        int64_t vocab_size) {
  const char* op = "cross_entropy_fwd_bwd";
  Device device(logits);
  OptTensor weight_sum;
  CrossEntropyArgs a = loss_args(op, logits, target, weight,
                                 {ignore_index, label_smoothing, z_loss, softcap, vocab_size}, weight_sum);
  check_flat(op, "loss", loss, ScalarType::Float, a.n_rows, logits);
  a.scale_step = check_scale(op, "scale", scale, a.n_rows, logits);
  a.logits_row = a.dlogits_row = writable_row_stride(op, "logits", logits);
  if (a.n_rows == 0) return;
  a.logits = a.dlogits = logits.data_ptr();
  a.loss = static_cast<float*>(loss.data_ptr());
  a.scale = static_cast<const float*>(scale.data_ptr());
  device.cross_entropy_fwd_bwd(a);
}

template <class Device>
void Ops<Device>::scale_rows(Tensor x, Tensor scale) {
  const char* op = "scale_rows";
  ScaleRowsArgs a{};
  a.dtype = float_dtype_of(op, "x", x);
  a.x_row = writable_row_stride(op, "x", x);
  a.n_rows = x.size(0), a.n_cols = x.size(1);
  a.scale_step = check_scale(op, "scale", scale, a.n_rows, x);
  if (x.numel() == 0) return;
  Device device(x);
  a.x = x.data_ptr(), a.scale = static_cast<const float*>(scale.data_ptr());
  device.scale_rows(a);
}

// ---- adamw ----

inline void check_count(const char* op, const char* name, size_t came, size_t expected) {
  FASTGPT_CHECK(came == expected, op, name, " has ", came, " entries, expected ", expected);
}

inline void check_slots(const char* op, const char* name, const Ints& slots, int64_t n) {
  for (int64_t slot : slots) FASTGPT_CHECK(slot >= 0 && slot < n, op, name, " holds ", slot, ", expected 0 to ", n - 1);
}

template <class Device>
void Ops<Device>::adamw_prepare(Tensors grads, Tensor steps, Ints index, Tensor partials, int64_t offset, bool norm) {
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
  Device device(grads[0]);
  a.tensors = tensors.data(), a.n_tensors = static_cast<int64_t>(tensors.size());
  a.steps = static_cast<float*>(steps.data_ptr());
  if (norm) {
    check_flat(op, "partials", partials, ScalarType::Float, partials.numel(), grads[0]);
    a.offset = offset, a.n_partials = partials.numel();
    const int64_t needed = device.adamw_partials(numels.data(), a.n_tensors);
    FASTGPT_CHECK(offset >= 0 && needed <= a.n_partials - offset, op, "partials has ", a.n_partials,
                  " elements, expected ", offset + needed);
    a.partials = static_cast<float*>(partials.data_ptr());
  }
  device.adamw_prepare(a);
}

inline AdamWTensor update_entry(const char* op, const Tensor& param, const Tensor& grad, const Tensor& exp_avg,
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

// Dtypes of the whole call: params, grads, moments and masters have one each.
inline void set_dtypes(const char* op, AdamWArgs& a, const Tensors& params, const Tensors& grads, const Tensors& ms,
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

inline float* check_scalar(const char* op, const char* name, const OptTensor& t, const Tensor& like) {
  if (!t) return nullptr;
  check_flat(op, name, *t, ScalarType::Float, 1, like);
  return static_cast<float*>(t->data_ptr());
}

template <class Device>
void Ops<Device>::adamw_update(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors masters,
                               Tensor steps, Ints index, Ints group, Tensor lr, Doubles beta1, Doubles beta2,
                               Doubles eps, Doubles weight_decay, Tensor partials, double max_norm,
                               OptTensor grad_scale, OptTensor found_inf, Tensor grad_norm, bool stochastic,
                               int64_t seed) {
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
  Device device(params[0]);
  device.adamw_update(a);
}

}  // namespace fastgpt
