// Rows of a warp and of a block, and rows that are held; gradients in place of the logits and beside them, in one kernel and in two.
#include "cross_entropy/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t n_cols, bool in_place, float smoothing, int off = 0) {
  run(name, [&] {
    const int64_t n = 4;
    Element* logits = elements(n * n_cols, off);
    fastgpt::CrossEntropyArgs a{};
    a.logits = logits, a.dlogits = in_place ? logits : elements(n * n_cols, off);
    a.target = values<int64_t>({0, 5, -100, n_cols - 9}), a.scale = floats(1);
    a.loss = floats(n), a.max = floats(n), a.sum_exp = floats(n), a.weight = nullptr, a.weight_sum = nullptr;
    a.logits_row = a.dlogits_row = a.n_cols = n_cols, a.n_classes = n_cols - 3, a.n_rows = n, a.ignore_index = -100;
    a.label_smoothing = smoothing, a.z_loss = 1e-4f, a.dtype = kDtype;
    fastgpt::cuda::cross_entropy_fwd(a, {});
    fastgpt::cuda::cross_entropy_bwd(a, {});
    fastgpt::cuda::cross_entropy_fwd_bwd(a, {});
    fastgpt::ScaleRowsArgs s{};
    s.x = logits, s.scale = floats(n), s.x_row = s.n_cols = n_cols, s.scale_step = 1, s.n_rows = n;
    s.dtype = kDtype;
    fastgpt::cuda::scale_rows(s, {});
  });
}

}  // namespace

int main() {
  check("a warp", 72, true, 0.0f);
  check("in place", 5000, true, 0.0f);
  check("beside, smoothed", 5000, false, 0.1f);
  check("unaligned", 700, true, 0.1f, 1);
  check("held", 16500, true, 0.0f, 1);
}
