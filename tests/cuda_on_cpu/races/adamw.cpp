// Tensors of one chunk and of two; a step that is skipped.
#include <cmath>

#include "adamw/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, float bad) {
  run(name, [&] {
    const int64_t sizes[] = {33000, 5, 700};
    fastgpt::AdamWTensor tensors[3];
    for (int32_t i = 0; i < 3; ++i) {
      const int64_t n = sizes[i];
      tensors[i] = {elements(n), elements(n), floats(n), floats(n), floats(n), n, 0, i};
      for (int64_t k = 0; k < n; ++k) static_cast<float*>(tensors[i].exp_avg_sq)[k] = 0.01f;
    }
    const fastgpt::AdamWGroup group{0.9, 0.95, 1e-8, 0.1};
    fastgpt::AdamWArgs a{};
    a.tensors = tensors, a.n_tensors = 3, a.groups = &group, a.n_groups = 1, a.lr = values({1e-3f});
    a.steps = values({0.0f, 0.0f, 0.0f}), a.n_partials = fastgpt::cuda::adamw_partials(sizes, 3, {});
    a.partials = floats(a.n_partials), a.max_norm = 1.0f, a.found_inf = values({bad}), a.grad_norm = floats(1);
    a.param_dtype = a.grad_dtype = kDtype, a.moment_dtype = a.master_dtype = DType::f32;
    fastgpt::cuda::adamw_prepare(a, {});
    fastgpt::cuda::adamw_update(a, {});
  });
}

}  // namespace

int main() {
  check("step", 0.0f);
  check("skipped step", 1.0f);
}
