#include "rope/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, bool in_place, bool interleaved, int off = 0) {
  run(name, [&] {
    const int64_t b = 2, t = 5, heads = 3, dim = 32;
    fastgpt::RopeArgs a{};
    for (fastgpt::RopePart& p : a.parts) {
      Element* x = elements(b * t * heads * dim, off);
      const int64_t batch = t * heads * dim, time = heads * dim;
      p = {x, in_place ? x : elements(b * t * heads * dim, off), batch, time, dim, batch, time, dim, heads, heads - 1};
    }
    a.n_batch = b, a.n_time = a.n_positions = t, a.n_cols = dim, a.half = in_place ? dim / 2 : dim / 4, a.sign = 1.0f;
    a.cos = floats(t * dim / 2), a.sin = floats(t * dim / 2), a.interleaved = interleaved, a.dtype = kDtype;
    fastgpt::cuda::rope(a, {});
  });
}

}  // namespace

int main() {
  check("in place", true, false);
  check("in place, interleaved", true, true);
  check("beside", false, false);
  check("beside, interleaved, unaligned", false, true, 1);
}
