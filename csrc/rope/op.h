// Arguments and launcher of rotary embedding; formulas in fastgpt/ops/rope.py.
#pragma once
#include "core/dtype.h"
#include "core/stream.h"

namespace fastgpt {

// Rotary embedding of one or two tensors in one pass; formulas in fastgpt/ops/rope.py. Strides are in elements, columns
// contiguous; a position outside [0, n_positions) gives NaN in the columns that rotate.
struct RopePart {
  const void* x;  // (B, T, H, D) dtype
  void* y;        // (B, T, H, D) dtype; may be x
  int64_t x_batch, x_time, x_head;
  int64_t y_batch, y_time, y_head;
  int64_t n_heads, n_turned;  // heads from n_turned on are copied
};

struct RopeArgs {
  RopePart parts[2];
  const float* cos;          // (n_positions, half)
  const float* sin;          // (n_positions, half)
  const int64_t* positions;  // (T) or (B, T); null: 0, 1, 2, ...
  int64_t positions_batch;   // distance between the positions of two batches: T, or 0 for (T)
  int64_t n_batch, n_time, n_cols, half, n_positions;
  float sign;  // -1 for the inverse rotation
  bool interleaved;
  DType dtype;
};

FASTGPT_ON_EACH_DEVICE(
  void rope(const RopeArgs& a, Stream stream);)

}  // namespace fastgpt
