// Raw ops of attention_decode; their schemas are in fastgpt/ops/attention_decode.py.
#include "attention_decode/op.h"

#include "attention/glue.h"

namespace fastgpt {
namespace {

// Checks pages (B, n) of a pool whose pages have `size` slots, and sets the fields that belong to them.
void set_pages(const char* op, DecodeArgs& a, const Tensor& pages, const Tensor& k, const Tensor& q) {
  const int64_t size = k.size(1);
  FASTGPT_CHECK(size >= 1 && (size & (size - 1)) == 0, op, "a page has ", size, " slots, expected a power of two");
  check_flat(op, "pages", pages, ScalarType::Int, q.size(0) * pages.size(1), q);
  a.pages = static_cast<const int32_t*>(pages.data_ptr()), a.n_pages = k.size(0);
  while (int64_t{1} << a.page_bits < size) ++a.page_bits;
}

template <class Device>
Tensor decode(const char* op, Tensor q, Tensor k, Tensor v, const OptTensor& pages, const OptTensor& kv_lens,
              const OptTensor& kv_start, double scale, int64_t window, double softcap) {
  const OptTensor none;
  FASTGPT_CHECK(q.dim() == 4 && k.dim() == 4, op, "q and k must have four dimensions");
  FASTGPT_CHECK(!pages || pages->dim() == 2, op, "pages must have two dimensions");
  const int64_t n = pages ? k.size(0) : q.size(0), n_keys = pages ? pages->size(1) * k.size(1) : k.size(1);
  check_heads(op, "k", k, q, {n, k.size(1), k.size(2), q.size(3)});
  check_heads(op, "v", v, q, {n, k.size(1), k.size(2), q.size(3)});
  q = with_dense_heads(q), k = with_dense_heads(k), v = with_dense_heads(v);
  DecodeArgs a{attention_args(op, q, q.size(2), n_keys, k.size(2),
                              {none, none, none, kv_lens, kv_start, none, true, scale, window, softcap, 0.0}),
               nullptr, 0, 0};
  if (pages) set_pages(op, a, *pages, k, q);
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

template <class Device>
Tensor attention_decode_fwd(Tensor q, Tensor k, Tensor v, OptTensor kv_lens, OptTensor kv_start, double scale,
                            int64_t window, double softcap) {
  return decode<Device>("attention_decode_fwd", q, k, v, OptTensor{}, kv_lens, kv_start, scale, window, softcap);
}

template <class Device>
Tensor attention_decode_paged_fwd(Tensor q, Tensor k, Tensor v, Tensor pages, OptTensor kv_lens, OptTensor kv_start,
                                  double scale, int64_t window, double softcap) {
  return decode<Device>("attention_decode_paged_fwd", q, k, v, pages, kv_lens, kv_start, scale, window, softcap);
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(attention_decode_fwd)
FASTGPT_REGISTER(attention_decode_paged_fwd)
