// Raw ops of attention: check, allocate, fill the struct of the launcher, launch. Schemas are in
// fastgpt/ops/attention.py.
#include "attention/glue.h"
#include "attention/sm90.h"

namespace fastgpt {
namespace {

// Returns the address of head `head` of a (B, rows, heads, D) tensor.
void* head_of(const Tensor& t, int64_t head, DType dtype) {
  return static_cast<char*>(t.data_ptr()) + head * t.stride(2) * (dtype == DType::f32 ? 4 : 2);
}

// Checks, allocates out and lse, and launches; `readable` returns a tensor, or a copy of it with another layout.
template <class Device, typename Readable, typename Launch>
std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& q_given, const Tensor& k_given, const Tensor& v_given,
                                   const AttentionOptions& o, Readable readable, Launch launch) {
  FASTGPT_CHECK(q_given.dim() == 4 && k_given.dim() == 4, op, "q and k must have four dimensions");
  const int64_t b = q_given.size(0), s = k_given.size(1), heads = k_given.size(2), dim = q_given.size(3);
  check_heads(op, "k", k_given, q_given, {b, s, heads, dim});
  check_heads(op, "v", v_given, q_given, {b, s, heads, dim});
  const Device device(q_given);
  const Tensor q = readable(q_given), k = readable(k_given), v = readable(v_given);
  AttentionArgs a = attention_args(op, q, q.size(2), k.size(1), k.size(2), o);
  Tensor out = allocate_like(q), lse = allocate(q, {a.n_batch, a.n_heads, a.n_queries}, ScalarType::Float);
  if (out.numel() == 0) return {out, lse};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.q_at = strides_of(q), a.k_at = strides_of(k), a.v_at = strides_of(v);
  a.out = out.data_ptr(), a.out_at = strides_of(out);
  a.lse = static_cast<float*>(lse.data_ptr());
  launch(a, device.stream);
  return {out, lse};
}

template <class Device>
std::tuple<Tensor, Tensor> attention_fwd(Tensor q, Tensor k, Tensor v, FASTGPT_ATTENTION_OPTIONS) {
  const auto launch = [](const AttentionArgs& a, auto stream) { attention_fwd(a, stream); };
  return forward<Device>("attention_fwd", q, k, v, FASTGPT_ATTENTION_PACK, with_dense_heads, launch);
}

#if defined(FASTGPT_WITH_CUDA)
// Returns a tensor itself if TMA can read it, else a copy.
Tensor with_whole_pieces(const Tensor& t) {
  const bool dense = t.stride(3) == 1 || t.size(3) == 1;
  const bool fits = cuda::sm90_takes_layout(t.data_ptr(), strides_of(t), t.size(0), t.size(1), t.size(2));
  if (dense && fits) return t;
  Tensor copy = allocate_like(t);
  torch::stable::copy_(copy, t);
  return copy;
}
#endif

// Allocates the scratch of backward, which the caller must keep.
template <class Device>
Tensor workspace_of(const Device& device, AttentionArgs& a, const Tensor& like) {
  const int64_t n = attention_bwd_workspace(a.n_batch, a.n_queries, a.n_heads, device.stream);
  Tensor t = allocate(like, {n}, ScalarType::Float);
  a.workspace = static_cast<float*>(t.data_ptr());
  return t;
}

// Sets what both backward ops have besides q, k, v and their gradients; replaces the three tensors by readable ones.
template <typename Readable>
void backward_args(const char* op, AttentionArgs& a, Tensor& dout, Tensor& out, const Tensor& lse, const Tensor& like,
                   Readable readable) {
  const std::array<int64_t, 4> sizes = {a.n_batch, a.n_queries, a.n_heads, a.head_dim};
  check_heads(op, "dout", dout, like, sizes);
  check_heads(op, "out", out, like, sizes);
  check_flat(op, "lse", lse, ScalarType::Float, a.n_batch * a.n_heads * a.n_queries, like);
  dout = readable(dout), out = readable(out);
  a.dout = dout.data_ptr(), a.dout_at = strides_of(dout);
  a.out = out.data_ptr(), a.out_at = strides_of(out);
  a.lse = static_cast<float*>(lse.data_ptr());
}

// Checks, allocates the gradients, and launches; `readable` as for `forward`.
template <class Device, typename Readable, typename Launch>
std::tuple<Tensor, Tensor, Tensor> backward(const char* op, Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v,
                                            Tensor out, const Tensor& lse, const AttentionOptions& o,
                                            Readable readable, Launch launch) {
  FASTGPT_CHECK(q.dim() == 4 && k.dim() == 4, op, "q and k must have four dimensions");
  check_heads(op, "k", k, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  check_heads(op, "v", v, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  const Device device(q);
  q = readable(q), k = readable(k), v = readable(v);
  AttentionArgs a = attention_args(op, q, q.size(2), k.size(1), k.size(2), o);
  backward_args(op, a, dout, out, lse, q, readable);
  if (dlse) {
    make_contiguous(*dlse);
    check_flat(op, "dlse", *dlse, ScalarType::Float, lse.numel(), q);
    a.dlse = static_cast<const float*>(dlse->data_ptr());
  }
  Tensor dq = allocate_like(q), dk = allocate_like(k), dv = allocate_like(v);
  if (dq.numel() == 0 && dk.numel() == 0) return {dq, dk, dv};
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr();
  a.q_at = strides_of(q), a.k_at = strides_of(k), a.v_at = strides_of(v);
  a.dq = dq.data_ptr(), a.dk = dk.data_ptr(), a.dv = dv.data_ptr();
  a.dq_at = strides_of(dq), a.dk_at = strides_of(dk), a.dv_at = strides_of(dv);
  const Tensor workspace = workspace_of(device, a, q);
  launch(a, device.stream);
  return {dq, dk, dv};
}

// The same for one packed tensor.
template <class Device, typename Readable, typename Launch>
Tensor packed_backward(const char* op, Tensor dout, Tensor qkv, Tensor out, const Tensor& lse,
                       const AttentionOptions& o, int64_t n_heads, int64_t n_kv_heads, Readable readable,
                       Launch launch) {
  FASTGPT_CHECK(qkv.dim() == 4 && n_heads >= 0 && n_kv_heads >= 1 && qkv.size(2) == n_heads + 2 * n_kv_heads, op,
                "qkv must be (B, T, n_heads + 2 n_kv_heads, D)");
  const Device device(qkv);
  qkv = readable(qkv);
  AttentionArgs a = attention_args(op, qkv, n_heads, qkv.size(1), n_kv_heads, o);
  backward_args(op, a, dout, out, lse, qkv, readable);
  Tensor dqkv = allocate_like(qkv);
  if (dqkv.numel() == 0) return dqkv;
  a.q = head_of(qkv, 0, a.dtype), a.k = head_of(qkv, n_heads, a.dtype);
  a.v = head_of(qkv, n_heads + n_kv_heads, a.dtype);
  a.dq = head_of(dqkv, 0, a.dtype), a.dk = head_of(dqkv, n_heads, a.dtype);
  a.dv = head_of(dqkv, n_heads + n_kv_heads, a.dtype);
  a.q_at = a.k_at = a.v_at = strides_of(qkv);
  a.dq_at = a.dk_at = a.dv_at = strides_of(dqkv);
  const Tensor workspace = workspace_of(device, a, qkv);
  launch(a, device.stream);
  return dqkv;
}

constexpr auto kBackward = [](const AttentionArgs& a, auto stream) { attention_bwd(a, stream); };

template <class Device>
std::tuple<Tensor, Tensor, Tensor> attention_bwd(Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v, Tensor out,
                                                 Tensor lse, FASTGPT_ATTENTION_OPTIONS) {
  return backward<Device>("attention_bwd", dout, dlse, q, k, v, out, lse, FASTGPT_ATTENTION_PACK, with_dense_heads,
                          kBackward);
}

template <class Device>
Tensor attention_qkv_bwd(Tensor dout, Tensor qkv, Tensor out, Tensor lse, FASTGPT_ATTENTION_OPTIONS, int64_t n_heads,
                         int64_t n_kv_heads) {
  return packed_backward<Device>("attention_qkv_bwd", dout, qkv, out, lse, FASTGPT_ATTENTION_PACK, n_heads, n_kv_heads,
                                 with_dense_heads, kBackward);
}

#if defined(FASTGPT_WITH_CUDA)
template <class Device>
std::tuple<Tensor, Tensor> attention_fwd_sm90(Tensor q, Tensor k, Tensor v, FASTGPT_ATTENTION_OPTIONS) {
  return forward<Device>("attention_fwd_sm90", q, k, v, FASTGPT_ATTENTION_PACK, with_whole_pieces,
                         cuda::attention_fwd_sm90);
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> attention_bwd_sm90(Tensor dout, OptTensor dlse, Tensor q, Tensor k, Tensor v,
                                                      Tensor out, Tensor lse, FASTGPT_ATTENTION_OPTIONS) {
  return backward<Device>("attention_bwd_sm90", dout, dlse, q, k, v, out, lse, FASTGPT_ATTENTION_PACK,
                          with_whole_pieces, cuda::attention_bwd_sm90);
}

template <class Device>
Tensor attention_qkv_bwd_sm90(Tensor dout, Tensor qkv, Tensor out, Tensor lse, FASTGPT_ATTENTION_OPTIONS,
                              int64_t n_heads, int64_t n_kv_heads) {
  return packed_backward<Device>("attention_qkv_bwd_sm90", dout, qkv, out, lse, FASTGPT_ATTENTION_PACK, n_heads,
                                 n_kv_heads, with_whole_pieces, cuda::attention_bwd_sm90);
}
#endif

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(attention_fwd)
FASTGPT_REGISTER_CUDA(attention_fwd_sm90)
FASTGPT_REGISTER(attention_bwd)
FASTGPT_REGISTER(attention_qkv_bwd)
FASTGPT_REGISTER_CUDA(attention_bwd_sm90)
FASTGPT_REGISTER_CUDA(attention_qkv_bwd_sm90)
