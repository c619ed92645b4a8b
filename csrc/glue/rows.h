// The row view: (..., C) as N rows, a fixed stride apart.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "glue/check.h"

namespace fastgpt {

// Distance between the rows of a (..., C) tensor if there is one and columns are contiguous; -1 if not.
inline int64_t row_stride(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  if (t.size(last) > 1 && t.stride(last) != 1) return -1;
  int64_t step = -1, expected = 0;  // of the innermost leading dimension; of the next one outwards
  for (int64_t d = last - 1; d >= 0; --d) {
    if (t.size(d) == 1) continue;
    if (step >= 0 && t.stride(d) != expected) return -1;
    if (step < 0) step = t.stride(d);
    expected = t.stride(d) * t.size(d);
  }
  return step < 0 ? t.size(last) : step;
}

// Rows of a (..., C) tensor, 0 where C is 0.
inline int64_t row_count(const Tensor& t) {
  const int64_t n_cols = t.size(t.dim() - 1);
  return n_cols == 0 ? 0 : t.numel() / n_cols;
}

struct Rows {
  Tensor keep;  // owns the memory: the tensor itself, or a contiguous copy
  int64_t step;
  const void* data() const { return keep.data_ptr(); }
};

// A (..., C) tensor as rows: as it is where one stride describes them, else copied.
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

// Row stride of a tensor that is written in place.
inline int64_t writable_row_stride(const char* op, const char* name, const Tensor& t) {
  FASTGPT_CHECK(t.dim() == 2, op, name, " must be (N, V)");
  const int64_t step = row_stride(t);
  FASTGPT_CHECK(step >= t.size(1) || t.numel() == 0, op, name, " needs contiguous rows that do not overlap");
  return step;
}

}  // namespace fastgpt
