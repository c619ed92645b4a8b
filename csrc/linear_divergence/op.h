// Arguments and launcher of the rows of linear_divergence; formulas in fastgpt/ops/divergence.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

// Loss of each row, and its gradient with respect to the student's logits, which it overwrites.
struct LinearDivergenceArgs {
  void* logits;          // (N, n_cols) dtype, rows logits_row apart: the student's, then their gradient
  const void* teacher;   // (N, at least n_classes) dtype, rows teacher_row apart
  const int64_t* target; // (N), or null: rows where it is ignore_index do not count
  const float* scale;    // (N) or (1): factor of each row's gradient
  float* loss;           // (N)
  int64_t logits_row, teacher_row;
  int64_t scale_step;    // 1 for (N), 0 for (1)
  int64_t n_rows, n_cols, n_classes;
  int64_t ignore_index;
  int64_t kind;          // a Divergence of terms.h
  float beta, temperature;
  DType dtype;
};

FASTGPT_ON_EACH_DEVICE(void linear_divergence_rows(const LinearDivergenceArgs& a, Stream stream);)

}  // namespace fastgpt
