// RMSNorm on the CPU; formulas in fastgpt/ops/rms_norm.py.
//
// Forward reads x (and residual) once, writes y (and their sum) once; the squares are summed while the row is loaded.
// Backward reads dy and h once, writes dx once, and sums dweight per block of rows (norm/cpu.h).
#include <cmath>
#include <vector>

#include "core/cpu/parallel.h"
#include "norm/cpu.h"
#include "rms_norm/op.h"

namespace fastgpt::cpu {

// weight + offset in fp32, ones without weight: (C)
static std::vector<float> widen_offset(const void* weight, DType dtype, int64_t n_cols, float offset) {
  std::vector<float> wide = widen(weight, dtype, n_cols, 1.0f);
  for (float& w : wide) w += weight != nullptr ? offset : 0.0f;
  return wide;
}

template <class T>
inline void fwd_rows_of(const RmsNormFwdArgs& a, const float* weight, float* row, int64_t begin, int64_t end) {
  const int64_t n_cols = a.n_cols;
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(a.x) + n * a.x_row;
    const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + n * a.residual_row;
    T* sum = a.sum == nullptr ? nullptr : static_cast<T*>(a.sum) + n * n_cols;
    T* y = static_cast<T*>(a.y) + n * n_cols;
    double squares = 0.0;
    for (int64_t c = 0; c < n_cols; c += kChunk) {
      squares += load_columns(x, residual, sum, row, c, min_of(n_cols, c + kChunk), [](float h) { return h * h; });
    }
    const float rstd = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(n_cols)) + a.eps);
    a.rstd[n] = rstd;
    FASTGPT_SIMD
    for (int64_t c = 0; c < n_cols; ++c) y[c] = from_float<T>(rms_norm_y(row[c], rstd, weight[c]));
  }
}

FASTGPT_CLONES static void fwd_rows(const RmsNormFwdArgs& a, const float* weight, float* row, int64_t begin,
                                    int64_t end) {
  with_type(a.dtype, [&](auto tag) { fwd_rows_of<decltype(tag)>(a, weight, row, begin, end); });
}

// Columns [begin, end) of a row: dweight += dy xhat (where asked). Returns the sum of w dy xhat.
template <class T>
inline float add_columns(const T* dy, const T* h, const float* weight, float rstd, float* dweight, int64_t begin,
                         int64_t end) {
  float total = 0.0f;
  if (dweight == nullptr) {
    FASTGPT_SUM(total)
    for (int64_t c = begin; c < end; ++c) total += to_float(dy[c]) * weight[c] * (to_float(h[c]) * rstd);
    return total;
  }
  FASTGPT_SUM(total)
  for (int64_t c = begin; c < end; ++c) {
    const float g_xhat = to_float(dy[c]) * (to_float(h[c]) * rstd);
    dweight[c] += g_xhat;
    total += g_xhat * weight[c];
  }
  return total;
}

template <class T>
inline void bwd_row(const RmsNormBwdArgs& a, const float* weight, float* dweight, int64_t n) {
  const int64_t n_cols = a.n_cols;
  const T* dy = static_cast<const T*>(a.dy) + n * a.dy_row;
  const T* h = static_cast<const T*>(a.h) + n * a.h_row;
  T* dx = static_cast<T*>(a.dx) + n * n_cols;
  const float rstd = a.rstd[n];
  double total = 0.0;
  for (int64_t c = 0; c < n_cols; c += kChunk) {
    total += add_columns(dy, h, weight, rstd, dweight, c, min_of(n_cols, c + kChunk));
  }
  const RmsNormDx row(static_cast<float>(total / static_cast<double>(n_cols)), rstd, n_cols, a.eps);
  if (a.dsum == nullptr) {
    FASTGPT_SIMD
    for (int64_t c = 0; c < n_cols; ++c) {
      dx[c] = from_float<T>(row(to_float(dy[c]) * weight[c], to_float(h[c]) * rstd));
    }
    return;
  }
  const T* dsum = static_cast<const T*>(a.dsum) + n * a.dsum_row;
  FASTGPT_SIMD
  for (int64_t c = 0; c < n_cols; ++c) {
    const float d = row(to_float(dy[c]) * weight[c], to_float(h[c]) * rstd);
    dx[c] = from_float<T>(d + to_float(dsum[c]));
  }
}

// Rows of one block; its partial sum starts at zero.
FASTGPT_CLONES static void bwd_block(const RmsNormBwdArgs& a, const float* weight, int64_t block) {
  const int64_t rows = rows_per_block(a.n_rows), end = min_of(a.n_rows, (block + 1) * rows);
  float* dweight = a.partials == nullptr ? nullptr : a.partials + block * a.n_cols;
  for (int64_t c = 0; dweight != nullptr && c < a.n_cols; ++c) dweight[c] = 0.0f;
  with_type(a.dtype, [&](auto tag) {
    for (int64_t n = block * rows; n < end; ++n) bwd_row<decltype(tag)>(a, weight, dweight, n);
  });
}

// ---- launchers ----

void rms_norm_fwd(const RmsNormFwdArgs& a, Stream) {
  const auto weight = widen_offset(a.weight, a.weight_dtype, a.n_cols, a.weight_offset);
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.n_cols);
    fwd_rows(a, weight.data(), row.data(), begin, end);
  });
}

int64_t rms_norm_bwd_blocks(int64_t n_rows, int64_t, Stream) { return ceil_div(n_rows, rows_per_block(n_rows)); }

void rms_norm_bwd(const RmsNormBwdArgs& a, Stream) {
  const auto weight = widen_offset(a.weight, a.weight_dtype, a.n_cols, a.weight_offset);
  const int64_t n_blocks = rms_norm_bwd_blocks(a.n_rows, a.n_cols, {});
  parallel_for(n_blocks, ceil_div(row_grain(a.n_cols), rows_per_block(a.n_rows)), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) bwd_block(a, weight.data(), block);
  });
  if (a.dweight == nullptr) return;
  parallel_for(a.n_cols, 1024, [&](int64_t begin, int64_t end) {
    reduce_blocks(a.partials, n_blocks, a.n_cols, a.weight_dtype, a.dweight, begin, end);
  });
}

}  // namespace fastgpt::cpu
