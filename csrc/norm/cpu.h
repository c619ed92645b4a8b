// What LayerNorm and RMSNorm share on the CPU: rows in, parameters in fp32, and parameter gradients summed per block of
// rows. Blocks follow from the shape alone and are added up in their order, so thread counts change no bit.
#pragma once
#include <vector>

#include "core/cpu/simd.h"

namespace fastgpt::cpu {

// weight or bias in fp32, `value` where there is none: (C)
static std::vector<float> widen(const void* data, DType dtype, int64_t n_cols, float value) {
  std::vector<float> wide(n_cols, value);
  if (data != nullptr) {
    with_type(dtype, [&](auto tag) { to_floats(static_cast<const decltype(tag)*>(data), wide.data(), n_cols); });
  }
  return wide;
}

// A float that came from a T, back to T: no rounding left to do.
template <class T>
inline T exact(float x) {
  return from_float<T>(x);
}
template <>
inline bf16 exact<bf16>(float x) {
  return bf16{static_cast<uint16_t>(float_bits(x) >> 16)};
}

// Columns [begin, end) of x, or of x + residual rounded to T and stored in sum, as floats in `row`. Returns the sum of
// term(float) over them.
template <class T, class Term>
inline float load_columns(const T* x, const T* residual, T* sum, float* row, int64_t begin, int64_t end,
                          const Term& term) {
  float total = 0.0f;
  if (residual != nullptr) {
    FASTGPT_SUM(total)
    for (int64_t c = begin; c < end; ++c) {
      row[c] = to_float(from_float<T>(to_float(x[c]) + to_float(residual[c])));
      sum[c] = exact<T>(row[c]);  // from row: a T in between would keep the loop scalar
      total += term(row[c]);
    }
    return total;
  }
  FASTGPT_SUM(total)
  for (int64_t c = begin; c < end; ++c) {
    row[c] = to_float(x[c]);
    total += term(row[c]);
  }
  return total;
}

// Rows whose parameter gradients are summed before blocks are added up.
static int64_t rows_per_block(int64_t n_rows) { return max_of(32, ceil_div(n_rows, 128)); }

// Columns [begin, end) of the sum over blocks, in their order: partials (n_blocks, C), blocks `step` floats apart.
FASTGPT_CLONES static void reduce_blocks(const float* partials, int64_t n_blocks, int64_t step, DType dtype, void* out,
                                         int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += 64) {
    const int64_t n = min_of(64, end - first);
    float total[64] = {};
    for (int64_t block = 0; block < n_blocks; ++block) {
      const float* partial = partials + block * step + first;
      FASTGPT_SIMD
      for (int64_t c = 0; c < n; ++c) total[c] += partial[c];
    }
    with_type(dtype, [&](auto tag) { from_floats(total, static_cast<decltype(tag)*>(out) + first, n); });
  }
}

}  // namespace fastgpt::cpu
