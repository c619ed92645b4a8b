#include "swiglu/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t n, int64_t c, int off = 0) {
  run(name, [&] {
    fastgpt::SwigluArgs a{};
    a.dy = elements(n * c, off), a.gate = elements(n * c, off), a.up = elements(n * c, off), a.y = elements(n * c, off);
    Element* packed = elements(n * 2 * c, off);  // both gradients, row by row
    a.dgate = packed, a.dup = packed + c;
    a.dy_row = a.gate_row = a.up_row = a.n_cols = c, a.grad_row = 2 * c, a.n_rows = n, a.dtype = kDtype;
    fastgpt::cuda::swiglu_fwd(a, {});
    fastgpt::cuda::swiglu_bwd(a, {});
  });
}

}  // namespace

int main() {
  check("rows side by side", 70, 264);
  check("one row", 9, 2056);
  check("unaligned", 9, 70, 1);
}
