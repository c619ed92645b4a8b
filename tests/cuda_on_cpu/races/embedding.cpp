// Tokens in several tiles, with runs of equal ones that cross their borders.
#include <algorithm>
#include <numeric>

#include "embedding/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t c, int off = 0) {
  run(name, [&] {
    const int64_t n = 150, rows = 7;
    int64_t* ids = room<int64_t>(n);
    for (int64_t i = 0; i < n; ++i) ids[i] = i * i % 11 % rows;
    fastgpt::EmbeddingFwdArgs f{};
    f.ids = {ids, true}, f.weight = elements(rows * c, off), f.position_weight = elements(n * c, off);
    f.y = elements(n * c, off), f.weight_row = f.position_row = f.n_cols = c, f.n_rows = rows;
    f.n_tokens = f.n_positions = f.period = n, f.dtype = kDtype;
    fastgpt::cuda::embedding_fwd(f, {});
    fastgpt::EmbeddingBwdArgs b{};
    b.ids = f.ids, b.dy = elements(n * c, off), b.dweight = floats(rows * c);
    b.dy_row = b.dweight_row = b.n_cols = c, b.n_tokens = n, b.n_rows = rows, b.dtype = kDtype;
    int32_t *keys = room<int32_t>(n), *sorted = room<int32_t>(n);
    int64_t* order = room<int64_t>(n);
    fastgpt::cuda::embedding_keys(b, keys, {});
    std::iota(order, order + n, 0);
    std::stable_sort(order, order + n, [&](int64_t i, int64_t j) { return keys[i] < keys[j]; });
    for (int64_t i = 0; i < n; ++i) sorted[i] = keys[order[i]];
    const int64_t partials = fastgpt::cuda::embedding_partials(n, {});
    b.sorted = sorted, b.order = order, b.partials = floats(partials * c), b.partial_keys = room<int32_t>(partials);
    fastgpt::cuda::embedding_bwd_add(b, {});
  });
}

}  // namespace

int main() {
  check("pieces", 320);
  check("unaligned", 70, 1);
}
