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

// Loads columns [begin, end) of x, or of x + residual, as floats into `row`, and returns the sum of term(float) over
// them. x + residual is rounded to T and also stored in `sum`.
template <class T, class Term>
inline float load_columns(const T* x, const T* residual, T* sum, float* row, int64_t begin, int64_t end,
                          const Term& term) {
  float total = 0.0f;
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

// Does the same for row n, in chunks whose sums are added in double.
template <class T, class Args, class Term>
inline double load_row(const Args& a, int64_t n, float* row, const Term& term) {
  const T* x = static_cast<const T*>(a.x) + n * a.x_row;
  const T* residual = a.residual == nullptr ? nullptr : static_cast<const T*>(a.residual) + n * a.residual_row;
  T* sum = a.sum == nullptr ? nullptr : static_cast<T*>(a.sum) + n * a.n_cols;
  double total = 0.0;
  for (int64_t c = 0; c < a.n_cols; c += kChunk) {
    total += load_columns(x, residual, sum, row, c, min_of(a.n_cols, c + kChunk), term);
  }
  return total;
}

// Calls fn(row, begin, end) for ranges of rows in forward; `row` is scratch for one row, (C).
template <class Args, class F>
inline void for_rows(const Args& a, const F& fn) {
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.n_cols);
    fn(row.data(), begin, end);
  });
}

// Stores row n of dx: d(column), plus dsum if it is given.
template <class T, class Args, class F>
inline void store_dx(const Args& a, int64_t n, const F& d) {
  T* dx = static_cast<T*>(a.dx) + n * a.n_cols;
  if (a.dsum == nullptr) {
    FASTGPT_SIMD
    for (int64_t c = 0; c < a.n_cols; ++c) dx[c] = from_float<T>(d(c));
    return;
  }
  const T* dsum = static_cast<const T*>(a.dsum) + n * a.dsum_row;
  FASTGPT_SIMD
  for (int64_t c = 0; c < a.n_cols; ++c) dx[c] = from_float<T>(d(c) + to_float(dsum[c]));
}

}  // namespace fastgpt::cpu
