// The one way to launch a kernel, and the one way to declare dynamic shared memory.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#if !defined(FASTGPT_DYNAMIC_SHARED)
#define FASTGPT_DYNAMIC_SHARED(type, name)                       \
  extern __shared__ __align__(128) unsigned char name##_bytes[]; \
  type* const name = reinterpret_cast<type*>(name##_bytes)
#endif

namespace fastgpt::cuda {

// `smem` is at most what a block of the device may have: 163 KB on sm_80, 227 on sm_90, 99 on sm_86 and sm_89. A launch
// that CUDA refuses throws std::runtime_error with the kernel's name.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t smem, void* stream,
            const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
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
