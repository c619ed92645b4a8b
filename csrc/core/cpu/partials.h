// Gradients of parameters that all rows share, on the CPU. Each block of rows is summed into one fp32 partial, then the
// partials are added in the order of the blocks. Blocks depend on the shape alone, so results are bitwise the same for
// any number of threads.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "core/column_sum.h"
#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"

namespace fastgpt::cpu {

// Returns a parameter in fp32, (C), or `missing` in every column if data is null.
inline std::vector<float> widen(const void* data, DType dtype, int64_t n_cols, float missing) {
  std::vector<float> wide(n_cols, missing);
  if (data != nullptr) {
    with_type(dtype, [&](auto tag) { to_floats(static_cast<const decltype(tag)*>(data), wide.data(), n_cols); });
  }
  return wide;
}

// Returns the number of rows in a block.
inline int64_t rows_per_block(int64_t n_rows) { return max_of(32, ceil_div(n_rows, 128)); }

inline int64_t row_blocks(int64_t n_rows) { return ceil_div(n_rows, rows_per_block(n_rows)); }

// Calls fn(partial, begin, end) for the rows of each block. partials is (row_blocks(n_rows), n_sums, C), or null;
// partial is the part of this block, (n_sums, C), set to 0, or null.
template <class F>
inline void for_row_blocks(int64_t n_rows, int64_t n_cols, float* partials, int64_t n_sums, const F& fn) {
  const int64_t rows = rows_per_block(n_rows), size = n_sums * n_cols;
  parallel_for(row_blocks(n_rows), ceil_div(row_grain(n_cols), rows), [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      float* partial = partials == nullptr ? nullptr : partials + block * size;
      if (partial != nullptr) std::fill_n(partial, size, 0.0f);
      fn(partial, block * rows, min_of(n_rows, (block + 1) * rows));
    }
  });
}

// Stores columns [begin, end) of the sum over the blocks, in order: partials (n_blocks, C), blocks `step` floats apart.
FASTGPT_CLONES static void add_blocks(const float* partials, int64_t n_blocks, int64_t step, DType dtype, void* out,
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

// Adds partials (row_blocks(n_rows), n_sums, C), unless null, up into the first n_sums of `sums`.
inline void add_partials(const float* partials, int64_t n_rows, int64_t n_cols, int64_t n_sums,
                         std::initializer_list<ColumnSum> sums) {
  if (partials == nullptr) return;
  parallel_for(n_cols, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = 0; i < n_sums; ++i) {
      const ColumnSum to = sums.begin()[i];
      if (to.out == nullptr) continue;
      add_blocks(partials + i * n_cols, row_blocks(n_rows), n_sums * n_cols, to.dtype, to.out, begin, end);
    }
  });
}

}  // namespace fastgpt::cpu
