#include "linear_divergence/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t n_cols, int64_t kind, int off = 0) {
  run(name, [&] {
    const int64_t n = 3;
    fastgpt::LinearDivergenceArgs a{};
    a.logits = elements(n * n_cols, off), a.teacher = elements(n * n_cols), a.target = values<int64_t>({0, -100, 2});
    a.scale = floats(n), a.loss = floats(n), a.logits_row = a.teacher_row = a.n_cols = n_cols, a.n_classes = n_cols - 3;
    a.scale_step = 1, a.n_rows = n, a.ignore_index = -100, a.kind = kind, a.beta = 0.5f, a.temperature = 2.0f;
    a.dtype = kDtype;
    fastgpt::cuda::linear_divergence_rows(a, {});
  });
}

}  // namespace

int main() {
  check("a warp", 72, 0);
  check("a block", 5000, 0);
  check("another divergence", 5000, 2);
  check("unaligned", 700, 0, 1);
}
