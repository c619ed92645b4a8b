// Shared by LayerNorm and RMSNorm on the CPU: reads and sums rows, writes dx.
#pragma once
#include <vector>

#include "core/cpu/parallel.h"
#include "core/cpu/partials.h"
#include "core/cpu/simd.h"

namespace fastgpt::cpu {

// Converts a float that holds a value of T back to T without rounding.
template <class T>
inline T exact(float x) {
  return from_float<T>(x);
}
template <>
inline bf16 exact<bf16>(float x) {
  return bf16{static_cast<uint16_t>(float_bits(x) >> 16)};
}

// Loads columns [begin, end) of x, or of x + residual, or of x + x_bias + residual, as floats into `row`, and returns
// the sum of term(float) over them. Sums are rounded to T and also stored in `sum`.
template <class T, class Term>
inline float load_columns(const T* x, const T* residual, const float* x_bias, T* sum, float* row, int64_t begin,
                          int64_t end, const Term& term) {
  float total = 0.0f;
  if (x_bias != nullptr) {
    FASTGPT_SUM(total)
    for (int64_t c = begin; c < end; ++c) {
      row[c] = to_float(from_float<T>(to_float(x[c]) + x_bias[c] + to_float(residual[c])));
      sum[c] = exact<T>(row[c]);
      total += term(row[c]);
    }
    return total;
  }
  if (residual != nullptr) {
    FASTGPT_SUM(total)
    for (int64_t c = begin; c < end; ++c) {
      row[c] = to_float(from_float<T>(to_float(x[c]) + to_float(residual[c])));
      sum[c] = exact<T>(row[c]);  // from row: a variable of type T would keep the loop scalar
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

// Does the same for row n, in chunks whose sums are added in double. x_bias: (C), or null.
template <class T, class Args, class Term>
inline double load_row(const Args& a, int64_t n, const float* x_bias, float* row, const Term& term) {
  const T* x = static_cast<const T*>(a.x) + n * a.x_row;
  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + n * a.residual_row;
  T* sum = a.sum == nullptr ? nullptr : static_cast<T*>(a.sum) + n * a.n_cols;
  double total = 0.0;
  for (int64_t c = 0; c < a.n_cols; c += kChunk) {
    total += load_columns(x, residual, x_bias, sum, row, c, min_of(a.n_cols, c + kChunk), term);
  }
  return total;
}

// Calls fn(x_bias, row, begin, end) for ranges of rows in forward; x_bias is in fp32, (C), or null, and `row` is scratch
// for one row, (C).
template <class Args, class F>
inline void for_rows(const Args& a, const F& fn) {
  const auto x_bias = widen(a.x_bias, a.x_bias_dtype, a.n_cols, 0.0f);
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.n_cols);
    fn(a.x_bias == nullptr ? nullptr : x_bias.data(), row.data(), begin, end);
  });
}

// Stores d(column) in the columns of a row, and adds it to dx_bias unless that is null.
template <class T, class F>
inline void store_row(T* dx, float* dx_bias, int64_t n_cols, const F& d) {
  if (dx_bias == nullptr) {
    FASTGPT_SIMD
    for (int64_t c = 0; c < n_cols; ++c) dx[c] = from_float<T>(d(c));
    return;
  }
  FASTGPT_SIMD
  for (int64_t c = 0; c < n_cols; ++c) {
    const float value = d(c);
    dx_bias[c] += value;
    dx[c] = from_float<T>(value);
  }
}

// Stores row n of dx: d(column), plus dsum if it is given; adds it to dx_bias (C) unless that is null.
template <class T, class Args, class F>
inline void store_dx(const Args& a, int64_t n, float* dx_bias, const F& d) {
  T* dx = static_cast<T*>(a.dx) + n * a.n_cols;
  if (a.dsum == nullptr) return store_row(dx, dx_bias, a.n_cols, d);
  const T* dsum = static_cast<const T*>(a.dsum) + n * a.dsum_row;
  store_row(dx, dx_bias, a.n_cols, [=](int64_t c) { return d(c) + to_float(dsum[c]); });
}

// Returns the sum after the first n_sums of a partial: that of dx_bias, or null.
template <class Args>
inline float* dx_bias_of(const Args& a, float* partial, int64_t n_sums) {
  return partial == nullptr || a.dx_bias == nullptr ? nullptr : partial + n_sums * a.n_cols;
}

}  // namespace fastgpt::cpu
