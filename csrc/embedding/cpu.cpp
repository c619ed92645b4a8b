// Token and position embedding on the CPU; formulas in fastgpt/ops/embedding.py.
//
// Forward reads both rows and writes their sum once. Backward sorts the tokens by table row (a stable counting sort)
// and sums the gradients of each row in fp32, in the order of the tokens. One task sums all of a row: there are no
// atomics, and the sums are the same for any number of threads.
#include <cmath>
#include <vector>

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "embedding/op.h"

namespace fastgpt::cpu {

inline int64_t index_at(const Indices& indices, int64_t n) {
  return indices.wide ? static_cast<const int64_t*>(indices.data)[n] : static_cast<const int32_t*>(indices.data)[n];
}

// Returns row `at` of a table, or null if it is outside.
template <class T>
inline const T* row_at(const void* table, int64_t step, int64_t n_rows, int64_t at) {
  return at >= 0 && at < n_rows ? static_cast<const T*>(table) + at * step : nullptr;
}

template <class T>
inline void fwd_rows_of(const EmbeddingFwdArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const T* w = row_at<T>(a.weight, a.weight_row, a.n_rows, index_at(a.ids, n));
    const T* p = w;
    if (a.position_weight != nullptr) {
      const int64_t at = a.positions.data == nullptr ? n % a.period : index_at(a.positions, n % a.period);
      p = row_at<T>(a.position_weight, a.position_row, a.n_positions, at);
    }
    T* y = static_cast<T*>(a.y) + n * a.n_cols;
    if (w == nullptr || p == nullptr) {
      for (int64_t c = 0; c < a.n_cols; ++c) y[c] = from_float<T>(NAN);
    } else if (a.position_weight == nullptr) {
      memcpy(y, w, a.n_cols * sizeof(T));
    } else {
      FASTGPT_SIMD
      for (int64_t c = 0; c < a.n_cols; ++c) y[c] = from_float<T>(to_float(w[c]) + to_float(p[c]));
    }
  }
}

FASTGPT_CLONES static void fwd_rows(const EmbeddingFwdArgs& a, int64_t begin, int64_t end) {
  with_type(a.dtype, [&](auto tag) { fwd_rows_of<decltype(tag)>(a, begin, end); });
}

// Returns the tokens whose index is in the table, sorted by it; equal ones stay in order.
static std::vector<int64_t> tokens_by_row(const EmbeddingBwdArgs& a) {
  std::vector<int64_t> next(a.n_rows + 1, 0);  // counts shifted by one row, later the place of the next token
  const auto known = [&](int64_t row) { return row >= 0 && row < a.n_rows; };
  for (int64_t n = 0; n < a.n_tokens; ++n) {
    if (const int64_t row = index_at(a.ids, n); known(row)) ++next[row + 1];
  }
  for (int64_t row = 0; row < a.n_rows; ++row) next[row + 1] += next[row];
  std::vector<int64_t> order(next[a.n_rows]);
  for (int64_t n = 0; n < a.n_tokens; ++n) {
    if (const int64_t row = index_at(a.ids, n); known(row)) order[next[row]++] = n;
  }
  return order;
}

// Adds the gradients of the tokens order[begin, end), which share a row, to this row of dweight.
template <class T, class W>
inline void add_tokens(const EmbeddingBwdArgs& a, const int64_t* order, int64_t begin, int64_t end) {
  float total[kChunk];
  W* row = static_cast<W*>(a.dweight) + index_at(a.ids, order[begin]) * a.dweight_row;
  for (int64_t first = 0; first < a.n_cols; first += kChunk) {
    const int64_t n_cols = min_of(kChunk, a.n_cols - first);
    const T* dy = static_cast<const T*>(a.dy) + first;
    to_floats(dy + order[begin] * a.dy_row, total, n_cols);
    for (int64_t i = begin + 1; i < end; ++i) {
      const T* g = dy + order[i] * a.dy_row;
      FASTGPT_SIMD
      for (int64_t c = 0; c < n_cols; ++c) total[c] += to_float(g[c]);
    }
    FASTGPT_SIMD
    for (int64_t c = 0; c < n_cols; ++c) row[first + c] = from_float<W>(to_float(row[first + c]) + total[c]);
  }
}

// Adds to the table rows whose first token is in [begin, end) of `order`.
template <class T, class W>
inline void add_rows_of(const EmbeddingBwdArgs& a, const int64_t* order, int64_t n, int64_t begin, int64_t end) {
  const auto row = [&](int64_t i) { return index_at(a.ids, order[i]); };
  int64_t i = begin;
  while (i > 0 && i < end && row(i) == row(i - 1)) ++i;  // the task before this one has this row
  while (i < end) {
    int64_t next = i + 1;
    while (next < n && row(next) == row(i)) ++next;
    add_tokens<T, W>(a, order, i, next);
    i = next;
  }
}

FASTGPT_CLONES static void add_rows(const EmbeddingBwdArgs& a, const int64_t* order, int64_t n, int64_t begin,
                                    int64_t end) {
  with_types(a.dtype, a.dweight_dtype, [&](auto t, auto w) {
    add_rows_of<decltype(t), decltype(w)>(a, order, n, begin, end);
  });
}

// ---- launchers ----

void embedding_fwd(const EmbeddingFwdArgs& a, Stream) {
  parallel_for(a.n_tokens, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { fwd_rows(a, begin, end); });
}

void embedding_bwd_add(const EmbeddingBwdArgs& a, Stream) {
  const std::vector<int64_t> order = tokens_by_row(a);
  const int64_t n = static_cast<int64_t>(order.size());
  parallel_for(n, row_grain(a.n_cols), [&](int64_t begin, int64_t end) { add_rows(a, order.data(), n, begin, end); });
}

}  // namespace fastgpt::cpu
