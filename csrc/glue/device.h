// The devices of raw ops. A device is constructed from a tensor and kept during the launches; `stream` is passed to the
// launchers.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include "core/stream.h"

#if defined(FASTGPT_WITH_CUDA) && !defined(FASTGPT_EMULATED)
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

// Defined in libtorch_cuda, which a CPU-only torch lacks. The weak symbol lets one binary load on both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace fastgpt {

struct Cpu {
  cpu::Stream stream;

  explicit Cpu(const torch::stable::Tensor&) {}
};

#if defined(FASTGPT_EMULATED)
struct Cuda {  // tests/cuda_on_cpu: launches run on the host and return when they are done
  cuda::Stream stream;

  explicit Cuda(const torch::stable::Tensor&) {}
};
#elif defined(FASTGPT_WITH_CUDA)
inline void* current_stream(int32_t device) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                  "fastgpt: aoti_torch_get_current_cuda_stream was not found: this torch has no CUDA support, or its "
                  "libtorch_cuda is not what libtorch loads");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return stream;
}

// Makes the device of the tensor current during its lifetime; `stream` is the current stream of PyTorch on it.
struct Cuda {
  torch::stable::accelerator::DeviceGuard guard;
  cuda::Stream stream;

  explicit Cuda(const torch::stable::Tensor& t)
      : guard(t.get_device_index()), stream{current_stream(t.get_device_index())} {}
};
#endif

}  // namespace fastgpt
