// Product of two fp32 matrices on the CPU, for the training steps of linear layers; formulas in fastgpt/ops/linear.py.
//
// The output is cut into tasks of some rows and columns, which threads take one by one: a core that is slowed down by
// other work gets fewer of them. A task packs its part of b in panels of two vectors (and of a, if its rows are not
// contiguous), 256 rows at a time, and multiplies blocks whose sums stay in registers (Goto, van de Geijn 2008,
// doi:10.1145/1356052.1356053). Every output is summed in the same order whatever the tasks are: its bits do not depend on
// the number of threads.
#if defined(__clang__)
#pragma clang fp contract(fast)  // no formula here needs a product to be rounded
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=fast")
#endif
#include <atomic>
#include <memory>

#include "core/cpu/parallel.h"
#include "core/cpu/simd.h"
#include "linear/op.h"

namespace fastgpt::cpu {

constexpr int64_t kDepth = 256;       // rows of b in a panel, which stays in the first-level cache
constexpr int64_t kPackedRows = 144;  // of a, which stay in the second-level cache; a multiple of every R
constexpr int64_t kMostCols = 256;    // of a task
constexpr int64_t kTasks = 8;         // at least, where the output is large enough

struct Range {
  int64_t begin, end;
};

#if defined(__clang__)
#define FASTGPT_MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define FASTGPT_MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, Picks{i, j, k, l})
#endif

// to[k][c] = from[c][k] for 4 x 4 values.
FASTGPT_INLINE static void transpose_four(const float* from, int64_t from_row, float* to, int64_t to_row) {
  typedef float Four __attribute__((vector_size(16)));
  typedef int32_t Picks __attribute__((vector_size(16), unused));
  Four x[4];
  FASTGPT_UNROLL
  for (int i = 0; i < 4; ++i) memcpy(&x[i], from + i * from_row, sizeof x[i]);
  const Four a = FASTGPT_MIX(x[0], x[1], 0, 4, 1, 5), b = FASTGPT_MIX(x[2], x[3], 0, 4, 1, 5);
  const Four c = FASTGPT_MIX(x[0], x[1], 2, 6, 3, 7), d = FASTGPT_MIX(x[2], x[3], 2, 6, 3, 7);
  const Four y[4] = {FASTGPT_MIX(a, b, 0, 1, 4, 5), FASTGPT_MIX(a, b, 2, 3, 6, 7), FASTGPT_MIX(c, d, 0, 1, 4, 5),
                     FASTGPT_MIX(c, d, 2, 3, 6, 7)};
  FASTGPT_UNROLL
  for (int i = 0; i < 4; ++i) memcpy(to + i * to_row, &y[i], sizeof y[i]);
}

#if defined(FASTGPT_LEVELS)
#define FASTGPT_SET SetV4
#define FASTGPT_TARGET FASTGPT_V4
#define FASTGPT_LANES 16
#define FASTGPT_ROWS 12
#include "linear/cpu_product.h"
#define FASTGPT_SET SetV3
#define FASTGPT_TARGET FASTGPT_V3
#define FASTGPT_LANES 8
#define FASTGPT_ROWS 6
#include "linear/cpu_product.h"
#endif
#define FASTGPT_SET SetBase
#define FASTGPT_TARGET
#define FASTGPT_LANES 4
#if defined(__aarch64__)
#define FASTGPT_ROWS 12  // 32 registers
#else
#define FASTGPT_ROWS 6
#endif
#include "linear/cpu_product.h"

inline void outputs_of(const ProductArgs& p, Range rows, Range cols, int64_t depth, float* a_pack, float* b_pack) {
#if defined(FASTGPT_LEVELS)
  if (level() == 4) return SetV4::outputs(p, rows, cols, depth, a_pack, b_pack);
  if (level() == 3) return SetV3::outputs(p, rows, cols, depth, a_pack, b_pack);
#endif
  SetBase::outputs(p, rows, cols, depth, a_pack, b_pack);
}

// ---- launcher ----

void linear_product(const ProductArgs& p, Stream) {
  // every task packs its b again, and a too if it must: wide tasks for the latter
  const int64_t n_cols = p.a_col != 1 ? kMostCols : p.n_cols <= 128 ? 64 : 128;
  const int64_t across = ceil_div(p.n_cols, n_cols), wanted = ceil_div(kTasks, across);
  const int64_t n_rows = ceil_div(min_of(max_of(ceil_div(p.n_rows, wanted), 96), 768), 12) * 12;
  const int64_t down = ceil_div(p.n_rows, n_rows);
  const int64_t depth = ceil_div(p.n_inner, ceil_div(p.n_inner, kDepth));
  std::atomic<int64_t> next{0};
  parallel_for(across * down, 1, [&](int64_t, int64_t) {
    const std::unique_ptr<float[]> memory(new float[(kPackedRows + n_cols + 2 * kLanes) * depth + kLanes]);
    float* b_pack = memory.get() + (64 - reinterpret_cast<uintptr_t>(memory.get()) % 64) / sizeof(float);
    for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < across * down;) {
      const int64_t m = task % down * n_rows, n = task / down * n_cols;
      outputs_of(p, {m, min_of(p.n_rows, m + n_rows)}, {n, min_of(p.n_cols, n + n_cols)}, depth,
                 b_pack + (n_cols + 2 * kLanes) * depth, b_pack);
    }
  });
}

}  // namespace fastgpt::cpu
