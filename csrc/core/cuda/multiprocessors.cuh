// The number of multiprocessors of the device that is current.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastgpt::cuda {

// Throws std::runtime_error if CUDA does not report it.
inline int multiprocessors() {
  int device = 0, count = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fastgpt: number of multiprocessors: ") + cudaGetErrorString(error));
  }
  return count;
}

}  // namespace fastgpt::cuda
