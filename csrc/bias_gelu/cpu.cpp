// bias + GELU on the CPU; formulas in fastgpt/ops/bias_gelu.py and core/math.h.
//
// Forward reads x and writes y once. Backward reads dy and x and writes dx once, and sums dbias in the same pass per
// block of rows: blocks follow from the shape alone, so thread counts change no bit.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=fast")  // no formula here relies on a rounded product
#endif
#include <vector>

#include "bias_gelu/op.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"

namespace fastgpt::cpu {

// bias in fp32, zero where there is none: (C)
static std::vector<float> bias_of(const BiasGeluArgs& a) {
  std::vector<float> wide(a.n_cols);
  if (a.bias != nullptr) {
    with_type(a.bias_dtype, [&](auto tag) {
      to_floats(static_cast<const decltype(tag)*>(a.bias), wide.data(), a.n_cols);
    });
  }
  return wide;
}

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

// One row of dx; dbias += dx before it is rounded.
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

static int64_t rows_per_block(int64_t n_rows) { return max_of(32, ceil_div(n_rows, 128)); }

// Rows of one block; its partial sum starts at zero.
FASTGPT_CLONES static void bwd_block(const BiasGeluArgs& a, const float* bias, int64_t block) {
  const int64_t rows = rows_per_block(a.n_rows), end = min_of(a.n_rows, (block + 1) * rows);
  float* dbias = a.partials == nullptr ? nullptr : a.partials + block * a.n_cols;
  for (int64_t c = 0; dbias != nullptr && c < a.n_cols; ++c) dbias[c] = 0.0f;
  with_type(a.dtype, [&](auto tag) {
    for (int64_t n = block * rows; n < end; ++n) {
      if (a.tanh) {
        bwd_row<true, decltype(tag)>(a, bias, dbias, n);
      } else {
        bwd_row<false, decltype(tag)>(a, bias, dbias, n);
      }
    }
  });
}

// Columns [begin, end) of dbias: the blocks' sums, in their order.
FASTGPT_CLONES static void reduce_blocks(const BiasGeluArgs& a, int64_t begin, int64_t end) {
  const int64_t n_blocks = bias_gelu_bwd_blocks(a.n_rows, a.n_cols, {});
  for (int64_t first = begin; first < end; first += 64) {
    const int64_t n = min_of(64, end - first);
    float total[64] = {};
    for (int64_t block = 0; block < n_blocks; ++block) {
      const float* partial = a.partials + block * a.n_cols + first;
      FASTGPT_SIMD
      for (int64_t c = 0; c < n; ++c) total[c] += partial[c];
    }
    with_type(a.bias_dtype, [&](auto tag) { from_floats(total, static_cast<decltype(tag)*>(a.dbias) + first, n); });
  }
}

// ---- launchers ----

void bias_gelu_fwd(const BiasGeluArgs& a, Stream) {
  const auto bias = bias_of(a);
  parallel_for(a.n_rows, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_rows(a, bias.data(), begin, end); });
}

int64_t bias_gelu_bwd_blocks(int64_t n_rows, int64_t, Stream) { return ceil_div(n_rows, rows_per_block(n_rows)); }

void bias_gelu_bwd(const BiasGeluArgs& a, Stream) {
  const auto bias = bias_of(a);
  const int64_t n_blocks = bias_gelu_bwd_blocks(a.n_rows, a.n_cols, {});
  parallel_for(n_blocks, ceil_div(row_grain(a.n_cols), rows_per_block(a.n_rows)), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) bwd_block(a, bias.data(), block);
  });
  if (a.dbias == nullptr) return;
  parallel_for(a.n_cols, 1024, [&](int64_t begin, int64_t end) { reduce_blocks(a, begin, end); });
}

}  // namespace fastgpt::cpu
