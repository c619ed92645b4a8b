// All kernels are launched by `launch` and declare dynamic shared memory by FASTGPT_DYNAMIC_SHARED.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
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

// Blocks of a launch. 64 bits, so more than CUDA allows is an error rather than a wrapped number.
struct Grid {
  int64_t x, y = 1, z = 1;
};

// Allows launches of the kernel to use as much dynamic shared memory as a block of this device can have, and sets
// `most` to it. It does so once and always with the maximum: the limit belongs to the kernel, so a thread that set less
// for a small launch would make the large launch of another thread fail.
inline cudaError_t allow_all_shared_memory(const void* kernel, int& most) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> done;  // kernel, device -> most
  int device = 0;
  cudaFuncAttributes of = {};
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = done.find({kernel, device}); found != done.end()) return most = found->second, cudaSuccess;
  if (const cudaError_t error = cudaFuncGetAttributes(&of, kernel)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) {
    return error;
  }
  most -= static_cast<int>(of.sharedSizeBytes);
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) done[{kernel, device}] = most;
  return error;
}

// Returns how much dynamic shared memory a block of the kernel can have on this device. Throws std::runtime_error if
// CUDA does not report it.
inline int most_shared_memory(const void* kernel) {
  int most = 0;
  const cudaError_t error = allow_all_shared_memory(kernel, most);
  if (error == cudaSuccess) return most;
  throw std::runtime_error(std::string("fastgpt: shared memory of a block: ") + cudaGetErrorString(error));
}

// `smem` must fit the limit of the device for a block: 163 KB on sm_80, 227 on sm_90, 99 on sm_86 and sm_89. Throws
// std::runtime_error with the name of the kernel if CUDA refuses the launch.
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
  int most = 0;
  // more than 48 KB, including static shared memory, must be requested
  if (smem > 32 * 1024) error = allow_all_shared_memory(reinterpret_cast<const void*>(kernel), most);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear the error, or it would be reported twice
  // an error of a running kernel is reported by the next call, which may be this one
  const bool ran = error >= cudaErrorIllegalAddress && error <= cudaErrorLaunchFailure;
  throw std::runtime_error(std::string("fastgpt: launching ") + name + ": " + cudaGetErrorString(error) +
                           (ran ? " (in this kernel or in one launched before it)" : ""));
}

}  // namespace fastgpt::cuda
