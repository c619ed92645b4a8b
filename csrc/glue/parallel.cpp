// Implements core/cpu/parallel.h with the thread pool of PyTorch.
#include <torch/csrc/stable/ops.h>

#include "core/cpu/parallel.h"

namespace fastgpt {

void parallel_ranges(int64_t n, int64_t grain, RangeFn fn, const void* context) {
  torch::stable::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) { fn(context, begin, end); });
}

}  // namespace fastgpt
