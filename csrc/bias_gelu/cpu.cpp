// bias + GELU on the CPU; formulas in fastgpt/ops/bias_gelu.py and core/math.h.
//
// Forward reads x and writes y once. Backward reads dy and x and writes dx once; in the same pass it sums dbias per
// block of rows (core/cpu/partials.h).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no formula here needs a product to be rounded
#endif
#include "bias_gelu/op.h"
#include "core/cpu/parallel.h"
#include "core/cpu/partials.h"
#include "core/cpu/simd.h"

namespace fastgpt::cpu {

template <bool Tanh, class T>
inline void fwd_rows_of(const BiasGeluArgs& a, const float* bias, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* x = static_cast<const T*>(a.x) + n * a.x_row;
    T* y = static_cast<T*>(a.out) + n * a.n_cols;
    FASTGPT_SIMD
    for (int64_t c = 0; c < a.n_cols; ++c) {
      const float u = to_float(x[c]) + bias[c];
      y[c] = from_float<T>(Tanh ? gelu_tanh_f(u) : gelu_f(u));
    }
  }
}

FASTGPT_CLONES static void fwd_rows(const BiasGeluArgs& a, const float* bias, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    if (a.tanh) return fwd_rows_of<true, decltype(tag)>(a, bias, begin, end);
    fwd_rows_of<false, decltype(tag)>(a, bias, begin, end);
  });
}

// Computes one row of dx; dbias += dx before rounding.
template <bool Tanh, class T>
inline void bwd_row(const BiasGeluArgs& a, const float* bias, float* dbias, int64_t n) {
  const T* dy = static_cast<const T*>(a.dy) + n * a.dy_row;
  const T* x = static_cast<const T*>(a.x) + n * a.x_row;
  T* dx = static_cast<T*>(a.out) + n * a.n_cols;
  const auto slope = [](float u) { return (Tanh ? gelu_tanh_both(u) : gelu_both(u)).slope; };
  if (dbias == nullptr) {
    FASTGPT_SIMD
    for (int64_t c = 0; c < a.n_cols; ++c) dx[c] = from_float<T>(to_float(dy[c]) * slope(to_float(x[c])));
    return;
  }
  FASTGPT_SIMD
  for (int64_t c = 0; c < a.n_cols; ++c) {
    const float d = to_float(dy[c]) * slope(to_float(x[c]) + bias[c]);
    dbias[c] += d;
    dx[c] = from_float<T>(d);
  }
}

// dbias: receives the sum over these rows, (C), or null.
FASTGPT_CLONES static void bwd_rows(const BiasGeluArgs& a, const float* bias, float* dbias, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) {
    for (int64_t n = begin; n < end; ++n) {
      if (a.tanh) {
        bwd_row<true, decltype(tag)>(a, bias, dbias, n);
      } else {
        bwd_row<false, decltype(tag)>(a, bias, dbias, n);
      }
    }
  });
}

// ---- launchers ----

void bias_gelu_fwd(const BiasGeluArgs& a, Stream) {
  const auto bias = widen(a.bias, a.bias_dtype, a.n_cols, 0.0f);
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_rows(a, bias.data(), begin, end); });
}

int64_t bias_gelu_bwd_blocks(int64_t n_rows, int64_t, Stream) { return row_blocks(n_rows); }

void bias_gelu_bwd(const BiasGeluArgs& a, Stream) {
  const auto bias = widen(a.bias, a.bias_dtype, a.n_cols, 0.0f);
  for_row_blocks(a.n_rows, a.n_cols, a.partials, 1, [&](float* dbias, int64_t begin, int64_t end) {
    bwd_rows(a, bias.data(), dbias, begin, end);
  });
  add_partials(a.partials, a.n_rows, a.n_cols, 1, {{a.dbias, a.bias_dtype}});
}

}  // namespace fastgpt::cpu
