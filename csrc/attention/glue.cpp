// Raw ops of attention: check, allocate, fill the struct of the launcher, launch. Schemas are in
// fastgpt/ops/attention.py.
#include <algorithm>
#include <array>

#include "attention/op.h"
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"

namespace fastgpt {
namespace {

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
Tensor with_dense_heads(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1 ? t : torch::stable::contiguous(t);
}

AttentionStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }

// Returns the address of head `head` of a (B, rows, heads, D) tensor.
void* head_of(const Tensor& t, int64_t head, DType dtype) {
  return static_cast<char*>(t.data_ptr()) + head * t.stride(2) * (dtype == DType::f32 ? 4 : 2);
}

const int32_t* index_or_null(const char* op, const char* name, const OptTensor& t, int64_t numel,
                             const Tensor& like) {
  if (!t) return nullptr;
  check_flat(op, name, *t, ScalarType::Int, numel, like);
  return static_cast<const int32_t*>(t->data_ptr());
}

// Sets shapes from q (B, T, H, D) and the sizes of the keys, and the options. The tensors of the caller own the memory.
AttentionArgs attention_args(const char* op, const Tensor& q, int64_t n_heads, int64_t n_keys,
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

void check_heads(const char* op, const char* name, const Tensor& t, const Tensor& like,
                 std::array<int64_t, 4> sizes) {
  bool same = t.dim() == 4;
  for (int64_t d = 0; same && d < 4; ++d) same = t.size(d) == sizes[d];
  FASTGPT_CHECK(same, op, name, " has the wrong shape");
  FASTGPT_CHECK(t.scalar_type() == like.scalar_type(), op, name, " has the wrong dtype");
  check_device(op, name, t, like);
}

template <class Device>
std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, FASTGPT_ATTENTION_OPTIONS) {
  const char* op = "attention_fwd";
  const AttentionOptions o = FASTGPT_ATTENTION_PACK;
  FASTGPT_CHECK(q.dim() == 4 && k.dim() == 4, op, "q and k must have four dimensions");
  check_heads(op, "k", k, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  check_heads(op, "v", v, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  q = with_dense_heads(q), k = with_dense_heads(k), v = with_dense_heads(v);
  AttentionArgs a = attention_args(op, q, q.size(2), k.size(1), k.size(2), o);
  const Device device(q);
  Tensor out = allocate_like(q), lse = allocate(q, {a.n_batch, a.n_heads, a.n_queries}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.q_at = strides_of(q), a.k_at = strides_of(k), a.v_at = strides_of(v);
  a.out = out.data_ptr(), a.out_at = strides_of(out);
  a.lse = static_cast<float*>(lse.data_ptr());
  attention_fwd(a, device.stream);
  return {out, lse};
}

// Allocates the scratch of backward, which the caller must keep.
template <class Device>
Tensor workspace_of(const Device& device, AttentionArgs& a, const Tensor& like) {
  const int64_t n = attention_bwd_workspace(a.n_batch, a.n_queries, a.n_heads, device.stream);
  Tensor t = allocate(like, {n}, ScalarType::Float);
  a.workspace = static_cast<float*>(t.data_ptr());
  return t;
}

// Sets what both backward ops have besides q, k, v and their gradients; replaces the three tensors by dense ones.
void backward_args(const char* op, AttentionArgs& a, Tensor& dout, Tensor& out, const Tensor& lse,
                   const Tensor& like) {
  const std::array<int64_t, 4> sizes = {a.n_batch, a.n_queries, a.n_heads, a.head_dim};
  check_heads(op, "dout", dout, like, sizes);
  check_heads(op, "out", out, like, sizes);
  check_flat(op, "lse", lse, ScalarType::Float, a.n_batch * a.n_heads * a.n_queries, like);
  dout = with_dense_heads(dout), out = with_dense_heads(out);
  a.dout = dout.data_ptr(), a.dout_at = strides_of(dout);
  a.out = out.data_ptr(), a.out_at = strides_of(out);
  a.lse = static_cast<float*>(lse.data_ptr());
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                                 Tensor lse, FASTGPT_ATTENTION_OPTIONS) {
  const char* op = "attention_bwd";
  const AttentionOptions o = FASTGPT_ATTENTION_PACK;
  FASTGPT_CHECK(q.dim() == 4 && k.dim() == 4, op, "q and k must have four dimensions");
  check_heads(op, "k", k, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  check_heads(op, "v", v, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  q = with_dense_heads(q), k = with_dense_heads(k), v = with_dense_heads(v);
  AttentionArgs a = attention_args(op, q, q.size(2), k.size(1), k.size(2), o);
  backward_args(op, a, dout, out, lse, q);
  if (dlse) {
    make_contiguous(*dlse);
    check_flat(op, "dlse", *dlse, ScalarType::Float, lse.numel(), q);
    a.dlse = static_cast<const float*>(dlse->data_ptr());
  }
  const Device device(q);
  Tensor dq = allocate_like(q), dk = allocate_like(k), dv = allocate_like(v);
  if (dq.numel() == 0 && dk.numel() == 0) return {dq, dk, dv};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.q_at = strides_of(q), a.k_at = strides_of(k), a.v_at = strides_of(v);
  a.dq = dq.data_ptr(), a.dk = dk.data_ptr(), a.dv = dv.data_ptr();
  a.dq_at = strides_of(dq), a.dk_at = strides_of(dk), a.dv_at = strides_of(dv);
  const Tensor workspace = workspace_of(device, a, q);
  attention_bwd(a, device.stream);
  return {dq, dk, dv};
}

template <class Device>
Tensor attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, FASTGPT_ATTENTION_OPTIONS, int64_t n_heads,
                         int64_t n_kv_heads) {
  const char* op = "attention_qkv_bwd";
  const AttentionOptions o = FASTGPT_ATTENTION_PACK;
  FASTGPT_CHECK(qkv.dim() == 4 && n_heads >= 0 && n_kv_heads >= 1 && qkv.size(2) == n_heads + 2 * n_kv_heads, op,
                "qkv must be (B, T, n_heads + 2 n_kv_heads, D)");
  qkv = with_dense_heads(qkv);
  AttentionArgs a = attention_args(op, qkv, n_heads, qkv.size(1), n_kv_heads, o);
  backward_args(op, a, dout, out, lse, qkv);
  const Device device(qkv);
  Tensor dqkv = allocate_like(qkv);
  if (dqkv.numel() == 0) return dqkv;
  a.q = head_of(qkv, 0, a.dtype), a.k = head_of(qkv, n_heads, a.dtype);
  a.v = head_of(qkv, n_heads + n_kv_heads, a.dtype);
  a.dq = head_of(dqkv, 0, a.dtype), a.dk = head_of(dqkv, n_heads, a.dtype);
  a.dv = head_of(dqkv, n_heads + n_kv_heads, a.dtype);
  a.q_at = a.k_at = a.v_at = strides_of(qkv);
  a.dq_at = a.dk_at = a.dv_at = strides_of(dqkv);
  const Tensor workspace = workspace_of(device, a, qkv);
  attention_bwd(a, device.stream);
  return dqkv;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(attention_fwd)
FASTGPT_REGISTER(attention_bwd)
FASTGPT_REGISTER(attention_qkv_bwd)
