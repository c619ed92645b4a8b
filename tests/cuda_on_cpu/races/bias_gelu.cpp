// Several rows side by side in a block, and one.
#include "bias_gelu/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t n, int64_t c, bool tanh, int off = 0) {
  run(name, [&] {
    fastgpt::BiasGeluArgs a{};
    a.dy = elements(n * c, off), a.x = elements(n * c, off), a.bias = floats(c), a.out = elements(n * c, off);
    a.dbias = floats(c), a.partials = floats(fastgpt::cuda::bias_gelu_bwd_blocks(n, c, {}) * c);
    a.dy_row = a.x_row = a.n_cols = c, a.n_rows = n, a.tanh = tanh, a.dtype = kDtype;
    fastgpt::cuda::bias_gelu_fwd(a, {});
    fastgpt::cuda::bias_gelu_bwd(a, {});
  });
}

}  // namespace

int main() {
  check("rows side by side", 70, 264, true);
  check("one row", 9, 2048, false);
  check("unaligned", 9, 70, true, 1);
}
