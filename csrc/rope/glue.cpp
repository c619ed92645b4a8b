// Raw ops of rope: check, allocate, fill the struct of the launcher, launch. Schemas are in fastgpt/ops/rope.py.
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"
#include "rope/op.h"

namespace fastgpt {
namespace {

// Returns a (B, T, H, D) tensor itself if its columns are contiguous, else a copy.
Tensor whole_columns(const Tensor& t) {
  return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

// Sets everything except the parts; cos, sin and positions own the memory.
RopeArgs rope_args(const char* op, const Tensor& x, Tensor& cos, Tensor& sin, OptTensor& positions,
                   bool interleaved, bool inverse) {
  FASTGPT_CHECK(x.dim() == 4, op, "queries and keys must be (B, T, H, D)");
  RopeArgs a{};
  a.dtype = float_dtype_of(op, "the tensor to turn", x);
  a.n_batch = x.size(0), a.n_time = x.size(1), a.n_cols = x.size(3);
  FASTGPT_CHECK(cos.dim() == 2 && 2 * cos.size(1) <= a.n_cols, op, "cos must be (T, rotary_dim / 2)");
  make_contiguous(cos), make_contiguous(sin);
  check_flat(op, "cos", cos, ScalarType::Float, cos.numel(), x);
  check_flat(op, "sin", sin, ScalarType::Float, cos.numel(), x);
  a.n_positions = cos.size(0), a.half = cos.size(1);
  a.cos = static_cast<const float*>(cos.data_ptr()), a.sin = static_cast<const float*>(sin.data_ptr());
  make_contiguous(positions);
  if (positions) {
    const bool per_batch = positions->dim() == 2;
    FASTGPT_CHECK(per_batch || positions->dim() == 1, op, "positions must be (T) or (B, T)");
    check_flat(op, "positions", *positions, ScalarType::Long, (per_batch ? a.n_batch : 1) * a.n_time, x);
    a.positions = static_cast<const int64_t*>(positions->data_ptr());
    a.positions_batch = per_batch ? a.n_time : 0;
  }
  a.sign = inverse ? -1.0f : 1.0f;
  a.interleaved = interleaved;
  return a;
}

RopePart rope_part(const Tensor& x, const Tensor& y, int64_t n_heads, int64_t n_turned) {
  RopePart p{};
  p.x = x.data_ptr(), p.y = y.data_ptr();
  p.x_batch = x.stride(0), p.x_time = x.stride(1), p.x_head = x.stride(2);
  p.y_batch = y.stride(0), p.y_time = y.stride(1), p.y_head = y.stride(2);
  p.n_heads = n_heads, p.n_turned = n_turned;
  return p;
}

template <class Device>
std::tuple<Tensor, Tensor> rope_fwd(Tensor q, Tensor k, Tensor cos, Tensor sin, OptTensor positions, bool interleaved,
                                    bool inverse) {
  const char* op = "rope_fwd";
  RopeArgs a = rope_args(op, q, cos, sin, positions, interleaved, inverse);
  FASTGPT_CHECK(k.dim() == 4 && k.size(0) == a.n_batch && k.size(1) == a.n_time && k.size(3) == a.n_cols &&
                    k.scalar_type() == q.scalar_type(),
                op, "k has the wrong shape or dtype");
  check_device(op, "k", k, q);
  const Device device(q);
  Tensor q_out = allocate_like(q), k_out = allocate_like(k);
  const Tensor q_in = whole_columns(q), k_in = whole_columns(k);
  a.parts[0] = rope_part(q_in, q_out, q.size(2), q.size(2));
  a.parts[1] = rope_part(k_in, k_out, k.size(2), k.size(2));
  if (q.numel() + k.numel() > 0) rope(a, device.stream);
  return {q_out, k_out};
}

void check_turned(const char* op, const Tensor& qkv, int64_t n_turned) {
  FASTGPT_CHECK(n_turned >= 0 && n_turned <= qkv.size(2), op, "n_turned is ", n_turned, ", expected 0 to ",
                qkv.size(2));
}

// Returns whether all elements have different addresses, by strides alone: each dimension steps over all smaller ones.
bool elements_apart(const Tensor& t) {
  int64_t reach = 0;  // largest offset within the dimensions seen so far
  std::vector<bool> seen(t.dim());
  for (int64_t i = 0; i < t.dim(); ++i) {
    int64_t next = -1;
    for (int64_t d = 0; d < t.dim(); ++d) {
      if (!seen[d] && (next < 0 || t.stride(d) < t.stride(next))) next = d;
    }
    seen[next] = true;
    if (t.size(next) <= 1) continue;
    if (t.stride(next) <= reach) return false;
    reach += t.stride(next) * (t.size(next) - 1);
  }
  return true;
}

template <class Device>
void rope_rows(Tensor qkv, Tensor cos, Tensor sin, OptTensor positions, int64_t n_turned, bool interleaved,
               bool inverse) {
  const char* op = "rope_rows";
  RopeArgs a = rope_args(op, qkv, cos, sin, positions, interleaved, inverse);
  check_turned(op, qkv, n_turned);
  FASTGPT_CHECK(qkv.numel() == 0 || ((a.n_cols == 1 || qkv.stride(3) == 1) && elements_apart(qkv)), op,
                "qkv needs contiguous columns and rows that do not overlap");
  if (qkv.numel() == 0 || n_turned == 0) return;
  const Device device(qkv);
  a.parts[0] = rope_part(qkv, qkv, n_turned, n_turned);
  rope(a, device.stream);
}

template <class Device>
Tensor rope_copy(Tensor qkv, Tensor cos, Tensor sin, OptTensor positions, int64_t n_turned, bool interleaved,
                 bool inverse) {
  const char* op = "rope_copy";
  RopeArgs a = rope_args(op, qkv, cos, sin, positions, interleaved, inverse);
  check_turned(op, qkv, n_turned);
  const Device device(qkv);
  Tensor out = allocate_like(qkv);
  if (qkv.numel() == 0) return out;
  const Tensor in = whole_columns(qkv);
  a.parts[0] = rope_part(in, out, qkv.size(2), n_turned);
  rope(a, device.stream);
  return out;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(rope_fwd)
FASTGPT_REGISTER(rope_rows)
FASTGPT_REGISTER(rope_copy)
