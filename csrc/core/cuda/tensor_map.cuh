// Tensor maps: what TMA knows of a tensor in global memory. tests/cuda_on_cpu replaces this file for the host.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastgpt::cuda {

using TensorMap = CUtensorMap;

// A tensor of 16-bit values, innermost dimension first. strides: bytes between neighbours in dimensions 1 to 3, multiples
// of 16. box: what one copy brings; its first side is at most 64 values.
struct TensorShape {
  const void* base;  // a multiple of 16
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box[4];
  bool is_bf16;
};

// Returns the function of the driver. The extension does not link libcuda, so it loads where there is no driver.
inline auto tensor_map_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    throw std::runtime_error("fastgpt: this driver has no cuTensorMapEncodeTiled, expected one for CUDA 12.0 or newer");
  }
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
}

// Throws std::runtime_error if the driver refuses the tensor. Copies swizzle within 128 bytes (descriptor.cuh).
inline TensorMap tensor_map(const TensorShape& s) {
  static const auto encode = tensor_map_encoder();
  TensorMap map{};
  const uint32_t steps[4] = {1, 1, 1, 1};
  const CUresult error = encode(
      &map, s.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, const_cast<void*>(s.base),
      s.sizes, s.strides, s.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS) {
    throw std::runtime_error("fastgpt: the driver refuses a tensor map (error " + std::to_string(error) + ")");
  }
  return map;
}

}  // namespace fastgpt::cuda
