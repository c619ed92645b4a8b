// The one way to launch a kernel, and the one way to declare dynamic shared memory.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>

#include "core/stream.h"

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

// Lets the kernel's launches have as much dynamic shared memory as a block of this device can have. Once, and never
// less: the limit is the kernel's, so that what one thread sets for a small launch would refuse another's large one.
inline cudaError_t allow_all_shared_memory(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<const void*, int>> done;  // kernel, device
  int device = 0, most = 0;
  cudaFuncAttributes of = {};
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (done.count({kernel, device}) > 0) return cudaSuccess;
  if (const cudaError_t error = cudaFuncGetAttributes(&of, kernel)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return error;
  }
  most -= static_cast<int>(of.sharedSizeBytes);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) done.insert({kernel, device});
  return error;
}

// `smem` is at most what a block of the device may have: 163 KB on sm_80, 227 on sm_90, 99 on sm_86 and sm_89. A launch
// that CUDA refuses throws std::runtime_error with the kernel's name.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, dim3 block, size_t smem, Stream stream,
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
  config.stream = static_cast<cudaStream_t>(stream.handle);
  cudaError_t error = cudaSuccess;
  // more than 48 KB, with the static shared memory, has to be asked for
  if (smem > 32 * 1024) error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that it is not reported twice
  // what a running kernel did is told by the next call, whoever makes it
  const bool ran = error >= cudaErrorIllegalAddress && error <= cudaErrorLaunchFailure;
  throw std::runtime_error(std::string("fastgpt: launching ") + name + ": " + cudaGetErrorString(error) +
                           (ran ? " (in this kernel or in one launched before it)" : ""));
}

}  // namespace fastgpt::cuda
