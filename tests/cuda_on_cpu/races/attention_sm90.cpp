// Several tiles of queries and of keys, forward and backward, on the kernels for sm_90a.
#include "attention/sm90.h"
#include "cases.h"

namespace emulator {
void set_chip(int chip);
}

using namespace cases;

int main() {
  run("causal", [&] {
    const int64_t heads = 2, n_queries = 300, n_keys = 500, dim = 64;
    fastgpt::AttentionArgs a{};
    a.q = elements(n_queries * heads * dim), a.k = elements(n_keys * dim), a.v = elements(n_keys * dim);
    a.out = elements(n_queries * heads * dim), a.lse = floats(heads * n_queries);
    a.dout = elements(n_queries * heads * dim), a.dq = elements(n_queries * heads * dim);
    a.dk = elements(n_keys * dim), a.dv = elements(n_keys * dim);
    a.q_at = a.out_at = a.dout_at = a.dq_at = {n_queries * heads * dim, heads * dim, dim};
    a.k_at = a.v_at = a.dk_at = a.dv_at = {n_keys * dim, dim, dim};
    a.workspace = floats(fastgpt::cuda::attention_bwd_workspace(1, n_queries, heads, {}));
    a.n_batch = 1, a.n_queries = n_queries, a.n_keys = n_keys, a.n_heads = heads, a.n_kv_heads = 1, a.head_dim = dim;
    a.scale = 0.125f, a.keep_scale = 1.0f, a.causal = true, a.dtype = kDtype;
    emulator::set_chip(90);
    fastgpt::cuda::attention_fwd_sm90(a, {});
    fastgpt::cuda::attention_bwd_sm90(a, {});
  });
}
