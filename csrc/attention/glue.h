// Arguments of the raw ops of attention and attention_decode: options, checks, the struct of the launchers.
#pragma once
#include <algorithm>
#include <array>

#include "attention/op.h"
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"

namespace fastgpt {

// Options, in the order of the schemas.
struct AttentionOptions {
  const OptTensor &cu_seqlens_q, &cu_seqlens_k, &doc_ids, &kv_lens, &kv_start, &rng;
  bool causal;
  double scale;
  int64_t window;
  double softcap, dropout_p;
};
#define FASTGPT_ATTENTION_OPTIONS                                                                           \
  OptTensor cu_seqlens_q, OptTensor cu_seqlens_k, OptTensor doc_ids, OptTensor kv_lens, OptTensor kv_start, \
      OptTensor rng, bool causal, double scale, int64_t window, double softcap, double dropout_p
#define FASTGPT_ATTENTION_PACK \
  {cu_seqlens_q, cu_seqlens_k, doc_ids, kv_lens, kv_start, rng, causal, scale, window, softcap, dropout_p}

// Returns a (B, rows, heads, D) tensor itself if its last dimension is contiguous, else a copy.
inline Tensor with_dense_heads(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
}

inline AttentionStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

inline const int32_t* index_or_null(const char* op, const char* name, const OptTensor& t, int64_t numel,
                             const Tensor& like) {
  if (!t) return nullptr;
  check_flat(op, name, *t, ScalarType::Int, numel, like);
  return static_cast<const int32_t*>(t->data_ptr());
}

// Sets shapes from q (B, T, H, D) and the sizes of the keys, and the options. The tensors of the caller own the memory.
inline AttentionArgs attention_args(const char* op, const Tensor& q, int64_t n_heads, int64_t n_keys,
                             int64_t n_kv_heads, const AttentionOptions& o) {
  AttentionArgs a{};
  a.dtype = float_dtype_of(op, "q", q);
  a.n_batch = q.size(0), a.n_queries = q.size(1), a.n_keys = n_keys, a.head_dim = q.size(3);
  a.n_heads = n_heads, a.n_kv_heads = n_kv_heads;
  FASTGPT_CHECK(a.head_dim >= 1, op, "the head dimension is 0");
  FASTGPT_CHECK(n_kv_heads >= 1 && n_heads >= 0 && n_heads % n_kv_heads == 0, op, "q has ", n_heads,
                " heads, expected a multiple of k's ", n_kv_heads);
  FASTGPT_CHECK(bool(o.cu_seqlens_q) == bool(o.cu_seqlens_k), op, "cu_seqlens_q and cu_seqlens_k go together");
  if (o.cu_seqlens_q) {
    const int64_t n = o.cu_seqlens_q->numel();
    FASTGPT_CHECK(n >= 1 && a.n_batch == 1, op, "cu_seqlens need a batch of 1 and at least one value");
    a.n_sequences = n - 1;
    a.cu_q = index_or_null(op, "cu_seqlens_q", o.cu_seqlens_q, n, q);
    a.cu_k = index_or_null(op, "cu_seqlens_k", o.cu_seqlens_k, n, q);
  }
  FASTGPT_CHECK(!o.doc_ids || a.n_queries == a.n_keys, op, "doc_ids need as many queries as keys");
  a.doc_ids = index_or_null(op, "doc_ids", o.doc_ids, a.n_batch * a.n_queries, q);
  a.kv_lens = index_or_null(op, "kv_lens", o.kv_lens, a.n_batch, q);
  a.kv_start = index_or_null(op, "kv_start", o.kv_start, a.n_batch, q);
  FASTGPT_CHECK(o.dropout_p >= 0.0 && o.dropout_p < 1.0, op, "dropout_p is ", o.dropout_p, ", expected 0 to less than 1");
  if (o.dropout_p > 0.0) {
    FASTGPT_CHECK(o.rng.has_value(), op, "dropout needs rng");
    check_flat(op, "rng", *o.rng, ScalarType::Long, 2, q);
    a.rng = static_cast<const int64_t*>(o.rng->data_ptr());
    a.drop_below = static_cast<uint32_t>(o.dropout_p * 4294967296.0);
  }
  a.keep_scale = static_cast<float>(1.0 / (1.0 - o.dropout_p));
  a.causal = o.causal, a.scale = static_cast<float>(o.scale), a.softcap = static_cast<float>(o.softcap);
  FASTGPT_CHECK(o.window >= 0 && o.softcap >= 0.0, op, "window and softcap must not be negative");
  a.window = std::min(o.window, a.n_queries + a.n_keys + 1);  // a larger window has the same effect, but could overflow
  return a;
}

inline void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& like,
                 std::array<int64_t, 4> sizes) {
  bool same = t.dim() == 4;
  for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == sizes[d];
  FASTGPT_CHECK(same, op, name, " has the wrong shape");
  FASTGPT_CHECK(t.scalar_type() == like.scalar_type(), op, name, " has the wrong dtype");
  check_device(op, name, t, like);
}

}  // namespace fastgpt
