// Rows of one warp, of several warps with two rows in a block, of a whole block, and wide ones.
#include "layer_norm/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t n, int64_t c, bool more, int off = 0) {
  run(name, [&] {
    fastgpt::LayerNormFwdArgs f{};
    f.x = elements(n * c, off), f.residual = more ? elements(n * c, off) : nullptr, f.weight = floats(c), f.bias = floats(c);
    f.y = elements(n * c, off), f.sum = more ? elements(n * c, off) : nullptr, f.stats = floats(2 * n);
    f.x_bias = more ? floats(c) : nullptr;
    f.x_row = f.residual_row = f.n_cols = c, f.n_rows = n, f.eps = 1e-5f, f.dtype = kDtype;
    fastgpt::cuda::layer_norm_fwd(f, {});
    fastgpt::LayerNormBwdArgs b{};
    b.dy = elements(n * c, off), b.dsum = more ? elements(n * c, off) : nullptr, b.h = f.x, b.weight = f.weight;
    b.stats = f.stats, b.dx = elements(n * c, off), b.dweight = floats(c), b.dbias = floats(c);
    b.dx_bias = more ? floats(c) : nullptr;
    b.partials = floats(fastgpt::cuda::layer_norm_bwd_blocks(n, c, {}) * 3 * c);
    b.dy_row = b.dsum_row = b.h_row = b.n_cols = c, b.n_rows = n, b.dtype = kDtype;
    fastgpt::cuda::layer_norm_bwd(b, {});
  });
}

}  // namespace

int main() {
  check("one warp", 37, 64, true);
  check("several warps", 13, 1280, false);
  check("a block", 7, 4096, true);
  check("wide", 9, 16640, true);
  check("unaligned", 13, 300, false, 1);
}
