// Rows of one warp, of several warps with two rows in a block, of a whole block, and wide ones.
#include "layer_norm/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t n, int64_t c, bool more, int off = 0) {
  run(name, [&] {
    fastgpt::LayerNormFwdArgs f{};
    f.x = halves(n * c, off), f.residual = more ? halves(n * c, off) : nullptr, f.weight = floats(c), f.bias = floats(c);
    f.y = halves(n * c, off), f.sum = more ? halves(n * c, off) : nullptr, f.stats = floats(2 * n);
    f.x_row = f.residual_row = f.n_cols = c, f.n_rows = n, f.eps = 1e-5f, f.dtype = DType::bf16;
    fastgpt::cuda::layer_norm_fwd(f, {});
    fastgpt::LayerNormBwdArgs b{};
    b.dy = halves(n * c, off), b.dsum = more ? halves(n * c, off) : nullptr, b.h = f.x, b.weight = f.weight;
    b.stats = f.stats, b.dx = halves(n * c, off), b.dweight = floats(c), b.dbias = floats(c);
    b.partials = floats(fastgpt::cuda::layer_norm_bwd_blocks(n, c, {}) * 2 * c);
    b.dy_row = b.dsum_row = b.h_row = b.n_cols = c, b.n_rows = n, b.dtype = DType::bf16;
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
