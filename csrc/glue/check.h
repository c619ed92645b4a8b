// Checks of dtype, shape, device and layout before the glue passes on raw pointers. Python has already raised readable
// errors; these checks only repeat what would corrupt memory.
#pragma once
#include <optional>
#include <vector>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "core/dtype.h"

namespace fastgpt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

#define FASTGPT_CHECK(condition, op, ...) STD_TORCH_CHECK(condition, op, ": ", __VA_ARGS__)

inline DType dtype_of(const char* op, const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Short: return DType::i16;
    default: FASTGPT_CHECK(false, op, name, " must be float32, bfloat16 or float16");
  }
  return DType::f32;
}

inline DType float_dtype_of(const char* op, const char* name, const Tensor& t) {
  const DType dtype = dtype_of(op, name, t);
  FASTGPT_CHECK(dtype != DType::i16, op, name, " must be float32, bfloat16 or float16");
  return dtype;
}

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  FASTGPT_CHECK(t.is_cuda() == like.is_cuda() && t.get_device_index() == like.get_device_index(), op, name,
                " must be on the other tensors' device");
}

// Checks that t is contiguous, of this dtype and number of elements, and on the device of `like`.
inline void check_flat(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t numel,
                       const Tensor& like) {
  FASTGPT_CHECK(t.scalar_type() == dtype, op, name, " has the wrong dtype");
  FASTGPT_CHECK(t.numel() == numel, op, name, " has ", t.numel(), " elements, expected ", numel);
  FASTGPT_CHECK(t.is_contiguous(), op, name, " must be contiguous");
  check_device(op, name, t, like);
}

inline void check_same_shape(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == like.size(d);
  FASTGPT_CHECK(same, op, name, " has the wrong shape");
  FASTGPT_CHECK(t.scalar_type() == like.scalar_type(), op, name, " has the wrong dtype");
  check_device(op, name, t, like);
}

inline void* data_or_null(const OptTensor& t) { return t ? t->data_ptr() : nullptr; }

// Returns whether t fills its memory without gaps or overlap (contiguous, or a permutation of it).
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  int64_t filled = 1, left = 0;
  for (int64_t d = 0; d < t.dim(); ++d) left += t.size(d) != 1;
  for (bool found = true; found && left > 0;) {
    found = false;
    for (int64_t d = 0; d < t.dim() && !found; ++d) {
      if (t.size(d) == 1 || t.stride(d) != filled) continue;
      filled *= t.size(d);
      --left;
      found = true;
    }
  }
  return left == 0;
}

// Checks that t has the shape and strides of `like`.
inline void check_same_layout(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  bool same = t.dim() == like.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) {
    same = t.size(d) == like.size(d) && (t.size(d) == 1 || t.stride(d) == like.stride(d));
  }
  FASTGPT_CHECK(same, op, name, " must have the shape and strides of its parameter");
  check_device(op, name, t, like);
}

}  // namespace fastgpt
