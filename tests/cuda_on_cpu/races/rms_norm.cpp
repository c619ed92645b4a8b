// Rows of one warp, of several warps with two rows in a block, of a whole block, and wide ones.
#include "rms_norm/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t n, int64_t c, bool more, int off = 0) {
  run(name, [&] {
    fastgpt::RmsNormFwdArgs f{};
    f.x = elements(n * c, off), f.residual = more ? elements(n * c, off) : nullptr, f.weight = floats(c);
    f.y = elements(n * c, off), f.sum = more ? elements(n * c, off) : nullptr, f.rstd = floats(n);
    f.x_bias = more ? floats(c) : nullptr;
    f.x_row = f.residual_row = f.n_cols = c, f.n_rows = n, f.eps = 1e-6f, f.dtype = kDtype;
    fastgpt::cuda::rms_norm_fwd(f, {});
    fastgpt::RmsNormBwdArgs b{};
    b.dy = elements(n * c, off), b.dsum = more ? elements(n * c, off) : nullptr, b.h = f.x, b.weight = f.weight;
    b.rstd = f.rstd, b.dx = elements(n * c, off), b.dweight = floats(c);
    b.dx_bias = more ? floats(c) : nullptr, b.partials = floats(fastgpt::cuda::rms_norm_bwd_blocks(n, c, {}) * 2 * c);
    b.dy_row = b.dsum_row = b.h_row = b.n_cols = c, b.n_rows = n, b.eps = 1e-6f, b.dtype = kDtype;
    fastgpt::cuda::rms_norm_bwd(b, {});
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
