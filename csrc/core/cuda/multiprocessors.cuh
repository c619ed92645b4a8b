// Multiprocessors of the device that is current: how many, and how much shared memory each has.
//
// Kernels that sum over rows have one wave of blocks, and each block sums its own rows. Their results are therefore
// reproducible bit by bit on GPUs with the same number of multiprocessors, not between different ones. The queries are
// quick, and allowed while a CUDA graph is captured.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fastgpt::cuda {

// Throws std::runtime_error if CUDA does not report it; so do the functions below.
inline int device_attribute(cudaDeviceAttr attribute, const char* what) {
  int device = 0, value = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fastgpt: ") + what + ": " + cudaGetErrorString(error));
  }
  return value;
}

inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount, "number of multiprocessors"); }

// Returns the bytes that the blocks on a multiprocessor share: what one block can have and the 1 KB that is reserved
// for it.
inline int shared_memory() {
  return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "shared memory of a block") + 1024;
}

}  // namespace fastgpt::cuda
