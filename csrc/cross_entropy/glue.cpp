// Raw ops of cross_entropy: check, allocate, fill the struct of the launcher, launch. Schemas are in
// fastgpt/ops/cross_entropy.py.
#include "cross_entropy/op.h"
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"

namespace fastgpt {
namespace {

struct LossOptions {
  int64_t ignore_index;
  double label_smoothing, z_loss, softcap;
  int64_t vocab_size;
};

// Sets everything except the logits and the outputs; `weight_sum` owns the memory of the sum.
CrossEntropyArgs loss_args(const char* op, const Tensor& logits, Tensor& target, OptTensor& weight,
                           const LossOptions& o, OptTensor& weight_sum) {
  FASTGPT_CHECK(logits.dim() == 2, op, "logits must be (N, V)");
  CrossEntropyArgs a{};
  a.dtype = float_dtype_of(op, "logits", logits);
  a.n_rows = logits.size(0), a.n_cols = logits.size(1), a.n_classes = o.vocab_size;
  FASTGPT_CHECK(o.vocab_size >= 1 && o.vocab_size <= a.n_cols, op, "vocab_size is ", o.vocab_size, ", expected 1 to ",
                a.n_cols);
  make_contiguous(target), make_contiguous(weight);
  check_flat(op, "target", target, ScalarType::Long, a.n_rows, logits);
  a.target = static_cast<const int64_t*>(target.data_ptr());
  if (weight) {
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

// Sets the factors of rows: (1,) for all of them, or (N,).
template <class Args>
void set_scale(const char* op, const char* name, const Tensor& scale, const Tensor& like, Args& a) {
  const bool one = scale.numel() == 1;
  check_flat(op, name, scale, ScalarType::Float, one ? 1 : a.n_rows, like);
  a.scale = static_cast<const float*>(scale.data_ptr()), a.scale_step = one ? 0 : 1;
}

template <class Device>
std::tuple<Tensor, Tensor> cross_entropy_fwd(Tensor logits, Tensor target, OptTensor weight, int64_t ignore_index,
                                             double label_smoothing, double z_loss, double softcap,
                                             int64_t vocab_size) {
  const Device device(logits);
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
    cross_entropy_fwd(a, device.stream);
  }
  return {loss, stats};
}

template <class Device>
Tensor cross_entropy_bwd(Tensor dloss, Tensor logits, Tensor target, Tensor stats, OptTensor weight,
                         int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                         int64_t vocab_size) {
  const char* op = "cross_entropy_bwd";
  const Device device(logits);
  OptTensor weight_sum;
  CrossEntropyArgs a = loss_args(op, logits, target, weight,
                                 {ignore_index, label_smoothing, z_loss, softcap, vocab_size}, weight_sum);
  check_flat(op, "stats", stats, ScalarType::Float, 2 * a.n_rows, logits);
  make_contiguous(dloss);
  set_scale(op, "dloss", dloss, logits, a);
  Tensor dlogits = allocate_like(logits);
  if (a.n_rows > 0) {
    const Rows rows = rows_of(logits);
    a.logits = rows.data(), a.logits_row = rows.step;
    a.dlogits = dlogits.data_ptr(), a.dlogits_row = a.n_cols;
    a.max = static_cast<float*>(stats.data_ptr()), a.sum_exp = a.max + a.n_rows;
    cross_entropy_bwd(a, device.stream);
  }
  return dlogits;
}

template <class Device>
void cross_entropy_fwd_bwd(Tensor logits, Tensor loss, Tensor target, OptTensor weight, Tensor scale,
                           int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                           int64_t vocab_size) {
  const char* op = "cross_entropy_fwd_bwd";
  const Device device(logits);
  OptTensor weight_sum;
  CrossEntropyArgs a = loss_args(op, logits, target, weight,
                                 {ignore_index, label_smoothing, z_loss, softcap, vocab_size}, weight_sum);
  check_flat(op, "loss", loss, ScalarType::Float, a.n_rows, logits);
  set_scale(op, "scale", scale, logits, a);
  a.logits_row = a.dlogits_row = writable_row_stride(op, "logits", logits);
  if (a.n_rows == 0) return;
  a.logits = a.dlogits = logits.data_ptr();
  a.loss = static_cast<float*>(loss.data_ptr());
  cross_entropy_fwd_bwd(a, device.stream);
}

template <class Device>
void scale_rows(Tensor x, Tensor scale) {
  const char* op = "scale_rows";
  ScaleRowsArgs a{};
  a.dtype = float_dtype_of(op, "x", x);
  a.x_row = writable_row_stride(op, "x", x);
  a.n_rows = x.size(0), a.n_cols = x.size(1);
  set_scale(op, "scale", scale, x, a);
  if (x.numel() == 0) return;
  const Device device(x);
  a.x = x.data_ptr();
  scale_rows(a, device.stream);
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(cross_entropy_fwd)
FASTGPT_REGISTER(cross_entropy_bwd)
FASTGPT_REGISTER(cross_entropy_fwd_bwd)
FASTGPT_REGISTER(scale_rows)
