// Arguments and launchers of cross-entropy; formulas in fastgpt/ops/cross_entropy.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

// loss_i and its gradient with respect to logits_i; formulas in fastgpt/ops/cross_entropy.py.
struct CrossEntropyArgs {
  const void* logits;       // (N, n_cols) dtype, rows logits_row apart
  void* dlogits;            // (N, n_cols) dtype, rows dlogits_row apart; may be the logits themselves
  const int64_t* target;    // (N)
  const float* weight;      // (n_classes), or null
  const float* weight_sum;  // (1): sum of weight; null without weight
  const float* scale;       // (N) or (1): factor of each row's gradient
  float* loss;              // (N)
  float* max;               // (N): maximum of z; written by fwd, read by bwd, not used by fwd_bwd
  float* sum_exp;           // (N): sum exp(z - max); used like max
  int64_t logits_row, dlogits_row;
  int64_t scale_step;       // 1 for (N), 0 for (1)
  int64_t n_rows, n_cols, n_classes;
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  DType dtype;
};

struct ScaleRowsArgs {
  void* x;  // (N, n_cols) dtype, rows x_row apart
  const float* scale;
  int64_t x_row, scale_step;
  int64_t n_rows, n_cols;
  DType dtype;
};

FASTGPT_ON_EACH_DEVICE(
  void cross_entropy_fwd(const CrossEntropyArgs& a, Stream stream);
  void cross_entropy_bwd(const CrossEntropyArgs& a, Stream stream);
  void cross_entropy_fwd_bwd(const CrossEntropyArgs& a, Stream stream);
  void scale_rows(const ScaleRowsArgs& a, Stream stream);)

}  // namespace fastgpt
