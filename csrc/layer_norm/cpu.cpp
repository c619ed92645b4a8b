// LayerNorm on the CPU; formulas in fastgpt/ops/layer_norm.py.
//
// Forward reads x (and residual) once and writes y (and their sum) once. The variance takes two passes over the row in
// cache; the second also corrects the mean (Chan, Golub, LeVeque 1983). Backward reads dy and h once, writes dx once,
// and sums dweight and dbias (and dx) per block of rows (core/cpu/partials.h).
#include <cmath>

#include "layer_norm/op.h"
#include "norm/cpu.h"

namespace fastgpt::cpu {

struct Moments {
  float mean, var;
};

// Returns the mean and variance of `row`, given its sum, in one more pass.
inline Moments moments_of(const float* row, double sum, int64_t n_cols) {
  const float guess = static_cast<float>(sum / static_cast<double>(n_cols));
  double off = 0.0, squares = 0.0;
  for (int64_t first = 0; first < n_cols; first += kChunk) {
    const int64_t end = min_of(n_cols, first + kChunk);
    float o = 0.0f, s = 0.0f;
    FASTGPT_SUM(o, s)
    for (int64_t c = first; c < end; ++c) {
      const float d = row[c] - guess;
      o += d;
      s += d * d;
    }
    off += o, squares += s;
  }
  off /= static_cast<double>(n_cols);
  const double var = squares / static_cast<double>(n_cols) - off * off;
  return {static_cast<float>(guess + off), static_cast<float>(var > 0.0 ? var : var * 0.0)};  // NaN stays NaN
}

template <class T>
inline void fwd_rows_of(const LayerNormFwdArgs& a, const float* x_bias, const float* weight, const float* bias,
                        float* row, int64_t begin, int64_t end) {
  const int64_t n_cols = a.n_cols;
  for (int64_t n = begin; n < end; ++n) {
    T* y = static_cast<T*>(a.y) + n * n_cols;
    const double total = load_row<T>(a, n, x_bias, row, [](float h) { return h; });
    const Moments m = moments_of(row, total, n_cols);
    const float rstd = 1.0f / std::sqrt(m.var + a.eps);
    a.stats[n] = m.mean;
    a.stats[a.n_rows + n] = rstd;
    FASTGPT_SIMD
    for (int64_t c = 0; c < n_cols; ++c) y[c] = from_float<T>(layer_norm_y(row[c], m.mean, rstd, weight[c], bias[c]));
  }
}

FASTGPT_CLONES static void fwd_rows(const LayerNormFwdArgs& a, const float* x_bias, const float* weight,
                                    const float* bias, float* row, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) { fwd_rows_of<decltype(tag)>(a, x_bias, weight, bias, row, begin, end); });
}

struct BwdSums {
  double wdy = 0.0, wdy_xhat = 0.0;
};

// For columns [begin, end) of a row: dweight += dy xhat, dbias += dy (unless null), and adds w dy and w dy xhat to
// sums.
template <class T>
inline void add_columns(const T* dy, const T* h, const float* weight, float mean, float rstd, float* dweight,
                        float* dbias, int64_t begin, int64_t end, BwdSums& sums) {
  float s = 0.0f, sx = 0.0f;
  if (dweight == nullptr) {
    FASTGPT_SUM(s, sx)
    for (int64_t c = begin; c < end; ++c) {
      const float wdy = to_float(dy[c]) * weight[c];
      s += wdy;
      sx += wdy * ((to_float(h[c]) - mean) * rstd);
    }
  } else {
    FASTGPT_SUM(s, sx)
    for (int64_t c = begin; c < end; ++c) {
      const float g = to_float(dy[c]), xhat = (to_float(h[c]) - mean) * rstd;
      dweight[c] += g * xhat;
      dbias[c] += g;
      s += g * weight[c];
      sx += g * weight[c] * xhat;
    }
  }
  sums.wdy += s, sums.wdy_xhat += sx;
}

template <class T>
inline void bwd_row(const LayerNormBwdArgs& a, const float* weight, float* dweight, float* dbias, float* dx_bias,
                    int64_t n) {
  const int64_t n_cols = a.n_cols;
  const T* dy = static_cast<const T*>(a.dy) + n * a.dy_row;
  const T* h = static_cast<const T*>(a.h) + n * a.h_row;
  const float mean = a.stats[n], rstd = a.stats[a.n_rows + n];
  BwdSums sums;
  for (int64_t c = 0; c < n_cols; c += kChunk) {
    add_columns(dy, h, weight, mean, rstd, dweight, dbias, c, min_of(n_cols, c + kChunk), sums);
  }
  const float mean_wdy = static_cast<float>(sums.wdy / static_cast<double>(n_cols));
  const float mean_wdy_xhat = static_cast<float>(sums.wdy_xhat / static_cast<double>(n_cols));
  store_dx<T>(a, n, dx_bias, [=](int64_t c) {
    const float xhat = (to_float(h[c]) - mean) * rstd;
    return layer_norm_dx(to_float(dy[c]) * weight[c], xhat, mean_wdy, mean_wdy_xhat, rstd);
  });
}

// partial: receives the sums of dweight, dbias and, if needed, dx_bias over these rows, (2 or 3, C), or null.
FASTGPT_CLONES static void bwd_rows(const LayerNormBwdArgs& a, const float* weight, float* partial, int64_t begin,
                                    int64_t end) {
  float* dbias = partial == nullptr ? nullptr : partial + a.n_cols;
  float* dx_bias = dx_bias_of(a, partial, 2);
  with_type(a.dtype, [&](auto tag) {
    for (int64_t n = begin; n < end; ++n) bwd_row<decltype(tag)>(a, weight, partial, dbias, dx_bias, n);
  });
}

// ---- launchers ----

void layer_norm_fwd(const LayerNormFwdArgs& a, Stream) {
  const auto weight = widen(a.weight, a.weight_dtype, a.n_cols, 1.0f);
  const auto bias = widen(a.bias, a.weight_dtype, a.n_cols, 0.0f);
  for_rows(a, [&](const float* x_bias, float* row, int64_t begin, int64_t end) {
    fwd_rows(a, x_bias, weight.data(), bias.data(), row, begin, end);
  });
}

int64_t layer_norm_bwd_blocks(int64_t n_rows, int64_t, Stream) { return row_blocks(n_rows); }

void layer_norm_bwd(const LayerNormBwdArgs& a, Stream) {
  const auto weight = widen(a.weight, a.weight_dtype, a.n_cols, 1.0f);
  const int64_t n_sums = a.dx_bias == nullptr ? 2 : 3;
  for_row_blocks(a.n_rows, a.n_cols, a.partials, n_sums, [&](float* partial, int64_t begin, int64_t end) {
    bwd_rows(a, weight.data(), partial, begin, end);
  });
  add_partials(a.partials, a.n_rows, a.n_cols, n_sums,
               {{a.dweight, a.weight_dtype}, {a.dbias, a.weight_dtype}, {a.dx_bias, a.x_bias_dtype}});
}

}  // namespace fastgpt::cpu
