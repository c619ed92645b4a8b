// Several tiles of queries and of keys, forward and backward, without options and with all of them.
#include "attention/op.h"
#include "cases.h"

using namespace cases;

namespace {

struct Options {
  bool causal = true, window = false, softcap = false, dropout = false, documents = false, negative = false;
  int off = 0;
};

void check(const char* name, int64_t dim, int64_t n_queries, int64_t n_keys, const Options& o) {
  run(name, [&] {
    const int64_t b = 1, heads = 2, kv_heads = 1;
    const auto heads_at = [&](int64_t t, int64_t h) { return fastgpt::AttentionStrides{t * h * dim, h * dim, dim}; };
    const auto tensor = [&](int64_t t, int64_t h) { return elements(b * t * h * dim, o.off); };
    fastgpt::AttentionArgs a{};
    a.q = tensor(n_queries, heads), a.k = tensor(n_keys, kv_heads), a.v = tensor(n_keys, kv_heads);
    a.out = tensor(n_queries, heads), a.dout = tensor(n_queries, heads), a.dq = tensor(n_queries, heads);
    a.dk = tensor(n_keys, kv_heads), a.dv = tensor(n_keys, kv_heads), a.lse = floats(b * heads * n_queries);
    a.q_at = a.out_at = a.dout_at = a.dq_at = heads_at(n_queries, heads);
    a.k_at = a.v_at = a.dk_at = a.dv_at = heads_at(n_keys, kv_heads);
    a.workspace = floats(fastgpt::cuda::attention_bwd_workspace(b, n_queries, heads, {}));
    a.n_batch = b, a.n_queries = n_queries, a.n_keys = n_keys, a.n_heads = heads, a.n_kv_heads = kv_heads;
    a.head_dim = dim, a.scale = o.negative ? -0.125f : 0.125f, a.keep_scale = 1.0f, a.causal = o.causal;
    a.window = o.window ? 40 : 0, a.softcap = o.softcap ? 2.0f : 0.0f, a.dtype = kDtype;
    if (o.dropout) a.rng = values<int64_t>({7, 1}), a.drop_below = 1u << 30, a.keep_scale = 4.0f / 3.0f;
    if (o.documents) {
      int32_t* ids = room<int32_t>(b * n_queries);
      for (int64_t i = 0; i < b * n_queries; ++i) ids[i] = static_cast<int32_t>(i / 50);
      a.doc_ids = ids;
    }
    fastgpt::cuda::attention_fwd(a, {});
    fastgpt::cuda::attention_bwd(a, {});
  });
}

}  // namespace

int main() {
  for (const int64_t dim : {FASTGPT_HEAD_DIMS}) {
    std::printf("head dimension %d\n", static_cast<int>(dim));
    check("causal", dim, 200, 200, {});
    check("queries without keys", dim, 300, 70, {});
    check("not causal, unaligned, negative scale", dim, 70, 133, {.causal = false, .negative = true, .off = 1});
    if (dim == 96) continue;  // no kernel of its own with options
    check("window, softcap", dim, 150, 150, {.window = true, .softcap = true});
    check("keys that no query sees", dim, 70, 300, {.window = true});
    check("dropout, documents", dim, 150, 150, {.dropout = true, .documents = true});
  }
}
