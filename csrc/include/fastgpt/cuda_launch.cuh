// The one way to launch a kernel, and the one way to declare dynamic shared memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#if !defined(FASTGPT_DYNAMIC_SHARED)
#define FASTGPT_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(128) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace fastgpt::cuda {

// Blocks of a launch. 64 bits, so that more than CUDA takes is an error and not another number.
struct Grid {
  int64_t x, y = 1, z = 1;
};

// `smem` is at most what a block of the device may have: 163 KB on sm_80, 227 on sm_90, 99 on sm_86 and sm_89. A launch
// that CUDA refuses throws std::runtime_error with the kernel's name.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t smem, void* stream,
            const Arguments&... arguments) {
  if (grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535) {
    throw std::runtime_error(std::string("fastgpt: launching ") + name + ": a grid of " + std::to_string(grid.x) + " x " +
                             std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                             " blocks, CUDA takes 2^31 - 1 x 65535 x 65535: the tensor is too large for one call");
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = block;
  config.dynamicSmemBytes = smem;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (smem > 32 * 1024) {  // more than 48 KB, with the static shared memory, has to be asked for
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(smem));
  }
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that it is not reported twice
  throw std::runtime_error(std::string("fastgpt: launching ") + name + ": " + cudaGetErrorString(error));
}

}  // namespace fastgpt::cuda
