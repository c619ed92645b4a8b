// RMSNorm on the CPU; formulas in fastgpt/ops/rms_norm.py.
//
// Forward reads x (and residual) once, writes y (and their sum) once, and sums the squares while it loads the row.
// Backward reads dy and h once, writes dx once, and sums dweight (and dx) per block of rows (core/cpu/partials.h).
#include <cmath>
#include <vector>

#include "norm/cpu.h"
#include "rms_norm/op.h"

namespace fastgpt::cpu {

// Returns weight + offset in fp32, (C), or ones if weight is null.
static std::vector<float> widen_offset(const void* weight, DType dtype, int64_t n_cols, float offset) {
  std::vector<float> wide = widen(weight, dtype, n_cols, 1.0f);
  for (float& w : wide) w += weight != nullptr ? offset : 0.0f;
  return wide;
}

template <class T>
inline void fwd_rows_of(const RmsNormFwdArgs& a, const float* x_bias, const float* weight, float* row, int64_t begin,
                        int64_t end) {
  const int64_t n_cols = a.n_cols;
  for (int64_t n = begin; n < end; ++n) {
    T* y = static_cast<T*>(a.y) + n * n_cols;
    const double squares = load_row<T>(a, n, x_bias, row, [](float h) { return h * h; });
    const float rstd = 1.0f / std::sqrt(static_cast<float>(squares / static_cast<double>(n_cols)) + a.eps);
    a.rstd[n] = rstd;
    FASTGPT_SIMD
    for (int64_t c = 0; c < n_cols; ++c) y[c] = from_float<T>(rms_norm_y(row[c], rstd, weight[c]));
  }
}

FASTGPT_CLONES static void fwd_rows(const RmsNormFwdArgs& a, const float* x_bias, const float* weight, float* row,
                                    int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) { fwd_rows_of<decltype(tag)>(a, x_bias, weight, row, begin, end); });
}

// For columns [begin, end) of a row: dweight += dy xhat (unless null). Returns the sum of w dy xhat.
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
inline void bwd_row(const RmsNormBwdArgs& a, const float* weight, float* dweight, float* dx_bias, int64_t n) {
  const int64_t n_cols = a.n_cols;
  const T* dy = static_cast<const T*>(a.dy) + n * a.dy_row;
  const T* h = static_cast<const T*>(a.h) + n * a.h_row;
  const float rstd = a.rstd[n];
  double total = 0.0;
  for (int64_t c = 0; c < n_cols; c += kChunk) {
    total += add_columns(dy, h, weight, rstd, dweight, c, min_of(n_cols, c + kChunk));
  }
  const RmsNormDx dx(static_cast<float>(total / static_cast<double>(n_cols)), rstd, n_cols, a.eps);
  store_dx<T>(a, n, dx_bias, [=](int64_t c) { return dx(to_float(dy[c]) * weight[c], to_float(h[c]) * rstd); });
}

// partial: receives the sums of dweight and, if needed, dx_bias over these rows, (1 or 2, C), or null.
FASTGPT_CLONES static void bwd_rows(const RmsNormBwdArgs& a, const float* weight, float* partial, int64_t begin,
                                    int64_t end) {
  float* dx_bias = dx_bias_of(a, partial, 1);
  with_type(a.dtype, [&](auto tag) {
    for (int64_t n = begin; n < end; ++n) bwd_row<decltype(tag)>(a, weight, partial, dx_bias, n);
  });
}

// ---- launchers ----

void rms_norm_fwd(const RmsNormFwdArgs& a, Stream) {
  const auto weight = widen_offset(a.weight, a.weight_dtype, a.n_cols, a.weight_offset);
  for_rows(a, [&](const float* x_bias, float* row, int64_t begin, int64_t end) {
    fwd_rows(a, x_bias, weight.data(), row, begin, end);
  });
}

int64_t rms_norm_bwd_blocks(int64_t n_rows, int64_t, Stream) { return row_blocks(n_rows); }

void rms_norm_bwd(const RmsNormBwdArgs& a, Stream) {
  const auto weight = widen_offset(a.weight, a.weight_dtype, a.n_cols, a.weight_offset);
  const int64_t n_sums = a.dx_bias == nullptr ? 1 : 2;
  for_row_blocks(a.n_rows, a.n_cols, a.partials, n_sums, [&](float* partial, int64_t begin, int64_t end) {
    bwd_rows(a, weight.data(), partial, begin, end);
  });
  add_partials(a.partials, a.n_rows, a.n_cols, n_sums, {{a.dweight, a.weight_dtype}, {a.dx_bias, a.x_bias_dtype}});
}

}  // namespace fastgpt::cpu
