// Raw ops of embedding: check, allocate, fill the struct of the launcher, launch. Schemas are in
// fastgpt/ops/embedding.py.
#include <array>
#include <type_traits>

#include "embedding/op.h"
#include "glue/allocate.h"
#include "glue/register.h"
#include "glue/rows.h"

namespace fastgpt {
namespace {

// Returns contiguous int64 or int32 indices; `t` owns the memory.
Indices indices_of(const char* op, const char* name, Tensor& t, const Tensor& like) {
  const ScalarType type = t.scalar_type();
  FASTGPT_CHECK(type == ScalarType::Long || type == ScalarType::Int, op, name, " must be int64 or int32");
  make_contiguous(t);
  check_device(op, name, t, like);
  return {t.data_ptr(), type == ScalarType::Long};
}

void check_table(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  FASTGPT_CHECK(t.dim() == 2 && t.size(1) == like.size(1) && t.scalar_type() == like.scalar_type(), op, name,
                " has the wrong shape or dtype");
  check_device(op, name, t, like);
}

template <class Device>
Tensor embedding_fwd(Tensor ids, Tensor weight, OptTensor position_weight, OptTensor positions) {
  const char* op = "embedding_fwd";
  FASTGPT_CHECK(weight.dim() == 2, op, "weight must be (V, C)");
  EmbeddingFwdArgs a{};
  a.dtype = float_dtype_of(op, "weight", weight);
  a.n_tokens = ids.numel(), a.n_rows = weight.size(0), a.n_cols = weight.size(1);
  a.ids = indices_of(op, "ids", ids, weight);
  if (position_weight) {
    check_table(op, "position_weight", *position_weight, weight);
    FASTGPT_CHECK(ids.dim() >= 1, op, "ids must have at least one dimension beside position_weight");
    a.period = ids.size(ids.dim() - 1);
    a.n_positions = position_weight->size(0);
  }
  if (position_weight && positions) {
    const int64_t n = positions->numel();
    FASTGPT_CHECK(n == a.n_tokens || n == a.period, op, "positions has the wrong shape");
    a.positions = indices_of(op, "positions", *positions, weight);
    a.period = n;
  }
  const Device device(weight);
  const auto sizes = ids.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape.push_back(a.n_cols);
  Tensor y = allocate(weight, shape, weight.scalar_type());
  if (y.numel() == 0) return y;
  const Rows rows = rows_of(weight), position_rows = position_weight ? rows_of(*position_weight) : rows;
  a.weight = rows.data(), a.weight_row = rows.step;
  a.position_weight = position_weight ? position_rows.data() : nullptr, a.position_row = position_rows.step;
  a.y = y.data_ptr();
  embedding_fwd(a, device.stream);
  return y;
}

// Tokens in the order of their table rows, and memory for partial sums: the further arguments of backward on CUDA.
struct SortedTokens {
  Tensor sorted, order, partials, partial_keys;
};

// Sorts the tokens with PyTorch (32-bit keys, stable, no synchronisation) and sets the fields of `a`.
template <class Device>
SortedTokens sort_tokens(const Device& device, EmbeddingBwdArgs& a, const Tensor& like) {
  FASTGPT_CHECK(a.n_rows < INT32_MAX, "embedding_bwd_add", "dweight has ", a.n_rows, " rows, expected less than 2^31 - 1");
  const Tensor keys = allocate(like, {a.n_tokens}, ScalarType::Int);
  embedding_keys(a, static_cast<int32_t*>(keys.data_ptr()), device.stream);
  std::array<StableIValue, 4> stack{torch::stable::detail::from(keys),
                                    torch::stable::detail::from(std::optional<bool>(true)),
                                    torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  const int64_t n = embedding_partials(a.n_tokens, device.stream);
  SortedTokens s{torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1]),
                 allocate(like, {n, a.n_cols}, ScalarType::Float), allocate(like, {n}, ScalarType::Int)};
  a.sorted = static_cast<const int32_t*>(s.sorted.data_ptr()), a.order = static_cast<const int64_t*>(s.order.data_ptr());
  a.partials = static_cast<float*>(s.partials.data_ptr());
  a.partial_keys = static_cast<int32_t*>(s.partial_keys.data_ptr());
  return s;
}

template <class Device>
void embedding_bwd_add(Tensor dweight, Tensor dy, Tensor ids) {
  const char* op = "embedding_bwd_add";
  EmbeddingBwdArgs a{};
  a.dtype = float_dtype_of(op, "dy", dy), a.dweight_dtype = float_dtype_of(op, "dweight", dweight);
  FASTGPT_CHECK(a.dweight_dtype == a.dtype || a.dweight_dtype == DType::f32, op, "dweight must be dy's dtype or fp32");
  a.dweight_row = writable_row_stride(op, "dweight", dweight);
  a.n_tokens = ids.numel(), a.n_rows = dweight.size(0), a.n_cols = dweight.size(1);
  FASTGPT_CHECK(dy.dim() >= 1 && dy.size(dy.dim() - 1) == a.n_cols && dy.numel() == a.n_tokens * a.n_cols, op,
                "dy has the wrong shape");
  check_device(op, "dy", dy, dweight);
  a.ids = indices_of(op, "ids", ids, dweight);
  if (dy.numel() == 0 || a.n_rows == 0) return;
  const Device device(dweight);
  const Rows dy_rows = rows_of(dy);
  a.dy = dy_rows.data(), a.dy_row = dy_rows.step;
  a.dweight = dweight.data_ptr();
  SortedTokens kept;
  if constexpr (!std::is_same_v<Device, Cpu>) kept = sort_tokens(device, a, dy);  // the CPU launcher sorts by itself
  embedding_bwd_add(a, device.stream);
}

template <class Device>
Tensor embedding_bwd(Tensor dy, Tensor ids, int64_t num_rows) {
  FASTGPT_CHECK(dy.dim() >= 1 && num_rows >= 0, "embedding_bwd", "dy must be (..., C), num_rows 0 or more");
  const Device device(dy);
  Tensor dweight = allocate(dy, {num_rows, dy.size(dy.dim() - 1)}, dy.scalar_type());
  torch::stable::zero_(dweight);
  embedding_bwd_add<Device>(dweight, dy, ids);
  return dweight;
}

}  // namespace
}  // namespace fastgpt

FASTGPT_REGISTER(embedding_fwd)
FASTGPT_REGISTER(embedding_bwd)
FASTGPT_REGISTER(embedding_bwd_add)
