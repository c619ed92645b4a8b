// Allocates outputs and workspaces.
#pragma once
#if defined(__linux__)
#include <sys/mman.h>
#endif
#include <cstdint>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "glue/check.h"

namespace fastgpt {

// Asks Linux for huge pages for a large new tensor on the CPU, which gets fresh memory from the system each time; see
// in_huge_pages in fastgpt/core/device.py.
inline void ask_for_huge_pages(const Tensor& t) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21, kHugeFrom = uintptr_t{1} << 25;
  const uintptr_t bytes = static_cast<uintptr_t>(t.numel()) * t.element_size();
  if (t.is_cuda() || bytes < kHugeFrom) return;
  const uintptr_t first = reinterpret_cast<uintptr_t>(t.data_ptr());
  const uintptr_t start = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);  // a request: without huge pages nothing changes
#endif
}

// Returns an uninitialised contiguous tensor on the device of `like`.
inline Tensor allocate(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1;
  for (size_t d = sizes.size(); d-- > 0; step *= sizes[d] > 0 ? sizes[d] : 1) strides[d] = step;
  const int32_t code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  const int32_t device = like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                         strides.data(), code, device, like.get_device_index(),
                                                         &handle));
  const Tensor t(handle);
  ask_for_huge_pages(t);
  return t;
}

inline Tensor allocate_like(const Tensor& like) {
  const auto sizes = like.sizes();
  return allocate(like, std::vector<int64_t>(sizes.begin(), sizes.end()), like.scalar_type());
}

// Returns a tensor for the gradient of a parameter over n_rows rows, set to 0 if n_rows is 0.
inline OptTensor allocate_grad(const OptTensor& parameter, int64_t n_rows) {
  if (!parameter) return std::nullopt;
  Tensor grad = allocate_like(*parameter);
  if (n_rows == 0) torch::stable::zero_(grad);
  return grad;
}

}  // namespace fastgpt
