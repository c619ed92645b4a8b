// One split and several, of which some have no keys; with and without pages.
#include "attention_decode/op.h"
#include "cases.h"

using namespace cases;

namespace {

void check(const char* name, int64_t dim, int64_t group, int64_t n_keys, bool paged) {
  run(name, [&] {
    const int64_t b = 2, kv_heads = 1, heads = group * kv_heads;
    fastgpt::DecodeArgs a{};
    a.q = elements(b * heads * dim), a.k = elements(b * n_keys * dim), a.v = elements(b * n_keys * dim);
    a.out = elements(b * heads * dim);
    a.q_at = a.out_at = {heads * dim, heads * dim, dim};
    a.k_at = a.v_at = {paged ? 16 * dim : n_keys * dim, dim, dim};
    a.n_batch = b, a.n_queries = 1, a.n_keys = n_keys, a.n_heads = heads, a.n_kv_heads = kv_heads, a.head_dim = dim;
    a.kv_lens = values({static_cast<int32_t>(n_keys), int32_t{1}}), a.scale = 0.125f, a.causal = true;
    a.dtype = kDtype, a.page_bits = 4, a.n_pages = b * n_keys / 16;
    if (paged) {
      int32_t* pages = room<int32_t>(a.n_pages);
      for (int32_t i = 0; i < a.n_pages; ++i) pages[i] = static_cast<int32_t>(a.n_pages) - 1 - i;
      a.pages = pages;
    }
    a.workspace = floats(fastgpt::cuda::attention_decode_workspace(a, {}));
    fastgpt::cuda::attention_decode_fwd(a, {});
  });
}

}  // namespace

int main() {
  check("one split", 64, 4, 32, false);
  check("splits", 64, 4, 320, false);
  check("splits of pages", 64, 4, 320, true);
}
