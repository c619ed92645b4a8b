// Views (..., C) tensors as N rows with a fixed stride.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "glue/check.h"

namespace fastgpt {

// Returns the distance between the rows of a (..., C) tensor; -1 if it varies or columns are not contiguous.
inline int64_t row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return -1;
  int64_t step = -1, expected = 0;  // stride of the innermost leading dimension, and of the next one outwards
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (step >= 0 && t.stride(d) != expected) return -1;
    if (step < 0) step = t.stride(d);
    expected = t.stride(d) * t.size(d);
  }
  return step < 0 ? t.size(last) : step;
}

// Returns the number of rows of a (..., C) tensor, 0 if C is 0.
inline int64_t row_count(const Tensor& t) {
  const int64_t n_cols = t.size(t.dim() - 1);
  return n_cols == 0 ? 0 : t.numel() / n_cols;
}

struct Rows {
  Tensor keep;  // owns the memory: the tensor itself, or a contiguous copy
  int64_t step;
  const void* data() const { return keep.data_ptr(); }
};

// Returns the rows of a (..., C) tensor: of the tensor itself if one stride describes them, else of a copy.
inline Rows rows_of(const Tensor& t) {
  const int64_t step = row_stride(t);
  if (step >= 0) return {t, step};
  return {torch::stable::contiguous(t), t.size(t.dim() - 1)};
}

// Replaces a tensor by a contiguous copy if it is not contiguous.
inline void make_contiguous(Tensor& t) {
  if (!t.is_contiguous()) t = torch::stable::contiguous(t);
}

inline void make_contiguous(OptTensor& t) {
  if (t) make_contiguous(*t);
}

// Returns the row stride of a tensor that is written in place.
inline int64_t writable_row_stride(const char* op, const char* name, const Tensor& t) {
  FASTGPT_CHECK(t.dim() == 2, op, name, " must be (N, V)");
  const int64_t step = row_stride(t);
  FASTGPT_CHECK(step >= t.size(1) || t.numel() == 0, op, name, " needs contiguous rows that do not overlap");
  return step;
}

}  // namespace fastgpt
