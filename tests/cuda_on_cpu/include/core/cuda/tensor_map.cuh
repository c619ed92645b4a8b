// Host version of csrc/core/cuda/tensor_map.cuh: the tensor itself, refused where the driver refuses it.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

namespace fastgpt::cuda {

struct TensorShape {
  const void* base;
  uint64_t sizes[4];
  uint64_t strides[3];
  uint32_t box[4];
  bool is_bf16;
};

using TensorMap = TensorShape;

inline TensorMap tensor_map(const TensorShape& s) {
  bool valid = reinterpret_cast<uintptr_t>(s.base) % 16 == 0 && s.box[0] * 2 <= 128 && s.box[0] * 2 % 16 == 0;
  for (const uint64_t size : s.sizes) valid &= size >= 1 && size <= uint64_t{1} << 32;
  for (const uint64_t stride : s.strides) valid &= stride % 16 == 0 && stride < uint64_t{1} << 40;
  for (const uint32_t side : s.box) valid &= side >= 1 && side <= 256;
  if (!valid) throw std::runtime_error("fastgpt: the driver refuses a tensor map (error 1)");
  return s;
}

}  // namespace fastgpt::cuda
