// Raw op of linear_divergence: check, fill the struct of the launcher, launch. The schema is in
// fastgpt/ops/divergence.py.
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"
#include "linear_divergence/op.h"

namespace fastgpt {
namespace {

template <class Device>
void linear_divergence_rows(Tensor logits, Tensor loss, Tensor teacher, OptTensor target, Tensor scale, int64_t kind,
                            double beta, double temperature, int64_t ignore_index, int64_t vocab_size) {
  const char* op = "linear_divergence_rows";
  const Device device(logits);
  LinearDivergenceArgs a{};
  a.dtype = float_dtype_of(op, "logits", logits);
  a.logits_row = writable_row_stride(op, "logits", logits);
  a.n_rows = logits.size(0), a.n_cols = logits.size(1), a.n_classes = vocab_size;
  FASTGPT_CHECK(teacher.dim() == 2 && teacher.size(0) == a.n_rows, op, "teacher must have the rows of logits");
  FASTGPT_CHECK(float_dtype_of(op, "teacher", teacher) == a.dtype, op, "teacher must have the dtype of logits");
  check_device(op, "teacher", teacher, logits);
  FASTGPT_CHECK(vocab_size >= 1 && vocab_size <= a.n_cols && vocab_size <= teacher.size(1), op, "vocab_size is ",
                vocab_size, ", expected 1 to the columns of both");
  FASTGPT_CHECK(kind >= 0 && kind <= 2, op, "kind is ", kind, ", expected 0, 1 or 2");
  check_flat(op, "loss", loss, ScalarType::Float, a.n_rows, logits);
  make_contiguous(target);
  if (target) {
    check_flat(op, "target", *target, ScalarType::Long, a.n_rows, logits);
    a.target = static_cast<const int64_t*>(target->data_ptr());
  }
  const bool one = scale.numel() == 1;
  check_flat(op, "scale", scale, ScalarType::Float, one ? 1 : a.n_rows, logits);
  a.scale = static_cast<const float*>(scale.data_ptr()), a.scale_step = one ? 0 : 1;
  a.ignore_index = ignore_index, a.kind = kind;
  a.beta = static_cast<float>(beta), a.temperature = static_cast<float>(temperature);
  if (a.n_rows == 0) return;
  const Rows rows = rows_of(teacher);
  a.teacher = rows.data(), a.teacher_row = rows.step;
  a.logits = logits.data_ptr(), a.loss = static_cast<float*>(loss.data_ptr());
  linear_divergence_rows(a, device.stream);
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(linear_divergence_rows)
