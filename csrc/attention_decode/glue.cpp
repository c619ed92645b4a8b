// Raw op of attention_decode; its schema is in fastgpt/ops/attention_decode.py.
#include "attention_decode/op.h"

#include "attention/glue.h"

namespace fastgpt {
namespace {

template <class Device>
Tensor attention_decode_fwd(Tensor q, Tensor k, Tensor v, OptTensor kv_lens, OptTensor kv_start, double scale,
                            int64_t window, double softcap) {
  const char* op = "attention_decode_fwd";
  const OptTensor none;
  FASTGPT_CHECK(q.dim() == 4 && k.dim() == 4, op, "q and k must have four dimensions");
  check_heads(op, "k", k, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  check_heads(op, "v", v, q, {q.size(0), k.size(1), k.size(2), q.size(3)});
  q = with_dense_heads(q), k = with_dense_heads(k), v = with_dense_heads(v);
  AttentionArgs a = attention_args(op, q, q.size(2), k.size(1), k.size(2),
                                   {none, none, none, kv_lens, kv_start, none, true, scale, window, softcap, 0.0});
  const Device device(q);
  Tensor out = allocate_like(q);
  if (out.numel() == 0) return out;
  a.q = q.data_ptr(), a.k = k.data_ptr(), a.v = v.data_ptr(), a.out = out.data_ptr();
  a.q_at = strides_of(q), a.k_at = strides_of(k), a.v_at = strides_of(v), a.out_at = strides_of(out);
  const int64_t size = attention_decode_workspace(a, device.stream);
  const Tensor workspace = size == 0 ? out : allocate(q, {size}, ScalarType::Float);
  if (size > 0) a.workspace = static_cast<float*>(workspace.data_ptr());
  attention_decode_fwd(a, device.stream);
  return out;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(attention_decode_fwd)
